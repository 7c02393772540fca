"""Lists what the steering page can open: an SAE, a probe and a dataset of one registry, by what is made."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import NamedTuple

from saefw import pipeline, registry
from saefw.catalog import Catalog
from saefw.errors import NotYet
from saefw.index import INDEX
from saefw.plugin import Run, Unit, UserError
from saefw.registry import Registry
from saefw.stages.steer import Steer


@dataclass(frozen=True)
class Choice:
    """An SAE and a probe that fit together; what is opened for them is shared by all sessions."""

    registry: Path
    """The registry that it was planned from."""

    store: Path
    """Where it is kept."""

    unit: Unit
    """What the steer stage makes of the two; it need not be made."""

    run: Run = field(compare=False)
    """The desk from which it is read."""

    stage: Steer = field(compare=False)
    """The stage that puts the two together."""

    name: str = field(compare=False)
    """What the stage is called in the registry."""

    @property
    def sae(self) -> Unit:
        """The SAE."""
        return self.unit.needs[0]

    @property
    def probe(self) -> Unit:
        """The probe."""
        return self.unit.needs[1]

    @property
    def dataset(self) -> Unit:
        """The recording that the probe reads: a dataset on a backbone."""
        return self.probe.needs[0]

    @property
    def steered(self) -> bool:
        """Whether the steer stage made it."""
        return self.run.store.has(self.unit)

    def saes(self) -> list[Unit]:
        """Return the SAEs of the stage that are made."""
        return [unit for unit in self.run.made_by(self.stage.saes) if self.run.store.has(unit)]

    def probes(self) -> list[Unit]:
        """Return the probes of the stage that are made."""
        return [unit for unit in self.run.made_by(self.stage.probes) if self.run.store.has(unit)]

    def other(self, sae: str, probe: str) -> "Choice":
        """Return the choice of another SAE and another probe of the stage, by address.

        Raises:
            UserError: there is no such one, they do not fit together, or nobody looked at the SAE's features.

        """
        units = [_named("SAE", self.saes(), sae), _named("probe", self.probes(), probe)]
        try:
            unit = self.stage.pair(self.run, *units)
        except NotYet as error:
            raise UserError(f"{units[0].label}, read by {units[1].label}: {error}") from error
        for need in unit.needs:
            if not self.run.store.has(need):
                raise UserError(f"{need.label} is not made yet: run `saefw run {self.registry}`")
        return Choice(self.registry, self.store, unit, self.run, self.stage, self.name)


class Planned(NamedTuple):
    """What a registry stood for when it was planned."""

    version: tuple[float, ...]
    choices: list[Choice]


_PLANNED: dict[Path, Planned] = {}
_TURN = RLock()


def choices(path: Path) -> list[Choice]:
    """List what the steer stages of a registry edit: what is made first, then what only lacks its measurements.

    A registry is planned once a process, and again once it or the index of its store has changed.

    Raises:
        UserError: the registry cannot be read, or there is none; the text says what to do.

    """
    with _TURN:
        # Before anything is looked at: what changes meanwhile is planned again.
        version = *_stat(path), *_stat(store_of(path) / INDEX)
        if path not in _PLANNED or _PLANNED[path].version != version:
            _PLANNED[path] = Planned(version, _planned(path))
        found = [choice for choice in _PLANNED[path].choices if all(map(choice.run.store.has, choice.unit.needs))]
        if not found:
            del _PLANNED[path]  # what a run keeps is in the index only after its stage
            raise UserError(f"Nothing is made yet that could be steered: run `saefw run {path}` first.")
    return sorted(found, key=lambda choice: not choice.steered)


def store_of(path: Path) -> Path:
    """Return the folder of a registry's store.

    Raises:
        UserError: the registry cannot be read.

    """
    return _read(path, _stat(path))[0].store


@lru_cache(maxsize=4)
def _read(path: Path, version: tuple[float, ...]) -> tuple[Registry, Catalog]:
    """Read a registry, once a process and version."""
    catalog = Catalog()
    return registry.read(path, catalog), catalog


def _stat(path: Path) -> tuple[float, ...]:
    try:
        told = path.stat()
    except OSError:
        return ()
    return told.st_mtime_ns, told.st_size, told.st_ino


def _planned(path: Path) -> list[Choice]:
    read, catalog = _read(path, _stat(path))
    stages = [
        (name, member.entry)
        for name, members in read.families["stages"].items()
        for member in members
        if isinstance(member.entry, Steer)
    ]
    if not stages:
        raise UserError(
            f"{path} has no stage with use: steer, which this page shows; add one and run `saefw run {path}`."
        )
    run = pipeline.desk(read, catalog)
    pipeline.plan(read, catalog, only=stages[-1][0], run=run)
    found = [
        Choice(path.resolve(), read.store, unit, run, stage, name)
        for name, stage in stages
        for unit in _units(stage, run)
    ]
    return list(dict.fromkeys(found))


def _units(stage: Steer, run: Run) -> list[Unit]:
    try:
        return list(stage.units(run))
    except NotYet:
        return []


def _named(what: str, units: Sequence[Unit], address: str) -> Unit:
    for unit in units:
        if unit.address == address:
            return unit
    raise UserError(f"there is no {what} {address!r} any more; choose another")
