"""Checks a store against its checksums, and sets back what is damaged."""

import time
from collections.abc import Callable
from pathlib import Path

from saefw.care import MADE, Damage, Unread, damages, found, listed, weight
from saefw.errors import UserError, did_you_mean
from saefw.index import INDEX
from saefw.printer import Printer, short, size
from saefw.store import Store

PAUSE = 0.1
"""Seconds between two words about progress."""


def verify(store: Store, stage: str | None, mend: bool, printer: Printer, other: str = "") -> None:
    """Read every file of every kept unit and print, file by file, what is not what it was when its unit was made.

    Args:
        store: what to check; without `mend` nothing in it changes.
        stage: only the units of this stage, by its `use`; or those of all, and the index.
        mend: set damaged units back, so that the next run makes them again, and make a damaged index anew. A unit of
            which a file cannot be read stays as it is.
        printer: shows how far it is, and what was found.
        other: what to put behind a command so that it takes the same registry.

    Raises:
        UserError: something is damaged and was not mended, or cannot be read; the text says what to do.

    """
    units = _units(store, stage)
    told, n_bytes, bad, unread = _progress(printer, sum(map(weight, units))), 0, 0, 0
    for folder in units:
        n_bytes += weight(folder)
        try:
            damage = list(damages(folder, told=told))
            if not found(folder / MADE):  # set back or removed meanwhile
                continue
        except Unread as error:
            printer.say(str(error))
            unread += 1
            continue
        for one in damage:
            printer.say(str(one))
        for path in _extra(folder):
            printer.say(f"{path}: not one of its unit's files")
        bad += bool(damage)
        if damage and mend:
            _set_back(store, folder, damage)
    broken = stage is None and (store.root / INDEX).exists() and not store.whole()
    if broken:
        printer.say(f"{store.root / INDEX}: damaged")
    printer.close()
    if mend and (bad or broken):
        if broken:
            store.rebuild()
        else:
            store.sync()
    said = f"{short(store.root)}: {len(units):,} unit{'' if len(units) == 1 else 's'}, {size(n_bytes) or '0 B'}"
    if unread:
        said += f", {unread:,} of which a file cannot be read"
    if not (bad or broken):
        if unread:
            raise UserError(said)
        printer.say(f"{said}, fine")
        return
    what = " and ".join(filter(None, [f"{bad:,} damaged" if bad else "", "the index damaged" if broken else ""]))
    again = f", and `saefw run` makes {'it' if bad == 1 else 'them'} again" if bad else ""
    if not mend:
        raise UserError(f"{said}, {what}; `saefw verify --mend{other}` puts that right{again}")
    put_right = f"{said}, {what}; that is put right{again}"
    if unread:
        raise UserError(put_right)
    printer.say(put_right)


def _units(store: Store, stage: str | None) -> list[Path]:
    folders = list(store.kept().values())
    if not store.root.is_dir():
        raise UserError(f"{store.root}: there is no such folder; `saefw run` makes it")
    if stage is None:
        return folders
    stages = sorted({folder.parent.name for folder in folders})
    if stage not in stages:
        near = did_you_mean(stage, stages) or f" (there are: {', '.join(stages)})"
        raise UserError(f"{store.root}: has no units of '{stage}'{near}")
    return [folder for folder in folders if folder.parent.name == stage]


def _extra(folder: Path) -> list[Path]:
    """Return files that the unit does not list."""
    try:
        known = {folder / name for name in (MADE, *listed(folder))}
    except (OSError, ValueError):  # damaged, or set back meanwhile
        return []
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in known]


def _progress(printer: Printer, total: int) -> Callable[[int], None]:
    done, due = 0, 0.0

    def told(n: int) -> None:
        nonlocal done, due
        done += n
        if time.monotonic() >= due or done == total:
            due = time.monotonic() + PAUSE
            printer.saefw_progressed("verify", done, total, "bytes")

    return told


def _set_back(store: Store, folder: Path, damage: list[Damage]) -> None:
    try:
        store.set_back(folder, damage)
    except OSError as error:
        raise UserError(f"{folder}: cannot be set back ({error.strerror}); make the store writable") from error
