"""my-figure keeps the contract of figures, and draws what is measured."""

from pathlib import Path

import duckdb
from saefw.testing import check_figure

from my_figure import MyFigure


def test_my_figure() -> None:
    """From the view that it reads."""
    check_figure(MyFigure())
    with duckdb.connect() as db:
        db.execute("CREATE TABLE pareto (sae TEXT, variant TEXT, l0 REAL, dead REAL)")
        db.execute("INSERT INTO pareto VALUES ('a', 'topk', 8, .25)")
        figure = MyFigure().draw(db, {"train": [Path("a")]})
    (point,) = figure.axes[0].lines
    assert point.get_xydata().tolist() == [[8, 0.25]]
