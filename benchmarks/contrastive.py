"""The contrastive step against open_clip's, at equal loss.

python benchmarks/contrastive.py [--rounds 15] [--json FILE]

One thread, process time, interleaved, every round in another order; milliseconds are the median of the rounds, ratios
the median of each round's own, with the quartiles beside them. Loss and gradients are asserted equal first.

Loss: forward and backward on given embeddings. open_clip's ClipLoss multiplies the embeddings once a direction;
ours makes one matrix, reads it by rows and by columns and takes the slopes along. Neither has switches of its own, so
that "same flags" is the same process-wide setting for both: the route of float32 products through oneDNN
(`mm.decoder.onednn`).

Step: image tower, text tower, loss, backward and AdamW, with one set of weights in both: a small ViT and a small text
transformer of open_clip's. As shipped: open_clip's model and loss as they come (float32; a caption fills all 77
places), ours as in its recipes (bfloat16; captions as long as the longest). Same flags: bfloat16 for both. And last,
float32 for both.
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
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from side_by_side import compare, heading, keep
from torch import Tensor, nn

from mm.batch import Padded
from mm.decoder.onednn import onednn_matmul
from mm.encoders.text import TextEncoder
from mm.fusion.contrastive import info_nce
from mm.fusion.siglip import siglip

SHAPES = ((256, 512), (1024, 512), (4096, 128))
"""Pairs, and the width of an embedding."""
BATCH, IMAGE, CONTEXT, VOCABULARY, LONGEST = 32, 64, 77, 2000, 24
OURS, PEER = "ours", "open_clip"

Step = Callable[[], Tensor]


# ------------------------------------------------------------------------------------------------- loss


def leaves(n: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    first = F.normalize(torch.randn(n, width, generator=generator), dim=-1)
    near = F.normalize(first + 0.1 * torch.randn(n, width, generator=generator), dim=-1)
    return [first.requires_grad_(), near.requires_grad_(), torch.tensor(14.3, requires_grad=True)]


def loss_steps(n: int, width: int) -> dict[str, dict[str, Step]]:
    given = leaves(n, width)
    bias = torch.tensor(-10.0, requires_grad=True)
    clip, sigmoid = ClipLoss(), SigLipLoss()

    def step(loss: Callable[[], Tensor]) -> Step:
        def run() -> Tensor:
            for item in (*given, bias):
                item.grad = None
            value = loss()
            value.backward()
            return value.detach()

        return run

    first, second, scale = given
    made = {
        "InfoNCE": {
            OURS: step(lambda: info_nce(first, second, scale=scale)),
            PEER: step(lambda: clip(first, second, scale)),
        },
        "SigLIP": {
            OURS: step(lambda: siglip(first, second, scale=scale, bias=bias)),
            PEER: step(lambda: sigmoid(first, second, scale, bias)),
        },
    }
    for pair in made.values():
        found = []
        for name in (OURS, PEER):
            value = pair[name]()
            found.append([value, *(item.grad.clone() for item in given if item.grad is not None)])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    return made


# ----------------------------------------------------------------------------------------- whole step


class Ours(nn.Module):
    """The same two towers, the text's run by our encoder."""

    def __init__(self, peer: CustomTextCLIP) -> None:
        super().__init__()
        self.visual = copy.deepcopy(peer.visual)
        self.text = TextEncoder(vocab_size=VOCABULARY, width=32, depth=1, heads=2, context_length=CONTEXT)
        self.text.network = copy.deepcopy(peer.text)
        self.logit_scale = nn.Parameter(peer.logit_scale.detach().clone())

    def loss(self, images: Tensor, texts: Padded) -> Tensor:
        first, second = F.normalize(self.visual(images).float(), dim=-1), F.normalize(self.text(texts).float(), dim=-1)
        return info_nce(first, second, scale=self.logit_scale.exp())


def whole_steps() -> dict[str, Callable[[bool], Tensor]]:
    """Steps that take whether to run in bfloat16."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=4, width=192, head_width=64, patch_size=8, image_size=IMAGE)
    words = CLIPTextCfg(context_length=CONTEXT, vocab_size=VOCABULARY, width=192, heads=3, layers=4)
    peer = CustomTextCLIP(128, vision, words)
    ours = Ours(peer)
    images = torch.randn(BATCH, 3, IMAGE, IMAGE)
    end = VOCABULARY - 1  # open_clip reads a text where its id is the largest
    rows = [torch.randint(2, end, (int(length),)).tolist() for length in torch.randint(6, LONGEST, (BATCH,))]
    texts = Padded.of([[*row, end] for row in rows])
    full = F.pad(texts.values, (0, CONTEXT - texts.values.shape[1]))
    loss = ClipLoss()
    optimizers = {OURS: torch.optim.AdamW(ours.parameters()), PEER: torch.optim.AdamW(peer.parameters())}

    def step(name: str, narrow: bool) -> Tensor:
        optimizers[name].zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if narrow else nullcontext():
            value = ours.loss(images, texts) if name == OURS else loss(*peer(images, full))
        value.backward()
        optimizers[name].step()
        return value.detach()

    with torch.no_grad():
        torch.testing.assert_close(ours.loss(images, texts), loss(*peer(images, full)), rtol=1e-5, atol=1e-5)
    for _ in range(3):  # and after steps of each
        mine, theirs = step(OURS, False), step(PEER, False)
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    return {OURS: lambda narrow: step(OURS, narrow), PEER: lambda narrow: step(PEER, narrow)}


# --------------------------------------------------------------------------------------------- all


def routed(step: Step) -> Step:
    def run() -> Tensor:
        with onednn_matmul():
            return step()

    return run


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="to see that it runs, not to measure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    random.seed(0)
    heading(OURS, PEER, rounds=options.rounds)
    result: dict[str, Any] = {}
    for n, width in ((16, 8),) if options.tiny else SHAPES:
        for name, pair in loss_steps(n, width).items():
            label = f"{name} loss, {n} pairs of {width}"
            for column, way in (("as shipped", lambda step: step), ("same flags (oneDNN)", routed)):
                line = f"{label}, {column}"
                result[line] = compare(line, way(pair[OURS]), way(pair[PEER]), rounds=options.rounds)
    steps = whole_steps()
    for column, ours, peer in (
        ("as shipped", True, False),
        ("same flags (bfloat16)", True, True),
        ("same flags (float32)", False, False),
    ):
        line = f"two-tower step of {BATCH} pairs, {column}"
        result[line] = compare(
            line,
            partial(steps[OURS], ours),
            partial(steps[PEER], peer),
            rounds=options.rounds,
        )
    return keep(result, rounds=options.rounds, path=options.json)


if __name__ == "__main__":
    main()
