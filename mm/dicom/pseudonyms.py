"""What stands for a patient in a de-identified study: all of it follows from a secret, none of it leads back."""

import hashlib
import hmac
import re
import secrets
import uuid
from datetime import date, timedelta
from pathlib import Path
from typing import Final

from mm.files import write_atomically

SECRET_BYTES: Final = 32
PATIENT_DIGITS: Final = 16
MOST_DAYS: Final = 3650


class Pseudonyms:
    """HMAC-SHA256 under one secret: the same secret gives the same pseudonyms, in every run and for every file."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def patient(self, identity: str) -> str:
        """16 hex digits that stand for a PatientID."""
        return self._digest("patient", identity).hex()[:PATIENT_DIGITS].upper()

    def uid(self, uid: str) -> str:
        """A UID made of a UUID (PS3.5 section B.2) that stands for any other one."""
        return f"2.25.{uuid.UUID(bytes=self._digest('uid', uid)[:16], version=4).int}"

    def days(self, identity: str) -> int:
        """By how many days a patient's dates go back: 1 to 3650, the same for all of one patient."""
        return 1 + int.from_bytes(self._digest("days", identity)[:8], "big") % MOST_DAYS

    def shifted(self, text: str, identity: str) -> str | None:
        """A DA or DT (PS3.5 section 6.2) that many days earlier, or None where it begins with no date.

        The time of a DT stays; an offset from UTC goes, for it tells the country.
        """
        digits, rest = text[:8], text[8:].partition("+")[0].partition("-")[0].strip()
        try:
            day = date.fromisoformat(digits) - timedelta(days=self.days(identity))
        except (ValueError, OverflowError):
            return None
        if not re.fullmatch(r"\d{8}(\d{2,6}(\.\d{1,6})?)?", digits + rest, re.ASCII):
            return None
        return f"{day.year:04d}{day:%m%d}{rest}"

    def _digest(self, kind: str, text: str) -> bytes:
        return hmac.new(self._secret, f"{kind}/{text}".encode(), hashlib.sha256).digest()


def open_secret(path: Path, *, otherwise: str) -> bytes:
    """The secret that a file holds in hex; made where the file doesn't exist (mode 0600).

    Args:
        path: Of the file.
        otherwise: What an error says can be done instead.

    Raises:
        ValueError: The file holds something else: pseudonyms made with it would be wrong.
        OSError: It can't be read or written.
    """
    if not path.exists():
        write_atomically(path, secrets.token_hex(SECRET_BYTES).encode() + b"\n", mode=0o600)
    path.chmod(0o600)
    try:
        secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"{path} must hold {2 * SECRET_BYTES} hex digits; {otherwise}")
    return secret
