"""How well a decoder writes about studies it has not seen: losses, exact sentences and answers, findings, routing."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from cached_studies import Studies, chance, situations, truth_of

from mm.batch import SLOT_KINDS, Sample, Writing
from mm.decoder.decoder import MoEDecoder
from mm.decoder.router import Routing
from mm.decoder.telemetry import routing_health
from mm.evaluation.labels import labels
from mm.evaluation.reports import macro_f1
from mm.phantom.questions import WORDS
from mm.report.text import fill

ANSWER = SLOT_KINDS.index("answer")


class Judge:
    """The validation split, made ready once for all rows."""

    def __init__(self, studies: Studies) -> None:
        self.studies = studies
        self.words = studies.in_order()
        self.asked = [studies.asked(part) for part in self.words]
        self.truth = truth_of(self.words)

    def references(self) -> dict[str, float]:
        """What rows are to be seen beside: chance in the wordings, the head's own F1, and saying always yes."""
        counts = [chance(item) for part in self.words for sample in part.samples for item in situations(sample)]
        tokens = 0
        for part in self.words:
            assert part.writing.target is not None
            tokens += int(part.writing.target.lengths[part.writing.slots.kind != ANSWER].sum())
        return {
            "wording_entropy": sum(counts) / tokens,
            "head_f1": macro_f1(self.studies.detected, self.truth),
            "always_yes_f1": macro_f1(self.truth | True, self.truth),
            "studies": len(self.studies),
            "sentences": len(counts),
        }

    @torch.no_grad()
    def __call__(self, decoder: MoEDecoder) -> dict[str, float]:
        decoder.eval()
        with torch.autocast("cpu", torch.bfloat16):
            return self._losses(decoder) | self._written(decoder) | {"asked_f1": self._asked_f1(decoder)}

    def _losses(self, decoder: MoEDecoder) -> dict[str, float]:
        """Nats a token of sentences and answers, and the routing of the whole split."""
        sums = torch.zeros(2, 2)
        routings: list[tuple[Routing, ...]] = []
        for part in self.words:
            writing = part.writing
            output = decoder(writing, self.studies.memory(part.numbers), rows=writing.study)
            loss = F.cross_entropy(output.logits.float(), output.targets, reduction="none")
            of_answers = (writing.slots.kind == ANSWER)[output.rows].long()
            sums.index_add_(0, of_answers, torch.stack([loss, torch.ones_like(loss)], dim=1))
            routings.append(output.routings)
        health = routing_health([together(layer) for layer in zip(*routings, strict=True)])
        total = sums.sum(0)
        return {
            "loss": float(total[0] / total[1]),
            "loss_sentences": float(sums[0, 0] / sums[0, 1]),
            "loss_answers": float(sums[1, 0] / sums[1, 1]),
            "load_variation": float(health.load_variation),
            "dead_experts": float(health.dead),
            "entropy": float(health.entropy),
        }

    def _write(self, decoder: MoEDecoder, numbers: list[int], writing: Writing) -> list[str]:
        blind = replace(writing, target=None)
        rows = decoder.generate(blind, self.studies.memory(numbers), rows=writing.study).rows()
        return [self.studies.tokenizer.decode(row) for row in rows]

    def _written(self, decoder: MoEDecoder) -> dict[str, float]:
        """Shares of sentences about true slots that say just what they should, and of questions answered exactly."""
        exact, read, right = [], [], []
        for part in self.words:
            texts = iter(self._write(decoder, part.numbers, part.writing))
            for sample in part.samples:
                written = [next(texts) for _ in sample.report]
                allowed = [{item.text for item in templates} for templates in situations(sample)]
                exact += [text in these for text, these in zip(written, allowed, strict=True)]
                read += read_back(sample, written)
                right += [next(texts) == question.answer for question in sample.questions]
        shares = {"exact_sentences": exact, "labels_of_sentences": read, "exact_answers": right}
        return {name: sum(hits) / len(hits) for name, hits in shares.items()}

    def _asked_f1(self, decoder: MoEDecoder) -> float:
        """Macro-F1 of the findings that the decoder affirms, each asked of each study."""
        rows = []
        for part in self.asked:
            texts = iter(self._write(decoder, part.numbers, part.writing))
            for sample in part.samples:
                yes = WORDS[sample.language]["yes"]
                rows.append([next(texts) == yes for _ in sample.questions])
        return macro_f1(torch.tensor(rows).numpy(), self.truth)


def together(parts: tuple[Routing, ...]) -> Routing:
    """One layer's routing of several batches as if they had been one; nothing is dropped in evaluation."""
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("experts", "gates", "logits", "probabilities")
    }
    return Routing(**joined, dropped=parts[0].dropped)


def read_back(sample: Sample, written: list[str]) -> list[bool]:
    """For each sentence about a finding: does a rule labeler read that finding, and no other, with its status?"""
    assert sample.truth is not None
    right = []
    for sentence, text in zip(sample.report, written, strict=True):
        if sentence.finding is None:
            continue
        item = sample.truth.findings[sentence.finding]
        known = {"finding": item, "findings": sample.truth.findings, "days": None, "language": sample.language}
        said = labels(fill(text, **known), sample.language)
        status = "present" if item.present else "resolved"
        right.append(said == {code: status if code == item.code else "absent" for code in said})
    return right
