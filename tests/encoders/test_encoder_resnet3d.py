"""ResNet3D: torchvision's weights and outputs, strides, windows, gradients."""

import pytest
import torch
from torchvision.models.video import r3d_18

from mm.encoders.resnet3d import STRIDES, ResNet3D, ResNet3DEncoder


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_torchvision_weights_load_and_outputs_are_equal(mode: str) -> None:
    torch.manual_seed(0)
    theirs = r3d_18(weights=None)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    ours = ResNet3D(width=64, depth=18, num_classes=400)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 8, 32, 32)
    theirs.train(mode == "train")
    ours.train(mode == "train")
    with torch.no_grad():
        expected, got = theirs(x), ours(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_pyramid_has_the_promised_strides_and_widths() -> None:
    encoder = ResNet3DEncoder(width=4)
    maps = encoder.pyramid(torch.zeros(2, 1, 16, 32, 48))
    for level, width, stride in zip(maps, encoder.widths, STRIDES, strict=True):
        assert level.shape == (2, width, 16 // stride[0], 32 // stride[1], 48 // stride[2])


def test_tokens_have_a_fixed_number_whatever_the_volume() -> None:
    encoder = ResNet3DEncoder(width=4, token_grid=(2, 3, 2)).eval()
    for shape in ((16, 32, 32), (24, 48, 64)):
        tokens = encoder(torch.zeros(1, 1, *shape))
        assert tokens.values.shape == (1, 12, encoder.width)
        assert tokens.mask.all()


def test_windows_clamp_and_reach_both_ends() -> None:
    encoder = ResNet3DEncoder(width=4, windows=((-1000.0, -200.0), (-160.0, 240.0), (-1000.0, 1000.0)))
    hu = torch.tensor([-3000.0, -1000.0, -600.0, -200.0, 40.0, 1000.0, 3000.0]).view(1, 1, 1, 1, 7)
    lung, soft, wide = encoder.window(hu)[0, :, 0, 0]
    assert lung.tolist() == pytest.approx([-1, -1, 0, 1, 1, 1, 1], abs=1e-6)
    assert soft.tolist() == pytest.approx([-1, -1, -1, -1, 0, 1, 1], abs=1e-6)
    assert wide[0] == -1
    assert wide[-1] == 1
    assert wide[2].item() == pytest.approx(-0.6)


def test_a_volume_is_encoded_the_same_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    encoder = ResNet3DEncoder(width=4).eval()
    x = torch.randn(3, 1, 16, 32, 32) * 500
    torch.testing.assert_close(encoder(x).values[1:2], encoder(x[1:2]).values)


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    encoder = ResNet3DEncoder(width=4, depth=18)
    encoder(torch.randn(2, 1, 16, 64, 64) * 500).values.pow(2).sum().backward()
    missing = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_default_size_is_within_the_budget() -> None:
    assert sum(p.numel() for p in ResNet3DEncoder().parameters()) <= 2_000_000


def test_bfloat16_autocast_stays_near_float32() -> None:
    torch.manual_seed(0)
    encoder = ResNet3DEncoder(width=16).eval()
    x = torch.randn(1, 1, 16, 32, 32) * 500
    with torch.no_grad():
        expected = encoder(x).values
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = encoder(x).values.float()
    assert (got - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 12}, "depth"),
        ({"stem_kernel": (3, 6, 6)}, "stem_kernel"),
        ({"windows": ((-200.0, -1000.0), (-160.0, 240.0), (-1000.0, 1000.0))}, "windows"),
    ],
)
def test_bad_settings_name_the_argument(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ResNet3DEncoder(**arguments)  # type: ignore[arg-type]
