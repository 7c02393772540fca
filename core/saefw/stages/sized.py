"""Settings of figures that go into a paper: their size and title."""

from pydantic import Field

from saefw.plugin import FigureConfig
from saefw.style import WIDTH


class Sized(FigureConfig):
    """A figure whose size and title can be set."""

    width: float = Field(WIDTH, ge=2, le=40)
    """Inches; 7.2 for both columns of a paper, 3.4 for one."""

    height: float | None = Field(None, ge=1, le=40)
    """Inches; null: as fits what is shown."""

    title: str | None = None
    """In place of the figure's own title; an empty text: none."""
