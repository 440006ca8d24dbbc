"""Clinical records: numbers in canonical units, the fact that one is missing, and words."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mm.attention import Keys
from mm.batch import Records, Tokens
from mm.encoders.base import Encoder
from mm.encoders.shared import init_weights
from mm.ontology import MEASUREMENTS
from mm.transformer import Block, RMSNorm

FARTHEST = 6.0
"""Standard deviations beyond which a value is taken for that extreme (a slip of the unit isn't 100 sd of fever)."""


class RecordEncoder(Encoder):
    """One token a measurement and one a word, mixed by a small transformer.

    A missing value has an embedding of its own: that nobody measured the CRP says something too.

    Args:
        vocab_size: Of the tokenizer that made the words.
        width: Of tokens.
        depth: Number of blocks.
        heads: Number of heads.
        dropout: In training only.
    """

    mean: Tensor
    sd: Tensor
    log: Tensor

    def __init__(
        self, *, vocab_size: int = 2048, width: int = 96, depth: int = 2, heads: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.width = width
        self.measurement = nn.Embedding(len(MEASUREMENTS), width)
        self.missing = nn.Embedding(len(MEASUREMENTS), width)
        self.value = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.word = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, rotary_base=10000.0, dropout=dropout) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.apply(init_weights)
        # Values lie near 1, where weights of 0.02 would make all of them look alike.
        first = self.value[0]
        assert isinstance(first, nn.Linear)
        nn.init.normal_(first.weight)
        nn.init.uniform_(first.bias, -2, 2)
        self.register_buffer("mean", torch.tensor([item.mean for item in MEASUREMENTS]), persistent=False)
        self.register_buffer("sd", torch.tensor([item.sd for item in MEASUREMENTS]), persistent=False)
        self.register_buffer("log", torch.tensor([item.log for item in MEASUREMENTS]), persistent=False)

    def standardise(self, values: Float[Tensor, "B R"], known: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
        """Standard deviations from the population mean, at most `FARTHEST`; 0 where unknown."""
        safe = torch.where(known, values, 1.0)
        scaled = torch.where(self.log, safe.clamp(min=1e-3).log(), safe)
        return ((scaled - self.mean) / self.sd).clamp(-FARTHEST, FARTHEST).masked_fill(~known, 0)

    def forward(self, x: Records) -> Tokens:
        """Tokens of measurements, then of words; a study without a record has none."""
        numbers = self.value(self.standardise(x.values, x.known)[..., None]) + self.measurement.weight
        numbers = torch.where(x.known[..., None], numbers, self.missing.weight.to(numbers.dtype))
        words = self.word(x.words.values)
        mask = torch.cat([torch.ones_like(x.known), x.words.mask], dim=1) & x.present[:, None]
        # Measurements have no order: they all stand before the first word.
        places = torch.cat(
            [x.words.lengths.new_zeros(x.known.shape[1]), 1 + torch.arange(words.shape[1], device=words.device)]
        )
        tokens = torch.cat([numbers, words.to(numbers.dtype)], dim=1)
        for block in self.blocks:
            tokens = block(tokens, mask=Keys(mask), positions=places[None])
        return Tokens(self.norm(tokens).masked_fill(~mask[..., None], 0), mask)
