"""Study keys and pseudonymous UIDs against HMAC-SHA256 worked out here; the map survives a torn row."""

import hashlib
import hmac

from mm.dicom.pseudonyms import Pseudonyms
from mm.pipeline.keys import KeyMap, Keys, open_private

SECRET = bytes(range(32))
UIDS = ("1.2.840.10008.1", "1.2.3", "2.25.7")


def digest(text: str) -> bytes:
    return hmac.new(SECRET, text.encode(), hashlib.sha256).digest()


def test_keys_are_those_of_the_hmac() -> None:
    keys = Keys(SECRET)
    for uid in UIDS:
        assert keys.study(uid) == digest(uid).hex()[:16]
        assert keys.instance(uid) == f"2.25.{int(digest(uid).hex()[:32], 16)}"
        assert len(keys.instance(uid)) <= 64
    assert len({Keys(secret).study(UIDS[0]) for secret in (SECRET, SECRET[::-1])}) == 2


def test_uids_of_copies_are_random_uuids_of_the_hmac() -> None:
    for uid in UIDS:
        number = int(Pseudonyms(SECRET).uid(uid).removeprefix("2.25."))
        # RFC 9562, section 5.4: all bits are the HMAC's but version 4 and variant 0b10.
        fixed = (0xF << 76) | (0b11 << 62)
        assert number & ~fixed == int.from_bytes(digest(f"uid/{uid}")[:16], "big") & ~fixed
        assert number & fixed == (4 << 76) | (0b10 << 62)
        assert Pseudonyms(SECRET).uid(uid) != Keys(SECRET).instance(uid)


def test_the_map_leads_back_and_drops_a_torn_row(tmp_path) -> None:
    keys, key_map = open_private(tmp_path)
    key_map.add("study", UIDS)
    path = tmp_path / "private" / "map.csv"
    path.write_text(path.read_text() + "0123456789abcdef,study,1.2")
    KeyMap(path, keys)
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    assert sorted(rows) == sorted([keys.study(uid), "study", uid] for uid in UIDS)
