"""What all benches have in common: rounds, rows, a table.

A bench is a module of this package with a function `bench(bench: Bench)`, which measures and calls `bench.row`. What
is compared is run in turn, in one process, and the medians count.
"""

import json
import os
import platform
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from rich.text import Text

from saefw.care import write_atomically
from saefw.errors import UserError
from saefw.printer import Printer, brief
from saefw.tables import console, table

PAUSE = 0.01
"""Seconds between two looks at how much memory is taken."""


class Bound(NamedTuple):
    """What is asked of a measurement."""

    of: str
    """`ratio` or `value`."""

    sign: str
    """`>=` or `<=`."""

    limit: float

    def holds(self, value: float, ratio: float | None) -> bool:
        """Whether a measurement is within the bound; one without a reference has no ratio."""
        found = value if self.of == "value" or ratio is None else ratio
        return found >= self.limit if self.sign == ">=" else found <= self.limit


class Row(NamedTuple):
    """A measurement."""

    name: str
    value: float
    unit: str
    against: str = ""
    """The name of the row that is its reference."""

    reference: float | None = None
    """The value of that row."""

    bound: Bound | None = None
    reason: str = ""
    """Why this machine cannot tell whether the bound holds; nothing where it can."""

    @property
    def ratio(self) -> float | None:
        """The value by the reference."""
        return self.value / self.reference if self.reference else None

    @property
    def holds(self) -> bool | None:
        """Whether the bound holds; None without a bound, or where the machine cannot tell."""
        return None if self.bound is None or self.reason else self.bound.holds(self.value, self.ratio)


class Bench:
    """What a bench is given: how much to do, where to put files, and where its rows go."""

    def __init__(
        self, size_mb: int | None, rounds: int, folder: Path, told: Callable[[str, int, int], None] = lambda *_: None
    ) -> None:
        """Begin without rows.

        Args:
            size_mb: MB of data to work on; None: what the bench thinks right.
            rounds: how often everything is measured.
            folder: for files; it is deleted afterwards.
            told: hears what is done, how much of it, and of how much.

        """
        self.size_mb, self.rounds, self.folder, self.told = size_mb, rounds, folder, told
        self.parts: list[tuple[str, list[Row]]] = []

    def part(self, title: str) -> None:
        """Begin a table; its title says what is the same in all rows: sizes, dtype, threads."""
        self.parts.append((title, []))

    def row(
        self,
        name: str,
        value: float,
        unit: str,
        against: str = "",
        bound: Bound | None = None,
        reason: str = "",
    ) -> None:
        """Add a row to the last table.

        Args:
            name: told apart from the others of the table by it.
            value: a median, or a number that comes of one.
            unit: `vectors/s`, `MB`.
            against: the name of an earlier row of the table: its reference, in the same unit.
            bound: what is asked of it.
            reason: why this machine cannot tell whether the bound holds; the row has it in place of a verdict.

        """
        rows = self.parts[-1][1]
        reference = next((row.value for row in rows if (row.name, row.unit) == (against, unit)), None)
        if against and reference is None:
            raise ValueError(f"there is no row '{against}' in {unit}")
        rows.append(Row(name, value, unit, against, reference, bound, reason))

    def seconds(
        self,
        what: str,
        subjects: Mapping[str, Callable[[], object]],
        before: Callable[[], object] = lambda: None,
    ) -> dict[str, float]:
        """Return the median seconds that each subject takes, by name, after one round that does not count.

        Args:
            what: is measured; for the progress.
            subjects: called in turn, in every round.
            before: called before each of them, outside of its time.

        """
        taken: dict[str, list[float]] = {name: [] for name in subjects}
        for turn in range(self.rounds + 1):
            for i, (name, subject) in enumerate(subjects.items()):
                self.told(what, turn * len(subjects) + i, (self.rounds + 1) * len(subjects))
                before()
                begun = time.perf_counter()
                subject()
                if turn:
                    taken[name].append(time.perf_counter() - begun)
        return {name: statistics.median(found) for name, found in taken.items()}

    def room(self, n_bytes: int) -> None:
        """See that the disk has room.

        Raises:
            UserError: it has not.

        """
        free = shutil.disk_usage(self.folder).free
        if free < n_bytes:
            raise UserError(
                f"{self.folder.parent}: {n_bytes / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; "
                "set TMPDIR to another disk, or give a smaller --size"
            )


def at_least(limit: float, of: str = "ratio") -> Bound:
    """Return a bound from below, of the ratio or of the value."""
    return Bound(of, ">=", limit)


def at_most(limit: float, of: str = "ratio") -> Bound:
    """Return a bound from above, of the ratio or of the value."""
    return Bound(of, "<=", limit)


# Memory


def memory() -> int | None:
    """Return the bytes of memory of this process that are no pages of files; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)


class Peak:
    """The most memory that was taken, beyond what there was at the beginning."""

    bytes = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watch `memory` from a thread; 0 bytes where the system does not tell."""
    peak, over, first = Peak(), threading.Event(), memory()

    def look() -> None:
        while not over.wait(PAUSE):
            peak.bytes = max(peak.bytes, (memory() or 0) - (first or 0))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


# The machine


class Machine(NamedTuple):
    """Where it was measured."""

    cpu: str
    cores: int
    """That this process may use."""

    threads: int
    """Of torch."""


def machine() -> Machine:
    """Return what this machine is."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cpu, cores, torch.get_num_threads())


# From the command


def measured(name: str, size_mb: int | None, rounds: int, file: Path | None) -> None:
    """Run a bench, print its tables and write its rows to a file as JSON."""
    shown, here = console(), machine()
    printer = Printer(shown)
    try:
        # A process that is told to stop raises KeyboardInterrupt, which deletes the folder.
        with TemporaryDirectory(prefix="saefw-bench-", ignore_cleanup_errors=True) as folder:
            bench = Bench(
                size_mb,
                rounds,
                Path(folder),
                lambda what, done, of: printer.saefw_progressed(f"bench {name}", done, of, what),
            )
            import_module(f"saefw.bench.{name}").bench(bench)
    finally:
        printer.close()
    threads = f"{here.threads} thread{'' if here.threads == 1 else 's'}"
    cores = f"{here.cores} core{'' if here.cores == 1 else 's'}"
    shown.print(f"{here.cpu}, {cores}, {threads}; median of {rounds}")
    for title, rows in bench.parts:
        shown.print()
        shown.print(Text(title, style="bold"))
        shown.print(_table(rows))
        for row in rows:
            if row.reason:
                shown.print(f"{row.name}: {row.reason}")
    if file is not None:
        write_atomically(file, json.dumps(list(_told(name, bench, here)), indent=1).encode())


def _told(name: str, bench: Bench, here: Machine) -> Iterator[dict[str, Any]]:
    """Yield the rows for a file."""
    for title, rows in bench.parts:
        for row in rows:
            bound = None if row.bound is None else f"{row.bound.of} {row.bound.sign} {row.bound.limit:g}"
            told = {"bench": name, "part": title, **row._asdict(), "ratio": row.ratio, "bound": bound}
            yield {
                **told,
                "holds": row.holds,
                "reason": row.reason or None,
                "against": row.against or None,
                **here._asdict(),
            }


def _table(rows: list[Row]) -> Any:
    """Return a table in which what has a reference is set in, below it."""
    shown = table("", "value>", "unit", "reference>", "ratio>", "bound>", "holds")
    words = {
        True: Text("yes", style="green"),
        False: Text("no", style="bold red"),
        None: Text("cannot tell", style="yellow"),
    }
    for row in rows:
        reference = "" if row.reference is None else brief(row.reference)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        bound = "" if row.bound is None else f"{row.bound.sign} {_limit(row.bound)}"
        holds = words[row.holds] if row.bound else Text("")
        shown.add_row(
            f"  {row.name}" if row.against else row.name, brief(row.value), row.unit, reference, ratio, bound, holds
        )
    return shown


def _limit(bound: Bound) -> str:
    return brief(bound.limit) if bound.of == "value" else f"{bound.limit:.2f}"
