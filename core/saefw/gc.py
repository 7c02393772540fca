"""Finds the units that no registry needs, and deletes them."""

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from saefw import pipeline
from saefw.catalog import Catalog
from saefw.errors import UserError
from saefw.plugin import StageConfig, Unit
from saefw.registry import Registry, read
from saefw.store import GONE, PARTIAL, SAVED, Store


class Spare(NamedTuple):
    """A folder that can go."""

    folder: Path
    stage: str
    address: str
    label: str
    """What it is, as its plan called it; of one begun and never kept, or half deleted, just that."""

    bytes: int
    at: datetime
    """When it was made or last written to."""


class Found(NamedTuple):
    """What of a store is needed, and what is not."""

    store: Store
    spare: list[Spare]
    kept: int
    """How many kept units are needed."""

    held: dict[str, int]
    """How many folders are kept though no listed stage needs them, by reason."""


class _Held(Exception):
    """Another run holds a lock."""


def find(paths: Sequence[Path]) -> Found:
    """Sort the units of the store that some registries share; nothing is deleted.

    What a stage may need whose units cannot be listed yet is kept, and so is what a run under way is making, or makes
    it from.

    Raises:
        UserError: a registry has a fault, or its store is not that of the first.

    """
    needed: set[str] = set()
    open_ended: dict[str, str] = {}
    registries = [_planned(path, needed, open_ended) for path in paths]
    for path, registry in zip(paths, registries, strict=True):
        if registry.store.resolve() != registries[0].store.resolve():
            raise UserError(
                f"{path}: its store is {registry.store}, that of {paths[0]} is {registries[0].store}; "
                "name registries of one store"
            )
    store = Store(registries[0].store)
    kept, folders, held = store.kept(), _folders(store), dict[str, int]()
    needed |= {address for address, folder in kept.items() if folder.parent.name == SAVED}
    for path in folders:
        reason = open_ended.get(path.parent.name, "")
        if path.is_symlink():
            reason = f"{path} is a link; delete it and what it leads to yourself"
        elif path.suffix == PARTIAL and (who := _holder(store, path.stem)):
            reason = f"{who} is at work on it, or on what is made from it"
        if reason and path.suffix != GONE:
            more = _closure(kept, [path.stem, *_needs(path)]) - needed
            if n := sum(folder.stem in more for folder in folders):
                held[reason] = held.get(reason, 0) + n
            needed |= more
    spare = [
        _spare(path)
        for path in folders
        if path.suffix == GONE or path.stem not in needed or (path.suffix == PARTIAL and path.stem in kept)
    ]
    return Found(store, spare, len(needed & set(kept)), held)


def delete(found: Found) -> Iterator[tuple[Spare, str | UserError]]:
    """Delete what can go; yield each folder with why it stays, if it does: who holds it, or what is wrong.

    Raises:
        UserError: the index, which follows in the end, cannot be written.

    """
    for spare in found.spare:
        why: str | UserError = ""
        try:
            # Asked again: since it was listed, a run may have begun what is made from it.
            if not (why := _user(found.store, spare.address)):
                found.store.delete(spare.folder, _refuse)
        except _Held as error:
            why = str(error)
        except UserError as error:
            why = error
        yield spare, why
    found.store.sync()


def _planned(path: Path, needed: set[str], open_ended: dict[str, str]) -> Registry:
    """Add the addresses that a registry lists to `needed`, and to `open_ended` the stages that cannot be listed."""
    catalog = Catalog()
    registry = read(path, catalog)
    for plan in pipeline.plan(registry, catalog):
        needed |= {unit.address for listed in plan.units for unit in _whole(listed)}
        for member in registry.families["stages"][plan.name] if plan.reason else ():
            assert isinstance(member.entry, StageConfig)
            use = member.entry.content()["use"]
            open_ended.setdefault(use, f"{path} cannot say yet what {plan.name} needs ({plan.reason})")
    return registry


def _whole(unit: Unit) -> Iterator[Unit]:
    """Yield a unit and all that it is made from."""
    yield unit
    for need in unit.needs:
        yield from _whole(need)


def _folders(store: Store) -> list[Path]:
    """Return the folders of all units, kept, begun or half deleted; nothing else that lies in a store."""
    kept = set(store.kept().values())
    return [
        path
        for path in sorted(store.root.glob("*/*"))
        if path in kept or (re.fullmatch(r"[0-9a-f]{12}", path.stem) and path.suffix in (PARTIAL, GONE))
    ]


def _closure(kept: dict[str, Path], addresses: Iterable[str]) -> set[str]:
    """Return addresses with those of all that the kept ones of them are made from."""
    found: set[str] = set()
    left = list(addresses)
    while left:
        if (address := left.pop()) not in found:
            found.add(address)
            left += _needs(kept[address]) if address in kept else []
    return found


def _told(folder: Path, file: str) -> dict[str, Any]:
    """Return what a file of a unit says; nothing if it cannot be read."""
    try:
        told = json.loads((folder / file).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _needs(folder: Path) -> list[str]:
    needs = _told(folder, "unit.json").get("needs")
    return [need for need in needs if isinstance(need, str)] if isinstance(needs, list) else []


def _label(folder: Path) -> str:
    return str(_told(folder, "made.json").get("label", folder.name))


def _spare(path: Path) -> Spare:
    facts = list(_facts(path))
    words = {PARTIAL: "begun, not kept", GONE: "half deleted"}
    at = max((one.st_mtime for one in facts), default=0)
    return Spare(
        path,
        path.parent.name,
        path.stem,
        words.get(path.suffix) or _label(path),
        sum(one.st_size for one in facts if stat.S_ISREG(one.st_mode)),
        datetime.fromtimestamp(at, UTC),
    )


def _facts(folder: Path) -> Iterator[os.stat_result]:
    """Yield the facts of a folder and of all files in it; another process may be at work on them."""
    for base, _, names in os.walk(folder):
        for path in (base, *(os.path.join(base, name) for name in names)):
            with suppress(OSError):
                yield os.stat(path)


def _holder(store: Store, address: str) -> str:
    """Return who is making a unit, or nothing."""
    try:
        with store.hold(address, _refuse):
            return ""
    except _Held as error:
        return str(error)


def _user(store: Store, address: str) -> str:
    """Return who is at work on a unit that is made from this one, or nothing."""
    kept = store.kept()
    for path in store.root.glob(f"*/*{PARTIAL}"):
        if address in _closure(kept, _needs(path)) and (who := _holder(store, path.stem)):
            return who
    return ""


def _refuse(holder: str) -> None:
    raise _Held(holder)
