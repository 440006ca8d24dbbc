"""The GPU benchmark runs to its end without a GPU; what its figures say is another matter."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_all_sections_measure_everything_but_what_needs_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import gpu

    result = gpu.main(
        ["--device", "cpu", "--tiny", "--json", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "md")]
    )
    rows = result["rows"]
    assert not [row for row in rows if "not_measured" in row]
    assert {row["section"] for row in rows} == {
        "packed attention",
        "packed prefill, whole model",
        "decode step",
        "MoE block",
        "training step",
    }
    steps = [row for row in rows if row["section"] == "decode step" and "floor_ms" in row]
    assert all(row["graph"] == "not measured: RuntimeError: CUDA graphs need CUDA" for row in steps)
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == rows
    assert all(row["case"] in (tmp_path / "md").read_text() for row in rows)


def test_what_fails_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import time

    import torch
    from on_gpu.bench import Bench, assert_near, peak_of

    bench = Bench(torch.device("cpu"), tiny=True, deadline=time.monotonic() + 60)
    bench.attempt("a", "one", lambda: assert_near(torch.ones(3), torch.zeros(3), within=0.1, what="ones and zeros"))
    bench.attempt("a", "two", lambda: bench.row("a", "two", ms=1.0))
    bench.deadline = 0.0
    bench.attempt("a", "three", lambda: bench.row("a", "three", ms=1.0))
    reasons = [str(row.get("not_measured")) for row in bench.rows]
    assert reasons[0].startswith("AssertionError: ones and zeros differ by")
    assert reasons[1] == "None"
    assert "used up" in reasons[2]
    assert peak_of("NVIDIA H200") == 989.5
    assert peak_of("NVIDIA something new") is None
