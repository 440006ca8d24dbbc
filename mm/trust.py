"""What a YAML file or a checkpoint may import.

A class path is imported before its type is checked, so a configuration runs code: everything is denied but a few
packages, and only the command line can add to them.
"""

from collections.abc import Collection, Sequence
from typing import Final

from jsonargparse import set_parsing_settings

TRUSTED: Final[tuple[str, ...]] = ("mm", "torch", "lightning", "timm", "torchaudio", "torchvision", "open_clip")

_named: dict[str, None] = {}
"""Packages that the command line has added, in that order; the parser's own list is one for the process too."""


def restrict_imports(trust: Sequence[str] = ()) -> None:
    """Denies every import path in configurations but those of `TRUSTED` and of all that was ever trusted.

    Holds for the process; a later call adds to the list and takes nothing away, so that a parser made behind the
    command line's (a checkpoint's, a data spec's) doesn't revoke what the user granted.

    Args:
        trust: Packages that the user named with `--trust`.

    Raises:
        ValueError: A name in `trust` is no import path.
    """
    for name in trust:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"--trust takes the import name of a package such as my_package; got {name!r}")
    _named.update(dict.fromkeys(trust))
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*TRUSTED, *_named])


def check_class(class_path: str, known: Collection[str], trust: Sequence[str], *, where: str) -> None:
    """Says in the user's words what the parser would say in its own, and before anything is imported.

    Args:
        class_path: As the file names it: with its package, or one of ours by its name alone.
        known: Names of ours that are accepted.
        trust: As of `restrict_imports`.
        where: The place in the file.

    Raises:
        ValueError: It is neither known nor of a package that may be imported.
    """
    package, dot, _ = class_path.partition(".")
    if dot and package not in {*TRUSTED, *(name.split(".")[0] for name in trust)}:
        raise ValueError(
            f"{where} names the class {class_path!r}; only classes of mm, and of packages named with --trust on the"
            " command line, are accepted"
        )
    if not dot and class_path not in known:
        raise ValueError(f"{where}: unknown class {class_path!r}; accepted: {', '.join(sorted(known))}")
