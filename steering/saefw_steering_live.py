"""What changes with every move on the page, sent as one message and put in its place by the browser.

Each property of a Bokeh model that changes is a message of its own, and most make the browser lay out the whole page
again, which takes longer than an edit. What is said here makes neither: the bars, the sentences, how cards look.
"""

from typing import Any

from bokeh.models.callbacks import CustomJS
from bokeh.models.layouts import LayoutDOM
from bokeh.models.sources import ColumnDataSource
from bokeh.models.widgets import Div, Spinner

import saefw_steering_script as script
from saefw_steering_views import div


class Live:
    """Texts and looks of models, by their names."""

    def __init__(self) -> None:
        """Say nothing as yet."""
        self.source = told("live", script.LIVE)
        self.link = ""
        """The address that shows what is to be seen."""
        self._divs: dict[str, Div] = {}
        self._looks: dict[str, LayoutDOM] = {}
        self.texts: dict[str, str] = {}
        """HTML by the name of its place; on the models themselves stands what was first shown."""
        self._classes: dict[str, list[str]] = {}
        self.numbers: dict[Spinner, float | None] = {}
        """What fields are to show; sent last, so that the browser draws all at once."""

    def div(self, name: str) -> Div:
        """Return a place for HTML."""
        self._divs[name], self.texts[name] = div("", name=name), ""
        return self._divs[name]

    def look(self, model: LayoutDOM, *css_classes: str) -> None:
        """Say which classes a model has, by which style sheets tell its state."""
        name = str(model.name)
        self._looks[name], self._classes[name] = model, list(css_classes)

    def show(self) -> None:
        """Send what was said; before anybody sees the page it goes onto the models, as part of the document."""
        if self.source.document is None:
            for name, place in self._divs.items():
                place.text = self.texts[name]
            for name, model in self._looks.items():
                model.css_classes = self._classes[name]
        rows: list[Any] = [[name, text, None] for name, text in self.texts.items()]
        rows += [[name, None, classes] for name, classes in self._classes.items()]
        self.source.tags = [self.link, *rows]
        for field, value in self.numbers.items():
            field.value = value
        self.numbers.clear()


def told(name: str, code: str) -> ColumnDataSource:
    """Return what tells the browser something: `code` runs whenever its tags change.

    It has no place on the page, since a model that has one is laid out again whenever anything of it changes.
    """
    made = ColumnDataSource(name=name)
    made.js_on_change("tags", CustomJS(code=code))
    return made
