"""What a decoder gives to training, whatever it is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mm.batch import SPECIAL_IDS, Padded
from mm.decoder.loss import chunked_cross_entropy
from mm.decoder.router import Routing


@dataclass(frozen=True)
class DecoderOutput:
    """What training needs. T counts the real target tokens of all rows, in order; there is no padding.

    Attributes:
        hidden: What the output layer reads before each target token, given everything before it.
        weight: Of the output layer.
        targets: The target tokens themselves.
        rows: The row of `Writing` that each belongs to.
        load_balancing_loss: Mean over the layers that have experts; 1 where routing is uniform, 0 without experts.
        z_loss: Mean over them.
        expert_load: Share of the choices that each expert got, layer by layer.
        dropped: Share of the choices dropped for capacity, layer by layer.
        routings: The routers' choices, layer by layer, for each of R routed tokens (prompts and targets); none where
            the decoder has no experts.
        routed_rows: The row of `Writing` that each routed token belongs to.
    """

    hidden: Float[Tensor, "T D"]
    weight: Float[Tensor, "V D"]
    targets: Int[Tensor, " T"]
    rows: Int[Tensor, " T"]
    load_balancing_loss: Float[Tensor, ""]
    z_loss: Float[Tensor, ""]
    expert_load: Float[Tensor, "depth E"]
    dropped: Float[Tensor, " depth"]
    routings: tuple[Routing, ...]
    routed_rows: Int[Tensor, " R"]

    @classmethod
    def of(
        cls,
        hidden: Float[Tensor, "T D"],
        weight: Float[Tensor, "V D"],
        *,
        targets: Int[Tensor, " T"],
        rows: Int[Tensor, " T"],
        routings: Sequence[Routing],
        routed_rows: Int[Tensor, " R"],
        memory_routings: Sequence[Routing] = (),
    ) -> "DecoderOutput":
        """Sums the layers' routing up.

        Args:
            hidden: See the class.
            weight: See the class.
            targets: See the class.
            rows: See the class.
            routings: Of prompts and targets.
            routed_rows: See the class.
            memory_routings: Of a memory that runs through the same layers once a study: its tokens weigh in losses
                and load by their number, but belong to no row.
        """
        balance, z, dropped, load = (hidden.new_zeros(size, dtype=torch.float32) for size in ((), (), (0,), (0, 0)))
        if routings:
            passes = (routings, memory_routings) if memory_routings else (routings,)
            layers = list(zip(*passes, strict=True))
            balance = _mean(layers, "load_balancing_loss").mean()
            z = _mean(layers, "z_loss").mean()
            dropped, load = _mean(layers, "dropped"), _mean(layers, "load")
        return cls(
            hidden=hidden,
            weight=weight,
            targets=targets,
            rows=rows,
            load_balancing_loss=balance,
            z_loss=z,
            expert_load=load,
            dropped=dropped,
            routings=tuple(routings),
            routed_rows=routed_rows,
        )

    @property
    def logits(self) -> Float[Tensor, "T V"]:
        """Of each target token, all at once; for training there is `cross_entropy`, which never holds so many."""
        return F.linear(self.hidden, self.weight)

    def cross_entropy(self) -> Float[Tensor, ""]:
        """The language loss, a mean over target tokens, in float32: `F.cross_entropy(logits, targets)`.

        Raises:
            ValueError: There is no target token.
        """
        return chunked_cross_entropy(self.hidden, self.weight, self.targets)


def _mean(layers: Sequence[tuple[Routing, ...]], name: str) -> Tensor:
    """One number (or load) a layer: the mean over its tokens, whichever pass they ran in."""
    rows = []
    for passes in layers:
        total = max(sum(len(routing.experts) for routing in passes), 1)
        parts = [getattr(routing, name) for routing in passes]
        if len(parts) > 1:
            parts = [part * (len(routing.experts) / total) for part, routing in zip(parts, passes, strict=True)]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def pack(prompt: Padded, target: Padded) -> tuple[Int[Tensor, "M L"], Int[Tensor, " M"]]:
    """Each row's prompt, then its target without the last token (which is only ever predicted), then padding.

    Returns:
        The rows, and their lengths.
    """
    lengths = (prompt.lengths + target.lengths - 1).clamp(min=0)
    both = torch.cat([prompt.values, target.values], dim=1)
    place = torch.arange(int(lengths.max()), device=both.device)[None]
    start = prompt.lengths[:, None]
    source = torch.where(place < start, place, prompt.values.shape[1] + place - start)
    ids = both.gather(1, source.clamp(max=both.shape[1] - 1))
    return ids.masked_fill(place >= lengths[:, None], SPECIAL_IDS.pad), lengths
