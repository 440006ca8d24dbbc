"""Beam search: the most probable sentence among several that grow side by side."""

import torch
from jaxtyping import Float
from torch import Tensor

from mm.batch import SPECIAL_IDS, Padded
from mm.decoder.cache import DecodingState
from mm.decoder.generate import NEVER_WRITTEN, Generated, Sampling, StepwiseDecoder
from mm.decoder.grammar import Grammar, Matcher, forbidden


def beam_search(
    decoder: StepwiseDecoder,
    logits: Float[Tensor, "M V"],
    state: DecodingState,
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    grammar: Grammar | None = None,
) -> Generated:
    """Writes each row's best sentence: highest log-probability divided by length ** `length_penalty`.

    A row goes on until it has `beams` ended sentences or is cut; a sentence that was cut competes as it is.

    Args:
        decoder: Has read the prompts.
        logits: Behind each prompt.
        state: Behind each prompt.
        beams: Sentences that grow at a time, for each row.
        max_new_tokens: Where a sentence is cut.
        length_penalty: 0: the probability alone counts, which favours short ones; 1: its mean a token.
        grammar: Every sentence is one that this allows; one that was cut is the beginning of one.

    Raises:
        ValueError: Settings that make no search, or a grammar for more ids than the decoder has.
    """
    most = (logits.shape[1] - len(NEVER_WRITTEN)) // 2
    if not 1 <= beams <= most:
        raise ValueError(f"beams must be 1..{most} (half the vocabulary), got {beams}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    Sampling(grammar=grammar).check_vocabulary(logits.shape[1])
    ended: list[list[_Sentence]] = [[] for _ in range(len(logits))]
    growing = [_Sentence(row, [], []) for row in range(len(logits))]
    for index in range(max_new_tokens):
        scores = logits.float().log_softmax(-1)
        scores[:, list(NEVER_WRITTEN)] = -torch.inf
        wrong = forbidden([_matcher(grammar, sentence.ids) for sentence in growing], logits.shape[1])
        if wrong is not None:
            scores.masked_fill_(wrong.to(scores.device), -torch.inf)
        # One of the best 2 * beams of a row's candidates always lies among the best 2 * beams of a sentence.
        best, tokens = scores.topk(2 * beams, dim=-1)
        candidates: dict[int, list[tuple[float, int, int, float]]] = {}
        for parent, sentence in enumerate(growing):
            pairs = zip(best[parent].tolist(), tokens[parent].tolist(), strict=True)
            candidates.setdefault(sentence.row, []).extend(
                (sentence.total + value, parent, token, value) for value, token in pairs
            )
        parents: list[int] = []
        kept: list[_Sentence] = []
        for row, options in candidates.items():
            options.sort(key=lambda option: -option[0])
            grown: list[tuple[int, _Sentence]] = []
            for place, (total, parent, token, value) in enumerate(options[: 2 * beams]):
                if total == -torch.inf or len(grown) == beams:
                    break
                old = growing[parent]
                sentence = _Sentence(row, [*old.ids, token], [*old.scores, value])
                if token == SPECIAL_IDS.end:
                    if place < beams:
                        ended[row].append(sentence)
                else:
                    grown.append((parent, sentence))
            if index + 1 == max_new_tokens:
                ended[row] += [sentence for _, sentence in grown]
            elif len(ended[row]) < beams:
                parents += [parent for parent, _ in grown]
                kept += [sentence for _, sentence in grown]
        growing = kept
        if not growing:
            break
        state = state.select(torch.tensor(parents, device=logits.device))
        logits, state = decoder.step(torch.tensor([s.ids[-1] for s in growing], device=logits.device), state)
    chosen = [max(row, key=lambda sentence: sentence.total / len(sentence.ids) ** length_penalty) for row in ended]
    ids = Padded.of([sentence.ids for sentence in chosen]).to(logits.device)
    log_probabilities = torch.zeros(ids.values.shape, device=logits.device)
    for place, sentence in enumerate(chosen):
        log_probabilities[place, : len(sentence.ids)] = torch.tensor(sentence.scores)
    return Generated(ids, log_probabilities)


def _matcher(grammar: Grammar | None, ids: list[int]) -> Matcher | None:
    """Where a sentence stands; read anew, for several grow out of one."""
    if grammar is None:
        return None
    matcher = grammar.begin()
    for token in ids:
        matcher.accept(token)
    return matcher


class _Sentence:
    """One of the sentences of one row."""

    def __init__(self, row: int, ids: list[int], scores: list[float]) -> None:
        self.row, self.ids, self.scores = row, ids, scores
        self.total = sum(scores)
