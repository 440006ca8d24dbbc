"""One data set in, a new one out that holds only what may stay (PS3.15 section E.1 and Table E.1-1).

Nothing is edited in place: an attribute reaches the new data set by a rule or not at all, in nested items as well.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag
from pydicom.uid import UID

from mm.dicom.confidentiality import TABLE, Code
from mm.dicom.errors import FileError
from mm.dicom.guard import BROKEN
from mm.dicom.pseudonyms import Pseudonyms
from mm.dicom.retained import (
    BINARY,
    CHARACTERISTICS,
    CODE_SEQUENCES,
    CODE_STRINGS,
    CODES,
    DATES,
    EMPTIED,
    NUMBERS,
    ORIENTATION,
    SEQUENCES,
    TERMS,
    TEXTS,
)

Keep = Literal["shifted-dates", "characteristics"]
Act = Literal["kept", "uid_mapped", "date_shifted", "dummy", "emptied", "removed", "private", "graphics", "invalid"]

MAX_DEPTH: Final = 16
OLDEST: Final = "090Y"
NUMBER: Final = re.compile(r"[-+0-9.eE ]{0,32}", re.ASCII)
TIME: Final = re.compile(r"(\d{2}){1,3}(\.\d{1,6})?", re.ASCII)
DUMMIES: Final = {"DA": "19000101", "DT": "19000101000000", "TM": "000000", "AS": "000D", "DS": "0", "IS": "0"}
REMOVED: Final = "REMOVED"
TEXT: Final = frozenset(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"))


@dataclass
class Cleaner:
    """The rules for the objects of one patient.

    Attributes:
        pseudonyms: Of the secret.
        identity: By what the patient is known (PatientID); dates shift by it.
        keep: Options of the profile.
        acts: How many elements each rule was applied to, those in nested items counted too.
    """

    pseudonyms: Pseudonyms
    identity: str = field(repr=False)
    keep: frozenset[Keep]
    acts: Counter[Act] = field(default_factory=Counter)

    def clean(self, data: Dataset, depth: int = 0) -> Dataset:
        """A new data set with what may stay of this one.

        Raises:
            FileError: `damaged`, where items are nested deeper than 16.
        """
        if depth > MAX_DEPTH:
            raise FileError("damaged", "nested items")
        cleaned = Dataset()
        for tag in sorted(data.keys()):
            act, element = self._element(data, tag, depth)
            self.acts[act] += 1
            if element is not None:
                cleaned.add(element)
        return cleaned

    def _element(self, data: Dataset, tag: BaseTag, depth: int) -> tuple[Act, DataElement | None]:
        if tag.is_private:
            return "private", None
        if tag.group >> 8 in (0x50, 0x60):  # curves and overlays
            return "graphics", None
        if tag.group < 8 or tag.element == 0 or not dictionary_has_tag(tag):
            return "removed", None
        code = self._code(tag)
        vr = dictionary_VR(tag)
        if code is not None and code not in ("U", "X/Z/U*"):
            return self._replaced(tag, vr, code)
        if not self._stays(tag, vr):
            return "removed", None
        try:
            element = data[tag]
            if element.VR not in (vr, *vr.split(" or ")):
                return "invalid", None
            if element.VR == "SQ":
                coded = tag in CODE_SEQUENCES
                items = self._codes(element.value) if coded else [self.clean(i, depth + 1) for i in element.value]
                return "kept", DataElement(tag, "SQ", Sequence(items))
            return self._value(tag, element)
        except BROKEN:  # one value that can't be parsed costs that value, not the object
            return "invalid", None

    def _code(self, tag: int) -> Code | None:
        """What the table says, under the options."""
        if (tag in DATES and "shifted-dates" in self.keep) or (
            tag in CHARACTERISTICS and "characteristics" in self.keep
        ):
            return None
        return "Z" if tag in EMPTIED else TABLE.get(tag)

    def _stays(self, tag: int, vr: str) -> bool:
        listed = tag in BINARY | CODE_STRINGS | SEQUENCES | CODE_SEQUENCES | DATES or keyword_for_tag(tag) in TEXTS
        return listed or vr == "UI" or NUMBERS.issuperset(vr.split(" or "))

    def _replaced(self, tag: BaseTag, vr: str, code: Code) -> tuple[Act, DataElement | None]:
        """Of the actions among which the type decides, the last: its outcome is valid for every type."""
        last = code[-1]
        if last == "D" and vr == "UI":
            return "removed", None
        if last == "D" and (vr in DUMMIES or vr in TEXT):
            return "dummy", DataElement(tag, vr, DUMMIES.get(vr, REMOVED))
        if last == "Z":
            return "emptied", DataElement(tag, vr, Sequence() if vr == "SQ" else None)
        return "removed", None

    def _value(self, tag: BaseTag, element: DataElement) -> tuple[Act, DataElement | None]:
        if element.is_empty:
            return "kept", DataElement(tag, element.VR, None)
        values = list(element.value) if element.VM > 1 else [element.value]
        if element.VR == "UI":
            mapped = [self.uid(str(value)) for value in values]
            same = mapped == [str(value) for value in values]
            return "kept" if same else "uid_mapped", DataElement(tag, "UI", mapped if len(mapped) > 1 else mapped[0])
        if element.VR in ("DA", "DT"):
            day = self.pseudonyms.shifted(str(element.value), self.identity)
            if day is None:
                code = TABLE.get(tag)
                return self._replaced(tag, element.VR, code) if code is not None else ("removed", None)
            return "date_shifted", DataElement(tag, element.VR, day)
        if not all(self._harmless(tag, element.VR, value) for value in values):
            return "invalid", None
        if element.VR == "AS" and str(element.value).endswith("Y") and str(element.value) > OLDEST:
            return "dummy", DataElement(tag, "AS", OLDEST)
        return "kept", element

    def _harmless(self, tag: int, vr: str, value: Any) -> bool:
        """Whether a value says no more than its attribute is for."""
        keyword, text = keyword_for_tag(tag), str(value).strip()
        if keyword in TEXTS:
            return re.fullmatch(TEXTS[keyword], text, re.ASCII) is not None
        if vr == "CS":
            if keyword == "PatientOrientation":
                return re.fullmatch(ORIENTATION, text) is not None
            return all(word in TERMS or (len(word) < 3 and word.isascii()) for word in text.split())
        if vr in ("DS", "IS"):
            return NUMBER.fullmatch(text) is not None
        return vr != "TM" or TIME.fullmatch(text) is not None

    def _codes(self, items: Sequence) -> list[Dataset]:
        """The codes of public schemes; any other may be a hospital's own and goes with its item."""
        kept = []
        for item in items:
            scheme, value = str(item.get("CodingSchemeDesignator", "")), str(item.get("CodeValue", ""))
            if scheme not in CODES or re.fullmatch(CODES[scheme], value, re.ASCII) is None:
                self.acts["removed"] += len(item)
                continue
            code = Dataset()
            code.CodeValue, code.CodingSchemeDesignator = value, scheme
            code.CodeMeaning = value  # required (PS3.3 Table 8.8-1), but free text
            kept.append(code)
        return kept

    def uid(self, uid: str) -> str:
        """Registered UIDs (PS3.6 annex A) as they are, all others mapped."""
        return uid if is_registered(uid) or not uid else self.pseudonyms.uid(uid)


def is_registered(uid: str) -> bool:
    """Whether PS3.6 annex A lists a UID; a prefix alone proves nothing."""
    return UID(uid).name != uid
