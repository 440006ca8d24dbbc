"""A plain decoder-only language model: what the open models are, read by `mm.decoder.huggingface`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm.attention import Causal, Mask, Packed, Visible, Window
from mm.batch import Padded
from mm.decoder.cache import DecodingState, LayerCache
from mm.decoder.experts import MixtureOfExperts
from mm.decoder.grouped_query import GroupedQueryAttention
from mm.decoder.language_config import LanguageConfig
from mm.decoder.latent import LatentAttention
from mm.decoder.paged import visible
from mm.decoder.prepared import LaidLinear, can_lay, prepared
from mm.decoder.rotary_scaling import rotary_angles
from mm.decoder.router import Routing
from mm.transformer import Angles, KeyValueCache, RMSNorm, SwiGLU


@dataclass(frozen=True)
class LanguageOutput:
    """What training needs.

    Attributes:
        logits: Of the token behind each token; of no meaning in padding.
        routings: The routers' choices and losses, over real tokens, one for every layer that has experts.
    """

    logits: Float[Tensor, "M L V"]
    routings: tuple[Routing, ...]


class LanguageLayer(nn.Module):
    """Pre-norm: self-attention, then SwiGLU or a mixture of experts."""

    def __init__(self, config: LanguageConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = (
            GroupedQueryAttention(
                config.width,
                heads=config.heads,
                key_heads=config.key_heads,
                head_width=config.head_width,
                norm=config.norm,
                norm_eps=config.norm_eps,
            )
            if config.latent is None
            else LatentAttention(
                config.width,
                heads=config.heads,
                sizes=config.latent,
                score_factor=1.0 if config.rotary_scaling is None else config.rotary_scaling.score_factor,
                neighbours=config.neighbours,
            )
        )
        self.feed_forward_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.feed_forward = (
            MixtureOfExperts(
                config.width,
                num_experts=config.num_experts,
                experts_per_token=config.experts_per_token,
                expert_width=config.expert_width,
                shared_expert_width=config.shared_expert_width,
                gates=config.gates,
                scale=config.gate_scale,
                groups=config.groups,
                selection_bias=config.selection_bias,
            )
            if config.has_experts(index)
            else SwiGLU(config.width, config.hidden)
        )

    def forward(
        self,
        x: Float[Tensor, "M L D"],
        *,
        mask: Visible,
        angles: Angles,
        real: Int[Tensor, " T"] | None = None,
        cache: KeyValueCache | None = None,
        kept: Int[Tensor, " K"] | None = None,
    ) -> tuple[Float[Tensor, "M K D"], Routing | None]:
        """One layer.

        Args:
            x: Rows.
            mask: Of self-attention.
            angles: Of each token's position.
            real: Places of real tokens in the flattened rows, None for all: only they are routed.
            cache: Of self-attention.
            kept: Places in every row that go on behind self-attention; None: all (K = L). Not together with `real`.
        """
        x = x + self.attention(self.attention_norm(x), mask=mask, angles=angles, cache=cache)
        x = x if kept is None else x.index_select(1, kept)
        if isinstance(self.feed_forward, SwiGLU):
            return x + self.feed_forward(self.feed_forward_norm(x)), None
        flat = x.flatten(0, 1)
        if real is None:
            mixed, routing = self.feed_forward(self.feed_forward_norm(flat))
            return (flat + mixed.to(flat.dtype)).view_as(x), routing
        mixed, routing = self.feed_forward(self.feed_forward_norm(flat.index_select(0, real)))
        return flat.index_add(0, real, mixed.to(flat.dtype)).view_as(x), routing


class LanguageModel(nn.Module):
    """Embedding, layers, norm, output.

    Llama, Qwen3, OLMoE, Mixtral, Qwen3-MoE, DeepSeek-V2 and DeepSeek-V3 are configurations of it.

    Rows are padded on the right. Padding is never routed, never counted and never changes a result.

    Example:
        output = model(ids, lengths=lengths)                    # training
        logits, state = model.read(prompt, capacity=256)        # generation: the whole prompt at once,
        logits, state = model.step(logits.argmax(-1), state)    # then token by token
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(LanguageLayer(config, index) for index in range(config.depth))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.output = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)

    def init_weights(self, *, std: float = 0.02) -> None:
        """Fresh weights; those that write into the residual are scaled down by the root of their number."""
        branches = (2 * self.config.depth) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        with torch.no_grad():
            for layer in self._layers():
                layer.attention.out.weight.mul_(branches)
                if isinstance(layer.feed_forward, SwiGLU):
                    layer.feed_forward.down.weight.mul_(branches)
                else:
                    layer.feed_forward.experts.init_weights(output_scale=branches)
                    if layer.feed_forward.shared is not None:
                        layer.feed_forward.shared.down.weight.mul_(branches)

    def forward(self, ids: Int[Tensor, "M L"], *, lengths: Int[Tensor, " M"] | None = None) -> LanguageOutput:
        """Logits behind every token of whole rows.

        Args:
            ids: Tokens.
            lengths: Of each row; None: all full.

        Raises:
            ValueError: The rows are longer than the context.
        """
        hidden, routings = self.hidden(ids, lengths=lengths)
        return LanguageOutput(self.logits(hidden), routings)

    def hidden(
        self,
        ids: Int[Tensor, "M L"],
        *,
        lengths: Int[Tensor, " M"] | None = None,
        caches: tuple[LayerCache, ...] | None = None,
    ) -> tuple[Float[Tensor, "M L D"], tuple[Routing, ...]]:
        """What `logits` reads, so that the logits of a long batch need never exist at once.

        Args:
            ids: Tokens.
            lengths: Of each row; None: all full.
            caches: Empty ones to fill, one a layer.
        """
        self._fits(ids.shape[1])
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        real = None if lengths is None else (places < lengths[:, None]).flatten().nonzero()[:, 0]
        window = self.config.window
        mask: Mask = Causal() if window is None or window >= ids.shape[1] else Window(window - 1)
        return self._run(self.embedding(ids), mask=mask, positions=places, real=real, caches=caches)

    def packed(self, rows: Padded) -> tuple[Float[Tensor, "T D"], tuple[Routing, ...]]:
        """The same over real tokens alone, one row behind the other: nothing is computed for padding.

        For training on rows of very unequal length: xFormers' block-diagonal kernel on CUDA, elsewhere row by row.

        Args:
            rows: Of at least one token each.

        Returns:
            What `logits` reads for the T real tokens of all rows, in order, and the routers' choices.

        Raises:
            ValueError: A row is empty, or longer than the context.
        """
        lengths = tuple(rows.lengths.tolist())
        if not lengths or min(lengths) < 1:
            raise ValueError("every row must have at least 1 token, got 0")
        self._fits(max(lengths))
        places = torch.arange(rows.values.shape[1], device=rows.values.device).expand_as(rows.values)[rows.mask]
        window = self.config.window
        mask = Packed(lengths, causal=True, left=None if window is None else window - 1)
        hidden, routings = self._run(self.embedding(rows.values[rows.mask])[None], mask=mask, positions=places[None])
        return hidden[0], routings

    def prepared(self) -> "LanguageModel":
        """A twin for generation, see `mm.decoder.prepared`."""
        twin, weight = prepared(self), self.embedding.weight if self.output is None else self.output.weight
        if can_lay(weight):
            twin.output = LaidLinear(weight)
        return twin

    def logits(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Of the next token."""
        normed = self.norm(hidden)
        out: Tensor = F.linear(normed, self.embedding.weight) if self.output is None else self.output(normed)
        return out

    def read(self, prompt: Padded, *, capacity: int) -> tuple[Float[Tensor, "M V"], DecodingState]:
        """Reads prompts and remembers them.

        Args:
            prompt: Rows of at least one token.
            capacity: Tokens of the longest row, those to be written included.

        Returns:
            Logits of each row's next token, and the state for `step`.

        Raises:
            ValueError: A prompt is empty, or the capacity is below the prompt or above the context.
        """
        if len(prompt.lengths) == 0 or int(prompt.lengths.min()) < 1:
            raise ValueError("every prompt must have at least 1 token, got 0")
        if capacity < prompt.values.shape[1]:
            raise ValueError(f"capacity must be at least the prompt's {prompt.values.shape[1]}, got {capacity}")
        self._fits(capacity)
        start = torch.zeros_like(prompt.lengths)
        caches = tuple(LayerCache(start, capacity=capacity) for _ in self.layers)
        hidden, _ = self.hidden(prompt.values, lengths=prompt.lengths, caches=caches)
        last = hidden[torch.arange(len(hidden), device=hidden.device), prompt.lengths - 1]
        return self.logits(last), DecodingState(caches, (), start).advance(prompt.lengths)

    def step(self, ids: Int[Tensor, " M"], state: DecodingState) -> tuple[Float[Tensor, "M V"], DecodingState]:
        """Logits behind one more token a row, and the state after it."""
        here = state.lengths[:, None]
        mask = visible(here, state.layers[0].extent + 1, window=self.config.window)
        hidden, _ = self._run(self.embedding(ids[:, None]), mask=mask, positions=here, caches=state.layers)
        return self.logits(hidden[:, 0]), state.advance(state.lengths + 1)

    def _run(
        self,
        x: Float[Tensor, "M L D"],
        *,
        mask: Visible,
        positions: Int[Tensor, "#M L"],
        real: Int[Tensor, " T"] | None = None,
        caches: Sequence[KeyValueCache] | None = None,
        kept: Int[Tensor, " K"] | None = None,
        between: Callable[[int, Tensor], Tensor] | None = None,
    ) -> tuple[Float[Tensor, "M K D"], tuple[Routing, ...]]:
        """All layers; `between` may change what goes into each, given its index: what `WritingModel` reads."""
        latent = self.config.latent
        width = self.config.head_width if latent is None else latent.turned_width
        base, scaling = self.config.rotary_base, self.config.rotary_scaling
        angles = rotary_angles(positions, head_width=width, base=base, scaling=scaling)
        routings = []
        for index, layer in enumerate(self._layers()):
            cache = None if caches is None else caches[index]
            x = x if between is None else between(index, x)
            last = kept if index == self.config.depth - 1 else None
            x, routing = layer(x, mask=mask, angles=angles, real=real, cache=cache, kept=last)
            routings += [] if routing is None else [routing]
        return x, tuple(routings)

    def _layers(self) -> list[LanguageLayer]:
        return [layer for layer in self.layers if isinstance(layer, LanguageLayer)]

    def _fits(self, tokens: int) -> None:
        if tokens > self.config.context:
            raise ValueError(f"at most {self.config.context} tokens (context) fit in a row, got {tokens}")
