"""ViTEncoder: the grid keeps places, timm models by name, gradients, size."""

import pytest
import timm
import torch

from mm.encoders.vit import ViTEncoder


def small(**changes: object) -> ViTEncoder:
    torch.manual_seed(0)
    return ViTEncoder(**{"image_size": 64, "width": 32, "depth": 1, "heads": 2, "token_grid": (2, 2)} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_grid_and_tokens_have_the_promised_shapes(stem: str) -> None:
    encoder = small(stem=stem, patch=8)
    x = torch.rand(2, 1, 64, 64)
    levels = encoder.pyramid(x)
    assert [tuple(level.shape) for level in levels] == ([(2, 16, 16, 16)] if stem == "conv" else []) + [(2, 32, 8, 8)]
    assert tuple(level.shape[1] for level in levels) == encoder.widths
    assert levels[0].shape[-1] * encoder.stride == 64
    tokens = encoder(x)
    assert tokens.values.shape == (2, 4, 32)
    assert tokens.mask.all()


def test_tokens_are_the_pooled_grid_row_by_row() -> None:
    encoder = small().eval()
    x = torch.rand(1, 1, 64, 64)
    grid, tokens = encoder.pyramid(x)[-1], encoder(x).values
    torch.testing.assert_close(tokens[0, 1], grid[0, :, :2, 2:].mean((1, 2)))


def test_a_change_of_pixels_shows_most_in_its_own_patch() -> None:
    encoder = small().eval()
    x = torch.rand(16, 1, 64, 64)
    y = x.clone()
    y[..., 18:30, 34:46] = 1 - y[..., 18:30, 34:46]
    change = (encoder.pyramid(y)[-1] - encoder.pyramid(x)[-1]).norm(dim=1).mean(0)
    assert divmod(int(change.argmax()), 4) == (1, 2)


def test_a_named_model_is_timms_own() -> None:
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    encoder = ViTEncoder(
        name=name, image_size=224, patch=None, width=None, depth=None, heads=None, stem="patch", token_grid=(14, 14)
    ).eval()
    theirs = timm.create_model(name, in_chans=1, num_classes=0, global_pool="").eval()
    theirs.load_state_dict(encoder.network.state_dict())
    x = torch.rand(1, 1, 224, 224)
    with torch.no_grad():
        expected = theirs((x - 0.5) / 0.25)[:, 1:]
        got = encoder(x).values
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_gradient_reaches_every_parameter(stem: str) -> None:
    encoder = small(stem=stem, depth=2)
    (encoder(torch.rand(2, 1, 64, 64)).values * torch.randn(32)).pow(3).sum().backward()
    missing = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_default_size_is_within_the_budget() -> None:
    encoder = ViTEncoder()
    assert sum(p.numel() for p in encoder.parameters()) <= 2_000_000
    assert encoder.patch_grid == (16, 16)


def test_bad_settings_name_the_argument() -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of patch"):
        small(patch=24)
    with pytest.raises(ValueError, match="patch must be a power of two"):
        small(image_size=72, patch=12)
    with pytest.raises(ValueError, match="pretrained weights have no conv stem"):
        small(pretrained=True)
