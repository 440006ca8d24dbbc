"""CanonicalHead: its directions against a generalised eigenproblem, invariances, and its way through a checkpoint."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

import mm
from mm.batch import Batch, Images, Padded, Tokens
from mm.canonical import CanonicalHead
from mm.data.tokenizer import train_tokenizer
from mm.training.checkpoint import Card, build, save


def pairs(number: int, *, seed: int) -> tuple[Tokens, Tensor, Padded]:
    """Images and texts that share two hidden numbers each."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(number, 2, generator=generator)
    images = hidden[:, None] * torch.tensor([1.0, 2.0, 3.0])[:, None] @ torch.eye(2, 4)
    images = images + 0.1 * torch.randn(number, 3, 4, generator=generator)
    sentences = torch.cat([hidden, 0.1 * torch.randn(number, 3, generator=generator)], 1)
    words = [[3 + int(row[0] > 0), 5 + int(row[1] > 0), 7] for row in hidden]
    return Tokens(images, torch.ones(number, 3, dtype=torch.bool)), sentences, Padded.of(words)


def fitted(number: int = 24) -> tuple[CanonicalHead, tuple[Tokens, Tensor, Padded]]:
    head, own = CanonicalHead(image_width=4, text_width=5, ridge=0.5), pairs(number, seed=0)
    head.fit(*own)
    return head, own


def test_directions_solve_the_regularised_problem() -> None:
    """Hardoon et al. 2004: max a'KLb with a'(KK + lK)a = b'(LL + mL)b = 1, asked of scipy."""
    head, _ = fitted()
    number = len(head.pictures)
    middle = np.eye(number) - 1 / number
    both = head._alike_images(head.pictures), head._alike_texts(head.sentences, head.ids)
    kernels = [middle @ alike.double().numpy() @ middle for alike in both]
    one, other = kernels
    sides = [kernel @ kernel + 0.5 * np.diag(kernel).mean() * kernel + 1e-10 * np.eye(number) for kernel in kernels]
    zero = np.zeros_like(one)
    cross = np.block([[zero, one @ other], [other @ one, zero]])
    values, vectors = scipy.linalg.eigh(cross, scipy.linalg.block_diag(*sides))
    best = values[::-1][:3]
    seen = one @ head.picture_directions.double().numpy()
    said = other @ head.text_directions.double().numpy()
    for place, value in enumerate(best):  # our directions carry their correlation as a factor
        theirs = one @ vectors[:number, -1 - place]
        assert abs(np.corrcoef(seen[:, place], theirs)[0, 1]) == pytest.approx(1, abs=1e-3)
        assert abs(np.corrcoef(said[:, place], other @ vectors[number:, -1 - place])[0, 1]) == pytest.approx(
            1, abs=1e-3
        )
        found = seen[:, place] @ said[:, place] / value**2
        assert found == pytest.approx(value, rel=0.02)


def test_strangers_find_their_texts() -> None:
    head, _ = fitted(200)
    images, sentences, texts = pairs(40, seed=1)
    nearest = (head.image(images) @ head.text(sentences, texts).T).argsort(1, descending=True)
    ranks = (nearest == torch.arange(40)[:, None]).nonzero()[:, 1]
    assert float((ranks < 5).float().mean()) > 0.5  # chance: .125


def test_each_is_embedded_alone_and_padding_changes_nothing() -> None:
    head, (images, sentences, texts) = fitted()
    seen, said = head.image(images), head.text(sentences, texts)
    torch.testing.assert_close(head.image(Tokens(images.values[3:4], images.mask[3:4])), seen[3:4])
    torch.testing.assert_close(head.text(sentences[3:4], Padded(texts.values[3:4], texts.lengths[3:4])), said[3:4])
    wider = Tokens(
        torch.cat([images.values, torch.full((24, 2, 4), 99.0)], 1), torch.nn.functional.pad(images.mask, (0, 2))
    )
    torch.testing.assert_close(head.image(wider), seen)
    longer = Padded(torch.nn.functional.pad(texts.values, (0, 4), value=6), texts.lengths)
    torch.testing.assert_close(head.text(sentences, longer), said)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(24))


def test_no_image_is_zeros() -> None:
    head, (images, _, _) = fitted()
    mask = images.mask.clone()
    mask[2] = False
    found = head.image(Tokens(images.values, mask))
    assert found[2].abs().max() == 0
    torch.testing.assert_close(found[:2], head.image(images)[:2])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="ridge must be above 0"):
        CanonicalHead(image_width=4, text_width=5, ridge=0.0)
    with pytest.raises(ValueError, match="three pairs"):
        CanonicalHead(image_width=4, text_width=5).fit(*pairs(2, seed=0))
    with pytest.raises(ValueError, match=r"canonical\.image_width must be the encoder's 64, got 4"):
        build(config(image_width=4))


def config(image_width: int = 64) -> dict[str, Any]:
    alignment = {"class_path": "mm.fusion.alignment.CrossModalAlignment", "init_args": {"width": 8, "heads": 2}}
    image = {"name": "resnet10t", "image_size": 32, "token_grid": [2, 2], "level": 1}
    text = {"vocab_size": 300, "width": 8, "depth": 1, "heads": 2, "context_length": 16}
    head = {"image_width": image_width, "text_width": 8}
    return {
        "class_path": "mm.model.MultimodalModel",
        "init_args": {
            "fusion": alignment,
            "image": {"class_path": "mm.encoders.timm_image.TimmEncoder", "init_args": image},
            "text": {"class_path": "mm.encoders.text.TextEncoder", "init_args": text},
            "canonical": {"class_path": "mm.canonical.CanonicalHead", "init_args": head},
        },
    }


def test_a_checkpoint_keeps_what_was_fitted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(config()).eval()
    assert model.canonical is not None
    assert model.text is not None
    batch = Batch(6, image=Images(torch.rand(6, 1, 32, 32), torch.ones(6, dtype=torch.bool)))
    texts = Padded.of([[20 + row, 30, 40 + row % 2] for row in range(6)])
    with torch.no_grad():
        tokens = model.encode(batch).tokens.image
        assert tokens is not None
        model.canonical.fit(tokens, model.text(texts), texts)
        seen, said = model.encode(batch).embeddings.image, model.embed_text(texts)
        save(model, tmp_path / "kept", config=config(), tokenizer=train_tokenizer(["a"], vocab_size=300),
             card=Card("kept"))  # fmt: skip
        opened = mm.load(tmp_path / "kept").model
        again = opened.encode(batch).embeddings.image
    assert seen is not None
    assert again is not None
    assert len(seen) == len(said) == 6
    assert (again * seen).sum(1).min() > 0.95  # the towers' matrices are kept in bfloat16
    assert (again @ opened.embed_text(texts).T).argmax(1).tolist() == (seen @ said.T).argmax(1).tolist()
