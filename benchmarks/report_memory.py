"""Peak memory and seconds of `mm report` on a folder, in a process of its own.

python benchmarks/report_memory.py $MM_DATA/dicom/LIDC-IDRI-0001
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    directory = parser.parse_args().directory
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "mm", "report", directory, "-o", out], check=False)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # kilobytes on Linux
    print(json.dumps({"exit code": done.returncode, "peak GB": round(peak, 2), "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
