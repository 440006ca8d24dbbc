"""Weights from local files: what is read, and what is never run."""

import contextlib
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.video import r3d_18

from mm.encoders.resnet3d import ResNet3DEncoder
from mm.encoders.weights import fill, read_weights


class Trap:
    ran = False

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return setattr, (Trap, "ran", True)  # type: ignore[return-value]


def test_nested_and_prefixed_state_dicts_are_found(tmp_path: Path) -> None:
    state = nn.Linear(2, 3).state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": item for name, item in state.items()}}, tmp_path / "a.pt")
    read = read_weights(tmp_path / "a.pt")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], item) for name, item in state.items())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["trap.pt", "trap.safetensors", "trap.bin"])
def test_nothing_is_run(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(pickle.dumps({"weight": Trap()}))
    with pytest.raises(ValueError, match="weights"):
        read_weights(file)
    torch.save({"weight": Trap()}, file)
    with pytest.raises(ValueError, match="weights"):
        read_weights(file)
    assert not Trap.ran


def test_what_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    for content in ([1, 2], {"weight": 3}, {}, torch.zeros(2)):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"state dict|tensors by name"):
            read_weights(tmp_path / "a.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="can't be read as tensors alone"):
        read_weights(tmp_path / "empty.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_damaged_file_is_refused_or_read_as_tensors(tmp_path: Path, name: str) -> None:
    file, draw = tmp_path / name, random.Random(0)
    state = nn.Linear(3, 4).state_dict()
    if name == "a.pt":
        torch.save(state, file)
    else:
        save_file(state, file)
    whole = file.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.3 else whole)
        for _ in range(draw.randrange(1, 8)):
            if damaged:
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        file.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            assert all(isinstance(item, torch.Tensor) for item in read_weights(file).values())


def test_weights_must_fit_name_by_name() -> None:
    made = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="1 are missing and 1 have no place, such as 'bias'"):
        fill(made, {"weight": torch.zeros(3, 2), "other": torch.zeros(1)}, path="x")
    with pytest.raises(ValueError, match=r"weight is \(2, 3\), the network's is \(3, 2\)"):
        fill(made, {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, path="x")


def test_a_video_resnet_of_torchvision_loads_from_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = r3d_18().eval()
    torch.save(theirs.state_dict(), tmp_path / "r3d.pt")
    ours = ResNet3DEncoder(width=64, depth=18, weights=str(tmp_path / "r3d.pt")).eval()
    x = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        expected = theirs.avgpool(theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(theirs.stem(x)))))).flatten(1)
        torch.testing.assert_close(ours.network(x), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="do not fit the network"):
        ResNet3DEncoder(width=64, depth=10, weights=str(tmp_path / "r3d.pt"))
    assert ours.sealed() == {"weights": None}
