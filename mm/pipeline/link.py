"""From scanned studies to sources: priors by patient and date, the files beside the series, and a fingerprint."""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path

from mm.dicom.errors import Reason
from mm.dicom.scan import Scan, Study
from mm.files import file_digest
from mm.pipeline.attached import record_file, sound_files
from mm.pipeline.case import ContextRow, PriorSource, Source
from mm.pipeline.keys import Keys

logger = logging.getLogger(__name__)


def link(found: Scan, rows: Mapping[str, ContextRow], keys: Keys, directory: Path) -> dict[str, Source]:
    """The source of every study, by StudyInstanceUID, in the order of the UIDs.

    Earlier studies of the same PatientID are priors, the most recent first; a study without PatientID or date
    has none. What `--context` says goes before.
    """
    studies = {study.study_instance_uid: study for study in found.studies}
    patients: dict[str, list[Study]] = defaultdict(list)
    for study in studies.values():
        if study.patient_id and _date(study) is not None:
            patients[study.patient_id].append(study)
    beside = _folders(studies.values(), directory)
    sources = {}
    for uid in sorted(studies):
        study, row = studies[uid], rows.get(uid)
        if row is not None and row.priors is not None:
            earlier = [studies[prior] for prior in row.priors]
            undated = sum(_date(other) is None for other in earlier) if _date(study) is not None else len(earlier)
            if undated:
                logger.warning("--context: %d priors of a study are not used: without a StudyDate", undated)
            late = len(earlier) - undated - len(_priors(study, earlier))
            if late > 0:
                logger.warning("--context: %d priors of a study are not used: not made before it", late)
        else:
            earlier = patients.get(study.patient_id, [])
        sources[uid] = Source(study, _priors(study, earlier), beside[uid], row, keys)
    return sources


def _priors(study: Study, earlier: Iterable[Study]) -> tuple[PriorSource, ...]:
    today = _date(study)
    dated = ((other, _date(other)) for other in earlier)
    found = [
        PriorSource(other, (today - made).days)
        for other, made in dated
        if today is not None and made is not None and made < today
    ]
    return tuple(sorted(found, key=lambda prior: (prior.days, prior.study.study_instance_uid)))


def _date(study: Study) -> date | None:
    """StudyDate (DA, PS3.5 section 6.2: YYYYMMDD), or None."""
    text = study.study_date
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:8])) if len(text) == 8 else None
    except ValueError:
        return None


def _folders(studies: Iterable[Study], directory: Path) -> dict[str, tuple[Path, ...]]:
    """Folders whose `record.json` can only be one study's: no other study has a file in them.

    A study whose series lie in subfolders may have it one level or more above, as long as everything below is
    that study's own.
    """
    direct: dict[Path, set[str]] = defaultdict(set)
    below: dict[Path, set[str]] = defaultdict(set)
    homes: dict[str, set[Path]] = defaultdict(set)
    for study in studies:
        uid = study.study_instance_uid
        homes[uid] |= {path.parent for path in _files(study)}
        for folder in homes[uid]:
            direct[folder].add(uid)
            for above in (folder, *folder.parents):
                below[above].add(uid)
                if above == directory:
                    break
    result = {}
    for uid, folders in homes.items():
        own = sorted(folder for folder in folders if direct[folder] == {uid})
        shared = _common(folders, directory)
        parents = [shared] if shared is not None and shared not in folders and below[shared] == {uid} else []
        result[uid] = (*own, *parents)
    return result


def _common(folders: Iterable[Path], directory: Path) -> Path | None:
    """The deepest folder, `directory` or below it, that all of them lie in."""
    chains = [[*reversed(folder.parents), folder] for folder in folders]
    shared = [level[0] for level in zip(*chains, strict=False) if len(set(level)) == 1]
    deepest = shared[-1] if shared else None
    return deepest if deepest is not None and deepest.is_relative_to(directory) else None


def _files(study: Study) -> tuple[Path, ...]:
    return tuple(path for series in study.series for path in series.files)


def refused_studies(found: Scan) -> dict[str, Reason]:
    """Studies none of whose files can be read, by StudyInstanceUID, and why: what most of them are refused for.

    So are those under which two patients lie. Files that don't tell their study belong to none.
    """
    reasons: dict[str, Counter[Reason]] = defaultdict(Counter)
    for item in found.rejected:
        if item.study_instance_uid:
            reasons[item.study_instance_uid][item.reason] += 1
    read = {study.study_instance_uid for study in found.studies}
    return {
        uid: min(told, key=lambda reason: (-told[reason], reason))
        for uid, told in sorted(reasons.items())
        if uid not in read
    }


class Digests:
    """SHA-256 of studies' files: a prior is asked for again and again. For one run; later the files may differ."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, ...], str] = {}

    def study(self, files: tuple[Path, ...]) -> str:
        """Of a study's files, whatever their names and order.

        Raises:
            OSError: A file has gone.
        """
        if files not in self._known:
            parts = sorted(file_digest(path) for path in files)
            self._known[files] = hashlib.sha256("".join(parts).encode()).hexdigest()
        return self._known[files]


def fingerprint(source: Source, *, checkpoint: str, pipeline: str, version: str, digests: Digests) -> str:
    """Everything that a report depends on, as one keyed hash: a rerun skips a study whose report holds it.

    It covers the bytes of the study's files, of its priors' and of the files beside it, what `--context` says,
    the checkpoint, the pipeline and the version of this package; not where the files lie.

    Args:
        source: The study.
        checkpoint: SHA-256 of its files.
        pipeline: Its digest.
        version: Of this package.
        digests: Of this run.

    Raises:
        OSError: A file has gone since the scan.
    """
    sounds = {site: file_digest(path) for site, path in sorted(sound_files(source).items())}
    record = record_file(source)
    row = source.row.record if source.row is not None and isinstance(source.row.record, dict) else None
    content = {
        "study": digests.study(_files(source.study)),
        "priors": [(prior.days, digests.study(_files(prior.study))) for prior in source.priors],
        "sounds": sounds,
        "record": None if record is None else file_digest(record),
        "context": row,
        "checkpoint": checkpoint,
        "pipeline": pipeline,
        "version": version,
    }
    return source.keys.digest(json.dumps(content, sort_keys=True)).hex()
