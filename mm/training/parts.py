"""Which parts of a model learn in a stage."""

from torch import nn


def learning(
    model: nn.Module, trains: tuple[str, ...], *, freeze: tuple[str, ...], unfreeze: tuple[str, ...]
) -> tuple[str, ...]:
    """Dotted names of the modules that learn, sorted.

    Args:
        model: Of the stage.
        trains: What the stage trains of models that have it.
        freeze: Whole parts that it shall leave alone.
        unfreeze: Modules that it shall train besides.

    Raises:
        ValueError: The model has no such part or module.
    """
    parts = {name for name, _ in model.named_children()}
    said = ", ".join(sorted(parts))
    if unknown := [name for name in freeze if name not in parts]:
        raise ValueError(f"freeze names parts of the model ({said}); got {', '.join(unknown)}")
    made = {name for name, _ in model.named_modules() if name}
    if unknown := [name for name in unfreeze if name not in made]:
        raise ValueError(
            f"unfreeze names parts of the model ({said}) or, with dots, modules within; got {', '.join(unknown)}"
        )
    return tuple(sorted((set(trains) & made) - set(freeze) | set(unfreeze)))


def top_names(names: tuple[str, ...]) -> list[str]:
    """The first two words of dotted names, each once."""
    return sorted({".".join(name.split(".")[:2]) for name in names})
