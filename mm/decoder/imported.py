"""What makes an open model ours and back: ten rows in front of its vocabulary, and experts where it has none."""

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from mm.batch import NUM_SPECIALS, SPECIAL_IDS
from mm.decoder.language import LanguageLayer, LanguageModel
from mm.decoder.language_config import LanguageConfig
from mm.decoder.upcycle import upcycle
from mm.transformer import SwiGLU

TABLES: Final = ("embedding.weight", "output.weight")


@torch.no_grad()
def with_specials(model: LanguageModel) -> LanguageModel:
    """The same model, its token i now id 10 + i.

    The row of `<end>` is a copy of that of the model's own end of text (the first one), all others are the mean row.

    Raises:
        ValueError: An end of text is no token.
    """
    config = model.config
    if any(index >= config.vocab_size for index in config.end_ids):
        raise ValueError(f"end_ids must be below vocab_size {config.vocab_size}, got {max(config.end_ids)}")
    ends = (SPECIAL_IDS.end, *(NUM_SPECIALS + index for index in config.end_ids))
    weights = model.state_dict()
    for name in TABLES:
        if name in weights:
            table = weights[name]
            front = table.mean(0, dtype=torch.float32).to(table.dtype).repeat(NUM_SPECIALS, 1)
            if config.end_ids:
                front[SPECIAL_IDS.end] = table[config.end_ids[0]]
            weights[name] = torch.cat([front, table])
    return _made(replace(config, vocab_size=NUM_SPECIALS + config.vocab_size, end_ids=ends), weights)


def without_specials(model: LanguageModel) -> LanguageModel:
    """What `with_specials` was given, but for what training changed.

    Raises:
        ValueError: The vocabulary has no room for the special ids.
    """
    config = model.config
    if config.vocab_size <= NUM_SPECIALS:
        raise ValueError(f"vocab_size must be above {NUM_SPECIALS} (special ids), got {config.vocab_size}")
    weights = model.state_dict()
    for name in TABLES:
        if name in weights:
            weights[name] = weights[name][NUM_SPECIALS:].clone()
    ends = tuple(index - NUM_SPECIALS for index in config.end_ids if index >= NUM_SPECIALS)
    return _made(replace(config, vocab_size=config.vocab_size - NUM_SPECIALS, end_ids=ends), weights)


def upcycled(model: LanguageModel, *, num_experts: int, experts_per_token: int = 2, seed: int = 0) -> LanguageModel:
    """Sparse upcycling of a whole dense model (see `upcycle`): equal to it until training starts.

    Llama becomes what Mixtral is, Qwen3 what Qwen3-MoE is.

    Args:
        model: Dense; it is used up.
        num_experts: Copies of every feed-forward.
        experts_per_token: How many of them a token visits.
        seed: Of the routers' fresh weights.

    Raises:
        ValueError: The model has experts already, or the numbers don't fit together.
    """
    if model.config.num_experts:
        raise ValueError(f"upcycling starts from a dense model, this one has {model.config.num_experts} experts")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.layers:
            assert isinstance(layer, LanguageLayer)
            assert isinstance(layer.feed_forward, SwiGLU)
            layer.feed_forward = upcycle(
                layer.feed_forward, num_experts=num_experts, experts_per_token=experts_per_token
            )
    config = replace(
        model.config,
        hidden=0,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_width=model.config.hidden,
        gates="renormalised",
    )
    return _made(config, model.state_dict())


def _made(config: LanguageConfig, weights: dict[str, Tensor]) -> LanguageModel:
    with torch.device("meta"):
        made = LanguageModel(config)
    made.load_state_dict(weights, assign=True)
    return made.eval()
