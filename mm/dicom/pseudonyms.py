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


class Secret:
    """HMAC-SHA256 under one secret: the same secret gives the same pseudonyms, in every run and for every file."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def digest(self, text: str) -> bytes:
        """The 32 bytes that follow from a text; without the secret they can't be guessed."""
        return hmac.new(self._secret, text.encode(), hashlib.sha256).digest()


def made_uid(number: bytes) -> str:
    """A valid UID of 16 bytes: 2.25 and their number (PS3.5 section B.2)."""
    return f"2.25.{int.from_bytes(number, 'big')}"


class Pseudonyms(Secret):
    """What stands in a de-identified copy for each thing that tells who a patient is."""

    def patient(self, identity: str) -> str:
        """16 hex digits that stand for a PatientID."""
        return self.digest(f"patient/{identity}").hex()[:PATIENT_DIGITS].upper()

    def uid(self, uid: str) -> str:
        """A UID made of a UUID that stands for any other one."""
        return made_uid(uuid.UUID(bytes=self.digest(f"uid/{uid}")[:16], version=4).bytes)

    def days(self, identity: str) -> int:
        """By how many days a patient's dates go back: 1 to 3650, the same for all of one patient."""
        return 1 + int.from_bytes(self.digest(f"days/{identity}")[:8], "big") % MOST_DAYS

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
