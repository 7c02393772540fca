"""Draws figures from the store alone, all in one style."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from saefw import notes
from saefw.care import write_atomically
from saefw.origin import whose
from saefw.plugin import FigureConfig, Names, Pace, Run, StageConfig, Unit, UserError, hookimpl, timed
from saefw.style import WIDTH, panels, rendered, shown, styled, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("saefw")


class Draw(StageConfig):
    """Draws figures as PNG, SVG and PDF; the same store gives the same bytes."""

    use: Literal["draw"] = "draw"
    revision: ClassVar[int] = 2

    figures: Annotated[list[str], Names("figures")] = Field(min_length=1)
    """The figures to draw."""

    of: Annotated[list[str], Names("stages")] = Field(min_length=1)
    """The stages above whose units they are drawn from."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit for each figure that finds something to be drawn from.

        Raises:
            NotYet: a stage cannot list its units yet.

        """
        made = [unit for stage in self.of for unit in run.made_by(stage)]
        listed: dict[Unit, None] = {}
        for member in run.family("figures", self.figures):
            figure = member.entry
            assert isinstance(figure, FigureConfig)
            # By address, so that entries in another order make no other figure.
            needs = tuple(sorted({unit for unit in made if unit.stage in figure.wants}, key=lambda unit: unit.address))
            lacking = [stage for stage in figure.wants if stage not in {unit.stage for unit in needs}]
            if not lacking:
                content = {"revision": self.revision, "figure": figure.content()}
                # A figure that names features is another one once people call them otherwise.
                if figure.names_features and (named := _named(run.store.root, needs)):
                    content["names"] = named
                listed[Unit("draw", content, needs, label=member.label, given={"figure": figure})] = None
            else:
                log.warning("figure '%s' is not drawn: `of` names no %s stage", member.label, " and no ".join(lacking))
        yield from listed

    def duration(self, units: Sequence[Unit], run: Run, pace: Pace) -> float:
        """Return the seconds of as many figures of two empty panels."""
        return len(units) * pace("a figure", _figure_seconds)

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Draw each unit.

        Raises:
            UserError: some could not be drawn; the others are.

        """
        failed = []
        with run.db() as db:
            for i, unit in enumerate(units):
                folders: dict[str, list[Path]] = {}
                for need in unit.needs:
                    folders.setdefault(need.stage, []).append(run.store.folder(need))
                figure: FigureConfig = unit.given["figure"]
                try:
                    with styled():
                        files = rendered(sized(figure, figure.draw(db, folders)))
                except UserError as error:
                    failed.append(f"figure '{unit.label}' cannot be drawn: {error}")
                    continue
                for kind, data in files.items():
                    write_atomically(run.folder(unit) / f"{figure.content()['use']}.{kind}", data)
                run.keep(unit)
                run.progress(i + 1, len(units), "figures")
        if failed:
            raise UserError("\n".join(failed))


def _named(root: Path, units: Sequence[Unit]) -> dict[str, dict[str, str]]:
    """Return what people call features of the SAEs that units are made from, by SAE and feature."""
    saes = sorted({need.address for unit in units for need in unit.needs if need.stage == "train"})
    said = {
        sae: {str(feature): note.name for feature, note in notes.of(root, sae).items() if note.name} for sae in saes
    }
    return {sae: names for sae, names in said.items() if names}


def sized(entry: FigureConfig, figure: "Figure") -> "Figure":
    """Return a figure in the size and with the title that its entry sets.

    Raises:
        UserError: it is no figure.

    """
    if not hasattr(figure, "set_size_inches"):
        raise UserError(f"{whose(type(entry))}: draw() must return a figure of matplotlib (got {figure!r})")
    figure.set_size_inches(entry.width, entry.height or figure.get_figheight())
    if entry.title is not None:
        figure.suptitle(wrapped(shown(entry.title, 160), entry.width), x=0.012, ha="left", fontsize=9.5)
    return figure


def _figure_seconds() -> float:
    with styled():
        return timed(lambda: rendered(panels(2, 3.0, WIDTH)[0]))


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """One: draw."""
    return [Draw]
