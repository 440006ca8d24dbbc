"""TextEncoder: equal to open_clip's own forward, padding, empty texts, gradients, sizes."""

import open_clip
import pytest
import torch
from open_clip.transformer import TextTransformer

from mm.batch import Padded
from mm.encoders.record import RecordEncoder
from mm.encoders.text import TextEncoder

END = 1


def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(vocab_size=50, width=24, depth=2, heads=2, context_length=12).eval()


def texts(*lengths: int) -> Padded:
    torch.manual_seed(1)
    return Padded.of([[*torch.randint(2, 50, (length - 1,)).tolist(), END] for length in lengths])


def test_our_size_equals_open_clips_own_forward() -> None:
    ours = encoder()
    theirs = TextTransformer(
        context_length=12, vocab_size=50, width=24, heads=2, layers=2, output_dim=None, pool_type="eos", eos_id=END
    ).eval()
    theirs.load_state_dict(ours.network.state_dict())
    x = texts(12, 5, 1)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x.values))


def test_a_named_model_equals_open_clips_encode_text() -> None:
    torch.manual_seed(0)
    ours = TextEncoder(name="RN50").eval()
    clip = open_clip.create_model("RN50", force_custom_text=True).eval()
    clip.text.load_state_dict(ours.network.state_dict())
    ids = open_clip.get_tokenizer("RN50")(["a chest radiograph", "no pleural effusion is seen on the left"])
    lengths = ids.argmax(1) + 1
    with torch.no_grad():
        expected, got = clip.encode_text(ids), ours(Padded(ids[:, : int(lengths.max())], lengths))
    assert got.shape == (2, ours.width)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_padding_never_changes_a_text() -> None:
    ours, x = encoder(), texts(4, 11)
    alone = ours(Padded(x.values[:1, :4], x.lengths[:1]))
    torch.testing.assert_close(ours(x)[:1], alone)
    x.values[0, 4:] = 9
    torch.testing.assert_close(ours(x)[:1], alone)


def test_an_empty_text_gives_zeros_and_a_long_one_is_cut() -> None:
    ours = encoder()
    assert (ours(Padded.of([[], [3, END]]))[0] == 0).all()
    row = list(range(2, 22))
    torch.testing.assert_close(ours(Padded.of([row])), ours(Padded.of([row[:12]])))


def test_tokens_and_their_mask_fit() -> None:
    tokens = encoder().tokens(texts(4, 7))
    assert tokens.values.shape == (2, 7, 24)
    assert tokens.mask.sum(1).tolist() == [4, 7]


def test_gradient_reaches_every_parameter() -> None:
    ours = encoder()
    (ours(texts(12, 12, 9)) * torch.randn(24)).pow(3).sum().backward()
    missing = [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_default_record_and_text_are_within_the_budget() -> None:
    networks = (TextEncoder(), RecordEncoder())
    assert sum(p.numel() for network in networks for p in network.parameters()) <= 1_000_000


def test_bad_settings_name_the_argument() -> None:
    with pytest.raises(ValueError, match="name must be one of open_clip's models"):
        TextEncoder(name="no-such-model")
    with pytest.raises(ValueError, match="pretrained='openai' needs the name"):
        TextEncoder(pretrained="openai")
