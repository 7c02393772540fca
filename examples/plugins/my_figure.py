"""A figure: how many features are dead, by how many fire."""

from typing import Any, ClassVar, Literal

from saefw.plugin import FigureConfig, hookimpl

SQL = "SELECT variant, l0, dead FROM pareto WHERE list_contains(?, sae) ORDER BY l0"


class MyFigure(FigureConfig):
    """Share of dead features of each SAE against its L0."""

    use: Literal["my-figure"] = "my-figure"
    wants: ClassVar[tuple[str, ...]] = ("train",)

    marker: str = "o"
    """Of an SAE, as matplotlib calls it."""

    def draw(self, db: Any, units: Any) -> Any:
        """Draw a point for each SAE; a unit's folder is named by its address."""
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.subplots()
        trained = [folder.name for folder in units["train"]]
        for variant, l0, dead in db.execute(SQL, [trained]).fetchall():
            axes.plot(l0, dead, self.marker)
            axes.annotate(variant, (l0, dead))
        axes.set(xlabel="L0", ylabel="share of dead features")
        return figure


@hookimpl
def saefw_figures() -> list[type[FigureConfig]]:
    """One: my-figure."""
    return [MyFigure]
