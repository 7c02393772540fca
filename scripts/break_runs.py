"""Stops the embedded experiment again and again and compares what it ends with to an unbroken run.

The registry is run once in peace. In another folder it is begun, stopped at a random moment (by Ctrl-C, SIGTERM and
kill -9 in turn; before its first stage, in every stage, while units are kept, while the index is published), begun
again, and so on, then let run to its end. Every file must have the same bytes and every table the same rows, but for
`made_at`, `seconds` and `made_with`; what was told to stop must say one sentence and be gone at once; nothing may be
left lying about.

    python scripts/break_runs.py [--times 20] [--seed 0] [--registry registry.yaml]
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from saefw.index import INDEX, types

TOP = Path(__file__).resolve().parents[1]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)

SAID = "stopped; what is kept stays, and the next run goes on from there\n"

PATIENCE = 8.0
"""Seconds in which a run that is told to stop must be gone."""

BETWEEN = ("made_at", "seconds", "made_with")
"""What may differ between two runs."""

STARTING = 0.3
"""Seconds in which Python itself starts; only then is there somebody to be told."""

LOOK = 0.005
"""Seconds between two looks at a run."""


class Moment(NamedTuple):
    """When to stop a run."""

    stage: str
    """In this stage; empty: before the first."""

    how: str
    """`seconds`: after some; `keeping`: once a unit is whole but not renamed; `indexing`: while one is published."""

    share: float
    """The seconds, as a share of those that the stage takes unbroken."""


class Stop(NamedTuple):
    """What a stop did."""

    number: signal.Signals
    stage: str
    """Where it really hit."""

    how: str
    seconds: float
    """How long the stage had been going on."""

    code: int
    said: str
    gone: float
    """Seconds from the signal until the process was no more."""


class Going:
    """A run in a process group of its own, as a terminal starts it."""

    def __init__(self, folder: Path) -> None:
        """Start it in a folder that holds registry.yaml."""
        self.store, self.started = folder / "runs", time.monotonic()
        self._out, self._err = folder / "out.txt", folder / "err.txt"
        with self._out.open("w") as out, self._err.open("w") as err:
            command = [str(Path(sys.executable).with_name("saefw")), "run"]
            self.process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, start_new_session=True)
        self.entered: dict[str, float] = {}
        """When each stage began."""

    @property
    def stage(self) -> str:
        """The stage that is being made, or nothing before the first one with something to make."""
        return next(reversed(self.entered), "")

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait until something is so, or the run has ended."""
        while not self.over:
            for name in re.findall(r"^(\S+): [\d,]+ units? to make", self._out.read_text(), re.M):
                self.entered.setdefault(name, time.monotonic())
            if reached():
                return
            time.sleep(LOOK)

    def wait(self, moment: Moment, took: dict[str, float]) -> None:
        """Wait for a moment, or the end; where its stage is done already, for that moment of a later one."""
        stages = list(took)
        later = set(stages[stages.index(moment.stage) :])
        self.until(lambda: not moment.stage or bool(later & set(self.entered)))
        ready = time.monotonic() + moment.share * took[self.stage] + (0 if moment.stage else STARTING)
        if moment.how == "seconds":
            self.until(lambda: time.monotonic() >= ready)
        elif moment.how == "keeping":
            self.until(lambda: any(self.store.glob("*/*.partial/made.json*")))
        else:
            self.until(lambda: any(self.store.glob(f".{INDEX}.part")))

    def end(self) -> None:
        """Wait for its end.

        Raises:
            SystemExit: it did not end well.

        """
        self.until(lambda: False)
        if (said := self._err.read_text()) or self.process.returncode:
            raise SystemExit(f"a run that nobody stopped ended with exit code {self.process.returncode}: {said}")

    def stop(self, number: signal.Signals, how: str) -> Stop:
        """Send a signal to the whole group and wait until it is gone; one that does not go is killed."""
        stage = self.stage
        began = time.monotonic()
        os.killpg(self.process.pid, number)
        try:
            self.process.wait(10 * PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        gone = time.monotonic() - began
        code, seconds = self.process.wait(), began - self.entered.get(stage, self.started)
        return Stop(number, stage or "planning", how, seconds, code, self._err.read_text(), gone)

    @property
    def left_behind(self) -> bool:
        """Whether any process of the group still lives."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


def unbroken(folder: Path) -> dict[str, float]:
    """Run to the end; return how long each stage took, and under the empty name how long it took to the first."""
    run = Going(folder)
    run.end()
    starts = [run.started, *run.entered.values(), time.monotonic()]
    return {name: starts[i + 1] - starts[i] for i, name in enumerate(["", *run.entered])}


def moments(stages: list[str], times: int, draw: random.Random) -> list[Moment]:
    """Spread the stops over the stages, in their order: each is hit, and each way of hitting it comes up."""
    names = sorted((stages[i % len(stages)] for i in range(times)), key=stages.index)
    ways = ["seconds", "keeping", "seconds", "indexing"]
    chosen = []
    for i, name in enumerate(names):
        how = ways[i % len(ways)] if name else "seconds"
        chosen.append(Moment(name, how, draw.uniform(0, 0.8 / (names.count(name) if name else 1))))
    return chosen


def broken(folder: Path, took: dict[str, float], times: int, draw: random.Random) -> Iterator[tuple[Stop, list[str]]]:
    """Run and stop; yield each stop with what is wrong with it. At last run to the end."""
    order = list(SIGNALS)
    draw.shuffle(order)
    for i, moment in enumerate(moments(list(took), times, draw)):
        run = Going(folder)
        run.wait(moment, took)
        if run.over:
            break
        stop = run.stop(order[i % len(order)], moment.how)
        yield stop, faults_of(stop, run)
    else:
        run = Going(folder)
    run.end()


def faults_of(stop: Stop, run: Going) -> list[str]:
    """Say what is wrong with how a run went."""
    faults = []
    expected = (-signal.SIGKILL, "") if stop.number == signal.SIGKILL else (130, SAID)
    if (stop.code, stop.said) != expected:
        faults.append(f"exit code {stop.code}, saying {stop.said!r}, instead of {expected[0]}, saying {expected[1]!r}")
    if stop.gone > PATIENCE:
        faults.append(f"it took {stop.gone:.1f} s to go, more than {PATIENCE:g}")
    if run.left_behind:
        faults.append("a process of it lives on")
    if len(copies := list(run.store.glob(f".{INDEX}*"))) > 2:  # a copy and its log
        faults.append(f"{len(copies)} copies of the index lie about")
    return faults


def differences(one: Path, two: Path) -> Iterator[str]:
    """Say in what two stores differ: in their files, byte by byte, and in the rows of every table."""
    files = [{path.relative_to(store).as_posix() for path in store.glob("*/*/**/*") if path.is_file()}
             for store in (one, two)]  # fmt: skip
    for name in sorted(files[0] ^ files[1]):
        yield f"{name}: is there {'without' if name in files[0] else 'with'} stops only"
    for name in sorted(files[0] & files[1]):
        if name.endswith("/made.json"):
            values = [json.loads((store / name).read_text()) for store in (one, two)]
            for key in sorted({key for value in values for key in value} - {*BETWEEN}):
                if values[0].get(key) != values[1].get(key):
                    yield f"{name}: '{key}' differs"
        elif (one / name).read_bytes() != (two / name).read_bytes():
            yield f"{name}: other bytes"
    for table in types():
        rows = [rows_of(store, table) for store in (one, two)]
        if rows[0] != rows[1]:
            lacking, more = (len(set(a) - set(b)) for a, b in (rows, rows[::-1]))
            yield f"table {table}: of {len(rows[0])} rows {lacking} are lacking, and {more} of {len(rows[1])} are new"


def rows_of(store: Path, table: str) -> list[tuple[Any, ...]]:
    """Return the rows of a table in the index, but for what may differ."""
    columns = ", ".join(f'"{name}"' for name in types()[table] if name not in BETWEEN)
    with duckdb.connect(str(store / INDEX), read_only=True) as db:
        # As text, so that a NaN equals itself.
        return db.execute(f"SELECT CAST(t AS TEXT) FROM (SELECT {columns} FROM {table}) t ORDER BY ALL").fetchall()


def leftovers(store: Path) -> Iterator[str]:
    """Name what only a run under way may hold."""
    for path in sorted([*store.rglob("*.part*"), *store.rglob("*.partial"), *store.rglob("*.wal")]):
        yield f"{path.relative_to(store)}: was left"
    units, locks = len(list(store.glob("*/*/made.json"))), len(list((store / "locks").iterdir()))
    if locks > units + 1:  # one for the index
        yield f"locks: {locks} of them, for {units} units"


def main() -> int:
    """Return the exit code: 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="how often to stop it (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--registry", type=Path, default=TOP / "registry.yaml", help="what to run")
    asked = parser.parse_args()
    # A shell starts what it sends to the background deaf to Ctrl-C, and deaf would be what is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw, wrong = random.Random(asked.seed), []
    with tempfile.TemporaryDirectory() as base:
        folders = [Path(base) / name for name in ("unbroken", "broken")]
        for folder in folders:
            folder.mkdir()
            shutil.copy(asked.registry, folder / "registry.yaml")
        took = unbroken(folders[0])
        print("unbroken: " + ", ".join(f"{name or 'planning'} {seconds:.1f} s" for name, seconds in took.items()))
        print(
            f"{'stop':>4}  {'signal':<8}{'stage':<10}{'when':<10}{'into it':>8}  {'exit':>4}  {'gone in':>8}  said",
            flush=True,
        )
        hit = set()
        for i, (stop, faults) in enumerate(broken(folders[1], took, asked.times, draw), 1):
            hit.add(stop.stage)
            print(
                f"{i:>4}  {stop.number.name:<8}{stop.stage:<10}{stop.how:<10}{stop.seconds:>6.2f} s  {stop.code:>4}  "
                f"{stop.gone:>6.2f} s  {stop.said.strip().splitlines()[-1] if stop.said else ''}",
                flush=True,
            )
            wrong += [f"stop {i}: {fault}" for fault in faults]
        if asked.times >= len(took):
            wrong += [f"no stop hit {name or 'planning'}" for name in took if (name or "planning") not in hit]
        stores = [folder / "runs" for folder in folders]
        wrong += [*differences(*stores), *leftovers(stores[1])]
    print("\n".join(wrong) or "Both end with the same files, byte by byte, and the same rows; nothing is left behind.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
