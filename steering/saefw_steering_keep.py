"""Keeps an edit of the Steer tab: under a name in the store, as a file, as Python lines, as a link."""

import csv
import json
from base64 import b64encode
from functools import partial
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

from bokeh.models.layouts import Column
from bokeh.models.widgets import Select, TextInput

import saefw_saved
import saefw_steering_script as script
import saefw_steering_style as style
from saefw.experiment.opened import After, Change, Experiment, Seen
from saefw.plugin import UserError
from saefw.stages.drawings import BeforeAfter, Case, said_of
from saefw.style import rendered, shown, styled
from saefw_saved import Saved
from saefw_steering_layout import button, row
from saefw_steering_live import told
from saefw_steering_state import State, written
from saefw_steering_views import div

if TYPE_CHECKING:
    from PIL.Image import Image

    from saefw_steering_session import Session

FILES = {"png": "image/png", "svg": "image/svg+xml", "csv": "text/csv", "json": "application/json"}


class Keeper:
    """The part of the tab that keeps edits."""

    def __init__(self, session: "Session") -> None:
        """Make the widgets; `session` is asked for what there is to keep."""
        self._session = session
        self.name = TextInput(
            name="save-name", placeholder="a name for this edit", stylesheets=[style.FIELD], margin=0, width=150
        )
        self.known = Select(name="saved", options=[], value="", stylesheets=[style.FIELD], margin=0, width=150)
        self.python = session.live.div("python")
        self._file = told("file", script.FILE)
        save, delete = button("Save", "save"), button("Delete", "delete")
        exports = [button(kind.upper(), f"export-{kind}") for kind in FILES]
        save.on_click(session.pressed(self.save))
        delete.on_click(session.pressed(self.delete))
        for kind, made in zip(FILES, exports, strict=True):
            made.on_click(session.pressed(partial(self.export, kind)))
        chosen = session._guarded(self._chosen)
        self.known.on_change("value", lambda _attr, _old, new: chosen(new))
        self.model = Column(
            children=[
                div("<h2>Keep it <small>the address of the page is a link to what you see</small></h2>"),
                row(self.name, save),
                row(self.known, delete),
                row(div("<span class=faint>Export</span>", wide=False), *exports),
                self.python,
            ],
            spacing=6,
            sizing_mode="stretch_width",
            tags=[self._file],
        )
        self._edits: list[Saved] = []
        self.refresh()

    def refresh(self, chosen: str = "") -> None:
        """List the saved edits."""
        self._edits = saefw_saved.saved(self._session.experiment.choice)
        options: list[Any] = [("", "saved edits …" if self._edits else "no saved edits yet")]
        self._session._quiet = True
        self.known.options = options + [(one.unit, one.name) for one in self._edits]
        self.known.value = chosen
        self._session._quiet = False

    def changed(self, state: State) -> None:
        """Make the address of the page a link to a state, and show the Python lines that repeat it."""
        self._session.live.link = f"?state={written(state)}"
        lines = python(self._session.experiment, state)
        self._session.live.texts["python"] = f"<pre>{escape(lines)}</pre>" if lines else ""

    def save(self) -> None:
        """Keep the edit in the store under the name that is given."""
        s = self._session
        made = saefw_saved.save(str(self.name.value), s.experiment, s.state(), s.seen, self._after(), s.view)
        self.name.value = ""
        self.refresh(made.unit)

    def delete(self) -> None:
        """Delete the saved edit that is chosen."""
        if not self.known.value:
            raise UserError("choose a saved edit first")
        saefw_saved.delete(self._session.experiment.choice, str(self.known.value))
        self.refresh()

    def export(self, kind: str) -> None:
        """Give the browser a file."""
        s = self._session
        job = partial(exported, kind, s.experiment, s.state(), s.seen, self._after(), s.view)
        s._newest.ask(job, partial(self._give, kind))

    def _give(self, kind: str, data: bytes) -> None:
        self._file.tags = [f"edit.{kind}", FILES[kind], b64encode(data).decode()]

    def _after(self) -> After:
        """Return what comes of the state as it is now; what is shown may still be that of the one before."""
        s, state = self._session, self._session.state()
        return run(s.experiment, state, s.seen)

    def _chosen(self, unit: str) -> None:
        for one in self._edits:
            if one.unit == unit:
                self._session.show_saved(one.state)


def run(experiment: Experiment, state: State, seen: Seen) -> After:
    """Return what the probe says of an image after the edits of a state."""
    changes = [Change(edit.feature, edit.mode, edit.amount) for edit in state.edits]
    return experiment.edit(seen, changes, state.place, list(state.patches) or None, state.directly)


def exported(kind: str, experiment: Experiment, state: State, seen: Seen, after: After, view: "Image") -> bytes:
    """Return an edit as a file: a before-and-after figure, or its numbers."""
    before_c, after_c = seen.probability_c(state.place), after.probability_c
    names = experiment.classes
    rows = list(zip(names, before_c.tolist(), after_c.tolist(), strict=True))
    if kind == "csv":
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["class", "before", "after", "change"])
        writer.writerows([name, b, a, a - b] for name, b, a in rows)
        return text.getvalue().encode()
    if kind == "json":
        key = None if state.example is None else experiment.acts.keys[state.example]
        told = {
            **state.model_dump(mode="json"),
            "image": key,
            "norm": after.norm,
            "classes": {name: {"before": b, "after": a} for name, b, a in rows},
            "python": python(experiment, state),
        }
        return json.dumps(told, indent=1).encode()
    case = Case(
        state.example or 0, shown(names[int(before_c.argmax())]), shown(names[int(after_c.argmax())]),
        said_of([(edit.mode, edit.amount) for edit in state.edits], state.place, len(state.patches)),
        [edit.feature for edit in state.edits], list(map(shown, names)), before_c, after_c, len(names),
        {experiment.unit.needs[3].address}, view, state.patches,
    )  # fmt: skip
    run_ = experiment.choice.run
    with run_.store.db() as db, styled():
        return rendered(BeforeAfter().drawn(db, [run_.store.folder(experiment.unit.needs[3])], case))[kind]


def python(experiment: Experiment, state: State) -> str:
    """Return the lines that repeat an edit in Python; nothing for an image that the visitor brought."""
    if state.example is None or not state.edits:
        return ""
    choice = experiment.choice
    amounts = {edit.feature: edit.amount for edit in state.edits}
    modes: set[str] = {edit.mode for edit in state.edits} or {experiment.mode}
    mode = repr(modes.pop()) if len(modes) == 1 else repr({edit.feature: edit.mode for edit in state.edits})
    more = f", patches={list(state.patches)}" if state.patches else ""
    more += f", place={state.place!r}" if state.place != experiment.place else ""
    more += ", directly=True" if state.directly else ""
    return (
        "from saefw.experiment import open_experiment\n\n"
        f"experiment = open_experiment({choice.registry.name!r}, sae={choice.sae.address!r},\n"
        f"    probe={choice.probe.address!r})\n"
        f"image = experiment.image({state.example})\n"
        f"image.edit({amounts}, mode={mode}{more})"
    )
