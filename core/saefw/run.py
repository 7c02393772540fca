"""What a stage finds on its desk."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import duckdb
from pydantic import Field, model_validator

from saefw.entry import Entry, Member
from saefw.errors import NotYet, UserError
from saefw.store import Store, write_atomically
from saefw.unit import Unit

LOG = "metric.jsonl"
"""What a unit logged so far, one JSON list [step, {name: value}] a line; becomes its metric table when kept."""


T = TypeVar("T")


class Pick(Entry):
    """Chooses one unit of a stage by its metrics: `{layer: -2, lowest: nmse, below: {l0: 64}}`."""

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
            raise ValueError(f"name lowest or highest, not both (got {self.lowest!r} and {self.highest!r})")
        return self

    def choose(self, label: str, metrics: Mapping[T, Mapping[str, float]]) -> T:
        """Return the unit (or what stands for it) that fits best; of equals the first given.

        Raises:
            UserError: no unit fits, or none has the metric.

        """
        name = self.lowest or self.highest
        names = [*([name] if name else []), *self.below, *self.above]
        known = sorted({key for values in metrics.values() for key in values})
        for key in names:
            if key not in known:
                raise UserError(f"{label}: nothing measured '{key}' (there are: {', '.join(known)})")
        fits = [
            unit
            for unit, values in metrics.items()
            if all(values.get(key, math.inf) <= bound for key, bound in self.below.items())
            and all(values.get(key, -math.inf) >= bound for key, bound in self.above.items())
        ]
        if not fits:
            bounds = [f"{key} <= {value:g}" for key, value in self.below.items()]
            bounds += [f"{key} >= {value:g}" for key, value in self.above.items()]
            raise UserError(f"{label}: none of {len(metrics)} has {' and '.join(bounds) or 'a result'}")
        if not name:
            return fits[0]
        sign = 1 if self.lowest else -1
        return min(fits, key=lambda unit: sign * metrics[unit].get(name, sign * math.inf))


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

        """
        self.store, self.base, self.metrics = store, base, metrics
        self.stage = ""
        self._families, self._device = families, device
        self._made_with, self._watcher = made_with or {}, watcher or Watcher()
        self._made: dict[str, list[Unit]] = {}
        self._started = time.monotonic()
        self._unindexed: dict[str, Path] = {}
        self._logs: dict[str, int] = {}

    # What was asked for

    def family(self, kind: str, names: Sequence[str]) -> list[Member]:
        """Return the members of the named entries, in order."""
        return [member for name in names for member in self._families[kind][name]]

    def made_by(self, stage: str) -> list[Unit]:
        """Return the units of a stage above, by its name in registry.yaml; in a dry run they may not be there yet.

        Raises:
            NotYet: that stage cannot list them yet.

        """
        if stage not in self._made:
            raise NotYet(f"decided once {stage} is made")
        return self._made[stage]

    def best(self, stage: str, pick: Pick, among: Callable[[Unit], bool] = lambda unit: True) -> Unit:
        """Return the unit of a stage that `pick` chooses by its last metrics, from those that `among` admits.

        Of equals one by address, so that the order of the file does not matter.

        Raises:
            NotYet: not all of them are made.
            UserError: none fits.

        """
        units = sorted(filter(among, self.made_by(stage)), key=lambda unit: unit.address)
        if not all(self.store.has(unit) for unit in units):
            raise NotYet(f"decided once {stage} is made")
        with self.db() as db:
            rows = db.execute(
                "SELECT unit, name, value FROM final WHERE list_contains(?, unit) AND NOT isnan(value)",
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
        """Return the unit's folder: the kept one, or the one it is being made in."""
        return self.store.folder(unit) if self.store.has(unit) else self.store.begin(unit)

    def put(self, unit: Unit, table: str, **columns: Any) -> None:
        """Write all rows of a table of schema.sql that belong to a unit: arrays, lists or single values by column."""
        self.store.write(unit, table, columns)

    def log(self, unit: Unit, step: int, **values: float) -> None:
        """Note what was measured at a step; it survives a stop and becomes rows of `metric`."""
        log = self._logs.get(unit.address) or self._open_log(unit)
        # One write a line, straight to the system: killed at any moment, what was logged is there.
        os.write(log, (json.dumps([step, values]) + "\n").encode())
        self._watcher.logged(unit, step, values)

    def rewind(self, unit: Unit, step: int) -> None:
        """Forget what was logged after a step, when going on from a checkpoint made there."""
        self._close_logs()
        path = self.store.begin(unit) / LOG
        lines = [json.dumps(row) + "\n" for row in _logged(path) if row[0] <= step]
        write_atomically(path, "".join(lines).encode())

    def keep(self, *units: Unit, without: Sequence[str] = ()) -> None:
        """Commit units that are complete; units kept in one call share the time since the last one.

        Files named in `without` served the making alone (checkpoints): they are dropped once a unit is committed, not
        before, so that a stop in between loses nothing.
        """
        seconds = (time.monotonic() - self._started) / len(units)
        self._close_logs()
        for unit in units:
            # A stage that was killed before this point logs its last steps again: the later value counts.
            rows = {
                (step, name): value
                for step, values in _logged(self.store.begin(unit) / LOG)
                for name, value in values.items()
            }
            if rows:
                steps, names = zip(*rows, strict=True)
                self.put(unit, "metric", step=list(steps), name=list(names), value=[float(v) for v in rows.values()])
            self._unindexed[unit.address] = self.store.keep(unit, seconds, self._made_with, without=[LOG, *without])
            self._watcher.kept(unit, self._unindexed[unit.address], seconds)
        self._started = time.monotonic()

    def progress(self, done: int, total: int, what: str) -> None:
        """Say how much of its images, tokens or steps the stage has done."""
        self._watcher.progressed(self.stage, done, total, what)

    @contextmanager
    def db(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open the index to read, with everything kept so far in it."""
        self.publish()
        with self.store.db() as db:
            yield db

    # What the pipeline does

    def enter(self, stage: str) -> None:
        """Begin a stage: its clock starts."""
        self._close_logs()
        self.stage, self._started = stage, time.monotonic()

    def listed(self, stage: str, units: Sequence[Unit]) -> None:
        """Note what a stage makes, for the stages below it."""
        self._made[stage] = list(units)

    def found(self, *units: Unit) -> None:
        """Tell that units were found already made."""
        for unit in units:
            self._watcher.kept(unit, self.store.folder(unit), 0)

    def publish(self) -> None:
        """Bring what was kept into the index; a failure costs nothing but a later `saefw index`."""
        if self._unindexed:
            new, self._unindexed = self._unindexed, {}
            self.store.index(new)

    def _open_log(self, unit: Unit) -> int:
        if self.store.has(unit):
            raise RuntimeError(f"'{unit.label}' was logged to after it was kept")
        if len(self._logs) >= 200:  # a sweep may be wider than the system lets one process open files
            self._close_logs()
        handle = os.open(self.store.begin(unit) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.write(handle, b"\n")  # ends a line that a power cut may have torn
        self._logs[unit.address] = handle
        return handle

    def _close_logs(self) -> None:
        for handle in self._logs.values():
            os.close(handle)
        self._logs.clear()


def _logged(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Read a log; a line torn by a kill, or that nobody logged, is left out."""
    if not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_row(row):
            yield row[0], row[1]


def _is_row(row: Any) -> bool:
    """Whether it is [step, {name: number}], and what a table can hold."""
    if not (isinstance(row, list) and len(row) == 2 and type(row[0]) is int and -(2**63) <= row[0] < 2**63):
        return False
    return isinstance(row[1], dict) and all(type(value) in (int, float) for value in row[1].values())
