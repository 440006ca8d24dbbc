import re

import pytest

from mm.data.sides import mirrored, sideless, sides_of

PAIRS = [
    ("Nodule in the left upper lobe.", "Nodule in the right upper lobe."),
    ("LEFT pleural effusion, right-sided rib fracture", "RIGHT pleural effusion, left-sided rib fracture"),
    ("LUL collapse; RLL is clear", "RUL collapse; LLL is clear"),
    ("Mild dextroscoliosis, levoconvex below", "Mild levoscoliosis, dextroconvex below"),
    ("Levoscoliosis", "Dextroscoliosis"),
    ("mass (L), R kidney", "mass (R), L kidney"),
    ("Lt. renal cyst", "Rt. renal cyst"),
    ("mediastinal shift rightwards, leftmost rib", "mediastinal shift leftwards, rightmost rib"),
    ("左肺上叶结节，右侧胸腔积液", "右肺上叶结节，左侧胸腔积液"),
    ("左侧弯，长约5cm左右", "右侧弯，长约5cm左右"),
    ("左侧胸腔积液 left effusion", "右侧胸腔积液 right effusion"),
]
SAME = [
    "",
    "No acute disease.",
    "Both lungs are clear, bilateral effusions",
    "disc bulge at L4-L5 and in L5/S1",
    "on levothyroxine, levofloxacin and 5% dextrose",
    "seen right away, r/o pneumonia",
    "双肺未见异常，左右对称",
    "upright chest film; leftover food; bright",
    "左氧氟沙星治疗",
]
NEVER = [
    "right middle lobe pneumonia",
    "RML infiltrate",
    "consolidation in the lingula",
    "lingular scarring on the left",
    "dextrocardia",
    "situs inversus",
    "left ventricle is enlarged",
    "right lobe of the liver",
    "splenomegaly",
    "free fluid at 3 o'clock",
    "catheter left in place",
    "dextroversion",
    "右肺中叶结节",
    "左肺舌段",
    "左心室增大",
    "肝右叶囊肿",
    "右位心",
]


@pytest.mark.parametrize(("text", "other"), PAIRS)
def test_sides_are_exchanged_both_ways(text: str, other: str) -> None:
    assert mirrored(text) == other
    assert mirrored(other) == text
    assert sideless(text) == sideless(other)


@pytest.mark.parametrize("text", SAME)
def test_what_names_no_side_stays(text: str) -> None:
    assert mirrored(text) == text


@pytest.mark.parametrize("text", NEVER)
def test_what_is_on_one_side_only_is_never_mirrored(text: str) -> None:
    assert mirrored(text) is None


def test_twice_is_the_text_again_and_the_sides_change_places() -> None:
    places = ("left lung", "Right hilum", "LLL", "左肺", "右侧", "both lungs", "the spine")
    other = {"left": "right", "right": "left"}
    for first in places:
        for second in places:
            text = f"Opacity in {first}, nothing in {second}."
            turned = mirrored(text)
            assert turned is not None
            assert mirrored(turned) == text
            assert sides_of(turned) == {other[side] for side in sides_of(text)}
            assert bool(re.search("(?i)left|lll|左", text)) == bool(re.search("(?i)right|rll|右", turned))


def test_which_sides_a_text_names() -> None:
    assert sides_of("left effusion") == {"left"}
    assert sides_of("RUL nodule") == {"right"}
    assert sides_of("bilateral effusions") == sides_of("双侧") == {"left", "right"}
    assert sides_of("all right, 5cm") == sides_of("L4 fracture") == frozenset()
