"""Heat maps of who calls whom: experts by finding and by modality, as the last validation of the write stage saw it."""

from pathlib import Path
from typing import Final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm import ontology
from mm.training.checkpoint import find, read_card

NO_FINDING: Final = "no finding"
"""Sentences and answers whose slot names none."""


def expert_visits(path: str | Path) -> Int[Tensor, "depth G E"]:
    """The counts that a checkpoint keeps: how often tokens about nothing, then of each finding, chose each expert.

    Raises:
        ValueError: No write stage of it counted, or the counts don't fit the findings.
    """
    counted = [stage["experts"] for stage in read_card(find(path)).stages if "experts" in stage]
    if not counted:
        raise ValueError(f"checkpoint {str(path)!r} keeps no counts of experts; train its write stage with validation")
    counts = torch.as_tensor(counted[-1])
    if counts.ndim != 3 or counts.shape[1] != 1 + len(ontology.CODES):
        raise ValueError(
            f"checkpoint {str(path)!r}: experts must be layers x {1 + len(ontology.CODES)} findings x experts, "
            f"got {tuple(counts.shape)}"
        )
    return counts


def by_modality(counts: Int[Tensor, "depth G E"]) -> Int[Tensor, "depth S E"]:
    """The same by the modality that can show the finding; what two modalities show counts for both."""
    shown = [[source in finding.sources for finding in ontology.FINDINGS] for source in get_args(ontology.Source)]
    return torch.einsum("sg,lge->lse", torch.tensor(shown).long(), counts[:, 1:])


def shares(counts: Int[Tensor, "depth G E"]) -> Float[Tensor, "depth G E"]:
    """Each row's share of its visits; NaN where it has none."""
    return counts / counts.sum(-1, keepdim=True)


def draw(counts: Int[Tensor, "depth G E"], file: Path) -> None:
    """Draws a column a layer, findings above modalities; grey where nothing was counted.

    Args:
        counts: Of `expert_visits`.
        file: The PNG to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the heat maps need matplotlib: pip install 'mm-report[evaluate]'") from error
    depth, groups, experts = counts.shape
    sources = get_args(ontology.Source)
    colours = colormaps["viridis"].with_extremes(bad="#dddddd")
    figure = Figure(
        figsize=(2.2 + depth * max(2.0, 0.28 * experts), 1.6 + 0.26 * (groups + len(sources))), layout="constrained"
    )
    axes = figure.subplots(2, depth, squeeze=False, height_ratios=(groups, len(sources)))
    most = float(shares(counts).nan_to_num().max()) or 1.0
    rows = ((NO_FINDING, *ontology.CODES), sources)
    for above, (names, table) in enumerate(zip(rows, (shares(counts), shares(by_modality(counts))), strict=True)):
        for layer in range(depth):
            here = axes[above, layer]
            here.imshow(table[layer].numpy(), aspect="auto", vmin=0, vmax=most, cmap=colours)
            here.set_yticks(range(len(names)), names if layer == 0 else [""] * len(names), fontsize=8)
            here.set_xticks(range(experts), [str(expert) for expert in range(experts)], fontsize=7)
            if above == 0:
                here.set_title(f"layer {layer + 1}", fontsize=9)
            else:
                here.set_xlabel("expert", fontsize=8)
    figure.colorbar(axes[0, 0].images[0], ax=axes, label="share of the choices", shrink=0.6)
    figure.savefig(file, dpi=130, format="png")
