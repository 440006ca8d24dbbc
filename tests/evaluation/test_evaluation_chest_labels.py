"""The labeler of foreign chest reports: on paraphrases written for the test, and on real sentences labelled by hand."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from mm.evaluation import chest_terms
from mm.evaluation.chest_labels import chest_labels, no_finding, sections

REPORTS = Path(os.environ.get("MM_DATA", "")) / "iu_xray_reports" / "reports.jsonl"
IU_SENTENCES = Path(__file__).parent / "iu_sentences.jsonl"
"""Study, number of the sentence and labels made by hand before the labeler was written; the text stays where it is."""
FROM_CT = ("emphysema", "arterial_calcification", "lymphadenopathy", "fibrotic_sequela")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The heart is not enlarged.", {"cardiomegaly": "absent"}),
        ("Enlarged cardiac silhouette.", {"cardiomegaly": "present"}),
        ("Heart size top normal.", {"cardiomegaly": "uncertain"}),
        (
            "Heart size normal, the mediastinum is widened.",
            {"cardiomegaly": "absent", "enlarged_cardiomediastinum": "present"},
        ),
        ("A pneumothorax is not seen.", {"pneumothorax": "absent"}),
        ("Small left apical pneumothorax without effusion.", {"pneumothorax": "present", "pleural_effusion": "absent"}),
        ("No effusion, cardiomegaly is present.", {"pleural_effusion": "absent", "cardiomegaly": "present"}),
        ("No significant change in the right pleural effusion.", {"pleural_effusion": "present"}),
        ("Pneumonia cannot be excluded.", {"pneumonia": "uncertain"}),
        ("Findings are suspicious for pneumonia.", {"pneumonia": "uncertain"}),
        ("Bibasilar opacities, atelectasis or infiltrate.", {"lung_opacity": "present", "atelectasis": "uncertain"}),
        ("The pleural effusion has resolved.", {"pleural_effusion": "absent"}),
        ("The chest tube was removed.", {"support_devices": "absent"}),
        ("Endotracheal tube 4.5 cm above the carina.", {"support_devices": "present"}),
        ("Healing fracture of the right seventh rib.", {"fracture": "present"}),
        ("No acute fracture; mild pulmonary edema.", {"fracture": "absent", "edema": "present"}),
        ("There is neither consolidation nor atelectasis.", {"consolidation": "absent", "atelectasis": "absent"}),
        ("Pericardial effusion.", {}),
        ("This is consistent with the earlier study and leads to no further question.", {}),
        ("Persistent changes are noted.", {}),
        ("", {}),
    ],
)
def test_radiographs(text: str, expected: dict[str, str]):
    assert chest_labels(text, "xray") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Calcific plaques in the thoracic aorta and calcifications of the coronary arteries.",
            {"arterial_calcification": "present", "coronary_calcification": "present"},
        ),
        (
            "No pericardial effusion; small hiatal hernia.",
            {"pericardial_effusion": "absent", "hiatal_hernia": "present"},
        ),
        ("No enlarged mediastinal lymph nodes.", {"lymphadenopathy": "absent"}),
        (
            "Centrilobular emphysema and bronchiectasis in the lower lobes.",
            {"emphysema": "present", "bronchiectasis": "present"},
        ),
        ("Mosaic attenuation, possibly small airway disease.", {"mosaic_attenuation": "present"}),
        (
            "Interlobular septal thickening with bilateral pleural effusions.",
            {"septal_thickening": "present", "pleural_effusion": "present"},
        ),
        (
            "A 6 mm nodule in the left upper lobe, linear atelectasis in the lingula.",
            {"lung_nodule": "present", "atelectasis": "present"},
        ),
        ("Ground-glass opacities which may represent infection.", {"lung_opacity": "present"}),
        ("Bronchial wall thickening is not seen.", {"peribronchial_thickening": "absent"}),
        ("Apical scarring.", {"fibrotic_sequela": "present"}),
    ],
)
def test_ct(text: str, expected: dict[str, str]):
    assert chest_labels(text, "ct") == expected


def test_what_the_reader_did_not_see_is_left_out():
    report = "INDICATION: Rule out pneumonia. FINDINGS: The lungs are clear. IMPRESSION: No effusion."
    assert chest_labels(report, "xray") == {"pleural_effusion": "absent"}
    assert sections("Pneumonia. Comparison: cardiomegaly in 2019. Lungs: clear.") == "Pneumonia.\nclear."


def test_said_once_is_said():
    report = "No effusion on the right. Small effusion on the left."
    assert chest_labels(report, "xray") == {"pleural_effusion": "present"}
    assert not no_finding(chest_labels(report, "xray"))
    assert no_finding(chest_labels("Left PICC line. No effusion. Heart size is normal.", "xray"))


def test_every_finding_is_found_and_denied_by_a_name_of_its_own():
    named = {
        "enlarged_cardiomediastinum": "mediastinal widening",
        "lung_lesion": "mass",
        "lung_opacity": "opacity",
        "edema": "pulmonary edema",
        "pleural_effusion": "pleural effusion",
        "pleural_other": "pleural thickening",
        "support_devices": "catheter",
        "medical_material": "pacemaker",
        "arterial_calcification": "aortic calcification",
        "pericardial_effusion": "pericardial effusion",
        "coronary_calcification": "coronary calcification",
        "hiatal_hernia": "hiatal hernia",
        "fibrotic_sequela": "fibrosis",
        "mosaic_attenuation": "mosaic pattern",
        "peribronchial_thickening": "peribronchial cuffing",
        "septal_thickening": "septal thickening",
        "lung_nodule": "nodule",
    }
    for kind, findings in (("xray", chest_terms.XRAY), ("ct", chest_terms.CT)):
        for name in findings:
            word = named.get(name, name)
            assert chest_labels(f"There is {word}.", kind)[name] == "present"
            assert chest_labels(f"There is no {word}.", kind)[name] == "absent"
            assert chest_labels(f"Possible {word}.", kind)[name] == "uncertain"


@pytest.mark.skipif(not REPORTS.is_file(), reason="iu_xray_reports is not under MM_DATA")
def test_real_sentences_are_read_as_by_hand():
    """At least .95 of what is said of a finding, and of mentions found."""
    with REPORTS.open(encoding="utf-8") as file:
        reports = {row["uid"]: row for row in map(json.loads, file)}
    by_hand = [json.loads(line) for line in IU_SENTENCES.read_text().splitlines()]
    assert len(by_hand) == 200
    agree: Counter[bool] = Counter()
    for row in by_hand:
        text = sentences(reports[row["uid"]])[row["sentence"]]
        read = chest_labels(text, "xray")
        read |= {name: said for name, said in chest_labels(text, "ct").items() if name in FROM_CT}
        agree.update(read.get(name) == row["labels"].get(name) for name in read.keys() | row["labels"].keys())
    assert agree[True] / agree.total() >= 0.95


def sentences(report: dict[str, str]) -> list[str]:
    """Findings, then impression, cut behind a full stop before a capital or a digit."""
    text = " ".join(part.strip() for part in (report["findings"], report["impression"]) if part.strip())
    return [part.strip() for part in re.split(r"(?<=[.?!])\s+(?=[A-Z0-9])", text) if part.strip()]
