"""Prints what a run does: a plan, progress bars, what was made, where to look.

On a terminal bars move; anywhere else plain lines come, one every ten seconds while something goes on.
"""

import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from saefw.errors import escaped
from saefw.gc import Spare
from saefw.pipeline import Cost, Observer, StagePlan
from saefw.plugin import Unit, hookimpl
from saefw.store import Store
from saefw.tables import grid, table

EVERY = 10.0
"""Seconds between two lines of progress where no bar can move."""

FEW = 12
"""Up to so many units of a stage are named when they are kept; of more only the bar tells."""

LATELY = 20.0
"""Of how many seconds the rate is that a bar tells: before, one SAE of a sweep may have caught up with the others."""

PAGED = ("train", "visuals", "probe", "steer")
"""Stages of whose units the page shows something."""

MINUTE = "< 1 min"
"""A short time, where no more is known than a guess."""

MEASURES = ("nmse", "l0", "dead", "valid_accuracy", "test_accuracy", "recovered_accuracy", "shift_effect")
"""What is said of a unit when it is kept, if it was measured."""


class Printer(Observer):
    """Prints a run; a plugin that hears the hooks, and the pipeline's observer."""

    def __init__(self, console: Console) -> None:
        """Print to a console; bars only if that is a terminal."""
        self.console = console
        self.made = 0
        self._started = self._entered = time.monotonic()
        self._live: Live | None = None
        self._bar: Bar | None = None
        self._line_at = time.monotonic()
        self._measured: dict[Unit, dict[str, float]] = {}
        self._news: dict[Unit, None] = {}
        """Units measured since the last line of progress that tells of them."""
        self._stage: StagePlan | None = None
        self._width = 0
        self._waits: set[str] = set()

    # Before

    def planned(self, plans: Sequence[StagePlan]) -> None:
        """Show what is to be made."""
        self._width = max((len(plan.name) for plan in plans), default=0)
        shown = table("stage", "units>", "kept>", "to make>", "")
        for plan in plans:
            counts = ["", "", ""] if plan.reason else [f"{len(x):,}" for x in (plan.units, plan.kept, plan.missing)]
            shown.add_row(plan.name, *counts, plan.reason)
        self.console.print(shown)

    # The pipeline's observer

    def entered(self, plan: StagePlan) -> None:
        """Begin a stage."""
        self._stage, self._entered, self._line_at = plan, time.monotonic(), time.monotonic()
        if plan.missing and not self.console.is_terminal:
            self.say(f"{plan.name}: {_count(len(plan.missing), 'unit')} to make, {len(plan.kept):,} kept")
        if plan.missing and self.console.is_terminal:
            self._show(Bar(plan.name, 0, 0, ""))

    def waiting(self, unit: Unit, holder: str) -> None:
        """Say who is waited for, once."""
        if holder not in self._waits:
            self._waits.add(holder)
            self.say(f"{self._name}: waiting for {holder}, which makes '{unit.label}'")

    def left(self, plan: StagePlan, made: Sequence[Unit]) -> None:
        """End a stage."""
        self.close()
        self.made += len(made)
        self._measured, self._news = {}, {}
        if made:
            text = Text(f"{plan.name:<{self._width}}  ", style="bold")
            text.append(f"{len(made):,} made", style="green")
            text.append(f", {len(plan.units) - len(made):,} kept, {span(time.monotonic() - self._entered)}", style="")
            self.say(text)

    # The hooks

    @hookimpl
    def saefw_logged(self, unit: Unit, step: int, values: Mapping[str, float]) -> None:
        """Remember what was measured last."""
        # A new one each time: another thread draws it.
        self._measured = {**self._measured, unit: {**self._measured.get(unit, {}), **values}}
        if not values.keys().isdisjoint(MEASURES):
            self._news[unit] = None

    @hookimpl
    def saefw_progressed(self, stage: str, done: int, total: int, what: str) -> None:
        """Move the bar, or print a line if ten seconds have gone."""
        bar = self._bar
        if bar is None or (bar.what, bar.total) != (what, total) or done < bar.done:
            bar = Bar(stage, done, total, what)
        bar.move(done)
        self._show(bar)
        if not self.console.is_terminal and time.monotonic() - self._line_at >= EVERY:
            self._line_at = time.monotonic()
            self.say(bar.text())
            for unit in list(self._news)[:FEW]:
                self.say(self._row(unit, self._measured[unit]))
            self._news.clear()

    @hookimpl
    def saefw_kept(self, unit: Unit, folder: Path, seconds: float) -> None:
        """Name a unit that was made, if they are few."""
        measured = self._measured.get(unit, {})
        self._measured = {other: values for other, values in self._measured.items() if other != unit}
        self._news.pop(unit, None)
        if seconds and self._stage and len(self._stage.missing) <= FEW:
            self.say(self._row(unit, measured))

    # After

    def close(self) -> None:
        """Take the bar away; also when a run is stopped."""
        if self._live:
            self._live.stop()
        self._live = self._bar = None

    def summary(self, done: Sequence[StagePlan], store: Store, registry: Path) -> None:
        """Say what was made and where it is."""
        kept = sum(len(plan.units) for plan in done) - self.made
        if self.made:
            took = span(time.monotonic() - self._started)
            self.say(f"\nMade {_count(self.made, 'unit')} in {took}; {kept:,} were there.")
        else:
            self.say(f"Nothing to make: {_count(kept, 'unit')} kept in {short(store.root)}.")
        pictures = [
            path
            for plan in done
            for unit in plan.units
            if unit.stage == "draw"
            for path in sorted(store.folder(unit).glob("*.png"))
        ]
        galleries = [
            store.folder(unit) / "site" / "index.html"
            for plan in done
            for unit in plan.units
            if unit.stage == "gallery"
        ]
        shown = any(unit.stage in PAGED for plan in done for unit in plan.units)
        saefw = called()
        other = "" if registry == Path("registry.yaml") else f" --registry {registry}"
        page = "" if registry == Path("registry.yaml") else f" {registry}"
        if not self.made:
            folder = f"Pictures: {short(pictures[0].parent.parent)}. " if pictures else ""
            gallery = f"Gallery: {short(galleries[0])}. " if galleries else ""
            served = f". Page: {saefw} serve{page}" if shown else ""
            self.say(f'{folder}{gallery}Tables: {saefw} sql "FROM pareto"{other}{served}')
            return
        where = grid(2)
        for i, path in enumerate(pictures[:FEW]):
            where.add_row("pictures" if i == 0 else "", short(path))
        if len(pictures) > FEW:
            where.add_row("", f"and {len(pictures) - FEW} more in {short(pictures[0].parent.parent)}")
        for i, path in enumerate(galleries):
            where.add_row("gallery" if i == 0 else "", short(path))
        where.add_row("tables", f'{saefw} sql "FROM pareto"{other}')
        if shown:
            where.add_row("page", f"{saefw} serve{page}")
        self.console.print(where, soft_wrap=True)

    def dry(
        self,
        plans: Sequence[StagePlan],
        costs: Mapping[Unit, Cost],
        seconds: Mapping[str, float] | None = None,
        device: str = "",
    ) -> None:
        """List every unit, whether it is kept, the work and the disk that it needs, and the time that its stage does.

        Args:
            plans: of all stages.
            costs: of all missing and likely units.
            seconds: by stage, nan where nothing is known; none if nothing is known at all.
            device: on which it takes so long.

        """
        seconds = seconds or {}
        shown = table("stage", "unit", "what", "", "disk>")
        for plan in plans:
            missing = set(plan.missing)
            for i, unit in enumerate(plan.units):
                shown.add_row(
                    plan.name if i == 0 else "",
                    unit.address,
                    Cut(unit.label),
                    costs[unit].work or "to make" if unit in missing else "kept",
                    size(costs[unit].disk) if unit in missing else "",
                )
        self.console.print(shown)
        to_make, kept = sum(map(_to_make, plans)), sum(len(plan.kept) for plan in plans)
        if to_make:
            self.say("")
            self._stages(plans, costs, seconds)
        later = [plan for plan in plans if plan.reason]
        open_ended = " Those decided later are not counted." if any(not plan.likely for plan in later) else ""
        need = f", about {size(sum(cost.disk for cost in costs.values())) or 'little disk'}" if to_make else ""
        known = {name: n for name, n in seconds.items() if not math.isnan(n)}
        if known:
            time = roughly(sum(known.values()))
            need += f", {'less than 1 min' if time == MINUTE else f'about {time}'} on {device}"
            unknown = [name for name in seconds if name not in known]
            need += f" without {' and '.join(unknown)}" if unknown else ""
        self.say(f"{_count(to_make, 'unit')} to make{need}; {kept:,} kept.{open_ended}")

    def _stages(self, plans: Sequence[StagePlan], costs: Mapping[Unit, Cost], seconds: Mapping[str, float]) -> None:
        """List what each stage needs in all."""
        shown = table("stage", "to make>", "disk>", "time>", "")
        for plan in plans:
            disk = size(sum(costs[unit].disk for unit in (*plan.missing, *plan.likely)))
            count = f"{_to_make(plan):,}" if plan.likely or not plan.reason else ""
            shown.add_row(plan.name, count, disk, roughly(seconds.get(plan.name, math.nan)), plan.reason)
        self.console.print(shown)

    def say(self, what: RenderableType) -> None:
        """Print a line, or a table, above the bar."""
        if isinstance(what, str):  # may name files, which anybody may have named
            self.console.print("\n".join(map(escaped, what.split("\n"))), soft_wrap=True)
        else:
            self.console.print(what)

    def spare(self, spares: Sequence[Spare]) -> None:
        """List what can be deleted."""
        shown = table("stage", "unit", "what", "disk>", "age>")
        for i, spare in enumerate(spares):
            first = i == 0 or spare.stage != spares[i - 1].stage
            shown.add_row(
                spare.stage if first else "", spare.address, Cut(escaped(spare.label)), size(spare.bytes), age(spare.at)
            )
        self.console.print(shown)

    # Inside

    def __rich__(self) -> RenderableType:
        """The bar, and a line for each unit in the making: what was measured of it last."""
        rows = [self._row(unit, values) for unit, values in list(self._measured.items())[:FEW]]
        if len(self._measured) > FEW:
            rows.append(Text(f"  and {len(self._measured) - FEW} more", style="dim"))
        return Group(*([self._bar] if self._bar else []), *rows)

    @staticmethod
    def _row(unit: Unit, measured: Mapping[str, float]) -> RenderableType:
        """A line for a unit: its name and what was measured of it."""
        row = grid(2, ratios=(1, 1))
        told = {name: measured[name] for name in MEASURES if name in measured} or dict(list(measured.items())[:3])
        row.add_row(Cut(f"  {unit.label}"), Text(numbers(told), style="dim", overflow="ellipsis", no_wrap=True))
        return row

    @property
    def _name(self) -> str:
        return self._stage.name if self._stage else ""

    def _show(self, bar: "Bar") -> None:
        self._bar = bar
        if not self.console.is_terminal:
            return
        if self._live is None:
            # Refreshed by its own thread, so that a stage that reports rarely still shows that time goes on.
            self._live = Live(self, console=self.console, transient=True, refresh_per_second=8)
            self._live.start()


class Cut:
    """A label that is cut in its middle where it is too long: those of a sweep differ at their start and their end."""

    def __init__(self, text: str) -> None:
        """Take the whole of it."""
        self._text = text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Take the width of its longest line, or any less."""
        return Measurement(1, cell_len(self._text)).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Write it in one line."""
        text, width = self._text, options.max_width
        if cell_len(text) > width:
            head = set_cell_size(text, 2 * width // 3)
            tail = set_cell_size(text[::-1], width - 2 * width // 3 - 1)[::-1]
            text = f"{head}\N{HORIZONTAL ELLIPSIS}{tail}"
        yield Text(text, no_wrap=True)


class Bar:
    """How far a stage is with its images, tokens or steps."""

    def __init__(self, stage: str, done: int, total: int, what: str) -> None:
        """Start the clock at what was done already."""
        self.stage, self.total, self.what = stage, total, what
        self.done = done
        self._start = time.monotonic()
        self._seen = deque([(self._start, done)])

    def move(self, done: int) -> None:
        """Note how much is done now."""
        self.done, now = done, time.monotonic()
        self._seen.append((now, done))
        while now - self._seen[1][0] > LATELY:
            self._seen.popleft()

    @property
    def rate(self) -> float:
        """How much a second, lately; 0 as long as it is not known."""
        since, first = self._seen[0]
        seconds = time.monotonic() - since
        return (self.done - first) / seconds if seconds > 0 else 0.0

    def times(self) -> str:
        """The rate and the time left or, as long as they are not known, the time gone by."""
        rate, gone = self.rate, time.monotonic() - self._start
        if not rate:
            return span(gone) if gone >= 1 else ""
        return f"{brief(rate)}/s, {span((self.total - self.done) / rate)} left"

    def text(self) -> str:
        """A line for a log."""
        share = f" ({100 * self.done // self.total} %)" if self.total else ""
        return f"{self.stage}: {self.done:,} of {self.total:,} {self.what}{share}, {self.times()}".removesuffix(", ")

    def __rich__(self) -> RenderableType:
        """A line for a terminal."""
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        count = f"{brief(self.done)}/{brief(self.total)} {self.what}" if self.total else ""
        right = ", ".join(filter(None, [count, self.times()]))
        bar = ProgressBar(self.total or None, self.done, pulse=not self.total)
        line.add_row(Text(self.stage, style="bold"), bar, right)
        return line


def numbers(values: Mapping[str, float]) -> str:
    """Write measurements short: `nmse 0.031, l0 8`."""
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def brief(number: float) -> str:
    """Write a count in at most five signs: 950, 12.3k, 4.56M."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= scale:
            return f"{number / (1000 if letter == 'k' else scale):.3g}{letter}"
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def span(seconds: float) -> str:
    """Write a time: 3.2 s, 48 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def roughly(seconds: float) -> str:
    """Write a time that is a guess, in one or two digits: < 1 min, 40 min, 3 h, 2 days; nothing for nan."""
    if math.isnan(seconds):
        return ""
    if seconds < 60:
        return MINUTE
    for length, unit, upto in ((60, "min", 90), (3600, "h", 48), (86400, "days", math.inf)):
        if seconds < upto * length:
            n = seconds / length
            return f"{round(n) if n < 10 else 5 * round(n / 5) if n < 100 else float(f'{n:.2g}'):,.0f} {unit}"
    raise AssertionError("a time is finite")


def age(at: datetime) -> str:
    """Write how long ago something was: 48 s, 2 h 10 min, 3 days."""
    seconds = (datetime.now(UTC) - at).total_seconds()
    return f"{seconds / 86400:.0f} days" if seconds >= 2 * 86400 else span(max(seconds, 0))


def size(n_bytes: int) -> str:
    """Write a size: 12 kB, 3.4 MB, 1.2 TB; nothing for 0."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.3g} {unit}"
    return f"{n_bytes} B" if n_bytes else ""


def short(path: Path) -> str:
    """Write a path from here, if that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def called() -> str:
    """Return how the command line is called from here: by its name where the shell finds it, else by its path."""
    path = Path(sys.argv[0])
    return str(short(path.absolute())) if path.name == "saefw" and not shutil.which("saefw") else "saefw"


def _to_make(plan: StagePlan) -> int:
    """Return how many units a stage makes, as far as that is known."""
    return len(plan.missing) + len(plan.likely)


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"
