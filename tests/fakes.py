"""Stages that make next to nothing, for tests of the pipeline and the command line."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from saefw.plugin import FigureConfig, Knob, Names, Pace, Pick, Run, StageConfig, Unit, UserError, hookimpl

MADE = "made.txt"
"""Beside registry.yaml: the label of every unit made, in order, whichever process made it."""


class Numbers(StageConfig):
    """Makes one unit a number; measures it."""

    use: Literal["numbers"] = "numbers"

    n: list[int] = Field(default_factory=lambda: [1, 2, 3])
    """The numbers."""

    plus: int = 0
    """Is added to each."""

    seconds: Annotated[float, Knob] = 0.0
    """How long each takes."""

    fault: Annotated[Literal["", "units", "make", "forget", "bug"], Knob] = ""
    """What goes wrong."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit a number."""
        if self.fault == "units":
            raise UserError("these numbers do not fit")
        for n in self.n:
            yield Unit("numbers", {"n": n + self.plus}, label=f"number {n + self.plus}", given={"stage": self})

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Write each number into its folder."""
        for i, unit in enumerate(units):
            if self.fault and i == 1:
                if self.fault == "make":
                    raise UserError("the second is too large\nand too blue")
                if self.fault == "bug":
                    raise ZeroDivisionError("a bug")
                return
            time.sleep(self.seconds)
            (run.folder(unit) / "number.txt").write_text(str(unit.content["n"]))
            run.log(unit, 1, nmse=1 / (1 + unit.content["n"]), l0=8.0)
            with (run.base / MADE).open("a") as file:
                file.write(f"{unit.label}\n")
            run.keep(unit)
            run.progress(i + 1, len(units), "numbers")

    def disk(self, unit: Unit, run: Run) -> int:
        """A million bytes for each."""
        return 1_000_000 * int(unit.content["n"])

    def work(self, unit: Unit, run: Run) -> str:
        """One number each."""
        return "one number"

    def duration(self, units: Sequence[Unit], run: Run, pace: Pace) -> float:
        """An hour each."""
        return 3600.0 * len(units)


class Sums(StageConfig):
    """Makes one unit: the sum of the numbers of a stage, or of the one picked."""

    use: Literal["sums"] = "sums"

    of: Annotated[str, Names("stages")]
    """The stage that makes the numbers."""

    pick: Pick | None = None
    """Which of them; null: all."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit."""
        units = [run.best(self.of, self.pick)] if self.pick else run.made_by(self.of)
        yield Unit("sums", {}, tuple(units), label=f"sum of {self.of}")

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Add up what lies in the folders."""
        for unit in units:
            total = sum(int((run.folder(need) / "number.txt").read_text()) for need in unit.needs)
            (run.folder(unit) / "number.txt").write_text(str(total))
            with (run.base / MADE).open("a") as file:
                file.write(f"{unit.label}\n")
            run.keep(unit)


class Draw(StageConfig):
    """Draws figures, in a way."""

    use: Literal["draw"] = "draw"

    figures: Annotated[list[str], Names("figures")] = Field(default_factory=list)
    """What to draw."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit a figure."""
        for member in run.family("figures", self.figures):
            yield Unit("draw", {"figure": member.entry.content()}, label=member.label)

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Write a picture without pixels."""
        for unit in units:
            (run.folder(unit) / f"{unit.content['figure']['use']}.png").write_bytes(b"")
            run.keep(unit)


class Dots(FigureConfig):
    """Dots on a line."""

    use: Literal["dots"] = "dots"

    size: float = 1.5
    """In points."""

    colour: Literal["red", "blue"] = "red"
    """Of the dots."""


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """Three."""
    return [Numbers, Sums, Draw]


@hookimpl
def saefw_figures() -> list[type[FigureConfig]]:
    """One."""
    return [Dots]


def made(base: Path) -> list[str]:
    """Return the labels of the units made so far, in order."""
    path = base / MADE
    return path.read_text().splitlines() if path.exists() else []
