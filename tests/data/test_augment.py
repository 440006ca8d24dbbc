from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from mm.batch import FindingTruth, Question, Record, Sample, Sentence, Truth, VisitTruth
from mm.data.augment import Mirrored, mirror
from mm.data.collate import collate


class Listed(Dataset[Sample]):
    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def sample(text: str = "Nodule in the left lung.") -> Sample:
    rng = np.random.default_rng(0)
    volume, bits = rng.normal(size=(3, 4, 6)).astype(np.float32), np.zeros((3, 4, 6), np.int16)
    bits[1, 2, 4] = 1
    image_bits = np.zeros((8, 8), np.int16)
    image_bits[3, 6] = 1
    found = FindingTruth("nodule", True, "left", (30.0, 1.0, 2.0), (30.0, 2.0), 9.0, "new", ("volume",))
    return Sample(
        study="a",
        volumes=(volume,),
        days=(0.0,),
        image=rng.random((8, 8)).astype(np.float32),
        audio=tuple(np.full(4, site, np.float32) for site in range(4)),
        record=Record({}, "pain on the left"),
        report=(Sentence("finding", "A nodule on the <side>.", 0),),
        text=text,
        questions=(Question("is the left lung clear?", "no", closed=True),),
        truth=Truth((found,), (VisitTruth(bits, (found,), ((1.0, 2.0, 4.0),)),), image_bits, ((3.0, 6.0),)),
    )


def test_inputs_texts_and_truth_turn_together() -> None:
    given = sample()
    turned = mirror(given)
    assert turned is not None
    assert turned.image is not None
    assert turned.truth is not None
    assert turned.truth.image_bits is not None
    assert turned.record is not None
    np.testing.assert_array_equal(turned.image, np.fliplr(given.image))
    np.testing.assert_array_equal(turned.volumes[0], np.flip(given.volumes[0], 2))
    assert turned.text == "Nodule in the right lung."
    assert turned.questions[0].question == "is the right lung clear?"
    assert turned.record.words == "pain on the right"
    assert turned.report[0].text == "A nodule on the <side>."
    assert [int(sound[0]) for sound in turned.audio if sound is not None] == [1, 0, 3, 2]
    assert turned.truth.findings[0].side == turned.truth.visits[0].findings[0].side == "right"
    # The mask is where the place says, before and behind.
    z, y, x = (int(at) for at in turned.truth.visits[0].centers[0] or ())
    assert turned.truth.visits[0].bits[z, y, x] == 1
    row, column = (int(at) for at in turned.truth.image_centers[0] or ())
    assert turned.truth.image_bits[row, column] == 1
    assert turned.truth.findings[0].center_mm == (-30.0, 1.0, 2.0)


def test_twice_is_the_sample_again() -> None:
    turned = mirror(sample())
    assert turned is not None
    again = mirror(turned)
    assert again is not None
    one, two = collate([sample()], None), collate([again], None)
    for first, second in ((one.volumes, two.volumes), (one.image, two.image), (one.audio, two.audio)):
        assert first is not None
        assert second is not None
        assert torch.equal(first.values, second.values)
    assert again.text == sample().text
    assert one.targets is not None
    assert two.targets is not None
    assert one.targets.centers is not None
    assert two.targets.centers is not None
    assert torch.equal(one.targets.centers, two.targets.centers)


@pytest.mark.parametrize("part", ["text", "answer", "record"])
def test_one_text_that_cannot_turn_keeps_the_whole_sample(part: str) -> None:
    given = sample()
    words = "right middle lobe collapse"
    if part == "text":
        given = replace(given, text=words)
    elif part == "answer":
        given = replace(given, questions=(Question("where?", words, closed=False),))
    else:
        given = replace(given, record=Record({}, words))
    assert mirror(given) is None
    only = Mirrored(Listed([given]), share=1.0)
    assert only[0] is given


def test_a_share_is_mirrored() -> None:
    torch.manual_seed(0)
    many = Mirrored(Listed([sample()] * 200), share=0.25)
    turned = sum("right" in many[index].text for index in range(len(many)))
    assert 30 < turned < 75
