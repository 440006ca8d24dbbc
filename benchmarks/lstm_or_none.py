"""Does the LSTM over the visits earn its place? The history head with it, without it, and with nothing else.

python benchmarks/lstm_or_none.py [--checkpoint default] [--patients 1800] [--val-patients 250] [--json FILE]

Encoders, pyramid and maps stay as the checkpoint has them; what the history head reads of each patient with a prior is
made once. Only history heads learn, from fresh weights, all from the same batches in the same order. Judged on
validation patients: balanced accuracy of the change class, a forced choice. The test split is never looked at.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import mm
from mm import ontology
from mm.batch import Batch
from mm.data.collate import collate
from mm.evaluation.balanced import balanced_accuracy
from mm.finding_maps import Maps
from mm.history import FOLLOWED, HistoryHead, nearby
from mm.phantom.dataset import PhantomDataset, patient_seed
from mm.phantom.patient import draw_patient
from mm.training.checkpoint import Loaded
from mm.training.optim import adamw, warmup_cosine

Row = Literal["comparison and LSTM", "comparison alone", "LSTM alone"]
ROWS: Final[tuple[Row, ...]] = ("comparison and LSTM", "comparison alone", "LSTM alone")
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, WARMUP = 500, 64, 2e-3, 0.05, 30
CHANGES: Final = [ontology.CHANGES.index(name) for name in ontology.CHANGES if name != "unknown"]
STAYING: Final = [index for index in CHANGES if ontology.CHANGES[index] != "resolved"]


@dataclass(frozen=True)
class Read:
    """What a history head reads of studies with a prior: visits are current and last; `compared` is its input."""

    evidence: Tensor
    days: Tensor
    compared: Tensor
    change: Tensor

    def __len__(self) -> int:
        return len(self.change)

    def rows(self, index: Tensor) -> "Read":
        return Read(self.evidence[index], self.days[index], self.compared[index], self.change[index])


def compared(maps: Maps) -> Tensor:
    """The comparison's input of one study without the findings' names, as `HistoryHead.forward` makes it."""
    order = torch.tensor([int((maps.visit == visit).nonzero()[0]) for visit in (0, 1)])
    logits, summary = maps.presence[order, :, 0], maps.summary[order]
    near = nearby(maps, order[None])[0]
    return torch.cat([near, summary[0], summary[0] - summary[1], logits.T], dim=-1)


def read(loaded: Loaded, *, patients: int, seed: int, split: Literal["train", "val"]) -> Read:
    """Renders and encodes every patient whose current visit has a change against a prior."""
    data = PhantomDataset(studies=patients, seed=seed, split=split, inputs=("volume",))
    parts: list[Read] = []
    for index in range(patients):
        patient = draw_patient(patient_seed(seed, index))
        if len(patient.visits) < 2 or all(item.change == "unknown" for item in patient.findings):
            continue
        batch: Batch = collate([data[index]], None)
        assert batch.volumes is not None
        assert batch.targets is not None
        with torch.inference_mode():
            maps = loaded.model.encode(batch).volume
            assert maps is not None
            order = maps.visit.argsort()
            one = Read(maps.evidence[order][None], batch.volumes.days, compared(maps)[None], batch.targets.change)
        parts.append(one)
        if len(parts) % 50 == 0:
            print(f"{split}: {len(parts)} studies of {index + 1} patients", flush=True)
    names = ("evidence", "days", "compared", "change")
    return Read(*(torch.cat([getattr(part, name) for part in parts]).clone() for name in names))


def said(head: HistoryHead, studies: Read, row: Row) -> Tensor:
    """Logits of the changes but "unknown"."""
    result = torch.zeros(*studies.change.shape, len(CHANGES))
    if row != "LSTM alone":
        name = head.name.weight.expand(len(studies), -1, -1)
        result = result + head.compare(torch.cat([studies.compared, name], dim=-1))
    if row != "comparison alone":
        count = torch.full((len(studies),), 2)
        result = result + head.course(head.lstm(studies.evidence, count=count, days=studies.days))
    return result


def train(head: HistoryHead, studies: Read, row: Row, *, seed: int) -> None:
    """`STEPS` steps of cross-entropy over the findings that have a change."""
    optimizer, draws = adamw(head, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY), torch.Generator()
    draws.manual_seed(seed)
    for step in range(STEPS):
        batch = studies.rows(torch.randint(len(studies), (BATCH,), generator=draws))
        learnt = (batch.change > 0) & torch.tensor(FOLLOWED)
        loss = F.cross_entropy(said(head, batch, row)[learnt], batch.change[learnt] - 1)
        factor = warmup_cosine(step=step, warmup_steps=WARMUP, done=step / STEPS)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def judge(head: HistoryHead, studies: Read, row: Row) -> dict[str, Any]:
    """Balanced accuracy of five and of four classes, and of nodules and the other findings in five."""
    logits, true = said(head.eval(), studies, row), studies.change
    nodule = torch.zeros_like(true, dtype=torch.bool)
    nodule[:, ontology.INDEX["nodule"]] = True

    def score(classes: list[int], of: Tensor) -> float:
        kept = torch.isin(true, torch.tensor(classes)) & of
        chosen = torch.tensor(classes)[logits[..., [index - 1 for index in classes]].argmax(-1)]
        return balanced_accuracy(chosen[kept].numpy(), true[kept].numpy()).value

    every = torch.ones_like(nodule)
    return {
        "5 classes": score(CHANGES, every),
        "4 classes": score(STAYING, every),
        "nodules": score(CHANGES, nodule),
        "others": score(CHANGES, ~nodule),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="default")
    parser.add_argument("--patients", type=int, default=1800)
    parser.add_argument("--val-patients", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    loaded = mm.load(options.checkpoint)
    assert loaded.model.findings is not None
    shape = loaded.model.findings.width, loaded.model.findings.history_width
    started = time.process_time()
    studies = read(loaded, patients=options.patients, seed=1, split="train")
    known = read(loaded, patients=options.val_patients, seed=2, split="val")
    seconds = {"features": time.process_time() - started}
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in ROWS:
        started = time.process_time()
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            head = HistoryHead(*shape)
            train(head, studies, row, seed=seed)
            rows.setdefault(row, []).append(judge(head, known, row))
        seconds[row] = (time.process_time() - started) / options.seeds
    changes = {"train": int((studies.change > 0).sum()), "val": int((known.change > 0).sum())}
    result = {
        "checkpoint": str(loaded.identity),
        "patients": [options.patients, options.val_patients],
        "changes": changes,
        "steps": STEPS,
        "rows": rows,
        "process_seconds": seconds,
    }
    text = json.dumps(result, indent=1)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(f"{changes['train']} changes to learn from, {changes['val']} to judge by; {seconds}")
    print("| row | " + " | ".join(rows[ROWS[0]][0]) + " |\n|" + " --- |" * 5)
    for row, found in rows.items():
        cells = []
        for name in found[0]:
            values = [item[name] for item in found]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
