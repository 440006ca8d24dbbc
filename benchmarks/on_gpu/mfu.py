"""Whole training steps in bfloat16, as a share of what the device could multiply in the same time."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from on_gpu.bench import Bench, assert_near, three
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mm.attention
from mm.batch import Padded, Slots, Tokens, Writing
from mm.data.collate import collate
from mm.decoder.counts import parameter_counts
from mm.decoder.decoder import MoEDecoder
from mm.encoders.resnet3d import ResNet3DEncoder
from mm.encoders.vit import ViTEncoder
from mm.findings import FindingHead
from mm.fusion.alignment import CrossModalAlignment
from mm.model import MultimodalModel
from mm.phantom.dataset import PhantomDataset

SECTION = "training step"
Loss = Callable[[], Tensor]
Make = Callable[[Bench], tuple[nn.Module, Loss, dict[str, object]]]


def run(bench: Bench) -> None:
    for name, make in (("MoEDecoder", decoder_case), ("ResNet3D + ViT, finding head, phantoms", vision_case)):
        bench.attempt(SECTION, name, partial(train, bench, name, make))


def train(bench: Bench, name: str, make: Make) -> None:
    measure(bench, name, *make(bench))


def decoder_case(bench: Bench) -> tuple[nn.Module, Loss, dict[str, object]]:
    torch.manual_seed(0)
    rows, length, seen, vocabulary = (2, 12, 4, 64) if bench.tiny else (32, 512, 64, 32000)
    with torch.device(bench.device):
        decoder = (
            MoEDecoder(vocabulary, width=32, depth=1, heads=2, num_experts=4, expert_width=16, shared_expert_width=16)
            if bench.tiny
            else MoEDecoder(vocabulary, width=1024, depth=12, heads=16, expert_width=2048, shared_expert_width=2048)
        )
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (rows, length), generator=g)
    full = torch.tensor([length // 2] * rows)
    slots = Slots(*torch.zeros(5, rows, dtype=torch.long))
    prompt, target = (Padded(part.contiguous(), full) for part in ids.chunk(2, dim=1))
    writing = Writing(torch.arange(rows), slots, prompt, target).to(bench.device)
    memory = Tokens(
        torch.randn(rows, seen, decoder.memory_width, generator=g), torch.ones(rows, seen, dtype=torch.bool)
    ).to(bench.device)

    def loss() -> Tensor:
        output = decoder(writing, memory)
        return output.cross_entropy() + 0.01 * output.load_balancing_loss

    return decoder, loss, {"tokens": rows * length}


def vision_case(bench: Bench) -> tuple[nn.Module, Loss, dict[str, object]]:
    torch.manual_seed(0)
    width, depth, blocks, tokens = (4, 10, 1, 32) if bench.tiny else (64, 18, 12, 384)
    volume = ResNet3DEncoder(width=width, depth=depth, token_grid=(2, 2, 2) if bench.tiny else (4, 4, 4))
    image = ViTEncoder(name="vit_tiny_patch16_224", width=tokens, depth=blocks, heads=2 if bench.tiny else 6)
    assert len(volume.widths) == 4
    head = FindingHead(
        width=32 if bench.tiny else 192,
        volume_widths=volume.widths,
        image_widths=image.widths,
        audio_width=None,
        record_width=None,
        channels=16 if bench.tiny else 48,
        source_dropout=0.0,
    )
    model = MultimodalModel(
        fusion=CrossModalAlignment(width=48, depth=1, heads=2), volume=volume, image=image, findings=head
    ).to(bench.device)
    drawn, studies = (1, 1) if bench.tiny else (4, 16)
    patients = PhantomDataset(studies=drawn, seed=1, split="train", priors=0, inputs=("volume", "image"))
    samples = [patients[index] for index in range(drawn)]
    batch = collate([samples[index % drawn] for index in range(studies)], None, rows=()).to(bench.device)

    def loss() -> Tensor:
        found = model.find(model.encode(batch))
        assert found is not None
        assert batch.targets is not None
        return torch.stack([part.float() for part in head.losses(found, batch.targets).values()]).sum()

    return model, loss, {"studies": studies}


def measure(bench: Bench, name: str, model: nn.Module, loss: Loss, sizes: dict[str, object]) -> None:
    model.train()

    def half() -> Tensor:
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            return loss().float()

    with torch.no_grad():
        assert_near(half(), loss().float(), within=3e-2, what="the loss in bfloat16 and in float32")
    optimizer = torch.optim.AdamW(
        [item for item in model.parameters() if item.requires_grad], lr=1e-5, fused=bench.device.type == "cuda"
    )

    def step() -> None:
        optimizer.zero_grad()
        half().backward()
        optimizer.step()

    flops = multiplications(lambda: half().backward())
    optimizer.zero_grad()
    ms = bench.times({"step": step}, seconds=5.0)["step"]
    done = flops / ms / 1e9
    counts = parameter_counts(model)
    bench.row(
        SECTION,
        name,
        parameters=f"{counts.total / 1e6:.1f} M",
        active=f"{counts.active / 1e6:.1f} M",
        **sizes,
        step_ms=three(ms),
        tflop=three(flops / 1e12),
        tflops=three(done),
        mfu="peak unknown" if bench.peak is None else f"{100 * done / bench.peak:.1f} %",
    )


def multiplications(run: Callable[[], object]) -> int:
    """FLOPs of matrix products, convolutions and attention; what a mask hides is counted, as is usual."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped})  # noqa: SLF001
    # xFormers' kernels are unknown to the counter: the same step through PyTorch's attention has the same FLOPs.
    with patch.object(mm.attention, "_ops", lambda: None), counter:
        run()
    return counter.get_total_flops()


def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """[A K] by [E K N], or, for the gradient of weights, [K A] by [A N]: each row meets one expert."""
    return 2 * int(a[0]) * int(a[1]) * int(b[-1])
