"""Contrastive losses of batches that hold any mix of pairs, and the align stage on data of one modality."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import yaml
from open_clip.loss import ClipLoss, SigLipLoss

import mm
from mm.batch import SLOT_KINDS, Batch, BySource, Padded, Slots, Tokens, Writing
from mm.encoded import Encoded
from mm.fusion.alignment import CrossModalAlignment
from mm.model import MultimodalModel
from mm.training.align import AlignTask, recalls
from mm.training.cli import TrainingCLI, main
from mm.training.pairs import PairLosses, PairWeights, Partners, first_answers
from mm.training.task import Task

quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

B, E = 6, 5
HAS = {  # a mix: studies 0 and 1 volume and image, 2 image, 3 sound, 4 only a text, 5 volume without one
    "volume": [1, 1, 0, 0, 0, 1],
    "image": [1, 1, 1, 0, 0, 0],
    "audio": [0, 0, 0, 1, 0, 0],
}
TEXT = [1, 1, 1, 1, 1, 0]


def model() -> MultimodalModel:
    return MultimodalModel(fusion=CrossModalAlignment(8, heads=2), temperature=0.1)


def vectors(seed: int, there: list[int]) -> torch.Tensor:
    values = torch.randn(B, E, generator=torch.Generator().manual_seed(seed))
    return (F.normalize(values, dim=-1) * torch.tensor(there)[:, None]).requires_grad_()


def mixed() -> tuple[Encoded, Partners, torch.Tensor]:
    embeddings = {source: vectors(seed, there) for seed, (source, there) in enumerate(HAS.items())}
    encoded = Encoded(B, BySource(), BySource(), embeddings=BySource(**embeddings))
    ids = Padded.of([[number] * there for number, there in enumerate(TEXT)])
    return encoded, Partners(ids, torch.tensor(TEXT) > 0, None), vectors(9, [1] * B)


@pytest.mark.parametrize("loss", ["info_nce", "siglip"])
def test_each_pair_that_is_there_counts_over_its_own_rows(loss: Any) -> None:
    encoded, partners, text = mixed()
    weights = PairWeights(volume=1.0, image=2.0, audio=3.0, record=4.0, volume_image=5.0)
    made, pairs = model(), PairLosses(loss=loss, weights=weights)
    found = pairs(made, encoded, partners, text)
    scale = made.logit_scale()
    seen = dict(encoded.embeddings.items()) | {"text": text}
    has = HAS | {"text": TEXT}
    expected = {}
    for name, first, second in (
        ("volume_text", "volume", "text"),
        ("image_text", "image", "text"),
        ("audio_text", "audio", "text"),
        ("volume_image", "volume", "image"),
    ):
        rows = [row for row in range(B) if has[first][row] and has[second][row]]
        one, other = seen[first][rows], seen[second][rows]
        weight = getattr(weights, name.removesuffix("_text"))
        theirs = ClipLoss()(one, other, scale) if pairs.bias is None else SigLipLoss()(one, other, scale, pairs.bias())
        expected[name] = weight * theirs.item()
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, abs=1e-5)
    # What has no partner says nothing: neither the text without an input nor the volume without a text but with none.
    gradients = torch.autograd.grad(sum(found.values()), [text, *encoded.embeddings.__dict__.values()][:2])
    assert torch.equal(gradients[0][4:], torch.zeros(2, E))
    assert torch.equal(gradients[1][5], torch.zeros(E))


def test_a_pair_of_no_weight_is_left_away() -> None:
    encoded, partners, text = mixed()
    weights = PairWeights(volume=0.0, audio=0.0, volume_image=0.0)
    assert PairLosses(weights=weights)(model(), encoded, partners, text).keys() == {"image_text"}
    with pytest.raises(ValueError, match=r"weights\.audio must be at least 0, got -1"):
        PairWeights(audio=-1.0)


def test_the_defaults_are_those_of_the_phantoms() -> None:
    assert vars(PairWeights()) == {"volume": 1.0, "image": 0.5, "audio": 0.1, "record": 0.1, "volume_image": 0.25}


def test_equal_texts_are_told_from_the_batch() -> None:
    batch = Batch(3, text=Padded.of([[5, 6], [7], [5, 6]]))
    assert PairLosses(duplicates="negatives").partners(batch).same is None
    same = PairLosses().partners(batch).same
    assert same is not None
    assert same[0] == same[2] != same[1]


def test_without_a_pair_there_is_a_loss_of_nothing_that_can_be_learnt_from() -> None:
    encoded, partners, text = mixed()
    alone = replace(encoded, embeddings=BySource(audio=encoded.embeddings.audio))
    nothing = replace(partners, valid=torch.zeros(B, dtype=torch.bool))
    made = model()
    found = PairLosses()(made, alone, nothing, text)
    assert {name: value.item() for name, value in found.items()} == {"no_pair": 0.0}
    found["no_pair"].backward()
    assert made.logit_scale.log_scale.grad == 0
    # A text, but of no study that has an input: a pair by name, without a row.
    apart = replace(partners, valid=torch.tensor([0, 0, 0, 0, 1, 0]) > 0)
    assert PairLosses()(made, alone, apart, text)["audio_text"] == 0


def test_a_question_and_its_answer_stand_in_for_a_report() -> None:
    kind = torch.tensor([SLOT_KINDS.index(name) for name in ("impression", "answer", "answer", "answer")])
    none = torch.zeros(4, dtype=torch.long)
    slots = Slots(kind, none, none, none, none)
    prompt = Padded.of([[2, 4], [2, 4, 30, 31, 5], [2, 4, 40, 5], [2, 4, 50, 5]])
    target = Padded.of([[20, 1], [32, 1], [41, 1], [51, 52, 1]])
    writing = Writing(torch.tensor([0, 0, 0, 2]), slots, prompt, target)
    found = first_answers(Batch(3, writing=writing))
    assert found.lengths.tolist() == [4, 0, 4]
    assert found.values.tolist() == [[30, 31, 32, 1], [0, 0, 0, 0], [50, 51, 52, 1]]
    assert first_answers(Batch(2)).lengths.tolist() == [0, 0]


def test_recall_is_of_the_studies_that_have_both() -> None:
    own = torch.eye(4)[[0, 2, 1, 3]]
    found = recalls(own, torch.eye(4), torch.tensor([True, True, True, False]))
    assert found["recall@1"] == pytest.approx(1 / 3)
    assert found["recall@5"] == 1.0


def test_equal_texts_are_no_wrong_partners_of_the_matching_loss() -> None:
    torch.manual_seed(0)
    fusion = CrossModalAlignment(8, heads=2)
    tokens = Tokens(torch.randn(4, 3, 8), torch.ones(4, 3, dtype=torch.bool))
    drawn = []
    fusion.match = lambda first, second: drawn.append((first, second)) or torch.zeros(len(first.values))
    same = torch.tensor([0, 0, 0, 1])
    for _ in range(20):
        fusion.matching_loss(tokens, tokens, similarity=torch.zeros(4, 4), same=same[:, None] == same)
    for first, second in drawn:
        place = [[int((tokens.values == row).flatten(1).all(1).nonzero()) for row in x.values] for x in (first, second)]
        wrong = list(zip(*place, strict=True))[4:]
        assert len(wrong) == 8
        assert all(same[one] != same[other] for one, other in wrong)
    alike = torch.ones(4, 4, dtype=torch.bool)
    fusion.matching_loss(tokens, tokens, similarity=torch.zeros(4, 4), same=alike)
    assert len(drawn[-1][0].values) == 4  # nobody to be taken for another: pairs only


def siglip(recipe: dict[str, Any]) -> None:
    recipe["model"]["init_args"] |= {"loss": "siglip", "weights": {"image": 1.0}}


def unfrozen(recipe: dict[str, Any]) -> None:
    recipe["model"]["init_args"] |= {"unfreeze": ["image.network.blocks.1"], "layer_decay": 0.5}


def uncached(recipe: dict[str, Any]) -> None:
    recipe["model"]["init_args"]["cache"] = None


@quiet
@pytest.mark.parametrize("change", [siglip, unfrozen, uncached])
def test_pictures_and_captions_are_enough(change: Any, aligning: Any, tmp_path: Path) -> None:
    words = aligning("run", change)
    before = TrainingCLI.make(["fit", "--config", words[1]]).model
    assert main(["fit", *words]) == 0
    log = next((tmp_path / "run/log").rglob("metrics.csv")).read_text()
    for name in ("loss_image_text", "loss_matching", "val_loss_image_text", "val_image_recall@5"):
        assert name in log
    assert (tmp_path / "cache").exists() == (change is siglip)
    after = mm.load(tmp_path / "run/checkpoint").model.state_dict()
    start = before.model.state_dict()
    moved = {name for name, value in after.items() if not torch.allclose(value, start[name], rtol=2**-8, atol=1e-6)}
    assert any(name.startswith("image_projection") for name in moved)
    towers = {name for name in moved if name.startswith("image.")}
    assert all(name.startswith("image.network.blocks.1.") for name in towers)
    assert bool(towers) == (change is unfrozen)
    assert not any("running" in name for name in moved)  # of a frozen batch norm


@quiet
def test_questions_are_enough(aligning: Any, tmp_path: Path) -> None:
    words = aligning()
    (tmp_path / "spec.yaml").write_text((tmp_path / "spec.yaml").read_text() + "prompt: {column: question}\n")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    rows = [row | {"question": "what is it?", "captions": row["captions"][0]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["fit", *words]) == 0
    assert "loss_image_text" in next((tmp_path / "run/log").rglob("metrics.csv")).read_text()


@quiet
def test_without_any_text_there_is_nothing_to_align(
    aligning: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = aligning("run", lambda recipe: recipe["data"].update(rows=["report"]))
    (tmp_path / "spec.yaml").write_text((tmp_path / "spec.yaml").read_text() + "prompt: {column: captions}\n")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    rows = [row | {"captions": row["captions"][0]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["fit", *words]) == 2
    assert "the align stage needs a data set with reports or captions" in capsys.readouterr().err


@quiet
def test_sounds_and_words_are_enough(aligning: Any, tmp_path: Path) -> None:
    def sounds(recipe: dict[str, Any]) -> None:
        parts = recipe["model"]["init_args"]["model"]["init_args"]
        del parts["image"]
        parts["audio"] = {
            "class_path": "mm.encoders.wav2vec.Wav2VecEncoder",
            "init_args": {"width": 32, "depth": 1, "heads": 2, "hidden": 32},
        }

    words = aligning("run", sounds)
    generator = np.random.default_rng(0)
    rows = []
    for number in range(10):
        soundfile.write(tmp_path / f"{number}.wav", generator.uniform(-0.5, 0.5, 2400), 8000)
        split = "train" if number < 6 else "val"
        rows.append({"sound": f"{number}.wav", "word": ["one", "two"][number % 2], "split": split})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = yaml.safe_load((tmp_path / "spec.yaml").read_text())
    del spec["image"]
    spec |= {"audio": {"column": "sound", "rate": 8000}, "target": {"column": "word"}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert main(["fit", *words]) == 0
    log = next((tmp_path / "run/log").rglob("metrics.csv")).read_text()
    assert "loss_audio_text" in log
    assert "loss_matching" in log
    assert "val_audio_recall@1" in log


def test_what_is_unfrozen_must_be_there(aligning: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value, said in (
        ("unfreeze", ["image.network.blocks.9"], "got image.network.blocks.9"),
        ("layer_decay", 1.5, "layer_decay must be above 0 and at most 1, got 1.5"),
        ("ema", 1.0, "ema must be at least 0 and below 1, got 1.0"),
        ("loss", "hinge", "loss"),
        ("weights", {"imge": 1.0}, "imge"),
    ):
        words = aligning("run", lambda r, option=option, value=value: r["model"]["init_args"].update({option: value}))
        assert main(["fit", *words]) == 2
        assert said in capsys.readouterr().err


def test_frozen_parts_stay_in_evaluation_mode_and_unfrozen_ones_do_not(aligning: Any) -> None:
    words = aligning("run", lambda r: r["model"]["init_args"].update(unfreeze=["image.network.blocks.1"]))
    task = TrainingCLI.make(["fit", "--config", words[1]]).model
    assert isinstance(task, Task)
    assert isinstance(task, AlignTask)
    task.train()
    image = task.model.image
    assert not any(module.training for module in image.stem.modules())
    assert not any(module.training for module in image.network.blocks[0].modules())
    assert all(module.training for module in image.network.blocks[1].modules())
    assert all(module.training for module in task.model.fusion.modules())
    moving = {name for name, item in image.named_parameters() if item.requires_grad}
    assert moving
    assert all(name.startswith("network.blocks.1.") for name in moving)
    assert task.cache_root is None
