"""What a plain language model is made of, as one frozen dataclass."""

from dataclasses import dataclass

from mm.decoder.grouped_query import QueryKeyNorm
from mm.decoder.groups import GroupLimit
from mm.decoder.latent import Latent
from mm.decoder.rotary_scaling import RotaryScaling
from mm.decoder.router import Gates


@dataclass(frozen=True)
class LanguageConfig:
    """What a language model is made of.

    Attributes:
        vocab_size: Number of tokens.
        width: Of tokens.
        depth: Number of layers.
        heads: Of queries.
        key_heads: Of keys and values; divides `heads`.
        head_width: Of one head; even.
        hidden: Width of a dense SwiGLU; 0: every layer has experts.
        context: Longest sequence in tokens.
        rotary_base: Of the rotary frequencies.
        rotary_scaling: How they were slowed down for a longer context; None: they weren't.
        norm_eps: Of all norms.
        norm: Of queries and keys, see `GroupedQueryAttention`.
        window: A token sees itself and `window - 1` tokens before it; None: all.
        tied: The output weights are the embedding's.
        latent: Multi-head latent attention of these sizes; `key_heads`, `head_width` and `norm` are then unused.
        neighbours: How the turned channels of latent attention pair, see `LatentAttention`.
        num_experts: Routed experts a layer; 0: every layer is dense.
        experts_per_token: How many a token visits.
        expert_width: Hidden width of an expert.
        shared_expert_width: Hidden width of the expert that every token visits; 0: there is none.
        gates: See `Router`.
        gate_scale: Times the gates, see `Router`.
        groups: Of experts that a token's choice is limited to, see `Router`; None: it isn't.
        selection_bias: Whether a bias keeps the experts' load in balance, see `Router`.
        dense_layers: Layers without experts all the same.
        end_ids: Tokens that end a text.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    key_heads: int
    head_width: int
    hidden: int
    context: int
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    norm_eps: float = 1e-6
    norm: QueryKeyNorm = "none"
    window: int | None = None
    tied: bool = False
    latent: Latent | None = None
    neighbours: bool = True
    num_experts: int = 0
    experts_per_token: int = 2
    expert_width: int = 0
    shared_expert_width: int = 0
    gates: Gates = "renormalised"
    gate_scale: float = 1.0
    groups: GroupLimit | None = None
    selection_bias: bool = False
    dense_layers: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "depth", "heads", "key_heads", "head_width", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.key_heads:
            raise ValueError(f"key_heads must divide heads, got key_heads={self.key_heads}, heads={self.heads}")
        if self.head_width % 2:
            raise ValueError(f"head_width must be even for rotary positions, got {self.head_width}")
        if self.rotary_scaling is not None and self.rotary_base <= 1:
            raise ValueError(f"rotary_base must be above 1 where rotary_scaling is given, got {self.rotary_base}")
        if self.window is not None and not 1 <= self.window <= self.context:
            raise ValueError(f"window must be 1..{self.context} (context) or null, got {self.window}")
        if self.shared_expert_width < 0:
            raise ValueError(f"shared_expert_width must be at least 0, got {self.shared_expert_width}")
        if not self.num_experts and (self.shared_expert_width or self.groups is not None or self.selection_bias):
            raise ValueError("shared_expert_width, groups and selection_bias need experts, got num_experts 0")
        if any(not 0 <= layer < self.depth for layer in self.dense_layers):
            raise ValueError(f"dense_layers must be 0..{self.depth - 1}, got {self.dense_layers}")
        if self.hidden < 1 and not all(self.has_experts(layer) for layer in range(self.depth)):
            raise ValueError(f"hidden must be at least 1 where a layer is dense, got {self.hidden}")

    def has_experts(self, layer: int) -> bool:
        """Whether that layer is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers
