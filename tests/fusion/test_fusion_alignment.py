"""Attention across modalities: any subset, no trace of padding, hard negatives."""

import pytest
import torch

from mm.batch import BySource, Tokens
from mm.fusion.adapters import Adapter, Projection
from mm.fusion.alignment import CrossModalAlignment, concatenate


def tokens(studies: int, number: int, *, width: int = 16, lengths: list[int] | None = None, seed: int = 0) -> Tokens:
    g = torch.Generator().manual_seed(seed)
    length = torch.tensor(lengths or [number] * studies)
    return Tokens(torch.randn(studies, number, width, generator=g), torch.arange(number) < length[:, None])


def make() -> CrossModalAlignment:
    torch.manual_seed(0)
    return CrossModalAlignment(16, depth=2, heads=2).eval()


def test_padding_changes_nothing() -> None:
    fusion = make()
    first = tokens(2, 4, lengths=[4, 2])
    second = tokens(2, 3, seed=1)
    noisy = Tokens(torch.where(first.mask[..., None], first.values, 99.0), first.mask)
    clean, dirty = fusion(BySource(volume=first, image=second)), fusion(BySource(volume=noisy, image=second))
    assert torch.equal(clean.image.values, dirty.image.values)
    assert torch.equal(clean.volume.values[first.mask], dirty.volume.values[first.mask])


def test_a_study_without_the_other_modality_reads_as_if_alone() -> None:
    fusion = make()
    first = tokens(2, 4)
    none_of_it = tokens(2, 3, lengths=[3, 0], seed=1)
    both, alone = fusion(BySource(volume=first, image=none_of_it)), fusion(BySource(volume=first))
    assert torch.allclose(both.volume.values[1], alone.volume.values[1], atol=1e-6)
    assert not torch.allclose(both.volume.values[0], alone.volume.values[0], atol=1e-3)
    assert fusion(BySource()) == BySource()


def test_each_modality_reads_every_other() -> None:
    fusion = make()
    parts = {"volume": tokens(1, 2), "audio": tokens(1, 2, seed=1), "record": tokens(1, 3, seed=2)}
    before = dict(fusion(BySource(**parts)).items())
    for name in parts:
        after = dict(fusion(BySource(**(parts | {name: tokens(1, 2, seed=9)}))).items())
        assert all(not torch.allclose(before[other].values, after[other].values) for other in parts if other != name)


def test_matching_learns_which_pairs_belong_together() -> None:
    torch.manual_seed(0)
    fusion = CrossModalAlignment(16, depth=1, heads=2)
    base = torch.randn(8, 1, 16)
    first = Tokens(base + 0.1 * torch.randn(8, 3, 16), torch.ones(8, 3, dtype=torch.bool))
    second = Tokens(base + 0.1 * torch.randn(8, 2, 16), torch.ones(8, 2, dtype=torch.bool))
    optimiser = torch.optim.AdamW(fusion.parameters(), lr=5e-3)
    for _ in range(80):
        loss = fusion.matching_loss(first, second, similarity=torch.zeros(8, 8))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    right = fusion.match(first, second)
    wrong = fusion.match(first, Tokens(second.values.roll(1, 0), second.mask))
    assert (right > wrong).float().mean() > 0.9


def test_matching_refuses_a_batch_of_one() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        make().matching_loss(tokens(1, 2), tokens(1, 2), similarity=torch.zeros(1, 1))


def test_projection_gives_unit_vectors_and_zeros_for_nothing() -> None:
    projection = Projection(16, said=5, num_findings=3, embedding_width=8)
    result = projection(tokens(2, 4, lengths=[3, 0]), torch.randn(2, 3, 5))
    assert torch.allclose(result.norm(dim=-1), torch.tensor([1.0, 0.0]), atol=1e-6)
    adapted = Adapter(16, 24)(tokens(2, 4))
    assert adapted.values.shape == (2, 4, 24)


def test_dropout_is_for_training_only() -> None:
    torch.manual_seed(0)
    given = tokens(4, 2)
    for made in (Projection(16, embedding_width=8, hidden=64, dropout=0.5), Adapter(16, 8, dropout=0.5)):
        first, second = (item.values if isinstance(item, Tokens) else item for item in (made(given), made(given)))
        assert not torch.allclose(first, second)
        made.eval()
        first, second = (item.values if isinstance(item, Tokens) else item for item in (made(given), made(given)))
        assert torch.equal(first, second)


def test_a_projection_without_a_hidden_layer_is_linear() -> None:
    torch.manual_seed(0)
    projection = Projection(16, embedding_width=8, hidden=None)
    given = tokens(4, 1)
    expected = projection.norm(given.values[:, 0]) @ projection.project.weight.T + projection.project.bias
    torch.testing.assert_close(projection(given), torch.nn.functional.normalize(expected, dim=-1))


def test_concatenation_keeps_masks() -> None:
    joined = concatenate([tokens(2, 2, lengths=[1, 2]), tokens(2, 1, lengths=[1, 0])])
    assert joined.mask.tolist() == [[True, False, True], [True, True, False]]
    assert concatenate([]) is None
