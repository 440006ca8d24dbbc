"""JoinedEncoder: the tokens of each network side by side, mirror images, and settings made again without files."""

import json

import pytest
import torch

from mm.encoders.joined import JoinedEncoder
from mm.encoders.timm_image import TimmEncoder
from mm.encoders.vit import ViTEncoder
from mm.fusion.alignment import CrossModalAlignment
from mm.model import MultimodalModel
from mm.training.rebuild import build, sealed

TIMM = "mm.encoders.timm_image.TimmEncoder"


class Colours(TimmEncoder):
    def __init__(self) -> None:
        super().__init__(name="resnet10t", image_size=64)
        self.channels = (3,)


def pair(*, grid: tuple[int, int] = (1, 1), mirrored: bool = False) -> JoinedEncoder:
    torch.manual_seed(0)
    first = TimmEncoder(name="resnet10t", image_size=64, token_grid=grid)
    second = TimmEncoder(name="test_vit", image_size=160, token_grid=grid)
    return JoinedEncoder(encoders=[first, second], mirrored=mirrored).eval()


def test_tokens_stand_side_by_side() -> None:
    joined = pair()
    first, second = joined.encoders
    x = torch.rand(2, 3, 96, 96)
    (level,), tokens = joined.look(x)
    assert tokens.values.shape == (2, 1, joined.width)
    assert joined.width == first.width + second.width
    assert level.shape == (2, joined.widths[0], 2, 2)
    torch.testing.assert_close(tokens.values[..., : first.width], first(x).values)
    # 10 patches fall evenly into 2 cells, which leaves the mean as it is.
    torch.testing.assert_close(tokens.values[..., first.width :], second(x).values)


def test_a_mirrored_picture_is_the_same_picture() -> None:
    x = torch.rand(2, 3, 96, 96)
    plain, mirrored = pair(), pair(mirrored=True)
    torch.testing.assert_close(mirrored(x).values, mirrored(x.flip(-1)).values, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain(x).values, plain(x.flip(-1)).values, atol=1e-3)


def test_what_does_not_fit_is_named() -> None:
    small = TimmEncoder(name="resnet10t", image_size=64, token_grid=(1, 1))
    with pytest.raises(ValueError, match="encoders must be two or more, got 1"):
        JoinedEncoder(encoders=[small])
    with pytest.raises(ValueError, match=r"share a number of channels, got \[\(3,\), \(1,\)\]"):
        JoinedEncoder(encoders=[Colours(), ViTEncoder(image_size=64, width=32, depth=1, heads=2)])
    other = TimmEncoder(name="resnet10t", image_size=64, token_grid=(2, 2))
    with pytest.raises(ValueError, match=r"as many tokens as each other, got \[1, 4\]"):
        JoinedEncoder(encoders=[small, other])(torch.rand(1, 3, 64, 64))


def test_a_checkpoint_has_no_path_of_any_of_them() -> None:
    joined = pair()
    model = MultimodalModel(fusion=CrossModalAlignment(16, heads=2), image=joined)
    parts = [
        {"class_path": TIMM, "init_args": {"name": "resnet10t", "weights": "/home/me/a", "image_size": 64}},
        {"class_path": TIMM, "init_args": {"name": "test_vit", "weights": "/home/me/b"}},
    ]
    for part in parts:
        part["init_args"]["token_grid"] = [1, 1]
    config = {
        "class_path": "mm.model.MultimodalModel",
        "init_args": {
            "fusion": {"class_path": "mm.fusion.alignment.CrossModalAlignment", "init_args": {"width": 16, "heads": 2}},
            "image": {"class_path": "mm.encoders.joined.JoinedEncoder", "init_args": {"encoders": parts}},
        },
    }
    kept = sealed(config, model)
    assert "/home" not in json.dumps(kept)
    assert parts[0]["init_args"]["weights"] == "/home/me/a"  # the recipe itself stays as it was
    again = build(kept)
    build(config)  # nor are they looked for: there is no such file
    assert [one.mean for one in again.image.encoders] == [one.mean for one in joined.encoders]
