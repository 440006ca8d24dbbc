"""AnswerHead: the kernel and the ridge against scikit-learn, invariances, and its way through a checkpoint."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.kernel_ridge import KernelRidge

import mm
from mm.answers import AnswerHead
from mm.batch import Batch, BySource, Images, Padded, Slots, Tokens, Writing, slot
from mm.data.tokenizer import train_tokenizer
from mm.training.checkpoint import Card, build, save

ANSWERS = ["yes", "no", "yes", "left lung", "no", "ct"]


def questions(number: int, *, seed: int, vocabulary: int = 9) -> tuple[torch.Tensor, Padded, Tokens]:
    """Sentence vectors, words and image tokens; exact in bfloat16, as the head keeps them."""
    generator = torch.Generator().manual_seed(seed)
    sentences = torch.randn(number, 4, generator=generator)
    rows = [torch.randint(1, vocabulary, (3 + row % 3,), generator=generator).tolist() for row in range(number)]
    values = torch.randn(number, 5, 2, generator=generator)
    return sentences, Padded.of(rows), Tokens(values, torch.ones(number, 5, dtype=torch.bool))


def fitted(image_width: int = 2) -> tuple[AnswerHead, torch.Tensor, Padded, Tokens]:
    head = AnswerHead(text_width=4, image_width=image_width, ridge=0.5)
    sentences, asked, image = questions(6, seed=0)
    head.fit(sentences, asked, head.describe(image, 6), ANSWERS)
    return head, sentences, asked, image


def test_against_scikit_learn() -> None:
    head, sentences, asked, image = fitted()
    others, words, pictures = questions(5, seed=1)

    def bags(texts: Padded) -> np.ndarray:
        return np.array([[float(word in row) for word in range(1, 9)] for row in texts.values.tolist()])

    # scikit-learn's idf is ln(n / df) + 1; ours lacks the 1, and words of no fitted question count nothing.
    weights = TfidfTransformer(smooth_idf=False).fit(bags(asked)).idf_ - 1
    weights = np.where(np.isfinite(weights), weights, 0)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    def stats(tokens: Tokens) -> np.ndarray:
        x = tokens.values.numpy()
        return np.concatenate([x.mean(1), x.std(1, ddof=1), x.max(1)], axis=1)

    mean, deviation = stats(image).mean(0), stats(image).std(0) + 1e-3

    def kernel(a: tuple[torch.Tensor, Padded, Tokens], b: tuple[torch.Tensor, Padded, Tokens]) -> np.ndarray:
        said = unit(a[0].numpy()) @ unit(b[0].numpy()).T
        words = unit(bags(a[1]) * weights) @ unit(bags(b[1]) * weights).T
        seen = unit((stats(a[2]) - mean) / deviation) @ unit((stats(b[2]) - mean) / deviation).T
        alike = 0.5 * np.exp(3 * (said - 1)) + 0.5 * np.exp(1.5 * (words - 1))
        return alike * (1 + 2 * np.exp(2 * (seen - 1)))

    own = (sentences, asked, image)
    wanted = np.array([[float(answer == item) for item in head.answers] for answer in ANSWERS])
    theirs = KernelRidge(alpha=0.5, kernel="precomputed").fit(kernel(own, own), wanted)
    expected = theirs.predict(kernel((others, words, pictures), own))
    found = head(others, words, head.describe(pictures, 5))
    assert np.allclose(found.numpy(), expected, atol=0.01)  # vectors are kept in bfloat16
    assert head.answers == ("ct", "left lung", "no", "yes")


def test_what_was_learnt_is_known() -> None:
    head, sentences, asked, image = fitted()
    scores = head(sentences, asked, head.describe(image, 6))
    assert [head.answers[place] for place in scores.argmax(1)] == ANSWERS


def test_padding_and_order_of_words_change_nothing() -> None:
    head, sentences, asked, image = fitted()
    expected = head(sentences, asked, head.describe(image, 6))
    longer = Padded(torch.nn.functional.pad(asked.values, (0, 4), value=7), asked.lengths)
    mask = torch.cat([image.mask, torch.zeros(6, 2, dtype=torch.bool)], 1)
    wider = Tokens(torch.cat([image.values, torch.full((6, 2, 2), 99.0)], 1), mask)
    torch.testing.assert_close(head(sentences, longer, head.describe(wider, 6)), expected)


def test_questions_alone_see_no_image() -> None:
    head, sentences, asked, image = fitted(image_width=0)
    _, _, other = questions(6, seed=5)
    assert head.describe(image, 6).shape == head.describe(None, 6).shape == (6, 0)
    found = head(sentences, asked, head.describe(other, 6))
    torch.testing.assert_close(found, head(sentences, asked, head.describe(None, 6)))


def test_a_missing_image_is_the_mean_of_all() -> None:
    head, sentences, asked, _ = fitted()
    assert head(sentences, asked, head.describe(None, 6)).isfinite().all()
    absent = Tokens(torch.zeros(6, 5, 2), torch.zeros(6, 5, dtype=torch.bool))
    torch.testing.assert_close(head.describe(absent, 6), head.describe(None, 6))


def test_an_unknown_word_is_none() -> None:
    head, sentences, asked, image = fitted()
    seen = head.describe(image, 6)
    longer = torch.cat([asked.values, torch.full((6, 1), 500)], 1)
    unknown = Padded(longer, torch.full((6,), longer.shape[1]))
    torch.testing.assert_close(head(sentences, unknown, seen), head(sentences, asked, seen))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="ridge must be above 0"):
        AnswerHead(text_width=4, ridge=0.0)
    sentences, asked, _ = questions(2, seed=0)
    head = AnswerHead(text_width=4)
    with pytest.raises(ValueError, match="never fitted; train it with AnswerTask"):
        head(sentences, asked, head.describe(None, 2))
    with pytest.raises(ValueError, match="no questions to fit"):
        head.fit(sentences[:0], Padded(asked.values[:0], asked.lengths[:0]), head.describe(None, 0), [])


IS, WHERE, NORMAL, MARK = 3, 4, 5, 9


def on_parts(*, well: tuple[int, ...] = (NORMAL,), regions: tuple[str, ...] = ("head", "chest") * 4) -> AnswerHead:
    """Eight questions on eight images, head and chest in turn; the first six begin as yes-or-no questions do."""
    head = AnswerHead(text_width=4, image_width=2, ridge=0.5)
    generator = torch.Generator().manual_seed(2)
    sentences = torch.nn.functional.normalize(torch.rand(8, 4, generator=generator), dim=1)
    image = Tokens(torch.randn(8, 5, 2, generator=generator), torch.ones(8, 5, dtype=torch.bool))
    asked = Padded.of([[MARK, IS if row < 6 else WHERE, NORMAL if row % 3 == 0 else 6 + row % 2] for row in range(8)])
    said = ["yes", "no", "yes", "no", "yes", "no", "left", "right"]
    head.fit(sentences, asked, head.describe(image, 8), said, regions=regions, well=well)
    return head


def test_parts_of_the_body_and_one_image_enter_the_kernel() -> None:
    head = on_parts()
    assert head.openings.tolist() == [IS]  # the mark that every question has opens none
    said, seen = head.sentences.numpy(), head.pictures.numpy()
    plain = 0.5 * np.exp(3 * (said @ said.T - 1))
    bags = head._bags(head.asked).numpy()
    plain += 0.5 * np.exp(1.5 * (bags @ bags.T - 1))
    part = np.arange(8) % 2
    sign = np.array([-1.0 if row % 3 == 0 else 1.0 for row in range(8)]) * (np.arange(8) < 6)
    alike = plain * (1 + 2 * (part[:, None] == part) + 2 * np.exp(8 * (seen @ seen.T - 1)))
    alike += 2 * np.outer(sign, sign) * (said @ said.T) * np.eye(8)  # each is on an image of its own
    wanted = np.array([[float(answer == item) for item in ("left", "no", "right", "yes")] for answer in
                       ("yes", "no", "yes", "no", "yes", "no", "left", "right")])  # fmt: skip
    expected = KernelRidge(alpha=0.5, kernel="precomputed").fit(alike, wanted).dual_coef_
    assert np.allclose(head.coefficients.numpy(), expected, atol=1e-4)


def test_a_yes_to_what_is_well_speaks_against_what_is_wrong() -> None:
    """That image 0 is normal is a yes; "is it 7?" on the same image is then less of a yes."""
    vectors = torch.full((1, 4), 0.5)
    yes = {}
    for well in ((NORMAL,), ()):
        head = on_parts(well=well)
        seen = head.pictures[:1] * head.picture_std + head.picture_mean
        scores = head(vectors, Padded.of([[MARK, IS, 7]]), seen)[0]
        yes[well] = float(scores[head.answers.index("yes")] - scores[head.answers.index("no")])
    assert yes[NORMAL,] < yes[()] - 0.2


def test_a_question_that_asks_for_a_place_is_not_touched_by_yes_or_no() -> None:
    vectors, asked = torch.full((1, 4), 0.5), Padded.of([[MARK, WHERE, 7]])
    scores = []
    for well in ((NORMAL,), ()):
        head = on_parts(well=well)
        assert not (head._decides(asked.values) != 0).any()
        own = head._alike(vectors, asked.values, head.pictures[:1])
        scores.append(own)
    assert torch.equal(*scores)


def test_an_absent_image_is_of_no_part() -> None:
    head = on_parts()
    vectors, asked = torch.full((1, 4), 0.5), Padded.of([[MARK, IS, 7]])
    alike = head._alike(vectors, asked.values, head._standard(head.describe(None, 1)))
    said = head._alike(vectors, asked.values, head.pictures[:1])
    assert (alike < said)[0, ::2].all()  # image 0 is of a head, as every second one is


def test_regions_are_of_all_questions_or_of_none() -> None:
    with pytest.raises(ValueError, match="regions must be of all 8 questions or of none, got 7"):
        on_parts(regions=("head",) * 7 + ("",))


CONFIG = {
    "class_path": "mm.model.MultimodalModel",
    "init_args": {
        "embedding_width": 8,
        "fusion": {
            "class_path": "mm.fusion.alignment.CrossModalAlignment",
            "init_args": {"width": 8, "depth": 1, "heads": 2},
        },
        "image": {
            "class_path": "mm.encoders.timm_image.TimmEncoder",
            "init_args": {"name": "resnet10t", "image_size": 32, "token_grid": [2, 2], "level": 1},
        },
        "text": {
            "class_path": "mm.encoders.text.TextEncoder",
            "init_args": {"vocab_size": 300, "width": 8, "depth": 1, "heads": 2, "context_length": 16},
        },
        "answers": {"class_path": "mm.answers.AnswerHead", "init_args": {"text_width": 8, "image_width": 64}},
    },
}


def batch() -> Batch:
    torch.manual_seed(0)
    images = Images(torch.rand(4, 1, 32, 32), torch.ones(4, dtype=torch.bool))
    columns = torch.tensor([slot("answer", None)] * 4).unbind(1)
    prompt = Padded.of([[2, 4, 20 + row, 5] for row in range(4)])
    asked = Padded.of([[20 + row, 30, 40 + row % 2] for row in range(4)])
    return Batch(4, image=images, writing=Writing(torch.arange(4), Slots(*columns), prompt, None, asked))


def test_a_checkpoint_keeps_what_was_fitted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(CONFIG).eval()
    assert model.answers is not None
    some = batch()
    assert some.writing is not None
    sentences, asked, seen = model.read_questions(model.encode(some), some.writing)
    model.answers.fit(sentences, asked, seen, ["yes", "no", "yes", "ct"])
    expected = model.weigh(some)
    words = train_tokenizer(["a b"], vocab_size=300)
    save(model, tmp_path / "kept", config=CONFIG, tokenizer=words, card=Card("kept"))
    opened = mm.load(tmp_path / "kept").model
    assert opened.answers is not None
    assert opened.answers.answers == ("ct", "no", "yes")
    assert opened.weigh(some).argmax(1).tolist() == expected.argmax(1).tolist() == [2, 1, 2, 0]
    assert torch.allclose(opened.weigh(some), expected, atol=0.05)


def test_widths_must_fit() -> None:
    wrong = {**CONFIG["init_args"], "answers": {"class_path": "mm.answers.AnswerHead", "init_args": {"text_width": 9}}}
    with pytest.raises(ValueError, match=r"answers\.text_width must be the encoder's 8, got 9"):
        build({**CONFIG, "init_args": wrong})
    without = {name: item for name, item in CONFIG["init_args"].items() if name != "text"}
    with pytest.raises(ValueError, match="give it `text`"):
        build({**CONFIG, "init_args": without})


def test_question_and_image_read_each_other_row_by_row() -> None:
    torch.manual_seed(0)
    decoder = {
        "class_path": "mm.decoder.decoder.MoEDecoder",
        "init_args": {"vocab_size": 300, "width": 8, "depth": 1, "heads": 2, "memory_width": 8, "num_experts": 2},
    }
    model = build({**CONFIG, "init_args": {**CONFIG["init_args"], "decoder": decoder}}).eval()
    some = batch()
    assert some.writing is not None
    assert some.image is not None
    both = replace(some.writing, study=torch.tensor([1, 1, 0, 2]))  # two questions on one image
    memory, rows = model.remember(model.encode(some), both)
    assert rows.tolist() == [0, 1, 2, 3]
    assert memory.values.shape[1] == 4 + 3  # the image's tokens and the question's
    assert not torch.allclose(memory.values[0], memory.values[1])
    # What is remembered of a row is a matter of its own question and its own image.
    other = replace(some, image=replace(some.image, values=some.image.values.roll(1, 0)))
    moved, _ = model.remember(model.encode(other), replace(both, study=(both.study + 1) % 4))
    torch.testing.assert_close(moved.values, memory.values, atol=1e-5, rtol=1e-4)
    alone, _ = model.remember(replace(model.encode(some), tokens=BySource()), both)
    assert alone.values.shape[1] == 3
