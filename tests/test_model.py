"""The whole model: modalities apart until fusion, any subset of them, and no look at the labels."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch

from mm import ontology
from mm.batch import (
    SLOT_KINDS,
    Audio,
    Batch,
    Images,
    Padded,
    Records,
    Slots,
    Targets,
    Tokens,
    Volumes,
    Writing,
)
from mm.data.tokenizer import SPECIAL_IDS
from mm.decoder.decoder import MoEDecoder
from mm.decoder.generate import Sampling
from mm.encoders.record import RecordEncoder
from mm.encoders.resnet3d import ResNet3DEncoder
from mm.encoders.text import TextEncoder
from mm.encoders.vit import ViTEncoder
from mm.encoders.wav2vec import Wav2VecEncoder
from mm.findings import FindingHead
from mm.fusion.alignment import CrossModalAlignment
from mm.model import MultimodalModel
from mm.reading import Reading

MODALITIES = ("volume", "image", "audio", "record")
SHORT = Sampling(max_new_tokens=6)
K = len(ontology.FINDINGS)


class Words:
    """A tokenizer that spells ids."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(item) for item in ids)


def make_model(**options: object) -> MultimodalModel:
    torch.manual_seed(0)
    parts: dict[str, object] = {
        "fusion": CrossModalAlignment(width=32, depth=1, heads=2),
        "volume": ResNet3DEncoder(width=8, depth=10, token_grid=(2, 2, 2), stem_kernel=(3, 3, 3)),
        "image": ViTEncoder(image_size=64, patch=16, width=24, depth=1, heads=2, token_grid=(2, 2)),
        "audio": Wav2VecEncoder(width=16, depth=1, heads=1, hidden=32, tokens_per_site=2),
        "record": RecordEncoder(vocab_size=64, width=16, depth=1, heads=1),
        "text": TextEncoder(vocab_size=64, width=16, depth=1, heads=1, context_length=16),
        "findings": FindingHead(
            width=32,
            volume_widths=(8, 16, 32, 64),
            image_widths=(16, 24),
            audio_width=16,
            record_width=16,
            channels=16,
            image_channels=16,
            hidden=32,
            history=16,
            source_dropout=0.0,
        ),
        "decoder": MoEDecoder(64, width=32, depth=1, heads=2, num_experts=4, expert_width=16, shared_expert_width=16),
        "embedding_width": 16,
    }
    return MultimodalModel(**(parts | options))


def make_batch(*, seed: int = 0) -> Batch:
    """Study 0 has everything and a prior, study 1 no volume, study 2 only a volume."""
    B, g = 3, torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    full = torch.tensor([True, True, False])
    rows = Slots(
        kind=torch.tensor([0, 1, 4]), code=torch.tensor([1, 0, 0]), side=torch.tensor([1, 0, 0]),
        change=torch.tensor([0, 0, 0]), grade=torch.tensor([1, 0, 0]),
    )  # fmt: skip
    count = torch.tensor([2, 0, 1])
    return Batch(
        size=B,
        volumes=Volumes(
            noise(B, 2, 1, 16, 32, 32) * 300 - 500, count, torch.tensor([[0.0, 40.0], [0.0, 0.0], [0.0, 0.0]])
        ),
        image=Images(noise(B, 1, 64, 64).sigmoid() * full[:, None, None, None], full),
        audio=Audio(noise(B, 4, 4000) * 0.1, torch.tensor([[4000, 3000, 0, 4000], [4000] * 4, [0] * 4])),
        record=Records(
            noise(B, len(ontology.MEASUREMENTS)).abs() * 10,
            torch.rand(B, len(ontology.MEASUREMENTS), generator=g) < 0.7,
            Padded.of([[11, 12, 13], [14], []]),
            full,
        ),
        text=Padded.of([[20, 21, 1], [22, 1], [23, 24, 25, 1]]),
        writing=Writing(
            torch.tensor([0, 1, 2]),
            rows,
            Padded.of([[2, 4], [3, 4], [2, 4, 30, 5]]),
            Padded.of([[31, 1], [32, 33, 1], [34, 1]]),
        ),
        targets=some_targets(B),
    )


def some_targets(studies: int) -> Targets:
    B, I = studies, ontology.MAX_INSTANCES  # noqa: E741
    nodule = ontology.INDEX["nodule"]
    targets = Targets(
        present=torch.zeros(B, K, dtype=torch.bool),
        change=torch.zeros(B, K, dtype=torch.long),
        volume_bits=torch.zeros(B, 2, 16, 32, 32, dtype=torch.int16),
        count=torch.zeros(B, 2, K, dtype=torch.long),
        centers=torch.zeros(B, 2, K, I, 3),
        sizes=torch.zeros(B, 2, K, I),
        sides=torch.zeros(B, 2, K, I, dtype=torch.long),
        image_bits=torch.zeros(B, 64, 64, dtype=torch.int16),
        image_count=torch.zeros(B, K, dtype=torch.long),
        image_centers=torch.zeros(B, K, I, 2),
        image_sides=torch.zeros(B, K, I, dtype=torch.long),
    )
    assert targets.count is not None
    assert targets.centers is not None
    assert targets.sizes is not None
    assert targets.sides is not None
    assert targets.image_count is not None
    assert targets.image_sides is not None
    targets.present[0, nodule], targets.change[0, nodule] = True, 2
    targets.count[0, :, nodule], targets.centers[0, :, nodule, 0] = 1, torch.tensor([7.0, 9.0, 20.0])
    targets.sizes[0, :, nodule, 0], targets.sides[0, :, nodule, 0] = 9.0, 1
    targets.image_count[0, nodule], targets.image_sides[0, nodule, 0] = 1, 1
    return targets


def strip(batch: Batch, kept: tuple[str, ...]) -> Batch:
    for modality in MODALITIES:
        if modality not in kept:
            batch = batch.without(modality)
    return batch


def test_a_gradient_reaches_every_parameter() -> None:
    model, batch = make_model().train(), make_batch()
    assert model.findings is not None
    assert batch.targets is not None
    out = model(batch)
    assert out.findings is not None
    assert out.text is not None
    assert out.writing is not None
    losses = model.findings.losses(out.findings, batch.targets)
    model.findings.source_dropout = 0.999  # the prior is learnt where a source isn't heard
    unheard = model.find(model.encode(batch))
    total = sum(losses.values()) + model.findings.losses(unheard, batch.targets)["presence"]
    total = total + out.writing.logits.logsumexp(-1).mean() + out.writing.load_balancing_loss + out.writing.z_loss
    total = total + sum((value * torch.randn_like(value)).sum() for _, value in out.encoded.embeddings.items())
    total = total + (model.logit_scale() * out.text * torch.randn_like(out.text)).sum()
    volume = model.adapt(out.encoded).volume
    similarity = out.encoded.embeddings.volume @ out.text.T
    assert model.text is not None
    words = model.text.tokens(batch.text)
    words = replace(words, values=words.values.repeat(1, 1, 2))
    total = total + model.fusion.matching_loss(volume, words, similarity=similarity)
    total.backward()
    missing = [name for name, item in model.named_parameters() if item.grad is None or not item.grad.abs().sum() > 0]
    assert missing == []


def test_replacing_one_modality_leaves_the_others_bit_identical() -> None:
    model, batch, other = make_model().eval(), make_batch(), make_batch(seed=1)
    swaps = {
        "volume": replace(batch, volumes=other.volumes),
        "image": replace(batch, image=other.image),
        "audio": replace(batch, audio=other.audio),
        "record": replace(batch, record=other.record),
    }
    with torch.no_grad():
        before = dict(model.encode(batch).embeddings.items())
        for name, changed in swaps.items():
            after = dict(model.encode(changed).embeddings.items())
            for source in MODALITIES:
                assert torch.equal(before[source], after[source]) == (source != name)


def test_embeddings_are_unit_vectors_or_zero_where_nothing_is() -> None:
    model, batch = make_model().eval(), make_batch()
    with torch.no_grad():
        embeddings = dict(model.encode(batch).embeddings.items())
    there = {"volume": [1, 0, 1], "image": [1, 1, 0], "audio": [1, 1, 0], "record": [1, 1, 0]}
    for source, value in embeddings.items():
        assert torch.allclose(value.norm(dim=-1), torch.tensor(there[source], dtype=torch.float), atol=1e-5)


@pytest.mark.parametrize("kept", list(chain.from_iterable(combinations(MODALITIES, n) for n in range(5))))
def test_any_subset_of_modalities_works(kept: tuple[str, ...]) -> None:
    model, batch = make_model().eval(), strip(make_batch(), kept)
    reports = model.generate(batch, tokenizer=Words(), sampling=SHORT)
    assert len(reports) == 3
    for report in reports:
        assert {row.code for row in report.findings} == set(ontology.CODES)
        assert [item.kind for item in report.sentences][-2:] == ["normal", "impression"]
    if "volume" not in kept:
        assert all(row.voxel is None and row.change == "unknown" for report in reports for row in report.findings)
        assert not any(item.kind == "comparison" for report in reports for item in report.sentences)


def test_a_study_reads_the_same_alone_and_in_a_batch() -> None:
    model, batch = make_model().eval(), make_batch()
    alone = Batch(
        size=1,
        image=Images(batch.image.values[1:2], batch.image.present[1:2]),
        audio=Audio(batch.audio.values[1:2], batch.audio.lengths[1:2]),
        record=Records(batch.record.values[1:2], batch.record.known[1:2], Padded.of([[14]]), batch.record.present[1:2]),
    )
    with torch.no_grad():
        together, single = model.find(model.encode(batch)), model.find(model.encode(alone))
    assert torch.allclose(together.presence[1], single.presence[0], atol=1e-5)
    assert torch.allclose(together.tokens[1], single.tokens[0], atol=1e-5)


def test_drawn_words_of_a_study_do_not_depend_on_its_neighbours() -> None:
    model, batch = make_model().eval(), make_batch()
    model.findings.threshold.fill_(0.0)
    together = model.read(batch)
    drawn = replace(Sampling.consensus_of(3), max_new_tokens=6)
    reports = model.write(together, tokenizer=Words(), sampling=drawn)
    assert model.write(together, tokenizer=Words(), sampling=drawn) == reports
    for study, report in enumerate(reports):
        memory = Tokens(together.memory.values[[study]], together.memory.mask[[study]])
        reading = Reading(together.findings[study : study + 1], (together.compared[study],), memory)
        (alone,) = model.write(reading, tokenizer=Words(), sampling=drawn)
        assert [item.text for item in alone.sentences] == [item.text for item in report.sentences]
    own = model.write(together, tokenizer=Words(), sampling=replace(drawn, seed=(0, 1, 0)))
    assert [a.sentences == b.sentences for a, b in zip(own, reports, strict=True)] == [True, False, True]
    with pytest.raises(ValueError, match=r"seed must be one number or 3 .*got 2"):
        model.write(together, tokenizer=Words(), sampling=replace(drawn, seed=(0, 1)))


def test_a_seed_is_of_what_is_told_and_of_the_place_in_the_report() -> None:
    model, batch = make_model().eval(), make_batch()
    model.findings.threshold.fill_(0.0)
    reading = model.read(batch)
    plan = reading.plan()
    seeds = plan.seeds((0, 0, 0))
    assert len(set(seeds)) == len(plan.sentences)
    assert plan.seeds((0, 0, 0)) == seeds
    (index, *_) = (i for i, item in enumerate(reading.findings[0]) if item.present and item.side != "none")
    turned = list(reading.findings[0])
    turned[index] = replace(turned[index], side="left" if turned[index].side == "right" else "right")
    other = replace(reading, findings=(tuple(turned), *reading.findings[1:])).plan().seeds((0, 0, 0))
    changed = {study for (study, _, _), a, b in zip(plan.sentences, seeds, other, strict=True) if a != b}
    assert changed == {0}


def test_generate_does_not_look_at_labels() -> None:
    model, batch = make_model().eval(), make_batch()
    truth = replace(batch, targets=None, writing=None, text=None)
    assert model.generate(batch, tokenizer=Words(), sampling=SHORT) == model.generate(
        truth, tokenizer=Words(), sampling=SHORT
    )
    other = replace(batch.writing, target=Padded.of([[9, 1], [9, 9, 9, 1], [1]]))
    assert torch.equal(
        model.answer(batch, sampling=SHORT).ids.values,
        model.answer(replace(batch, writing=other), sampling=SHORT).ids.values,
    )


def test_every_sentence_is_about_a_finding_that_is_told() -> None:
    model, batch = make_model().eval(), make_batch()
    model.findings.threshold.fill_(0.0)
    for language in ("en", "zh"):
        for report, compared in zip(
            model.generate(batch, tokenizer=Words(), language=language, sampling=SHORT),
            (True, False, False),
            strict=True,
        ):
            assert report.language == language
            kinds = [item.kind for item in report.sentences]
            assert set(kinds) <= set(SLOT_KINDS)
            assert (kinds[0] == "comparison") == compared
            told = [item.finding for item in report.sentences if item.kind == "finding"]
            assert told == [i for i, row in enumerate(report.findings) if row.present]
            codes = {report.findings[i].code for i in told}
            if compared:  # the first study has every input; the second has no volume, which alone shows these two
                assert len(codes) == K
            elif "emphysema" in codes:
                assert codes >= {"emphysema", "calcification"}
                assert "airflow_obstruction" not in codes
            else:
                assert codes == set(ontology.CODES) - {"emphysema", "calcification"}
            assert all(item.log_probability < 0 for item in report.sentences)


def test_prompts_are_language_and_slot() -> None:
    assert (SPECIAL_IDS.en, SPECIAL_IDS.slot) == (2, 4)


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"findings.image_widths must be the encoder's \(32, 40\), got \(16, 24\)"):
        make_model(image=ViTEncoder(image_size=64, patch=16, width=40, depth=1, heads=2))


def test_kept_encodings_embed_and_fuse_like_fresh_ones() -> None:
    model, batch = make_model().eval(), make_batch()
    with torch.no_grad():
        encoded = model.encode(batch)
        kept = encoded.without_maps()
        again = model.embed(kept)
        assert torch.equal(again.embeddings.volume, encoded.embeddings.volume)
        assert torch.equal(model.fuse(kept, model.find(kept)).values, model.fuse(encoded, model.find(encoded)).values)
