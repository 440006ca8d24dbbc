import pytest

from mm.evaluation.labels import labels, mentions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No pleural effusion or pneumothorax. A 12 mm nodule on the right, now larger.", {"nodule": "present"}),
        ("The previously seen left effusion has resolved.", {"effusion": "resolved"}),
        ("Resolution of the right pneumothorax.", {"pneumothorax": "resolved"}),
        ("The nodule is no longer seen.", {"nodule": "resolved"}),
        ("Possible pneumonia.", {"infection": "uncertain"}),
        ("Pneumonia cannot be excluded.", {"infection": "uncertain"}),
        ("Pericardial effusion is seen.", {}),
        ("No evidence of infection, but a small left pneumothorax is present.", {"pneumothorax": "present"}),
        ("Effusion is seen and pneumothorax is absent.", {"effusion": "present"}),
        ("Atelectasis rather than consolidation.", {"atelectasis": "present"}),
        ("A step of 1.5 mm. Fractured rib on the left.", {"rib_fracture": "present"}),
        ("Nodules are present; emphysema is absent.", {"nodule": "present"}),
        ("", {}),
    ],
)  # fmt: skip
def test_english(text: str, expected: dict[str, str]):
    assert {code: status for code, status in labels(text, "en").items() if status != "absent"} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("右肺见12 mm结节，较前增大。", {"nodule": "present"}),
        ("未见胸腔积液及气胸。", {}),
        ("原有左侧气胸已吸收。", {"pneumothorax": "resolved"}),
        ("不除外肺炎。", {"infection": "uncertain"}),
        ("心包积液。", {}),
        ("双肺肺气肿改变，动脉钙化。", {"emphysema": "present", "calcification": "present"}),
    ],
)
def test_chinese(text: str, expected: dict[str, str]):
    assert {code: status for code, status in labels(text, "zh").items() if status != "absent"} == expected


def test_the_longest_word_wins():
    text = "Collapsed lung with pleural air"
    found = mentions(text, "en")
    assert [(mention.code, text[mention.start : mention.end]) for mention in found] == [("pneumothorax", text)]
