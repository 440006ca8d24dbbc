"""A decoder as generation wants it on a CPU: weights laid out once, and joined where they meet one input.

PyTorch multiplies by a weight as it lies, and repacks it in every call. Generation multiplies the same weights by a
few rows again and again: laid out beforehand, 16 rows take less than half the time (256 x 1376 on one core with
AVX-512: 71 microseconds against 160), and so do 1,000 (3.2 ms against 7.8). It is the same float32 arithmetic.
"""

import math
import platform
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.decoder.experts import MixtureOfExperts
from mm.decoder.grouped_query import GroupedQueryAttention
from mm.decoder.router import Routing
from mm.transformer import Angles, RMSNorm, SwiGLU

TYPICAL_ROWS = 64
"""That weights are laid out for; every number from 4 on does as well with it."""
WORTH_LAYING = 2**17
"""Numbers of a weight from which on a laid out product is faster: its call takes 10 microseconds more."""
FEW_ROWS = 24
"""Up to so many tokens, all experts for all tokens cost no more than sorting tokens by expert."""

Made = TypeVar("Made", bound=nn.Module)


class Laid:
    """x W^T for weights that never change, one below the other; small ones are joined and not laid out."""

    def __init__(self, *weights: Float[Tensor, "_ D"]) -> None:
        self._weight = torch.cat([weight.detach() for weight in weights])
        self._product: Callable[..., Tensor] | None = None
        if self._weight.numel() >= WORTH_LAYING:
            self._product = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, TYPICAL_ROWS)  # noqa: SLF001

    def __call__(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch O"]:
        """The product, in float32."""
        x = x.float()
        if self._product is None:
            return F.linear(x, self._weight)
        rows = x.numel() // x.shape[-1]
        # A kernel is made for every new number of rows (half a millisecond): of large numbers few are used.
        room = 0 if rows <= FEW_ROWS else -rows % 32
        if not room:
            return self._product(x, self._weight, None, "none", [], "")
        flat = F.pad(x.reshape(rows, -1), (0, 0, 0, room))
        out = self._product(flat, self._weight, None, "none", [], "")
        return out[:rows].view(*x.shape[:-1], -1)


class LaidNorm(RMSNorm):
    """The same norm in four calls, where PyTorch's own makes eight."""

    def __init__(self, plain: RMSNorm) -> None:
        nn.Module.__init__(self)
        # x / sqrt(mean(x^2) + eps) is sqrt(D) x / sqrt(|x|^2 + D eps).
        width = len(plain.weight)
        self._scale = plain.weight.detach() * width**0.5
        self._least = torch.tensor((width * plain.eps) ** 0.5)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """As `RMSNorm`, in float32."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).hypot_(self._least)
        out: Tensor = (x / length).mul_(self._scale)
        return out


class LaidLinear(nn.Linear):
    """A linear map by a laid out weight."""

    def __init__(self, weight: Tensor) -> None:
        nn.Module.__init__(self)
        assert isinstance(weight, nn.Parameter), "the module's own weight, which is shared"
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)
        self._laid = Laid(weight)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch O"]:
        """Each vector by itself."""
        return self._laid(x)


class LaidSwiGLU(SwiGLU):
    """Gate and up in one product."""

    def __init__(self, plain: SwiGLU) -> None:
        nn.Module.__init__(self)
        self._gate_up, self._down = Laid(plain.gate.weight, plain.up.weight), Laid(plain.down.weight)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Each token by itself."""
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(F.silu(gate).mul_(up))


class LaidAttention(GroupedQueryAttention):
    """Queries, keys and values in one product."""

    def __init__(self, plain: GroupedQueryAttention) -> None:
        nn.Module.__init__(self)
        self.head_width, self.norm = plain.head_width, plain.norm
        self.q_norm, self.k_norm = (None if norm is None else LaidNorm(norm) for norm in (plain.q_norm, plain.k_norm))
        self._queries, self._keys = (len(part.weight) // plain.head_width for part in (plain.q, plain.k))
        self._qkv = Laid(plain.q.weight, plain.k.weight, plain.v.weight)
        self.out = LaidLinear(plain.out.weight)

    def _project(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        heads = self._qkv(x).view(*x.shape[:-1], -1, self.head_width)
        first, last = self._queries, self._queries + self._keys
        if self.q_norm is None:
            turned = angles.turn(heads[:, :, :last])
            return turned[:, :, :first], turned[:, :, first:], heads[:, :, last:]
        q, k, v = heads[:, :, :first], heads[:, :, first:last], heads[:, :, last:]
        return angles.turn(self._normed(q, self.q_norm)), angles.turn(self._normed(k, self.k_norm)), v


class LaidMixture(MixtureOfExperts):
    """For few tokens that visit nearly all experts together: every expert sees every token, and gates of 0 hide it.

    That reads the same weights, in two large products in place of two for each expert, and nothing is sorted. The
    shared expert, where nothing gates it, is one expert more.
    """

    def __init__(self, plain: MixtureOfExperts) -> None:
        nn.Module.__init__(self)
        self.router, self.experts, self.shared_gate = plain.router, plain.experts, plain.shared_gate
        self.shared = None if plain.shared is None else LaidSwiGLU(plain.shared)
        own, shared = plain.experts, None if plain.shared_gate is not None else plain.shared
        self._joined, self._routed = shared is not None, own.down.shape[0] * own.down.shape[1]
        gates, ups = (part.mT.flatten(0, 1) for part in own.gate_up.chunk(2, dim=2))
        down = own.down.flatten(0, 1).mT
        if shared is not None:
            gates, ups = torch.cat([gates, shared.gate.weight]), torch.cat([ups, shared.up.weight])
            down = torch.cat([down, shared.down.weight], dim=1)
        self._gate_up, self._down = Laid(gates, ups), Laid(down)

    def forward(self, x: Float[Tensor, "T D"]) -> tuple[Float[Tensor, "T D"], Routing]:
        """Mixes for real tokens."""
        experts = self.experts.num_experts
        tokens = x.shape[0]
        if tokens > FEW_ROWS or tokens * self.router.experts_per_token < 2 * experts:
            return super().forward(x)
        routing = self.router(x)
        gates = torch.zeros_like(routing.probabilities).scatter_(1, routing.experts, routing.gates)
        gate, up = self._gate_up(x).chunk(2, dim=1)
        hidden = F.silu(gate).mul_(up)
        hidden[:, : self._routed].view(tokens, experts, -1).mul_(gates[:, :, None])
        out = self._down(hidden)
        if not math.isfinite(out.sum().item()):
            return super().forward(x)  # perhaps an expert overflowed for a token that didn't choose it: 0 * inf
        return out if self._joined or self.shared is None else out.add_(self._share(x)), routing


def prepared(module: Made) -> Made:
    """A twin that computes the same and is never trained; `module` stays as it is.

    On CPUs with float32 weights it holds a second copy of the weights of linear maps and experts, as they were; all
    else is shared. Where nothing is to be gained (other devices and types) it holds none.
    """
    twin = module.__new__(type(module))
    children = {name: None if child is None else _prepared(child) for name, child in module._modules.items()}  # noqa: SLF001
    twin.__dict__ = {**module.__dict__, "_modules": children}
    return twin


def can_lay(weight: Tensor) -> bool:
    """Whether laying this weight out is worth it."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32
    known = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return fits and known and platform.machine().lower() in ("x86_64", "amd64")


def _prepared(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Dropout):
        return nn.Identity()
    first = next(module.parameters(), None)
    if first is not None and can_lay(first):
        if type(module) is nn.Linear and module.bias is None:
            return LaidLinear(module.weight)
        if type(module) is RMSNorm:
            return LaidNorm(module)
        if type(module) is SwiGLU:
            return LaidSwiGLU(module)
        if type(module) is GroupedQueryAttention:
            return LaidAttention(module)
        if type(module) is MixtureOfExperts:
            return LaidMixture(module)
    return prepared(module)
