"""CT volumes a second: in memory as training samples (2 loader processes), and to disk (2 workers).

python benchmarks/phantom_speed.py
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from mm.phantom.dataset import PhantomDataset
from mm.phantom.write import write_studies

STUDIES = 120
ON_DISK = 40


def volumes(samples: list) -> int:
    return sum(len(sample.volumes) for sample in samples)


def in_memory(inputs: tuple) -> float:
    data = PhantomDataset(studies=STUDIES, seed=99, split="train", priors=1, inputs=inputs)
    loader = iter(DataLoader(data, batch_size=4, num_workers=2, collate_fn=volumes))
    next(loader)  # the processes are up
    start, made = time.perf_counter(), 0
    for count in loader:
        made += count
    return made / (time.perf_counter() - start)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    alone, whole = in_memory(("volume",)), in_memory(("volume", "image", "audio", "record"))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_studies(Path(folder), studies=ON_DISK, seed=99, workers=2)
        seconds = time.perf_counter() - start
        made = sum(1 for study in (Path(folder) / "studies").iterdir() if any(study.glob("ct_*.dcm")))
    result = {
        "in memory, CT volumes/s": round(alone, 1),
        "in memory, CT volumes/s with X-ray, sounds and record": round(whole, 1),
        "to disk, CT volumes/s (start of the processes included)": round(made / seconds, 1),
        "machine": platform.processor() or platform.machine(),
        "processes": 2,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
