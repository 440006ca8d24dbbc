"""`mm report`: every eligible study of a folder gets its report; a failure stays with its study."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TextIO

import mm
from mm.batch import Language
from mm.dicom.errors import REASONS
from mm.dicom.scan import Scan, scan
from mm.pipeline.build import Built, build_pipeline
from mm.pipeline.case import Case, ContextRow, Failure, Source
from mm.pipeline.choose import of_chest
from mm.pipeline.context import read_context
from mm.pipeline.keys import KeyMap, Keys, open_private
from mm.pipeline.ledger import Ledger, Line, open_ledger
from mm.pipeline.link import Digests, fingerprint, link, refused_studies
from mm.pipeline.progress import Tell, progress

logger = logging.getLogger(__name__)

DONE: Final = 0
SOME_FAILED: Final = 1

WORDS: Final[dict[str, str]] = {
    **{str(reason): words for reason, words in REASONS.items()},
    "record_unreadable": "its record can't be read as JSON",
    "record_layout": "its record isn't laid out as mm.data.record tells",
    "audio_unreadable": "a sound can't be read; wav, flac, ogg and mp3 are accepted",
    "audio_empty": "a sound is empty",
    "audio_rate": "a sound has a rate outside 4000 to 192000 Hz",
    "audio_not_finite": "a sound has samples that are no numbers",
}


def run_report(
    directory: Path,
    out: Path,
    *,
    pipeline: str | Path = "report",
    context: Path | None = None,
    language: Language | None = None,
    trust: tuple[str, ...] = (),
    checkpoint: str | None = None,
    stream: TextIO | None = None,
) -> int:
    """Reports every eligible study under a folder; studies that an earlier run finished are left as they are.

    Args:
        directory: DICOM files, in any order and depth.
        out: Where `<study key>/`, `manifest.jsonl` and `private/` go.
        pipeline: Name of a shipped pipeline, or a YAML file.
        context: Records, sounds and priors of studies; see `mm.pipeline.context`.
        language: The one that comes first in every report; the pipeline's own order by default.
        trust: Packages, besides ours, whose classes the pipeline may name.
        checkpoint: Takes the place of the one that the pipeline names.
        stream: Takes the progress: a bar on a terminal, else JSON lines. Standard output by default.

    Returns:
        0 when all eligible studies are reported, 1 when some failed.

    Raises:
        ValueError: A configuration that can't work, or nothing eligible in the input. Nothing is written then.
        OSError: No right to read or to write.
    """
    built = build_pipeline(pipeline, trust=trust, checkpoint=checkpoint)
    if language is not None:
        others = [item for item in built.generate.languages if item != language]
        built.generate.languages = (language, *others)
    if not directory.is_dir():
        raise ValueError(f"{directory} is no folder; give the folder that holds the DICOM files")
    found = scan(directory)
    eligible = {study.study_instance_uid for study in found.studies if built.pipeline.accepts(study)}
    refused = refused_studies(found)
    if not eligible and not refused:
        raise ValueError(_nothing(directory, found, built))
    _ = built.generate.sealed  # opens the checkpoint: a wrong one is told before anything is written
    rows = {} if context is None else read_context(context, found)
    _warn_of_rejected(found)
    _warn_of_unused(rows, built)
    out.mkdir(parents=True, exist_ok=True)
    with open_ledger(out) as ledger, progress(stream or sys.stdout, len(eligible) + len(refused)) as tell:
        keys, key_map = open_private(out)  # behind the lock: two runs must not make two secrets
        run = _Run(built, ledger, key_map, tell)
        key_map.add("study", [*(study.study_instance_uid for study in found.studies), *refused])
        sources = link(found, rows, keys, directory)
        for uid, source in sources.items():
            if uid not in eligible:
                pictures = [series for series in source.study.series if series.kind in {"volume", "image"}]
                elsewhere = bool(pictures) and not any(of_chest(series) for series in pictures)
                reason = "other_body_part" if elsewhere else "no_eligible_series"
                run.close(Line(keys.study(uid), "skipped", reason))
        for uid, why in refused.items():
            run.fail(keys, uid, Failure(why, ""))
        todo = [source for uid, source in sources.items() if uid in eligible]
        size = built.generate.batch_size
        for start in range(0, len(todo), size):
            run.batch(todo[start : start + size])
        key_map.compact()
    return SOME_FAILED if run.failed else DONE


@dataclass
class _Run:
    """One run over one input."""

    built: Built
    ledger: Ledger
    key_map: KeyMap
    tell: Tell
    failed: int = 0
    digests: Digests = field(default_factory=Digests)

    def batch(self, sources: Sequence[Source]) -> None:
        """Takes a batch of studies from files to folders; the whole batch, if one of it isn't settled.

        A failure that the very same files have had already is settled like a report: it is told again, not tried
        again.
        """
        start = time.perf_counter()
        cases = [Case(item, item.keys.study(item.study.study_instance_uid), self._sealed) for item in sources]
        prints: dict[str, str] = {}

        def read_prints(part: list[Case]) -> list[Case]:
            prints.update({case.study: self._fingerprint(case.source) for case in part})
            return part

        cases = _guarded(read_prints, cases)
        finished = {study for study, print_ in prints.items() if self.ledger.finished(study, print_)}
        for case in cases:
            if case.study in finished:
                known = self.ledger.line(case.study)
                kept = known if known is not None and known.status == "done" else Line(case.study, "done")
                self.close(kept, fresh=False)
        failures = {study: self.ledger.failed(study, print_) for study, print_ in prints.items()}
        stand = [line for study, line in failures.items() if line is not None and study not in finished]
        if len(finished) + len(stand) == len(cases):
            for line in stand:
                self._failed(line, fresh=False)
            return
        for stage in self.built.pipeline.stages:
            if "report" in stage.provides:
                cases = [_without_picture(case) for case in cases]
            cases = _guarded(stage.process, cases)
        cases = _guarded(lambda part: [self._place(case, prints) for case in part if case.study not in finished], cases)
        seconds = round((time.perf_counter() - start) / max(1, len(sources) - len(finished)), 3)
        for case in cases:
            if case.study in finished:
                continue
            if case.failure is None:
                self.close(Line(case.study, "done", seconds=seconds))
            else:
                if case.study in prints:  # a report of what the study held before would be taken for this one's
                    self.ledger.withdraw(case.study)
                print_ = prints.get(case.study) if case.failure.lasting else None
                self._failed(_line(case.study, case.failure, seconds, print_))

    def fail(self, keys: Keys, uid: str, failure: Failure) -> None:
        """A study that never became a case."""
        self._failed(_line(keys.study(uid), failure, 0.0, None))

    def close(self, line: Line, *, fresh: bool = True) -> None:
        """Accounts for a study."""
        self.ledger.record(line)
        self.tell(line, fresh)

    def _failed(self, line: Line, *, fresh: bool = True) -> None:
        self.failed += 1
        words = WORDS.get(line.reason or "")
        where = f" at {line.place}" if line.place else ""
        logger.warning("study %s failed%s: %s%s", line.study, where, line.reason, f" ({words})" if words else "")
        self.close(line, fresh=fresh)

    @property
    def _sealed(self) -> "mm.pipeline.case.Sealed":
        return self.built.generate.sealed

    def _fingerprint(self, source: Source) -> str:
        checkpoint = self.built.generate.loaded.identity.sha256
        languages = ",".join(self.built.generate.languages)
        pipeline = f"{self.built.digest}:{languages}"
        return fingerprint(
            source, checkpoint=checkpoint, pipeline=pipeline, version=mm.__version__, digests=self.digests
        )

    def _place(self, case: Case, prints: dict[str, str]) -> Case:
        assert case.result is not None, "Pipeline makes sure that a stage provides 'report'"
        shown = {item.sop_instance_uid for item in case.result.findings}
        uids = (item.sop_instance_uid for series in case.source.study.series for item in series.instances)
        self.key_map.add("instance", [uid for uid in uids if case.source.keys.instance(uid) in shown])
        self.ledger.place(case.result, prints[case.study], self.built.pipeline.writers)
        return replace(case, result=None)


def _guarded(step: Callable[[list[Case]], list[Case]], cases: Sequence[Case]) -> list[Case]:
    """The study boundary: what goes wrong in a step stays with the study that it goes wrong with.

    A step that fails on several cases is tried on each alone. Cases that have failed already pass by.
    """
    going = [case for case in cases if case.failure is None]
    over = [case for case in cases if case.failure is not None]
    if not going:
        return over
    try:
        return [*over, *step(going)]
    except Exception as error:  # noqa: BLE001  # the one place; a batch of thousands outlives any one study
        if len(going) == 1:
            return [*over, replace(going[0], failure=Failure.of(error))]
    return [*over, *(case for one in going for case in _guarded(step, [one]))]


def _without_picture(case: Case) -> Case:
    """The case, failed by what went wrong with its pictures where none is left to report."""
    if case.failure is not None or case.inputs.pictured or case.inputs.failure is None:
        return case
    return replace(case, failure=case.inputs.failure)


def _line(study: str, failure: Failure, seconds: float, fingerprint: str | None) -> Line:
    return Line(study, "failed", failure.reason, failure.place or None, seconds, fingerprint)


def _nothing(directory: Path, found: Scan, built: Built) -> str:
    reasons = Counter(item.reason for item in found.rejected)
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    files = f"; {_count(len(found.rejected), 'file', 'files')} not read ({counts})" if reasons else ""
    what = f"{_count(len(found.studies), 'study', 'studies')}, none of them fits" if found.studies else "no DICOM study"
    return (
        f"nothing to report in {directory}: {what}; a study needs {built.pipeline.wanted()}{files};"
        " `mm scan` lists every file"
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _warn_of_rejected(found: Scan) -> None:
    """All files that aren't read are told in one line, where one of them is broken DICOM.

    Records and sounds alone are nobody's concern; two patients are told with their study.
    """
    told = Counter(item.reason for item in found.rejected if item.reason != "two_patients")
    if told.keys() - {"not_dicom", "dicomdir"}:
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(told.items()))
        logger.warning("not read: %s (%s); `mm scan` lists them", _count(told.total(), "file", "files"), counts)


def _warn_of_unused(rows: Mapping[str, ContextRow], built: Built) -> None:
    """What `--context` gives and the pipeline has no stage for."""
    provided = {name for stage in built.pipeline.stages for name in stage.provides}
    given = {
        "audio": sum(bool(row.audio) for row in rows.values()),
        "record": sum(row.record is not None for row in rows.values()),
        "priors": sum(bool(row.priors) for row in rows.values()),
    }
    for name, count in given.items():
        if count and name not in provided:
            logger.warning("--context: %s of %s not used: the pipeline reads none", name, _count(count, "row", "rows"))
