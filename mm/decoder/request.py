"""What is asked of the engine, and what it answers."""

from dataclasses import dataclass, field
from typing import Literal

from mm.decoder.generate import GREEDY, Sampling
from mm.decoder.memory import Memory

Slot = tuple[int, int, int, int, int]
Finish = Literal["end", "length", "stop"]


@dataclass(frozen=True)
class Request:
    """One row to write.

    Attributes:
        prompt: Token ids.
        memory: What it may read, from `Engine.remember`.
        slot: Indices as `mm.batch.slot` gives them; added where the prompt has its `<slot>` token.
        sampling: With one seed, and a grammar where the text must have a form.
        signature: Which inputs the study has, such as "volume+record"; requests of one kind are read together.
    """

    prompt: tuple[int, ...]
    memory: Memory = field(default_factory=lambda: Memory((), b""))
    slot: Slot = (0, 0, 0, 0, 0)
    sampling: Sampling = GREEDY
    signature: str = ""


@dataclass(frozen=True)
class Piece:
    """One token more of one request, as it is written.

    Attributes:
        request: Its index, in the order of `submit`.
        id: The token.
        log_probability: Under the model (temperature 1, all tokens, no penalty).
        finish: Why it was the last one; None: it wasn't.
    """

    request: int
    id: int
    log_probability: float
    finish: Finish | None


@dataclass(frozen=True)
class Completion:
    """Everything that one request got; `<end>` is the last id where `finish` is "end"."""

    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finish: Finish
