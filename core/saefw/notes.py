"""What people call a feature and say of it, as files in the store.

A note is `notes/<address of the SAE>/<feature>-<checksum>.json` and is never written again: who changes it writes the
next one, and the newest counts. So nobody's words are lost, however many write at once, or if stores are merged.
"""

import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from saefw.care import write_atomically
from saefw.errors import UNPRINTED, UserError
from saefw.unit import canonical

NOTES = "notes"
"""The folder of the store that they lie in."""

NAME, TEXT = 80, 4000
"""Characters of a name and of a text, at most."""

log = logging.getLogger("saefw")

_FILE = re.compile(r"(\d{1,9})-([0-9a-f]{12})\.json")


class Note(NamedTuple):
    """What is said of a feature."""

    sae: str
    """Address of the SAE."""

    feature: int

    name: str
    """What it is called; may be empty."""

    text: str
    """More about it; may be empty, and have line ends."""

    made_at: datetime
    """When it was written, in UTC."""


def write(root: Path, sae: str, feature: int, name: str, text: str = "") -> Note:
    """Write a note into a store, beside those that there are of the feature; both empty: it has none from now on.

    Args:
        root: the folder of the store.
        sae: address of the SAE.
        feature: its number.
        name: one line.
        text: as many as it takes.

    Raises:
        UserError: something of it is too long or does not print; nothing is written.
        OSError: the store cannot be written to.

    """
    name, text = " ".join(name.split()), "\n".join(line.rstrip() for line in text.strip().splitlines())
    for what, said, most in (("name", name, NAME), ("text", text, TEXT)):
        if len(said) > most:
            raise UserError(f"{what} of a note: at most {most:,} characters (got {len(said):,})")
        if bad := UNPRINTED.search(said.replace("\n", "").replace("\t", "")):
            raise UserError(f"{what} of a note: {bad.group()!a} does not print")
    before = versions(root, sae, feature)
    if before and (before[0].name, before[0].text) == (name, text):
        return before[0]
    now = datetime.now(UTC)
    # Clocks differ: the next one is the newer one all the same.
    note = Note(sae, feature, name, text, max([now, *(one.made_at + timedelta(microseconds=1) for one in before)]))
    data = canonical({**note._asdict(), "made_at": note.made_at.isoformat(timespec="microseconds")}).encode()
    folder = root / NOTES / sae
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{feature}-{_checksum(data)}.json", data)
    return note


def versions(root: Path, sae: str, feature: int) -> list[Note]:
    """Return all notes that were ever written of a feature, the newest first."""
    return _newest_first((root / NOTES / sae).glob(f"{feature}-*.json"))


def of(root: Path, sae: str) -> dict[int, Note]:
    """Return the notes that count of an SAE, by feature."""
    return {note.feature: note for note in _newest(_newest_first((root / NOTES / sae).glob("*.json")))}


def every(files: list[Path]) -> list[Note]:
    """Return the notes that count among the files of `listed`, by SAE and feature."""
    return sorted(_newest(_newest_first(iter(files))))


def listed(root: Path) -> list[Path]:
    """Return the files of all notes of a store."""
    return sorted(path for path in (root / NOTES).glob("*/*.json") if _FILE.fullmatch(path.name))


def mark(files: list[Path]) -> str:
    """Tell some files from others: a note is never written again, so their names say it."""
    return _checksum("\n".join(f"{path.parent.name}/{path.name}" for path in files).encode())


def _newest_first(files: Iterator[Path]) -> list[Note]:
    read = [(note.made_at, path.name, note) for path in files if (note := _read(path))]
    return [note for _, _, note in sorted(read, reverse=True)]


def _newest(notes: list[Note]) -> Iterator[Note]:
    """Yield of each feature the first note, unless it is empty."""
    seen: set[tuple[str, int]] = set()
    for note in notes:
        if (note.sae, note.feature) not in seen and (note.name or note.text):
            yield note
        seen.add((note.sae, note.feature))


def _read(path: Path) -> Note | None:
    """Return a note; None of a file that is none, or is damaged, with a warning."""
    called = _FILE.fullmatch(path.name)
    try:
        return _parsed(path, int(called[1]), called[2]) if called else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        log.warning("%s: cannot be read, or is not what was written; this note is left out", path)
        return None


@lru_cache(maxsize=100_000)
def _parsed(path: Path, feature: int, checksum: str) -> Note:
    with path.open("rb") as file:
        data = file.read(16 * (NAME + TEXT))
    told = json.loads(data)
    note = Note(**{**told, "made_at": datetime.fromisoformat(told["made_at"])})
    whole = _checksum(data) == checksum and (note.sae, note.feature) == (path.parent.name, feature)
    if not whole or not isinstance(note.name, str) or not isinstance(note.text, str) or not note.made_at.tzinfo:
        raise ValueError
    return note


def _checksum(data: bytes) -> str:
    return sha256(data).hexdigest()[:12]
