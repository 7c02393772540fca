"""What a stage finds on its desk."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import duckdb
from pydantic import Field, model_validator

from saefw.care import Damage, Unread, damages, said, settle, weight, write_atomically, writing
from saefw.entry import Entry, Member
from saefw.errors import Faults, NotYet, UserError
from saefw.imagesets import Dataset
from saefw.index import INDEX, BrokenIndex
from saefw.store import Store
from saefw.unit import Unit, canonical
from saefw.wording import or_listed

LOG = "metric.jsonl"
"""What a unit logged so far, one JSON list [step, {name: value}] a line; becomes its metric table when kept."""

PATIENCE, PAUSE = 0.5, 0.1
"""Seconds before a check says how far it is, and between two such words."""


logger = logging.getLogger("saefw")

T = TypeVar("T")


class Pick(Entry):
    """Chooses one unit of a stage by its metrics: `{lowest: nmse, below: {l0: 64}}`, at most 64."""

    lowest: str | None = None
    """The metric that is to be smallest."""

    highest: str | None = None
    """The metric that is to be largest."""

    below: dict[str, float] = Field(default_factory=dict)
    """Metrics that must be at most so much."""

    above: dict[str, float] = Field(default_factory=dict)
    """Metrics that must be at least so much."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.lowest and self.highest:
            raise ValueError("name lowest or highest, not both")
        return self

    def choose(self, label: str, metrics: Mapping[T, Mapping[str, float]]) -> T:
        """Return the unit (or what stands for it) that fits best; of equals the first given.

        A metric that is NaN, as of an SAE that diverged, was not measured.

        Raises:
            UserError: no unit fits, or none has the metric.

        """
        metrics = {
            unit: {key: value for key, value in values.items() if not math.isnan(value)}
            for unit, values in metrics.items()
        }
        name = self.lowest or self.highest
        names = [*([name] if name else []), *self.below, *self.above]
        known = sorted({key for values in metrics.values() for key in values})
        for key in names:
            if key not in known:
                raise UserError(f"{label}: nothing measured '{key}'{or_listed(key, known)}")
        fits = [
            unit
            for unit, values in metrics.items()
            if all(values.get(key, math.inf) <= bound for key, bound in self.below.items())
            and all(values.get(key, -math.inf) >= bound for key, bound in self.above.items())
        ]
        if not fits:
            bounds = [f"{key} <= {value:g}" for key, value in self.below.items()]
            bounds += [f"{key} >= {value:g}" for key, value in self.above.items()]
            every = {key: [x[key] for x in metrics.values() if key in x] for key in (*self.below, *self.above)}
            nearest = [f"the least {key} is {min(every[key]):.6g}" for key in self.below]
            nearest += [f"the largest {key} is {max(every[key]):.6g}" for key in self.above]
            there = f" ({', '.join(nearest)})" if nearest else ""
            raise UserError(f"{label}: none of {len(metrics)} has {' and '.join(bounds) or 'a result'}{there}")
        if not name:
            return fits[0]
        sign = 1 if self.lowest else -1
        return min(fits, key=lambda unit: sign * metrics[unit].get(name, sign * math.inf))


class Opens(Protocol):
    """The entry of an image set."""

    def content(self) -> dict[str, Any]:
        """The settings that decide which images it has."""
        ...

    def open(self, base: Path) -> Dataset:
        """List them; relative paths count from `base`."""
        ...


class Watcher:
    """What a run tells those who watch it; the pipeline passes it on to the hooks. By default it tells nobody."""

    def logged(self, unit: Unit, step: int, values: Mapping[str, float]) -> None:
        """A running stage measured something."""

    def progressed(self, stage: str, done: int, total: int, what: str) -> None:
        """A running stage has done so much."""

    def kept(self, unit: Unit, folder: Path, seconds: float) -> None:
        """A unit was made, or found already made."""


class Run:
    """What a stage may use: the entries of the registry, the units above it, and a place to put its own."""

    def __init__(
        self,
        store: Store,
        base: Path,
        families: Mapping[str, Mapping[str, Sequence[Member]]],
        metrics: Mapping[str, type[Any]],
        device: str = "auto",
        made_with: Mapping[str, str] | None = None,
        watcher: Watcher | None = None,
        mend: bool = False,
    ) -> None:
        """Set the desk.

        Args:
            store: where units are kept.
            base: the folder of registry.yaml.
            families: by kind and name, the members that each entry stands for.
            metrics: what `saefw_metrics` brought: for every SAE, by name.
            device: `auto`, `cpu`, `cuda`, `mps` or `cuda:1`.
            made_with: versions of the code, stored with each unit.
            watcher: who is told.
            mend: whether damage that is met is put right, as in a run; or only said.

        """
        self.store, self.base, self.metrics = store, base, metrics
        self.stage = ""
        self._families, self._device = families, device
        self._made_with, self._watcher = made_with or {}, watcher or Watcher()
        self._made: dict[str, list[Unit]] = {}
        self._guessed: dict[str, list[Unit]] = {}
        self._guessing = False
        self._datasets: dict[str, Dataset] = {}
        self._started = time.monotonic()
        self._unindexed: dict[str, Path] = {}
        self._logs: dict[str, int] = {}
        self._begun: set[str] = set()
        """Units whose log is that of this run, from its start or from a mark on."""
        self._sound: set[str] = set()
        """Kept units that need no check any more: made by this process, or found whole."""
        self._mend = mend

    # What was asked for

    def family(self, kind: str, names: Sequence[str]) -> list[Member]:
        """Return the members of the named entries, in order."""
        return [member for name in names for member in self._families[kind][name]]

    def dataset(self, entry: Opens) -> Dataset:
        """Return an image set, opened; its files are listed once in a run, whichever stages ask for it.

        Raises:
            UserError: it is not there, or cannot be opened.

        """
        key = canonical(entry.content())
        if key not in self._datasets:
            self._datasets[key] = entry.open(self.base)
        return self._datasets[key]

    def made_by(self, stage: str, use: str = "") -> list[Unit]:
        """Return the units of a stage above, by its name in registry.yaml; in a dry run they may not be there yet.

        Args:
            stage: its name.
            use: what makes units that will do: `record`; empty: any.

        Raises:
            NotYet: that stage cannot list them yet.
            UserError: it makes others.

        """
        known = {**self._guessed, **self._made} if self._guessing else self._made
        if stage not in known:
            raise NotYet(f"decided once {stage} is made")
        for unit in known[stage]:
            if use and unit.stage != use:
                raise UserError(f"'{stage}' is a stage of {unit.stage}, not of {use}")
        return known[stage]

    def decided(self, stage: str, units: Sequence[Unit]) -> bool:
        """Whether one can choose among units of a stage by what was measured: all are made; False only while guessing.

        Raises:
            NotYet: they are not.

        """
        if all(self.store.has(unit) for unit in units):
            return True
        if self._guessing:
            return False
        raise NotYet(f"decided once {stage} is made")

    def best(self, stage: str, pick: Pick, among: Callable[[Unit], bool] = lambda unit: True) -> Unit:
        """Return the unit of a stage that `pick` chooses by its last metrics, from those that `among` admits.

        Of equals one by address, so that the order of the file does not matter. While guessing, any, where not all of
        them are made.

        Raises:
            NotYet: not all of them are made.
            UserError: none fits.

        """
        units = sorted(filter(among, self.made_by(stage)), key=lambda unit: unit.address)
        if not self.decided(stage, units):
            return units[0]
        with self.db() as db:
            rows = db.execute(
                "SELECT unit, name, value FROM final WHERE list_contains(?, unit)",
                [[unit.address for unit in units]],
            ).fetchall()
        metrics: dict[Unit, dict[str, float]] = {unit: {} for unit in units}
        by_address = {unit.address: unit for unit in units}
        for address, name, value in rows:
            metrics[by_address[address]][name] = value
        return pick.choose(stage, metrics)

    @property
    def device(self) -> str:
        """The device to compute on: what registry.yaml says, or the best there is.

        Raises:
            UserError: it is not there.

        """
        if self._device == "auto":
            import torch

            self._device = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
        elif self._device != "cpu":
            import torch

            there = torch.cuda.device_count() if self._device.startswith("cuda") else int(torch.mps.is_available())
            if int(self._device.partition(":")[2] or 0) >= there:
                raise UserError(
                    f"device: {self._device}: this machine, or this build of torch, has none; try auto or cpu"
                )
        return self._device

    # Where to put it

    def folder(self, unit: Unit) -> Path:
        """Return the unit's folder: the kept one, or the one it is being made in.

        Raises:
            UserError: in a run, the unit is kept but no longer what it was when it was made.

        """
        if not self.store.has(unit):
            return self.store.begin(unit)
        if self._mend:
            self.check(unit)
        return self.store.folder(unit)

    def check(self, *units: Unit) -> None:
        """See that the files of kept units are what they were when they were made; once for each unit.

        Raises:
            UserError: some are damaged. In a run their units are set back, so that the next run makes them again.

        """
        units = tuple(unit for unit in dict.fromkeys(units) if unit.address not in self._sound)
        told = self._checking([self.store.folder(unit) for unit in units])
        found = {unit: damage for unit in units if (damage := list(damages(self.store.folder(unit), told=told)))}
        self._sound.update(unit.address for unit in units if unit not in found)
        if found:
            raise Faults([self._put_right(unit, damage) for unit, damage in found.items()])

    def _checking(self, folders: Sequence[Path]) -> Callable[[int], None]:
        """Return what takes the number of bytes that were checked and, where it takes long, says how far it is."""
        total, done, due = sum(map(weight, folders)), 0, time.monotonic() + PATIENCE

        def told(n: int) -> None:
            nonlocal done, due
            done += n
            if time.monotonic() >= due:
                due = time.monotonic() + PAUSE
                self.progress(done, total, "bytes checked")

        return told

    def _put_right(self, unit: Unit, damage: Sequence[Damage]) -> str:
        """Set a damaged unit back, in a run; return what there is to say of it."""
        folder, text = self.store.folder(unit), said(damage)
        if not self._mend:
            return f"{text}; `saefw verify --mend` sets '{unit.label}' back, and `saefw run` makes it again"
        try:
            self.store.set_back(folder, damage)
        except Unread:
            raise
        except (OSError, UserError):
            return f"{text}, and '{unit.label}' cannot be set back; delete {folder}, and the next run makes it again"
        return f"{text}; '{unit.label}' is set back: the next run makes it again, and all else is kept"

    def put(self, unit: Unit, table: str, **columns: Any) -> None:
        """Write all rows of a table of schema.sql that belong to a unit: arrays, lists or single values by column."""
        self.store.write(unit, table, columns)

    def log(self, unit: Unit, step: int, **values: float) -> None:
        """Note what was measured at a step; becomes rows of `metric`.

        It survives a stop, for a stage that goes on from a checkpoint and rewinds to the mark in it.
        """
        for name, value in values.items():
            if not isinstance(value, int | float):
                raise TypeError(f"'{unit.label}': '{name}' must be an int or a float to be logged (got {value!r})")
        log = self._logs.get(unit.address) or self._open_log(unit)
        line = (json.dumps([step, values]) + "\n").encode()
        with writing(self.store.partial(unit) / LOG):
            # Straight to the system: killed at any moment, what was logged is there.
            while line:
                line = line[os.write(log, line) :]
        self._watcher.logged(unit, step, values)

    def mark(self, unit: Unit) -> str:
        """Return the place in a unit's log, to be put into a checkpoint: how long it is, and its checksum."""
        path = self.store.begin(unit) / LOG
        if unit.address not in self._begun:
            return _mark(b"")
        settle(path)  # or a power cut could leave a checkpoint of more than its log
        return _mark(path.read_bytes())

    def rewind(self, unit: Unit, mark: str = "") -> bool:
        """Forget what was logged after a mark, when going on from a checkpoint made there; without a mark, forget all.

        Returns False, and forgets all, if what was logged before the mark is damaged.
        """
        if (log := self._logs.pop(unit.address, None)) is not None:
            os.close(log)
        path = self.store.begin(unit) / LOG
        data = _taken(path, mark) if mark else b""
        if data is None:
            logger.warning("%s: damaged; it is not used, and what it held is made again", path)
        write_atomically(path, data or b"")
        self._begun.add(unit.address)
        return data is not None

    def keep(self, *units: Unit, without: Sequence[str] = ()) -> None:
        """Commit units that are complete; units kept in one call share the time since the last one.

        Files named in `without` served the making alone (checkpoints): they are dropped once a unit is committed, not
        before, so that a stop in between loses nothing.
        """
        seconds = (time.monotonic() - self._started) / len(units)
        self._close_logs()
        for unit in units:
            # A step may have been logged twice: the later value counts.
            rows = {
                (step, name): value
                for step, values in (
                    _rows((self.store.begin(unit) / LOG).read_bytes()) if unit.address in self._begun else ()
                )
                for name, value in values.items()
            }
            if rows:
                steps, names = zip(*rows, strict=True)
                self.put(unit, "metric", step=list(steps), name=list(names), value=list(rows.values()))
            self._unindexed[unit.address] = self.store.keep(unit, seconds, self._made_with, without=[LOG, *without])
            self._sound.add(unit.address)
            self._watcher.kept(unit, self._unindexed[unit.address], seconds)
        self._started = time.monotonic()

    def progress(self, done: int, total: int, what: str) -> None:
        """Say how much of its images, tokens or steps the stage has done."""
        self._watcher.progressed(self.stage, done, total, what)

    @contextmanager
    def db(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open the index to read, with everything kept so far in it.

        Raises:
            UserError: it is damaged. In a run it is removed, so that the next run makes it anew.

        """
        self.publish()
        try:
            with self.store.db() as db:
                yield db
        except BrokenIndex as error:
            if not self._mend:
                raise
            try:
                self.store.drop()
            except (OSError, UserError):
                raise error from None
            text = f"{self.store.root / INDEX}: damaged; it is removed, and the next run makes it anew from the folders"
            raise UserError(text) from error

    # What the pipeline does

    def enter(self, stage: str) -> None:
        """Begin a stage: its clock starts."""
        self._close_logs()
        self.stage, self._started = stage, time.monotonic()

    def listed(self, stage: str, units: Sequence[Unit]) -> None:
        """Note what a stage makes, for the stages below it."""
        (self._guessed if self._guessing else self._made)[stage] = list(units)

    @contextmanager
    def guessing(self) -> Iterator[None]:
        """Let stages list what they might make while it is not known what they will choose."""
        self._guessing = True
        try:
            yield
        finally:
            self._guessing = False

    def found(self, *units: Unit) -> None:
        """Tell that units were found already made."""
        for unit in units:
            self._watcher.kept(unit, self.store.folder(unit), 0)

    def publish(self) -> None:
        """Bring what was kept into the index; a failure costs nothing but a later `saefw index`."""
        new = dict(self._unindexed)
        if new:
            self.store.index(new)
        # Only now: told to stop while it was indexed, a run tries once more before it goes.
        self._unindexed = {address: folder for address, folder in self._unindexed.items() if address not in new}

    def _open_log(self, unit: Unit) -> int:
        if self.store.has(unit):
            raise RuntimeError(f"'{unit.label}' was logged to after it was kept")
        if len(self._logs) >= 200:  # a sweep may be wider than the system lets one process open files
            self._close_logs()
        # What an earlier run logged counts only for a stage that rewound to a mark in it.
        anew = 0 if unit.address in self._begun else os.O_TRUNC
        handle = os.open(self.store.begin(unit) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | anew, 0o666)
        self._begun.add(unit.address)
        self._logs[unit.address] = handle
        return handle

    def _close_logs(self) -> None:
        for handle in self._logs.values():
            os.close(handle)
        self._logs.clear()


def _rows(data: bytes) -> list[tuple[int, dict[str, float]]]:
    """Return what a log holds; raise ValueError if that is nothing that was logged, or that no table can hold."""
    rows = []
    for line in data.splitlines():
        try:
            match json.loads(line):
                case [int(step), dict(values)] if type(step) is int and -(2**63) <= step < 2**63:
                    rows.append((step, {name: _float(value) for name, value in values.items() if name.encode()}))
                case _:
                    raise ValueError("not a row of a log")
        except (RecursionError, OverflowError) as error:
            raise ValueError(str(error)) from error
    return rows


def _float(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError("not a number")
    return float(value)


def _taken(path: Path, mark: str) -> bytes | None:
    """Return the log up to a mark, or None if it is not what it was then."""
    if not path.is_file():
        return b"" if mark == _mark(b"") else None
    try:
        data = path.read_bytes()[: int(mark.partition(":")[0])]
        _rows(data)
    except ValueError:
        return None
    return data if _mark(data) == mark else None


def _mark(data: bytes) -> str:
    return f"{len(data)}:{sha256(data).hexdigest()}"
