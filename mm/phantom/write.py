"""Phantom patients as files: studies as a scanner would send them, and the truth in a tree of its own.

```
OUT/phantoms.json                             seed, number of studies, digests of table and ontology
OUT/studies/<StudyInstanceUID>/ct_0001.dcm ...  dx_0001.dcm  sound_<site>.wav  record.json
OUT/truth/<StudyInstanceUID>/findings.json  report_en.txt  report_zh.txt  vqa.jsonl  masks.npz
```
A prior is a study of its own, with the same PatientID and an earlier StudyDate; it has no truth. The same seed
gives the same bytes, whatever the number of workers.
"""

import json
import multiprocessing
import wave
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mm import ontology
from mm.batch import FindingTruth, Language
from mm.dicom.volume import Volume, source_slice
from mm.phantom.ct import Rendered, render_ct
from mm.phantom.dataset import header, labelled, patient_seed, words
from mm.phantom.instances import ct_instances, dx_instance
from mm.phantom.patient import Patient, draw_patient
from mm.phantom.record import render_record
from mm.phantom.sound import PCM_STEPS, render_sounds
from mm.phantom.table import table_digest
from mm.phantom.xray import RenderedImage, render_xray

SETTINGS: Final = "phantoms.json"
_LANGUAGES: Final[tuple[Language, ...]] = ("en", "zh")


def write_studies(
    out: Path | str, *, studies: int, seed: int, workers: int = 1, split: Literal["train", "test"] = "test"
) -> tuple[str, ...]:
    """Writes patients; what is there already from the same call is written again.

    Args:
        out: A folder; it is made where it doesn't exist.
        studies: Number of patients. Each has one current study; its priors are not counted.
        seed: Of the patients, as in `PhantomDataset`.
        workers: Processes.
        split: "test" draws report sentences from the held-out templates too.

    Returns:
        The StudyInstanceUIDs of the current studies.

    Raises:
        ValueError: `studies` or `workers` is below 1, or `out` holds phantoms of other settings.
        OSError: `out` can't be written.
    """
    if studies < 1 or workers < 1:
        raise ValueError(f"studies and workers must be at least 1, got {studies} and {workers}")
    root = Path(out)
    settings = {
        "studies": studies,
        "seed": seed,
        "split": split,
        "table": table_digest(),
        "ontology": ontology.digest(),
    }
    _claim(root, settings)
    task = partial(write_patient, root, split=split)
    seeds = [patient_seed(seed, index) for index in range(studies)]
    written = []
    with ExitStack() as stack:
        progress = stack.enter_context(_progress())
        bar = progress.add_task("phantoms", total=studies)
        results: Iterator[str] = map(task, seeds)
        if workers > 1:
            # Forked children would share the threads of torch; fresh ones start clean.
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(min(workers, studies), mp_context=context))
            results = pool.map(task, seeds, chunksize=max(1, min(8, studies // (4 * workers))))
        for study in results:
            written.append(study)
            progress.advance(bar)
    return tuple(written)


def write_patient(root: Path, seed: int, *, split: Literal["train", "test"]) -> str:
    """All visits of one patient and the truth of the current one.

    Returns:
        The StudyInstanceUID of the current study.
    """
    patient = draw_patient(seed)
    for number in range(len(patient.visits) - 1, 0, -1):
        rendered = render_ct(patient, number)
        _write_ct(root, patient, number, rendered)
    ct, dx = render_ct(patient, 0), render_xray(patient)
    slices = _write_ct(root, patient, 0, ct)
    facts = header(patient, 0)
    folder = root / "studies" / facts.study_instance_uid
    radiograph, content = dx_instance(facts, dx.pixels, spacing_mm=dx.spacing_mm)
    (folder / "dx_0001.dcm").write_bytes(content)
    for site, sound in render_sounds(patient).items():
        write_wav(folder / f"sound_{site}.wav", sound)
    _write_json(folder / "record.json", render_record(patient))
    _write_truth(root / "truth" / facts.study_instance_uid, patient, ct, dx, slices, radiograph, split)
    return facts.study_instance_uid


def write_wav(path: Path, sound: Float[np.ndarray, " T"]) -> None:
    """16-bit PCM at `SOUND_RATE`."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(ontology.SOUND_RATE)
        file.writeframes(np.rint(sound * PCM_STEPS).clip(-PCM_STEPS, PCM_STEPS - 1).astype("<i2").tobytes())


def _write_ct(root: Path, patient: Patient, visit: int, rendered: Rendered) -> tuple[str, ...]:
    facts = header(patient, visit)
    folder = root / "studies" / facts.study_instance_uid
    folder.mkdir(parents=True, exist_ok=True)
    instances = []
    kernel = patient.visits[visit].scanner.kernel
    made = ct_instances(facts, rendered.voxels, rendered.affine, kernel=kernel.upper())
    for number, (instance, content) in enumerate(made, start=1):
        (folder / f"ct_{number:04d}.dcm").write_bytes(content)
        instances.append(instance)
    return tuple(instances)


def _write_truth(
    folder: Path,
    patient: Patient,
    ct: Rendered,
    dx: RenderedImage,
    slices: tuple[str, ...],
    radiograph: str,
    split: Literal["train", "test"],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    days = patient.visits[1].days if len(patient.visits) > 1 else None
    findings = labelled(patient.findings, inputs=ontology.SOURCES, compared=days is not None)
    volume = Volume(ct.voxels, ct.affine, "HU", slices)
    rows = [finding_row(item, volume=volume, radiograph=radiograph) for item in findings]
    named = {item.code for item in findings}
    absent = [FindingTruth(code, False, "none", None, None, None, "unknown", ()) for code in ontology.CODES]
    rows += [finding_row(item, volume=volume, radiograph=radiograph) for item in absent if item.code not in named]
    rows.sort(key=lambda row: ontology.INDEX[row["code"]])
    truth = {"study": header(patient, 0).study_instance_uid, "days": days, "table": table_digest(), "findings": rows}
    _write_json(folder / "findings.json", truth)
    for language in _LANGUAGES:
        said = words(patient, findings, days=days, language=language, split=split)
        (folder / f"report_{language}.txt").write_text(said.text + "\n", encoding="utf-8")
    with (folder / "vqa.jsonl").open("w", encoding="utf-8") as file:
        for row in _question_rows(patient, findings):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    np.savez_compressed(folder / "masks.npz", ct=ct.bits, affine=ct.affine, dx=dx.bits)


def finding_row(item: FindingTruth, *, volume: Volume, radiograph: str) -> dict[str, Any]:
    """One finding with the names of report.json; `sop_instance_uid` is the slice that holds its centre."""
    measure = ontology.finding(item.code).measure
    size = None if item.size is None or measure is None else {"value": item.size, "unit": measure.unit}
    instance = None
    if item.center_mm is not None:
        instance = volume.sop_instance_uids[source_slice(volume, item.center_mm)]
    elif item.image_center_mm is not None:
        instance = radiograph
    return {
        "code": item.code,
        "present": item.present,
        "probability": 1.0 if item.present else 0.0,
        "side": item.side,
        "center_mm": item.center_mm,
        "image_center_mm": item.image_center_mm,
        "size_mm": item.size if measure is not None and measure.unit == "mm" else None,
        "size": size,
        "change": item.change,
        "sop_instance_uid": instance,
        "sources": item.sources,
    }


def _question_rows(patient: Patient, findings: tuple[FindingTruth, ...]) -> Iterator[dict[str, Any]]:
    """English under the plain names, Chinese beside it."""
    english = words(patient, findings, days=None, language="en", split="train").questions
    chinese = words(patient, findings, days=None, language="zh", split="train").questions
    for en, zh in zip(english, chinese, strict=True):
        yield {
            "question": en.question,
            "answer": en.answer,
            "closed": en.closed,
            "question_zh": zh.question,
            "answer_zh": zh.answer,
        }


def _claim(root: Path, settings: dict[str, Any]) -> None:
    """Notes the settings in the folder, or refuses one that holds other phantoms."""
    note = root / SETTINGS
    if note.is_file():
        held = json.loads(note.read_text(encoding="utf-8"))
        if held != settings:
            names = ", ".join(name for name in settings if held.get(name) != settings[name])
            raise ValueError(f"out: {root} holds phantoms with another {names}; choose a new folder")
        return
    root.mkdir(parents=True, exist_ok=True)
    _write_json(note, settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
