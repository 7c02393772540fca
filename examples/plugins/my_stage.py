"""A stage: counts the images of each split of a recording."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from saefw.plugin import Names, Run, StageConfig, Unit, hookimpl

SQL = "SELECT split, count(*) FROM example WHERE unit = ? GROUP BY ALL ORDER BY ALL"


class MyStage(StageConfig):
    """Counts the images of each split of a recording."""

    use: Literal["my-stage"] = "my-stage"

    acts: Annotated[str, Names("stages")]
    """The stage that made the recordings."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit for each recording: what it is made from, and of what."""
        for acts in run.made_by(self.acts):
            label = f"splits of {acts.label}"
            yield Unit("my-stage", self.content(), needs=(acts,), label=label)

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Measure each, and keep it as soon as it is complete."""
        for i, unit in enumerate(units):
            with run.db() as db:
                rows = db.execute(SQL, [unit.needs[0].address]).fetchall()
            run.log(unit, 0, **{f"n_{split}": n for split, n in rows})
            run.keep(unit)
            run.progress(i + 1, len(units), "recordings")


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """One: my-stage."""
    return [MyStage]
