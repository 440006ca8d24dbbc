"""From logits to sentences: the next token greedily or by chance, and the loop around it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm.batch import SPECIAL_IDS, Padded
from mm.decoder.cache import DecodingState
from mm.decoder.consensus import consensus
from mm.decoder.grammar import Grammar, forbidden

NEVER_WRITTEN = (SPECIAL_IDS.pad, SPECIAL_IDS.en, SPECIAL_IDS.zh, SPECIAL_IDS.slot, SPECIAL_IDS.answer)
"""Specials that only ever stand in a prompt."""
CONSENSUS_TOP_P: Final = 0.9
"""Of sentences that are drawn to agree: without the tail, in which a small decoder garbles words."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: A row that has not ended by then is cut.
        temperature: 0: the most probable token; higher: more chance.
        top_p: Only the most probable tokens that together reach this mass are drawn from (Holtzman 2020).
        seed: Of all rows, or one a row. A row's draws depend on its own seed alone, not on its neighbours.
        repetition_penalty: A logit of a token that the row has written before is divided by it where positive and
            multiplied where negative (Keskar et al. 2019, CTRL); the prompt doesn't count. 1: none.
        stop: A row ends with the token that completes one of these strings.
        grammar: A row writes what this allows and then ends. One that `max_new_tokens` cuts isn't whole, and has no
            `<end>`.
        samples: Texts drawn for each row, of which the one that agrees most with the others is kept, see
            `mm.decoder.consensus`.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | tuple[int, ...] = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    grammar: Grammar | None = None
    samples: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError(f"top_p must be 1 with temperature 0 (greedy draws from no set), got {self.top_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if "" in self.stop:
            raise ValueError(f"stop must hold strings of at least one character, got {self.stop!r}")
        if self.stop and self.grammar is not None:
            raise ValueError(f"stop must be empty with a grammar, whose texts it would cut, got {self.stop!r}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples must be 1 with temperature 0 (all would be alike), got {self.samples}")

    @classmethod
    def consensus_of(cls, samples: int) -> "Sampling":
        """The consensus of so many texts a row, drawn without the tail; greedy for one."""
        return cls() if samples == 1 else cls(temperature=1.0, top_p=CONSENSUS_TOP_P, samples=samples)

    def seeds(self, rows: int) -> tuple[int, ...]:
        """One a row.

        Raises:
            ValueError: There is not one seed a row.
        """
        seeds = (self.seed,) * rows if isinstance(self.seed, int) else self.seed
        if len(seeds) != rows:
            raise ValueError(f"seed must be one number or {rows} (one a row), got {len(seeds)}")
        return seeds

    def check_vocabulary(self, vocab_size: int) -> None:
        """Whether a decoder of that many ids can write by the grammar.

        Raises:
            ValueError: The grammar is for more ids.
        """
        if self.grammar is not None and self.grammar.vocab_size > vocab_size:
            raise ValueError(
                f"grammar must be for at most the decoder's {vocab_size} ids, got {self.grammar.vocab_size}"
            )

    def draws(self, rows: int) -> Float[Tensor, "R S"]:
        """Uniform numbers for every step of `samples` texts a row, those of a row one behind the other.

        Raises:
            ValueError: There is not one seed a row.
        """
        seeds = self.seeds(rows)
        made = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
        streams = {seed: torch.rand(self.samples, self.max_new_tokens, generator=made[seed]) for seed in made}
        return torch.cat([streams[seed] for seed in seeds]) if seeds else torch.empty(0, self.max_new_tokens)


GREEDY = Sampling()


@dataclass(frozen=True)
class Generated:
    """What was written, row by row.

    Attributes:
        ids: New tokens; `<end>` is the last one where the row ended by itself.
        log_probabilities: Of each token under the model (temperature 1, all tokens); 0 in padding.
    """

    ids: Padded
    log_probabilities: Float[Tensor, "M L"]

    @property
    def log_probability(self) -> Float[Tensor, " M"]:
        """Of each whole row."""
        return self.log_probabilities.sum(-1)

    def rows(self) -> list[list[int]]:
        """The ids without padding."""
        return self.ids.rows()

    def select(self, rows: Int[Tensor, " R"]) -> "Generated":
        """Some of the rows."""
        return Generated(self.ids.select(rows), self.log_probabilities[rows])


@runtime_checkable
class StepwiseDecoder(Protocol):
    """What the loop needs of a decoder after its prompt was read."""

    def step(self, ids: Int[Tensor, " M"], state: DecodingState) -> tuple[Float[Tensor, "M V"], DecodingState]:
        """Logits behind one more token a row."""
        ...


def choose(
    logits: Float[Tensor, "M V"],
    *,
    sampling: Sampling,
    draw: Float[Tensor, " M"],
    written: Int[Tensor, "M W"] | None = None,
    forbidden: Bool[Tensor, "M V"] | None = None,
) -> tuple[Int[Tensor, " M"], Float[Tensor, " M"]]:
    """The next token of each row and its log-probability.

    Args:
        logits: Of the next token.
        sampling: Temperature, top_p and repetition penalty.
        draw: A uniform number a row; not used when greedy.
        written: What each row has written so far, padded; needed for a repetition penalty.
        forbidden: True for what a row can't write, by its grammar; None for rows without.
    """
    log_probabilities = allowed = logits.float().log_softmax(-1)
    if sampling.repetition_penalty != 1:
        assert written is not None, "a repetition penalty needs what was written"
        allowed = penalised(logits.float(), written, sampling.repetition_penalty).log_softmax(-1)
    allowed.index_fill_(-1, _never_written(logits.device), -torch.inf)  # whose probabilities nobody asks for
    if forbidden is not None:
        allowed.masked_fill_(forbidden.to(allowed.device), -torch.inf)
    if sampling.temperature == 0:
        ids = allowed.argmax(-1)
    else:
        probabilities, ranked = (allowed / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        # The token that crosses top_p still counts, so the set is never empty.
        kept = (probabilities.cumsum(-1) - probabilities < sampling.top_p) & (probabilities > 0)
        mass = (probabilities * kept).cumsum(-1)
        place = torch.searchsorted(mass, draw[:, None] * mass[:, -1:], right=True)
        place = place.minimum(kept.sum(-1, keepdim=True) - 1)
        ids = ranked.gather(-1, place)[:, 0]
    return ids, log_probabilities.gather(-1, ids[:, None])[:, 0]


@cache
def _never_written(device: torch.device) -> Int[Tensor, " S"]:
    with torch.inference_mode(mode=False):  # an engine may be the first to ask, and others may want gradients
        return torch.tensor(NEVER_WRITTEN, device=device)


def penalised(logits: Float[Tensor, "M V"], written: Int[Tensor, "M W"], penalty: float) -> Float[Tensor, "M V"]:
    """Logits of written tokens, made less probable; once, however often a token was written."""
    those = logits.gather(-1, written)
    return logits.scatter(-1, written, torch.where(those > 0, those / penalty, those * penalty))


def write(
    decoder: StepwiseDecoder,
    logits: Float[Tensor, "M V"],
    state: DecodingState,
    *,
    sampling: Sampling,
    decode: Callable[[list[int]], str] | None = None,
) -> Generated:
    """Writes until every row has ended; rows that have ended leave the batch.

    Args:
        decoder: Has read the prompts.
        logits: Behind each prompt.
        state: Behind each prompt.
        sampling: How tokens are chosen.
        decode: Ids to text.

    Raises:
        ValueError: There are stop strings and no `decode`, or a grammar for more ids than the decoder has.
    """
    if sampling.stop and decode is None:
        raise ValueError(f"stop {sampling.stop!r} needs `decode`, the tokenizer's, got None")
    sampling.check_vocabulary(logits.shape[1])
    draws = sampling.draws(len(logits)).to(logits.device)
    if sampling.samples > 1:
        logits, state = logits.repeat_interleave(sampling.samples, 0), state.fork(sampling.samples)
    rows, device = len(logits), logits.device
    matchers = [] if sampling.grammar is None else [sampling.grammar.begin() for _ in range(rows)]
    ids = torch.full((rows, sampling.max_new_tokens), SPECIAL_IDS.pad, dtype=torch.long, device=device)
    log_probabilities = torch.zeros(rows, sampling.max_new_tokens, device=device)
    active = torch.arange(rows, device=device)
    for index in range(sampling.max_new_tokens):
        chosen, scores = choose(
            logits,
            sampling=sampling,
            draw=draws[active, index],
            written=ids[active, :index],
            forbidden=forbidden(matchers, logits.shape[1]),
        )
        for matcher, token in zip(matchers, chosen.tolist() if matchers else (), strict=True):
            matcher.accept(token)
        ids[active, index], log_probabilities[active, index] = chosen, scores
        ended = chosen == SPECIAL_IDS.end
        if decode is not None and sampling.stop:
            texts = [decode(row) for row in ids[active, : index + 1].tolist()]
            ended |= torch.tensor([any(stop in text for stop in sampling.stop) for text in texts], device=device)
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0 or index + 1 == sampling.max_new_tokens:
            break
        if len(going) < len(active):
            active, chosen, state = active[going], chosen[going], state.select(going)
            matchers = [matchers[row] for row in going.tolist()] if matchers else []
        logits, state = decoder.step(chosen, state)
    lengths = (ids != SPECIAL_IDS.pad).sum(-1)
    longest = int(lengths.max()) if rows else 0
    written = Generated(Padded(ids[:, :longest], lengths), log_probabilities[:, :longest])
    if sampling.samples == 1:
        return written
    drawn, number = written.rows(), sampling.samples
    kept = [first + consensus(drawn[first : first + number]) for first in range(0, rows, number)]
    return written.select(torch.tensor(kept, dtype=torch.long, device=device))
