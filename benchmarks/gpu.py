"""The figures that need a GPU, unattended: packed prefill, decoding steps, mixture of experts, training steps.

python benchmarks/gpu.py [--minutes 8] [--json gpu.json] [--markdown gpu.md]     (needs transformers and a CUDA device)

Results are asserted equal before anything is timed: in fp32, or in bfloat16 within its tolerance of fp32. Times are
medians of CUDA events, sides measured in turns. Each section runs in a process of its own, with its share of the
minutes, and writes each row as soon as it has it; what fails or isn't reached is named with its reason, the others go
on. `--device cpu --tiny` walks through all of it on a machine without a GPU; its figures mean nothing.
"""

import argparse
import importlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from on_gpu.bench import Bench, last_line, peak_of

SHARES = {"prefill": 0.2, "decode": 0.3, "moe": 0.15, "mfu": 0.2}
"""Of the minutes; the rest is for starting processes and for what began just before its deadline."""


def machine(device: torch.device) -> dict[str, object]:
    """What the figures were measured on."""
    found: dict[str, object] = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("xformers", "transformers", "triton"):
        try:
            found[name] = importlib.import_module(name).__version__
        except ImportError as error:
            found[name] = f"missing: {error}"
    if device.type == "cuda":
        part = torch.cuda.get_device_properties(device)
        found |= {
            "device": part.name,
            "capability": f"{part.major}.{part.minor}",
            "memory_gib": part.total_memory >> 30,
        }
        found["cuda"] = torch.version.cuda
    else:
        found |= {"device": "CPU", "note": "walked through on a CPU: the figures mean nothing"}
    return found


def section(name: str, bench: Bench) -> None:
    """Runs one section here; what fails outside of its cases is a row too."""
    print(f"{name}:", flush=True)
    try:
        importlib.import_module(f"on_gpu.{name}").run(bench)
    except Exception as error:  # noqa: BLE001
        bench.row(name, "the whole section", not_measured=last_line(error))


def apart(name: str, options: argparse.Namespace, seconds: float) -> list[dict[str, Any]]:
    """Runs one section in its own process and gives the rows that it came to."""
    with tempfile.TemporaryDirectory() as scratch:
        lines = Path(scratch) / "rows"
        command = [sys.executable, __file__, "--section", name, "--lines", str(lines), "--seconds", str(seconds)]
        command += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
        command += [] if options.peak_tflops is None else ["--peak-tflops", str(options.peak_tflops)]
        try:
            code: int | str = subprocess.run(command, check=False, timeout=1.1 * seconds + 5).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {1.1 * seconds + 5:.0f} s"
        rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] if lines.exists() else []
    if code != 0:
        rows.append({"section": name, "case": "the rest of the section", "not_measured": f"its process ended: {code}"})
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The rows as tables, one a section, to be pasted into docs/results.md."""
    about = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    text = f"`python benchmarks/gpu.py`, {result['date']}: {about}.\n"
    for title in dict.fromkeys(row["section"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["section"] == title]
        names = list(dict.fromkeys(name for row in rows for name in row if name not in ("section", "case")))
        header = [title, *(name.replace("_", " ") for name in names)]
        lines = [header, ["---"] * len(header)]
        lines += [[row["case"], *(str(row.get(name, "")).replace("|", "/") for name in names)] for row in rows]
        text += "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    return text


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, and returns what it wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: does it run at all?")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--peak-tflops", type=float, help="of the device in dense bfloat16, where its name is unknown")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--apart", action="store_true", help="each section in its own process; on CUDA it always is")
    parser.add_argument("--section", choices=SHARES, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is at hand; --device cpu --tiny walks through on a CPU")
    if device.type == "cpu" and not options.tiny:
        parser.error("on a CPU only --tiny makes sense")
    peak = options.peak_tflops
    if peak is None and device.type == "cuda":
        peak = peak_of(torch.cuda.get_device_name(device))

    def bench(seconds: float) -> Bench:
        return Bench(device, options.tiny, time.monotonic() + seconds, peak, options.lines)

    if options.section is not None:
        part = bench(options.seconds)
        section(options.section, part)
        return {"rows": part.rows}
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(device),
        "peak_tflops": peak,
        "rows": [],
    }
    if device.type == "cpu":
        torch.set_num_threads(1)
        print("On a CPU: this shows that the script runs. Its figures mean nothing.")
    start = time.monotonic()
    for name, share in SHARES.items():
        seconds = 60 * options.minutes * share
        if device.type == "cuda" or options.apart:
            result["rows"] += apart(name, options, seconds)
        else:
            part = bench(seconds)
            section(name, part)
            result["rows"] += part.rows
        result["seconds"] = round(time.monotonic() - start, 1)
        if options.json is not None:  # after every section: whoever stops the script keeps what there is
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = markdown(result)
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
