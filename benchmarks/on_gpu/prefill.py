"""Packed prefill against padded rows: attention alone, forward and backward, and a whole language model."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from on_gpu.bench import Bench, assert_near, three
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mm.attention import Packed, attend
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig

ATTENTION, WHOLE = "packed attention", "packed prefill, whole model"


def raggednesses(rows: int, longest: int) -> dict[str, list[int]]:
    """Lengths of rows, from all alike to one long among short ones."""
    g = torch.Generator().manual_seed(0)
    some = torch.rand(rows, generator=g)
    cases = {
        "all of one length": [longest] * rows,
        "half to whole": (longest * (0.5 + 0.5 * some)).long().tolist(),
        "a sixteenth to whole": (longest * (1 / 16 + 15 / 16 * some)).long().tolist(),
        "one whole, others an eighth": [longest] + [longest // 8] * (rows - 1),
    }
    for lengths in cases.values():
        lengths[0] = longest  # so that padding reaches the same length in every case
    return cases


def run(bench: Bench) -> None:
    rows, longest = (4, 48) if bench.tiny else (16, 2048)
    model = make_model(bench)
    for name, lengths in raggednesses(rows, longest).items():
        filled = f"{name} ({100 * sum(lengths) // (rows * longest)} % real)"
        bench.attempt(ATTENTION, filled, partial(attention, bench, filled, lengths))
        bench.attempt(WHOLE, filled, partial(whole, bench, model, filled, lengths))


def attention(bench: Bench, name: str, lengths: list[int]) -> None:
    heads, width = (2, 16) if bench.tiny else (16, 128)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, sum(lengths), heads, width, device=bench.device, dtype=torch.bfloat16) for _ in range(3))
    mask = Packed(tuple(lengths), causal=True)
    padded = [pad_sequence(list(x[0].split(lengths)), batch_first=True).transpose(1, 2).contiguous() for x in (q, k, v)]
    for x in (q, k, v, *padded):
        x.requires_grad_()

    def of_rows(x: Tensor) -> Tensor:
        return torch.cat([row[:, :length].transpose(0, 1) for row, length in zip(x, lengths, strict=True)])

    def packed_forward() -> Tensor:
        return attend(q, k, v, mask=mask)

    def padded_forward() -> Tensor:
        return F.scaled_dot_product_attention(padded[0], padded[1], padded[2], is_causal=True)

    ones = torch.randn_like(q)
    padded_ones = pad_sequence(list(ones[0].split(lengths)), batch_first=True).transpose(1, 2).contiguous()
    exact = torch.cat(
        [
            F.scaled_dot_product_attention(*(x[None].transpose(1, 2).float() for x in row), is_causal=True)[
                0
            ].transpose(0, 1)
            for row in zip(*(x[0].detach().split(lengths) for x in (q, k, v)), strict=True)
        ]
    )
    assert_near(packed_forward()[0], exact, within=2e-2, what="packed attention and fp32 SDPA of each row")
    assert_near(of_rows(padded_forward()), exact, within=2e-2, what="padded SDPA and fp32 SDPA of each row")
    ours = torch.autograd.grad(packed_forward(), (q, k, v), ones)
    theirs = torch.autograd.grad(padded_forward(), padded, padded_ones)
    for one, other in zip(ours, theirs, strict=True):
        assert_near(one[0], of_rows(other), within=4e-2, what="gradients of packed and padded attention")

    def without_gradient(forward: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            forward()

    forward = bench.times(
        {"packed": lambda: without_gradient(packed_forward), "padded": lambda: without_gradient(padded_forward)}
    )
    both = bench.times(
        {
            "packed": lambda: torch.autograd.grad(packed_forward(), (q, k, v), ones),
            "padded": lambda: torch.autograd.grad(padded_forward(), padded, padded_ones),
        }
    )
    flops = sum(2 * length * length * heads * width for length in lengths)  # half of 4 L^2 H K: causal
    bench.row(
        ATTENTION,
        name,
        packed_ms=three(forward["packed"]),
        padded_sdpa_ms=three(forward["padded"]),
        speedup=three(forward["padded"] / forward["packed"]),
        packed_both_ways_ms=three(both["packed"]),
        speedup_both_ways=three(both["padded"] / both["packed"]),
        packed_tflops=three(flops / forward["packed"] / 1e9),
    )


def make_model(bench: Bench) -> LanguageModel:
    torch.manual_seed(0)
    sizes = (
        {"vocab_size": 64, "width": 32, "depth": 2, "heads": 4, "key_heads": 2, "head_width": 8, "hidden": 64}
        if bench.tiny
        else {
            "vocab_size": 32000,
            "width": 2048,
            "depth": 4,
            "heads": 16,
            "key_heads": 4,
            "head_width": 128,
            "hidden": 5632,
        }
    )
    with torch.device(bench.device):
        model = LanguageModel(LanguageConfig(context=4096, **sizes))
    model.init_weights(std=0.02)
    return model.to(torch.bfloat16).eval()


@torch.no_grad()
def whole(bench: Bench, model: LanguageModel, name: str, lengths: list[int]) -> None:
    ids = torch.randint(0, model.config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    ids = ids.to(bench.device)
    places = torch.cat([torch.arange(length) for length in lengths]).to(bench.device)[None]
    padded = pad_sequence(list(ids.split(lengths)), batch_first=True)
    real = (torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]).to(bench.device)

    def packed_run() -> Tensor:
        mask = Packed(tuple(lengths), causal=True)
        return model._run(model.embedding(ids[None]), mask=mask, positions=places)[0]  # noqa: SLF001

    def padded_run() -> Tensor:
        return model.hidden(padded)[0]

    assert_near(packed_run()[0], padded_run()[real], within=2e-2, what="packed and padded prefill")
    ms = bench.times({"packed": packed_run, "padded": padded_run})
    bench.row(
        WHOLE,
        name,
        packed_ms=three(ms["packed"]),
        padded_ms=three(ms["padded"]),
        speedup=three(ms["padded"] / ms["packed"]),
        packed_tokens_per_s=round(sum(lengths) / ms["packed"] * 1e3),
    )
