"""Layer-wise learning rates: the nearer a pretrained tower's block is to its input, the less it moves.

Bao et al., "BEiT: BERT Pre-Training of Image Transformers" (ICLR 2022), appendix: of L blocks, block i (from 1)
learns at decay ** (L + 1 - i) of the rate, what stands before the blocks at decay ** (L + 1), all behind them fully.
"""

from typing import Final

from torch import nn

TOWERS: Final = ("volume", "image", "audio", "record", "text")
STACKS: Final = frozenset({"blocks", "layers", "layer", "resblocks"})
"""What timm, torchaudio, transformers and open_clip call the list of a transformer's blocks."""
BEHIND: Final = frozenset(
    {"norm", "fc_norm", "conv_head", "bn2", "ln_post", "ln_final", "post_layernorm", "final_layer_norm", "head"}
    | {"pooler", "proj", "text_projection", "score", "site", "place", "position"}
)
"""Parts of a tower outside its blocks that come behind them; all others stand before."""


def layer_rates(model: nn.Module, decay: float) -> dict[str, float]:
    """Factor on the learning rate of each parameter of the towers, by name; any other parameter's is 1.

    Args:
        model: With towers by their names in `MultimodalModel`. One without a list of blocks, such as a ResNet, is
            left out: its rate is 1 throughout.
        decay: From one block to the one before.
    """
    rates: dict[str, float] = {}
    for tower in TOWERS:
        network = getattr(model, tower, None)
        stack = None if network is None else _stack(network)
        if network is None or stack is None:
            continue
        place, depth = stack
        for name, _ in network.named_parameters():
            rates[f"{tower}.{name}"] = decay ** (depth + 1 - _level(name, place, depth))
    return rates


def _stack(network: nn.Module) -> tuple[str, int] | None:
    """Name and length of the list of blocks: of those with equal blocks, else of all, the one with most weights."""
    found: list[tuple[bool, int, str, int]] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and name.rpartition(".")[2] in STACKS and len(module):
            sizes = [sum(item.numel() for item in block.parameters()) for block in module]
            found.append((len(set(sizes)) == 1, sum(sizes), name, len(sizes)))
    return max(found)[2:] if found else None


def _level(name: str, place: str, depth: int) -> int:
    """0 before the blocks, 1 to `depth` within, `depth` + 1 behind."""
    own, path = name.split("."), place.split(".")
    if own[: len(path)] == path:
        return int(own[len(path)]) + 1
    shared = next(index for index, part in enumerate(own) if part != path[index])
    return depth + 1 if own[shared] in BEHIND else 0
