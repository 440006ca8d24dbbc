"""How probable a decoder finds given answers: a tree over their tokens, each distinct beginning read once."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.decoder.cache import DecodingState
from mm.decoder.generate import StepwiseDecoder

MOST_BYTES: Final = 256 << 20
"""Of the beginnings that are read together: each has a copy of its row's cache and memory."""
_MOST_ROWS: Final = 1024


@dataclass(frozen=True)
class _Tree:
    """Nodes breadth first, 0 the root: the children of node n are `first[n]`, `first[n]` + 1 ... `number[n]` of them.

    Attributes:
        token: On the way into each node; the root has none.
        first: The first child.
        number: Of children.
        ends: The node where each answer ends.
    """

    token: Int[Tensor, " N"]
    first: Int[Tensor, " N"]
    number: Int[Tensor, " N"]
    ends: Int[Tensor, " A"]

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]], device: torch.device) -> "_Tree":
        token, first, number, ends = [-1], list[int](), list[int](), [0] * len(answers)
        waiting = deque([(list(range(len(answers))), 0)])
        while waiting:
            passing, depth = waiting.popleft()
            following: dict[int, list[int]] = {}
            for answer in passing:
                if len(answers[answer]) > depth:
                    following.setdefault(answers[answer][depth], []).append(answer)
            first.append(len(token))
            number.append(len(following))
            for index, those in following.items():
                for answer in those:
                    ends[answer] = len(token)  # until a longer beginning of it comes
                token.append(index)
                waiting.append((those, depth + 1))
        return cls(*(torch.tensor(values, device=device) for values in (token, first, number, ends)))


@dataclass(frozen=True)
class _Work:
    """Beginnings to read on: row `rows[i]` of the result, at node `nodes[i]`, behind row `parents[i]` of a state."""

    rows: Int[Tensor, " R"]
    nodes: Int[Tensor, " R"]
    parents: Int[Tensor, " R"]
    state: DecodingState


def score_answers(
    decoder: StepwiseDecoder,
    logits: Float[Tensor, "M V"],
    state: DecodingState,
    answers: Sequence[Sequence[int]],
    *,
    most_rows: int | None = None,
) -> Float[Tensor, "M A"]:
    """Log-probability of every answer behind every prompt, as reading it token by token would give.

    Answers share their common beginnings: each distinct one is read once a prompt.

    Args:
        decoder: Has read the prompts.
        logits: Behind each prompt.
        state: Behind each prompt, with room for the longest answer.
        answers: Token ids; to count where an answer ends, each has `<end>` as its last.
        most_rows: Beginnings that are read together; None: 1024, or fewer where those need over 256 MB. The fewer, the
            thinner the ends of the tree are read.

    Raises:
        ValueError: No answer, an empty one, an id that the decoder doesn't have, or no rows to read together.
    """
    lengths = [len(answer) for answer in answers]
    if min(lengths, default=0) < 1:
        raise ValueError(f"answers must be one or more of at least 1 token, got lengths {lengths[:5]}")
    vocab_size = logits.shape[1]
    wrong = next((index for answer in answers for index in answer if not 0 <= index < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"answers must hold ids 0..{vocab_size - 1}, got {wrong}")
    if most_rows is None:
        most_rows = min(_MOST_ROWS, max(MOST_BYTES // max(state.row_bytes, 1), 1))
    if most_rows < 1:
        raise ValueError(f"most_rows must be at least 1, got {most_rows}")
    tree = _Tree.of(answers, logits.device)
    totals = torch.zeros(len(logits), len(tree.token), device=logits.device)
    rows = torch.arange(len(logits), device=logits.device)
    waiting = _spread(totals, tree, logits, _Work(rows, torch.zeros_like(rows), rows, state), most_rows)
    while waiting:  # the last first: the states that are kept are those of one way down the tree
        work = waiting.pop()
        logits, state = decoder.step(tree.token[work.nodes], work.state.select(work.parents))
        waiting += _spread(totals, tree, logits, _Work(work.rows, work.nodes, work.parents, state), most_rows)
    return totals[:, tree.ends]


def _spread(
    totals: Float[Tensor, "M N"], tree: _Tree, logits: Float[Tensor, "R V"], read: _Work, most_rows: int
) -> list[_Work]:
    """Scores the children of what was read, in place, and says which of them must be read in turn."""
    number = tree.number[read.nodes]
    parents = torch.arange(len(number), device=number.device).repeat_interleave(number)
    places = torch.arange(len(parents), device=number.device) - (number.cumsum(0) - number)[parents]
    nodes, rows = tree.first[read.nodes][parents] + places, read.rows[parents]
    said = logits.float().log_softmax(-1)[parents, tree.token[nodes]]
    totals[rows, nodes] = totals[rows, read.nodes[parents]] + said
    on = (tree.number[nodes] > 0).nonzero()[:, 0]
    parts = [on[start : start + most_rows] for start in range(0, len(on), most_rows)]
    return [_Work(rows[part], nodes[part], parents[part], read.state) for part in parts]
