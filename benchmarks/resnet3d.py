"""A training step of our 3-D ResNet against MONAI's of the same shape: forward, backward and AdamW.

python benchmarks/resnet3d.py [--rounds 11] [--json FILE]      (needs monai)

One thread, process time, interleaved, every round in another order. Both start from one set of weights; outputs and
gradients are asserted equal first. MONAI's `ResNet` is made with our stem, (3, 7, 7) with stride (1, 2, 2) and no
pooling behind it, and without the bias that its shortcuts have by default.

As shipped: MONAI's as it comes, float32 and channels first; ours as in its recipes, bfloat16, on windows that
`ResNet3DEncoder` lays out channels last. Same flags: weights and input of MONAI's channels last too, bfloat16 for both;
and float32 for both. The allocator of `mm fit` (`mm.training.allocator`) is the process's and so helps both.
"""

import argparse
import copy
import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets.resnet import ResNet
from side_by_side import compare, heading, keep
from torch import Tensor, nn

from mm.encoders.resnet3d import BLOCKS, Depth, ResNet3D, ResNet3DEncoder
from mm.training.allocator import keep_freed_memory

SIZES: tuple[tuple[int, Depth, tuple[int, int, int]], ...] = ((24, 10, (64, 128, 128)), (64, 18, (16, 64, 64)))
"""Width, depth and voxels: about the size of the recipes, and torchvision's and MONAI's own width."""
CLASSES = 11

Step = Callable[[bool], Tensor]
"""Takes whether to run in bfloat16, returns the loss."""


def peer_of(ours: ResNet3D, *, width: int, depth: Depth) -> nn.Module:
    """MONAI's network of the same shape with the same weights."""
    peer = ResNet("basic", list(BLOCKS[depth]), [width, 2 * width, 4 * width, 8 * width], n_input_channels=3,
                  conv1_t_size=(3, 7, 7), conv1_t_stride=(1, 2, 2), no_max_pool=True, num_classes=CLASSES,
                  bias_downsample=False)  # fmt: skip
    names = {"stem.0": "conv1", "stem.1": "bn1", "conv1.0": "conv1", "conv1.1": "bn1", "conv2.0": "conv2",
             "conv2.1": "bn2"}  # fmt: skip
    weights = {}
    for name, value in ours.state_dict().items():
        for own, theirs in names.items():
            name = name.replace(own, theirs)
        weights[name] = value.clone()
    peer.load_state_dict(weights)
    return peer


def loss_of(network: nn.Module, x: Tensor, truth: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(network(x).float(), truth)


def step_of(network: nn.Module, x: Tensor, truth: Tensor) -> Step:
    optimizer = torch.optim.AdamW(network.parameters())

    def step(narrow: bool) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if narrow else nullcontext():
            loss = loss_of(network, x, truth)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def assert_equal(ours: nn.Module, peer: nn.Module, x: Tensor, truth: Tensor) -> None:
    """Outputs, losses, and the gradient of every weight (of the sum of all, so that a rounding isn't a difference)."""
    mine, theirs = copy.deepcopy(ours), copy.deepcopy(peer)
    torch.testing.assert_close(mine(x), theirs(x.contiguous()), rtol=1e-4, atol=1e-4)
    gradients = []
    for network in (mine, theirs):
        loss_of(network, x, truth).backward()
        gradients.append([item.grad for item in network.parameters()])
    for own, other in zip(*gradients, strict=True):
        assert own is not None
        assert other is not None
        assert float((own - other).norm() / other.norm().clamp(min=1e-12)) < 1e-3


def steps(width: int, depth: Depth, size: tuple[int, int, int]) -> dict[str, Step]:
    torch.manual_seed(0)
    ours = ResNet3D(width=width, depth=depth, num_classes=CLASSES)
    peer = peer_of(ours, width=width, depth=depth)
    hounsfield = torch.empty(1, 1, *size).uniform_(-1000, 400)
    x = ResNet3DEncoder(width=width, depth=depth).window(hounsfield)
    assert x.is_contiguous(memory_format=torch.channels_last_3d)
    truth = torch.rand(1, CLASSES)
    assert_equal(ours, peer, x, truth)
    same = copy.deepcopy(peer).to(memory_format=torch.channels_last_3d)
    return {
        "ours": step_of(ours, x, truth),
        "shipped": step_of(peer, x.contiguous(), truth),
        "same flags": step_of(same, x, truth),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tiny", action="store_true", help="to see that it runs, not to measure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    random.seed(0)
    keep_freed_memory()
    heading("ours", "MONAI", rounds=options.rounds)
    lines: dict[str, Any] = {}
    for width, depth, size in ((4, 10, (8, 32, 32)),) if options.tiny else SIZES:
        made = steps(width, depth, size)
        for column, peer, ours_narrow, peer_narrow in (
            ("as shipped", "shipped", True, False),
            ("same flags (bfloat16)", "same flags", True, True),
            ("same flags (float32)", "same flags", False, False),
        ):
            line = f"width {width}, depth {depth}, {'x'.join(map(str, size))}, {column}"
            lines[line] = compare(
                line,
                partial(made["ours"], ours_narrow),
                partial(made[peer], peer_narrow),
                rounds=options.rounds,
            )
    return keep(lines, rounds=options.rounds, path=options.json)


if __name__ == "__main__":
    main()
