from dataclasses import replace

import numpy as np
import pytest
import torch

from mm import ontology
from mm.batch import SLOT_KINDS, FindingTruth, Question, Record, Sample, Sentence, Truth, VisitTruth
from mm.data.collate import collate
from mm.data.tokenizer import SPECIAL_IDS, Tokenizer, train_tokenizer

SHAPE = (4, 6, 6)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a nodule of <size> in the <side> lung", "is there a nodule?", "yes"], vocab_size=300)


def nodule(size: float, *, side: str = "left", present: bool = True) -> FindingTruth:
    return FindingTruth("nodule", present, side, (1.0, 2.0, 3.0), None, size, "larger", ("volume",))


def full_sample(visits: int = 2) -> Sample:
    findings = (nodule(12.0), nodule(25.0, side="right"))
    bits = np.zeros(SHAPE, np.int32)
    bits[1, 2, 3] = 1 << ontology.INDEX["nodule"]
    visit = VisitTruth(bits, findings, ((1.0, 2.0, 3.0), (2.0, 2.0, 1.0)))
    image_bits = np.zeros((8, 8), np.int32)
    return Sample(
        study="s",
        volumes=tuple(np.full(SHAPE, -100.0 * v, np.float32) for v in range(visits)),
        days=tuple(30.0 * v for v in range(visits)),
        image=np.ones((8, 8), np.float32),
        audio=(np.ones(16, np.float32), None, np.ones(10, np.float32), None),
        record=Record({"crp": 80.0}, "cough"),
        report=(Sentence("finding", "A nodule of <size>.", 0), Sentence("normal", "No effusion.")),
        text="A nodule of 12 mm. No effusion.",
        questions=(Question("is there a nodule?", "yes", closed=True),),
        truth=Truth(findings, (visit,) * visits, image_bits, (None, (3.0, 4.0))),
    )


def test_inputs_are_padded_and_what_is_missing_is_marked(tokenizer: Tokenizer) -> None:
    batch = collate([full_sample(), Sample(study="empty")], tokenizer)
    assert batch.volumes is not None
    assert batch.image is not None
    assert batch.audio is not None
    assert batch.record is not None
    assert batch.volumes.values.shape == (2, 2, 1, *SHAPE)
    assert batch.volumes.count.tolist() == [2, 0]
    assert batch.volumes.days.tolist() == [[0.0, 30.0], [0.0, 0.0]]
    assert batch.image.present.tolist() == [True, False]
    assert batch.audio.lengths.tolist() == [[16, 0, 10, 0], [0, 0, 0, 0]]
    assert batch.record.known.sum() == 1
    assert batch.record.values[0, ontology.MEASUREMENT_INDEX["crp"]] == 80.0
    assert batch.targets is None  # one study has no truth
    assert batch.text is not None
    assert batch.text.lengths[0] > 0
    assert batch.text.lengths[1] == 0  # one study has no report


def test_what_no_study_has_is_none(tokenizer: Tokenizer) -> None:
    batch = collate([Sample(study="a"), Sample(study="b")], tokenizer)
    assert (batch.volumes, batch.image, batch.audio, batch.record, batch.writing) == (None,) * 5


def test_a_study_is_the_same_alone_and_beside_a_longer_one(tokenizer: Tokenizer) -> None:
    alone, beside = collate([full_sample(1)], tokenizer), collate([full_sample(1), full_sample(3)], tokenizer)
    assert alone.volumes is not None
    assert beside.volumes is not None
    assert alone.targets is not None
    assert beside.targets is not None
    assert torch.equal(alone.volumes.values[0, 0], beside.volumes.values[0, 0])
    assert alone.targets.centers is not None
    assert beside.targets.centers is not None
    assert torch.equal(alone.targets.centers[0, 0], beside.targets.centers[0, 0])


def test_a_sentence_that_is_not_measured_has_a_slot_without_grade(tokenizer: Tokenizer) -> None:
    sample = full_sample()
    told, *rest = sample.report
    untold = replace(sample, report=(replace(told, text="A nodule.", measured=False), *rest))
    before, after = (collate([item], tokenizer, rows=("report",)).writing for item in (sample, untold))
    assert before is not None
    assert after is not None
    assert before.slots.grade[0] == ontology.GRADES.index(ontology.grade("nodule", 12.0))
    assert after.slots.grade[0] == ontology.GRADES.index("none")
    for name in ("kind", "code", "side", "change"):
        assert torch.equal(getattr(before.slots, name), getattr(after.slots, name))


def test_targets_hold_instances_by_visit(tokenizer: Tokenizer) -> None:
    targets = collate([full_sample()], tokenizer).targets
    assert targets is not None
    assert targets.count is not None
    assert targets.sizes is not None
    assert targets.sides is not None
    assert targets.volume_bits is not None
    assert targets.image_count is not None
    assert targets.image_centers is not None
    k = ontology.INDEX["nodule"]
    assert targets.present[0].nonzero().flatten().tolist() == [k]
    assert ontology.CHANGES[int(targets.change[0, k])] == "larger"
    assert targets.count[0, :, k].tolist() == [2, 2]
    assert targets.sizes[0, 0, k, :3].tolist() == [12.0, 25.0, 0.0]
    assert [ontology.SIDES[int(s)] for s in targets.sides[0, 0, k, :2]] == ["left", "right"]
    assert (targets.volume_bits[0, 0] >> k & 1).sum() == 1
    assert targets.image_count[0, k] == 1  # the first nodule doesn't show on the X-ray
    assert targets.image_centers[0, k, 0].tolist() == [3.0, 4.0]


def test_a_resolved_finding_is_absent_but_has_a_change(tokenizer: Tokenizer) -> None:
    gone = FindingTruth("effusion", False, "left", None, None, None, "resolved", ("volume",))
    targets = collate([Sample(study="s", truth=Truth((gone,), (), None, (None,)))], tokenizer).targets
    assert targets is not None
    k = ontology.INDEX["effusion"]
    assert not targets.present[0, k]
    assert ontology.CHANGES[int(targets.change[0, k])] == "resolved"


def test_rows_know_their_study_and_slot(tokenizer: Tokenizer) -> None:
    writing = collate([Sample(study="first"), full_sample()], tokenizer).writing
    assert writing is not None
    assert writing.target is not None
    assert writing.study.tolist() == [1, 1, 1]
    assert [SLOT_KINDS[int(kind)] for kind in writing.slots.kind] == ["finding", "normal", "answer"]
    assert writing.slots.code.tolist() == [ontology.INDEX["nodule"] + 1, 0, 0]
    assert ontology.GRADES[int(writing.slots.grade[0])] == "moderate"
    rows = [row[:n].tolist() for row, n in zip(writing.target.values, writing.target.lengths, strict=True)]
    assert [tokenizer.decode(row) for row in rows] == ["A nodule of <size>.", "No effusion.", "yes"]
    assert all(row[-1] == SPECIAL_IDS.end for row in rows)
    assert SPECIAL_IDS.answer in writing.prompt.values[2]


def test_rows_can_be_chosen_and_answers_hold_no_placeholder(tokenizer: Tokenizer) -> None:
    sample = Sample(study="s", questions=(Question("how <size>?", "<size>", closed=False),))
    assert collate([sample], tokenizer, rows=("report",)).writing is None
    writing = collate([sample], tokenizer, rows=("questions",)).writing
    assert writing is not None
    assert writing.target is not None
    assert SPECIAL_IDS.size not in writing.target.values
    assert SPECIAL_IDS.size not in writing.prompt.values


def test_more_instances_than_there_is_room_for_are_cut(tokenizer: Tokenizer) -> None:
    many = tuple(nodule(5.0 + i) for i in range(ontology.MAX_INSTANCES + 3))
    visit = VisitTruth(np.zeros(SHAPE, np.int32), many, ((1.0, 1.0, 1.0),) * len(many))
    truth = Truth(many, (visit,), None, (None,) * len(many))
    targets = collate([Sample(study="s", truth=truth)], tokenizer).targets
    assert targets is not None
    assert targets.count is not None
    assert targets.count.max() == ontology.MAX_INSTANCES


def test_different_sizes_are_refused(tokenizer: Tokenizer) -> None:
    small = Sample(study="s", image=np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match="images of one batch must share a size"):
        collate([full_sample(), small], tokenizer)
    with pytest.raises(ValueError, match="at least one study"):
        collate([], tokenizer)


def test_long_texts_are_cut(tokenizer: Tokenizer) -> None:
    sample = Sample(study="s", text="nodule " * 500, record=Record({}, "cough " * 500))
    batch = collate([sample], tokenizer, max_text=20, max_words=7)
    assert batch.text is not None
    assert batch.record is not None
    assert batch.text.lengths.tolist() == [20]
    assert batch.text.values[0, -1] == SPECIAL_IDS.end
    assert batch.record.words.lengths.tolist() == [7]


def test_a_caption_answers_the_instruction(tokenizer: Tokenizer) -> None:
    some = [Sample(study="a", text="a nodule of <size>"), Sample(study="b", text="a lung " * 40), Sample(study="c")]
    writing = collate(some, tokenizer, rows=("caption",), max_text=20).writing
    assert writing is not None
    assert writing.target is not None
    assert writing.study.tolist() == [0, 1, 2]
    assert writing.prompt.values[0, -1] == SPECIAL_IDS.answer
    assert len(writing.prompt.values.unique(dim=0)) == 1  # the same for all: nothing of a caption is in its prompt
    rows = writing.target.values.tolist()
    lengths = writing.target.lengths.tolist()
    assert tokenizer.decode(rows[0][: lengths[0]]) == "a nodule of <size>"
    assert SPECIAL_IDS.size not in rows[0]  # a user's text holds no placeholder
    assert lengths[1] == 20
    assert SPECIAL_IDS.end not in rows[1]  # what was cut doesn't end
    assert rows[2][: lengths[2]] == [SPECIAL_IDS.end]
    # Captions aren't questions, and each kind of rows comes only where it is asked for.
    assert collate([full_sample()], tokenizer, rows=("questions",)).writing.study.tolist() == [0]  # type: ignore[union-attr]
    both = collate([full_sample()], tokenizer, rows=("questions", "caption")).writing
    assert both is not None
    assert both.slots.kind.tolist() == [SLOT_KINDS.index("answer"), SLOT_KINDS.index("impression")]
