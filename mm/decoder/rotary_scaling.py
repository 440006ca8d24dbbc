"""Rotary positions of models that were stretched to a longer context than they first learnt."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.transformer import Angles, rotary_frequencies

Kind = Literal["linear", "llama3", "yarn"]
MOST = 2.0**20
"""Largest factor and number of turns, and the smallest as its inverse; no published model comes near."""


@dataclass(frozen=True)
class RotaryScaling:
    """How a model's rotary frequencies were slowed down.

    A pair of channels that turns many times within the original context tells near tokens apart and stays as it is;
    one that turns less than about once would meet angles it has never seen, and is slowed down by the factor. A ramp
    leads from the one to the other.

    Attributes:
        kind: "linear": every pair is slowed down (Chen et al. 2023); "llama3": the ramp rises with the number of
            turns (Llama 3.1, 2024); "yarn": it rises with the index of the pair, and the angles' cosine and sine are
            scaled too (Peng et al. 2023).
        factor: By how much; 1 or more.
        original_context: Tokens that the model first learnt; unused by "linear".
        slow: Turns within it up to which a pair is slowed down wholly; unused by "linear".
        fast: Turns from which it is left as it is; unused by "linear".
        attention_factor: Of cosine and sine, for "yarn"; None: from the factor.
        mscale: DeepSeek's numerator of that factor; 0: none. Given together with `mscale_all_dim`.
        mscale_all_dim: Its denominator. Latent attention has a factor on its scores in return, see `score_factor`.
        truncate: Whether the ends of YaRN's ramp are whole pairs.

    Raises:
        ValueError: Numbers out of range, or that the kind doesn't know.
    """

    kind: Kind
    factor: float
    original_context: int = 0
    slow: float = 1.0
    fast: float = 32.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.factor <= MOST:
            raise ValueError(f"factor of {self.kind!r} must be 1..{MOST:g}, got {self.factor}")
        if self.kind != "linear" and self.original_context < 1:
            raise ValueError(f"original_context of {self.kind!r} must be at least 1, got {self.original_context}")
        if not 1 / MOST <= self.slow < self.fast <= MOST:
            raise ValueError(
                f"slow (low_freq_factor, beta_slow) must be below fast (high_freq_factor, beta_fast), both within "
                f"{1 / MOST:g}..{MOST:g}, got slow={self.slow}, fast={self.fast}"
            )
        if self.kind != "yarn" and (self.attention_factor is not None or self.mscale or self.mscale_all_dim):
            raise ValueError(f"attention_factor, mscale and mscale_all_dim belong to 'yarn', got kind {self.kind!r}")
        if self.attention_factor is not None and not 0 < self.attention_factor <= MOST:
            raise ValueError(f"attention_factor must be above 0 and at most {MOST:g}, got {self.attention_factor}")
        if not (0 <= self.mscale <= MOST and 0 <= self.mscale_all_dim <= MOST):
            raise ValueError(f"mscale and mscale_all_dim must be 0..{MOST:g}, got {self.mscale}, {self.mscale_all_dim}")
        if (self.mscale > 0) != (self.mscale_all_dim > 0):
            # DeepSeek's code and transformers disagree about one without the other.
            raise ValueError(
                f"mscale and mscale_all_dim must be given together, got {self.mscale} and {self.mscale_all_dim}"
            )

    def frequencies(self, plain: Float[Tensor, " P"], *, base: float) -> Float[Tensor, " P"]:
        """Radians a position for each pair, from the unscaled ones (`mm.transformer.rotary_frequencies`) of a base."""
        if self.kind == "linear":
            return plain / self.factor
        kept = self._by_turns(plain) if self.kind == "llama3" else self._by_index(plain, base=base)
        return plain * kept + plain / self.factor * (1 - kept)

    @property
    def angle_factor(self) -> float:
        """Of cosine and sine: as scores are products of a turned query and key, its square works on them."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    @property
    def score_factor(self) -> float:
        """Of the scores of latent attention, whose keys have channels that aren't turned (DeepSeek-V2, V3)."""
        return self._growth(self.mscale_all_dim) ** 2

    def _growth(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0

    def _by_turns(self, plain: Tensor) -> Float[Tensor, " P"]:
        turns = self.original_context * plain / (2 * math.pi)
        return ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1)

    def _by_index(self, plain: Tensor, *, base: float) -> Float[Tensor, " P"]:
        pairs = len(plain)
        first, last = (self._pair_of(turns, pairs=pairs, base=base) for turns in (self.fast, self.slow))
        if self.truncate:
            first, last = float(math.floor(first)), float(math.ceil(last))
        # The upper bound counts channels, not pairs, in every implementation that models were trained with.
        first, last = max(first, 0.0), min(last, 2.0 * pairs - 1)
        width = last - first if last != first else 0.001
        index = torch.arange(pairs, dtype=torch.float32, device=plain.device)
        return 1 - ((index - first) / width).clamp(0, 1)

    def _pair_of(self, turns: float, *, pairs: int, base: float) -> float:
        """Index, not whole, of the pair that turns so often within the original context."""
        return pairs * math.log(self.original_context / (2 * math.pi * turns)) / math.log(base)


def rotary_angles(
    positions: Int[Tensor, "#B M"], *, head_width: int, base: float, scaling: RotaryScaling | None
) -> Angles:
    """Angles of positions for heads of that width, in float32, on the positions' device."""
    # Made anew each time, not kept: a module turned to bfloat16 would round its frequencies.
    plain = rotary_frequencies(head_width, base=base, device=positions.device)
    if scaling is None:
        return Angles.at(positions, plain)
    angles = Angles.at(positions, scaling.frequencies(plain, base=base))
    return Angles(angles.cos * scaling.angle_factor, angles.sin * scaling.angle_factor)
