import numpy as np
import pytest

from mm.evaluation.bleu import bleu_counts, bleu_of
from mm.evaluation.cider import cider_d
from mm.evaluation.rouge import longest_common, rouge_l_coco, rouge_l_f1
from mm.evaluation.tokens import rouge_words, words

VOCABULARY = ["no", "a", "the", "12", "mm", "nodule", "effusion", "left", "right", "large", "small", "lung", "is"]
EXACT = 1e-9


def texts(number: int, *, seed: int, longest: int = 24) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [[str(word) for word in rng.choice(VOCABULARY, rng.integers(1, longest))] for _ in range(number)]


def corpus(number: int = 40, *, most: int = 3, seed: int = 0) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Candidates and one to `most` references each; some candidates begin as their reference does."""
    rng = np.random.default_rng(seed)
    pool = texts(number * most, seed=seed + 1)
    references = [pool[most * n : most * n + int(rng.integers(1, most + 1))] for n in range(number)]
    fresh = texts(number, seed=seed + 2)
    candidates = [known[0][: int(rng.integers(1, 20))] + own[:4] for known, own in zip(references, fresh, strict=True)]
    return candidates, references


def joined(candidates, references):
    """The form that pycocoevalcap takes."""
    return (
        {n: [" ".join(text) for text in known] for n, known in enumerate(references)},
        {n: [" ".join(text)] for n, text in enumerate(candidates)},
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [1, 3])
def test_bleu_is_pycocoevalcaps(seed, most):
    theirs = pytest.importorskip("pycocoevalcap.bleu.bleu")
    candidates, references = corpus(most=most, seed=seed)
    score, each = theirs.Bleu(4).compute_score(*joined(candidates, references), verbose=0)
    counts = bleu_counts(candidates, references)
    assert bleu_of(counts) == pytest.approx(score, abs=EXACT)
    assert 0.1 < score[3] < 0.9
    # A text's own score is not the corpus's, and has the same definition.
    assert [bleu_of(counts[n : n + 1])[3] for n in range(5)] == pytest.approx(each[3][:5], abs=EXACT)


def test_bleu_of_nothing_shared_is_zero_and_of_the_same_one():
    assert bleu_of(bleu_counts([["a"] * 5], [[["b"] * 5]])) == pytest.approx(0, abs=1e-3)
    assert bleu_of(bleu_counts([[]], [[["b"] * 5]])) == pytest.approx(0)
    assert bleu_of(bleu_counts([["a"] * 5], [[["a"] * 5]])) == pytest.approx(1)


def test_bleu_4_is_sacrebleus_where_nothing_is_smoothed():
    sacrebleu = pytest.importorskip("sacrebleu")
    candidates, references = corpus(most=1, seed=7)
    theirs = sacrebleu.corpus_bleu(
        [" ".join(text) for text in candidates], [[" ".join(known[0]) for known in references]], tokenize="none"
    )
    assert bleu_of(bleu_counts(candidates, references))[3] == pytest.approx(theirs.score / 100, abs=1e-6)


@pytest.mark.parametrize("most", [1, 3])
def test_rouge_l_is_pycocoevalcaps(most):
    theirs = pytest.importorskip("pycocoevalcap.rouge.rouge")
    candidates, references = corpus(most=most)
    _, each = theirs.Rouge().compute_score(*joined(candidates, references))
    assert rouge_l_coco(candidates, references) == pytest.approx(each, abs=EXACT)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_rouge_l_f1_is_rouge_scores():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    written = [
        ("A 12.5-mm nodule; no effusion.", "There's a nodule of 12 mm in the left lung, no effusion"),
        ("Die Größe: 3_4", "the size is 3/4"),
        ("", "nothing"),
        ("Stable.", "stable"),
    ]
    theirs = [scorer.score(reference, candidate)["rougeL"].fmeasure for candidate, reference in written]
    ours = rouge_l_f1(*(list(map(rouge_words, side)) for side in zip(*written, strict=True)))
    assert ours == pytest.approx(theirs, abs=EXACT)


def test_the_longest_common_subsequence_is_found():
    def slow(a, b):
        table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
        for i, left in enumerate(a):
            for j, right in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if left == right else max(table[i, j + 1], table[i + 1, j])
        return table[-1, -1]

    for a, b in zip(texts(30, seed=3, longest=90), texts(30, seed=4, longest=90), strict=True):
        assert longest_common(a, b) == slow(a, b)
    assert longest_common([], ["a"]) == longest_common(["a"], []) == 0


@pytest.mark.parametrize(("number", "most"), [(40, 1), (40, 3), (2, 2)])
def test_cider_d_is_pycocoevalcaps(number, most):
    theirs = pytest.importorskip("pycocoevalcap.cider.cider")
    candidates, references = corpus(number, most=most)
    score, each = theirs.Cider().compute_score(*joined(candidates, references))
    assert cider_d(candidates, references) == pytest.approx(each, abs=EXACT)
    assert cider_d(candidates, references).mean() == pytest.approx(score, abs=EXACT)


def test_cider_d_bounds():
    _, references = corpus(most=1)
    first = [known[0] for known in references]
    assert cider_d(first, references).max() == pytest.approx(10)
    assert cider_d([["never", "written"]] * len(references), references).max() == 0
    assert cider_d([["a", "b"]], [[["a", "b"]]])[0] == 0  # one text alone: every word is in all references


def test_texts_without_references_are_told():
    for measure in (bleu_counts, rouge_l_coco, cider_d):
        with pytest.raises(ValueError, match="2 given for 1 lists"):
            measure([["a"], ["b"]], [[["a"]]])
        with pytest.raises(ValueError, match="references of text 1"):
            measure([["a"], ["b"]], [[["a"]], []])


def test_chinese_tokens_are_sacrebleus():
    cut = pytest.importorskip("sacrebleu.tokenizers.tokenizer_zh").TokenizerZh()
    written = [
        "右肺上叶见一12.5mm结节，较前（30天）增大。",
        "CT: 3-4 mm, L/R≥1.2%…“未见”气胸",
        " ".join(chr(point) for point in range(33, 0xD800, 7)) + "".join(chr(p) for p in range(0xE000, 0x10000)),
    ]
    for text in written:
        assert words(text, "zh") == cut(text.lower()).split()


def test_english_tokens():
    assert words("A 12.5 mm nodule isn't new; 1,200 ml (left-sided).", "en") == [
        "a", "12.5", "mm", "nodule", "isn't", "new", "1,200", "ml", "left", "sided",
    ]  # fmt: skip
