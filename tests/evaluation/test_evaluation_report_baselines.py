import numpy as np
import pytest
import torch

from mm import ontology
from mm.batch import BySource, DetectedFinding
from mm.evaluation.audit_pairs import preference_table, preferences
from mm.evaluation.labels import labels
from mm.evaluation.report_baselines import drawn_template, nearest_texts, one_template, side_by_side
from mm.phantom.dataset import labelled, patient_seed
from mm.phantom.patient import draw_patient


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("index", range(6))
def test_templates_say_what_the_head_says(language, index) -> None:
    patient = draw_patient(patient_seed(9, index))
    compared = len(patient.visits) > 1
    truth = labelled(patient.findings, inputs=("volume", "image", "audio", "record"), compared=compared)
    absent = [code for code in ontology.CODES if code not in {item.code for item in truth}]
    findings = [DetectedFinding(f.code, f.present, 0.9, f.side, None, None, f.size, f.change) for f in truth]
    findings += [DetectedFinding(code, False, 0.1, "none", None, None, None, "unknown") for code in absent]
    days = patient.visits[1].days if compared else None
    rng = np.random.default_rng(0)
    fixed = one_template(findings, language=language, days=days)
    drawn = [drawn_template(findings, language=language, days=days, rng=rng) for _ in range(4)]
    present = {item.code for item in truth if item.present}
    for text in (fixed, *drawn):
        assert {code for code, said in labels(text, language).items() if said == "present"} == present
        assert "<" not in text
    assert one_template(findings, language=language, days=days) == fixed
    assert len(set(drawn)) > 1
    if compared:
        assert str(round(days)) in fixed


def test_the_nearest_patient_lends_its_text() -> None:
    training = torch.eye(3)
    vectors = torch.tensor([[0.1, 0.2, 0.9], [0.8, 0.7, 0.0]])
    assert nearest_texts(vectors, training, ["a", "b", "c"]) == ["c", "a"]
    joined = side_by_side(BySource(volume=torch.ones(2, 3), record=torch.zeros(2, 1)))
    assert joined.shape == (2, 4)


def test_an_embedding_that_reads_sides_prefers_the_true_text() -> None:
    texts = ["A left nodule of 12 mm.", "A right nodule of 5 mm.", "Normal."]

    def embed(given: list[str]) -> torch.Tensor:  # reads sides, and nothing else
        return torch.tensor([[float("left" in text.lower()), float("right" in text.lower())] for text in given])

    found = preferences(embed(texts), texts, ["en"] * 3, embed)
    assert found["swap side"].changed == 2
    assert found["swap side"].right.value == 1.0
    assert found["scale size"].right.value == 0.5
    assert "drop finding" not in found  # nothing of the texts would be left
    assert "| swap side | 2 | 1.000" in preference_table(found)
