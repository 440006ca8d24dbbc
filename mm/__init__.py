"""mm: structured, evidence-linked reports from medical studies. Research software, not a medical device."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm.training.checkpoint import Loaded

__version__ = "0.1.0"
__all__ = ["__version__", "load", "shipped"]


def load(path: "str | Path" = "default") -> "Loaded":
    """Opens a checkpoint folder (or a shipped one by name) for inference; see `mm.training.checkpoint.load`."""
    from mm.training.checkpoint import load as load_checkpoint

    return load_checkpoint(path)


def shipped(name: "str | Path") -> Path:
    """Where a recipe, pipeline or data spec lies: a path first, then the package's copy, then the checkout's.

    Args:
        name: A path to a YAML file, or the name of a shipped one with or without `.yaml`.

    Raises:
        ValueError: Nothing of that name; the message lists the shipped ones.
    """
    given = Path(name)
    if given.is_file():
        return given
    package = Path(__file__).parent
    roots = [package / "_shipped" / kind for kind in ("pipelines", "data_specs")]
    roots += [package.parent / kind for kind in ("pipelines", "data_specs")]
    stem = given.name.removesuffix(".yaml")
    for root in roots:
        candidate = root / f"{stem}.yaml"
        if given.parent == Path() and candidate.is_file():
            return candidate
    known = sorted({file.stem for root in roots for file in root.glob("*.yaml")})
    raise ValueError(f"no file and no shipped YAML {str(name)!r}; shipped: {', '.join(known)}")
