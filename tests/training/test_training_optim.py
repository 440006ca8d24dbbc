import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mm.training.optim import parameter_groups, warmup_cosine
from mm.training.resume import AtomicCheckpointIO
from mm.training.scores import area_under_curve, best_f1, finding_scores, table


def test_only_matrices_decay_and_nothing_is_lost() -> None:
    module = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2), nn.LayerNorm(2))
    decayed, kept = parameter_groups(module, weight_decay=0.1)
    assert [tuple(item.shape) for item in decayed["params"]] == [(2, 3)]  # type: ignore[attr-defined]
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    found = {id(item) for group in (decayed, kept) for item in group["params"]}  # type: ignore[attr-defined]
    assert found == {id(item) for item in module.parameters()}
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(module.requires_grad_(requires_grad=False), weight_decay=0.1)


def test_the_rate_rises_then_falls() -> None:
    warm = [warmup_cosine(step=step, warmup_steps=10, done=0.0) for step in range(12)]
    assert warm == sorted(warm)
    assert warm[9] == warm[11] == 1.0
    late = [warmup_cosine(step=1000, warmup_steps=10, done=done / 10) for done in range(11)]
    assert late == sorted(late, reverse=True)
    assert math.isclose(late[-1], 0.01)


def test_area_under_curve_and_f1_of_known_cases() -> None:
    labels = torch.tensor([True, True, False, False])
    assert area_under_curve(torch.tensor([4.0, 3.0, 2.0, 1.0]), labels) == 1.0
    assert area_under_curve(torch.tensor([1.0, 2.0, 3.0, 4.0]), labels) == 0.0
    assert area_under_curve(torch.ones(4), labels) == 0.5
    assert best_f1(torch.ones(4), labels) == pytest.approx(2 / 3)  # all positive is the only threshold
    assert best_f1(torch.tensor([4.0, 3.0, 2.0, 1.0]), labels) == 1.0
    assert area_under_curve(torch.ones(2), torch.tensor([True, True])) is None
    assert best_f1(torch.ones(2), torch.tensor([False, False])) is None


def test_scores_agree_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(80, 11, generator=generator)
    labels = torch.rand(80, 11, generator=generator) < 0.3
    scores = finding_scores(logits, labels)
    assert scores["auroc_nodule"] == pytest.approx(metrics.roc_auc_score(labels[:, 0], logits[:, 0]))
    precision, recall, _ = metrics.precision_recall_curve(labels[:, 0], logits[:, 0])
    f1 = max(2 * p * r / max(p + r, 1e-9) for p, r in zip(precision, recall, strict=True))
    assert scores["f1_nodule"] == pytest.approx(f1)
    assert "nodule" in table(scores)


def test_a_checkpoint_that_fails_leaves_the_last_one(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"step": 1, "weights": torch.ones(3)}, path)
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        io.save_checkpoint({"broken": (item for item in ())}, path)
    assert io.load_checkpoint(path)["step"] == 1
    io.save_checkpoint({"step": 2}, path)
    assert io.load_checkpoint(path)["step"] == 2
    io.remove_checkpoint(path)
    assert not path.exists()
