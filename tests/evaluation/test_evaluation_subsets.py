from pathlib import Path

import numpy as np
import pytest
import torch

import mm
from mm import ontology
from mm.batch import Batch
from mm.data.collate import collate
from mm.evaluation.conspicuous import counted, largest
from mm.evaluation.subsets import CHANGES, INPUTS, SUBSETS, Answers, grid_table
from mm.phantom.dataset import PhantomDataset
from mm.training.checkpoint import Loaded


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> Loaded:
    return mm.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def samples():
    patients = PhantomDataset(studies=4, seed=2, split="test")
    made = [patients[index] for index in range(4)]
    assert {len(sample.volumes) for sample in made} == {1, 2}
    return made


def test_the_subsets_are_all_there_are() -> None:
    assert len(SUBSETS) == len(set(SUBSETS)) == 2**4 + 2**3  # priors are compared with a volume
    assert SUBSETS[0] == ()
    assert SUBSETS[-1] == INPUTS


@pytest.mark.parametrize(
    "kept",
    [(), ("volume",), INPUTS[:-1], INPUTS[1:-1], ("volume", "record", "priors")],
    ids=lambda kept: "+".join(kept) or "nothing",
)
def test_taking_away_behind_the_encoders_is_taking_away_before(kept, loaded: Loaded, samples) -> None:
    batch = collate(samples, loaded.tokenizer, rows=())
    with torch.inference_mode():
        encoded = loaded.model.encode(batch)
        for name in INPUTS:
            if name not in kept:
                batch, encoded = batch.without(name), encoded.without(name)
        left = loaded.model.encode(batch)
        one, other = loaded.model.find(encoded), loaded.model.find(left)
    assert one is not None
    assert other is not None
    for name in ("presence", "change", "before", "tokens", "assessable"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-5)
    ours, theirs = dict(encoded.embeddings.items()), dict(left.embeddings.items())
    for name, vectors in ours.items():
        torch.testing.assert_close(vectors, theirs[name], rtol=1e-4, atol=1e-5)
    gone = {"volume"} if "volume" in kept and "priors" not in kept else set()  # its embedding holds the course
    assert ours.keys() == theirs.keys() - gone


def test_the_head_is_asked_with_every_subset(loaded: Loaded, samples) -> None:
    answers = Answers()
    batch = collate(samples, loaded.tokenizer, rows=())
    embeddings = dict(answers.add(loaded, batch, samples).items())
    assert embeddings.keys() == {"volume", "image", "audio", "record"}
    truth = answers.labels()
    assert truth.shape == answers.probability().shape == answers.changes().shape == (4, len(ontology.CODES))
    # The tiny model's thresholds of 0 call what any input can show, and never what none can.
    assert answers.present()[:, ontology.INDEX["nodule"]].all()
    assert not answers.present("volume", "image")[:, ontology.INDEX["nodule"]].any()
    assert answers.present("volume")[:, ontology.INDEX["nodule"]].all()
    with torch.inference_mode():
        found = loaded.model.findings.decode(loaded.model.find(loaded.model.encode(batch.without("image"))))
    called = [[any(f.code == code and f.present for f in own) for code in ontology.CODES] for own in found]
    assert answers.present("image").tolist() == called
    sizes = largest([sample.truth.findings for sample in samples])
    cells = answers.grid(counted(truth, sizes))
    assert [len(cell.inputs) for cell in cells] == [len(kept) for kept in SUBSETS]
    assert cells[0].macro_f1.value == 0
    assert grid_table(cells).count("\n") == 1 + len(SUBSETS)


def test_change_is_a_forced_choice(loaded: Loaded, samples) -> None:
    answers = Answers()
    answers.add(loaded, collate(samples, loaded.tokenizer, rows=()), samples)
    true, said = answers.forced(CHANGES)
    known = sum(item.change != "unknown" for sample in samples for item in sample.truth.findings)
    assert 0 < len(true) <= known  # several nodules are one finding
    assert set(said) <= {ontology.CHANGES.index(name) for name in CHANGES}
    _, blind = answers.forced(CHANGES, "priors")
    assert len(np.unique(blind)) == 1


def test_a_batch_without_anything_stays_without(loaded: Loaded) -> None:
    encoded = loaded.model.encode(Batch(size=2))
    for name in INPUTS:
        encoded = encoded.without(name)
    outputs = loaded.model.find(encoded)
    assert outputs is not None
    assert not outputs.assessable.any()
