"""The Steer tab: which SAE, probe and dataset are opened, and the session of what is open."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import Any

from bokeh.document import Document, without_document_lock
from bokeh.models.layouts import Column, Row
from bokeh.models.widgets import Select

import saefw_steering_style as style
from saefw.errors import UserError
from saefw.experiment.choices import Choice
from saefw.experiment.opened import is_open, opened
from saefw.plugin import Unit
from saefw_steering_layout import card
from saefw_steering_session import Session
from saefw_steering_state import State
from saefw_steering_views import div
from saefw_steering_work import later


class Steer:
    """The tab."""

    def __init__(self, doc: Document, found: Sequence[Choice], say: Callable[[str], None], state: State | None) -> None:
        """Open the first of what is found, or what a state names."""
        self._doc, self._found, self._say, self._quiet = doc, found, say, False
        self.choice = found[0]
        self.session: Session | None = None
        field: dict[str, Any] = {"stylesheets": [style.FIELD], "margin": 0, "sizing_mode": "stretch_width"}
        stages: list[Any] = [(str(i), name) for i, name in enumerate(self._stages())]
        self._stage = Select(**field, name="stage", title="Run", options=stages, visible=len(stages) > 1)
        self._sae = Select(**field, name="sae", title="SAE", options=[])
        self._dataset = Select(**field, name="dataset", title="Dataset", options=[])
        self._probe = Select(**field, name="probe", title="Probe", options=[])
        self._head = div("")
        self._body = Column(children=[div("")], sizing_mode="stretch_width", name="experiment")
        selects: list[Any] = [self._stage, self._sae, self._dataset, self._probe]
        chooser = Row(children=selects, spacing=8, sizing_mode="stretch_width")
        self.panel = Column(
            children=[card("chooser", self._head, chooser), self._body], spacing=12, sizing_mode="stretch_width"
        )
        self._stage.on_change("value", self._heard(self._stage_chosen))
        self._sae.on_change("value", self._heard(lambda sae: self.switch(sae)))
        self._dataset.on_change("value", self._heard(self._dataset_chosen))
        self._probe.on_change("value", self._heard(lambda probe: self.switch(self.choice.sae.address, probe)))
        choice = found[0]
        if state is not None:
            try:
                choice = self._of(state)
            except UserError as error:
                say(str(error))
                state = None
        self._show(choice, state)

    def switch(self, sae: str, probe: str | None = None, feature: int | None = None) -> None:
        """Open an SAE and, if one is named, a probe; show a feature, if one is named."""
        try:
            choice = self._fitting(sae, probe)
        except UserError as error:
            self._say(str(error))
            self._chooser()
            return
        state = None
        if feature is not None and choice == self.choice and self.session is not None:
            self.open(self.session.state().model_copy(update={"finder": "numbers", "numbers": (feature,)}))
            return
        if feature is not None:
            state = State(
                sae=choice.sae.address,
                probe=choice.probe.address,
                example=int(opened(choice).test[0]) if is_open(choice) else 0,
                place=choice.unit.content["place"],
                finder="numbers",
                numbers=(feature,),
            )
        self._show(choice, state)

    def open_unit(self, unit: str) -> None:
        """Open what a steer stage measured, by its address; the page stays as it is if that is gone."""
        for choice in self._found:
            if choice.unit.address == unit and choice != self.choice:
                self._show(choice)

    def open(self, state: State) -> None:
        """Show a state, of what is open or of something else."""
        choice = self._of(state)
        if choice == self.choice and self.session is not None:
            self.session.apply(state)
            self.session.remember()
        else:
            self._show(choice, state)

    def _heard(self, do: Callable[[Any], None]) -> Callable[[str, Any, Any], None]:
        def heard(_attr: str, _old: Any, new: Any) -> None:
            if self._quiet:
                return
            self._say("")
            try:
                do(new)
            except UserError as error:
                self._say(str(error))
                self._chooser()

        return heard

    # Which

    def _stages(self) -> list[str]:
        return list(dict.fromkeys(choice.name for choice in self._found))

    def _of(self, state: State) -> Choice:
        """Return the choice that a state names."""
        if (self.choice.sae.address, self.choice.probe.address) == (state.sae, state.probe):
            return self.choice
        trouble: UserError | None = None
        for choice in self._found:
            try:
                return choice.other(state.sae, state.probe)
            except UserError as error:
                trouble = trouble or error
        raise trouble or UserError("there is nothing to open")

    def _fitting(self, sae: str, probe: str | None) -> Choice:
        """Return a choice with an SAE: with a probe, or the first that fits, the one that is open if it does."""
        if probe is not None:
            return self.choice.other(sae, probe)
        trouble: UserError | None = None
        # What the stage itself pairs comes first.
        steered = [choice.probe for choice in self._found if choice.name == self.choice.name]
        for one in dict.fromkeys([self.choice.probe, *steered, *self.choice.probes()]):
            try:
                return self.choice.other(sae, one.address)
            except UserError as error:
                trouble = trouble or error
        raise trouble or UserError("there is no probe yet")

    def _stage_chosen(self, index: str) -> None:
        name = self._stages()[int(index)]
        self._show(next(choice for choice in self._found if choice.name == name))

    def _dataset_chosen(self, recording: str) -> None:
        probes = [choice.probe for choice in self._found] + self.choice.probes()
        for probe in probes:
            if probe.needs[0].address == recording:
                self.switch(self.choice.sae.address, probe.address)
                return

    def _chooser(self) -> None:
        """Show in the fields what is open, and what else there is."""
        choice = self.choice
        self._quiet = True
        probes = choice.probes()
        self._stage.value = str(self._stages().index(choice.name))
        for select, units, value in (
            (self._sae, choice.saes(), choice.sae),
            (self._dataset, list(dict.fromkeys(probe.needs[0] for probe in probes)), choice.dataset),
            (self._probe, [probe for probe in probes if probe.needs[0] == choice.dataset], choice.probe),
        ):
            options: list[Any] = [(unit.address, unit.label) for unit in _with(units, value)]
            select.options = options
            select.value = value.address
        self._quiet = False

    # What is shown

    def _show(self, choice: Choice, state: State | None = None) -> None:
        """Open a choice; while that takes time, say so."""
        self.choice, self.session = choice, None
        self._chooser()
        if is_open(choice) or self._doc.session_context is None:
            self._opened(choice, state)
            return
        self._body.children = [
            card(
                "busy",
                div(f'<div class="busy">Loading {escape(choice.unit.label)}: the backbone, the SAE, the probe …</div>'),
            )
        ]
        load: Any = partial(self._load, choice, state)
        self._doc.add_next_tick_callback(without_document_lock(load))

    async def _load(self, choice: Choice, state: State | None) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(None, _prepared, choice, state)
        except (UserError, OSError) as error:
            later(self._doc, partial(self._failed, choice, str(error)))
        else:
            later(self._doc, partial(self._opened, choice, state))

    def _opened(self, choice: Choice, state: State | None) -> None:
        if choice != self.choice:  # another was chosen meanwhile
            return
        try:
            experiment = opened(choice)
            self._head.text = (
                f"<span class=brand>saefw steering</span><h1>{escape(experiment.title)}</h1>"
                f"<p class=faint>{escape(experiment.subtitle)}</p>"
            )
            self.session = Session(self._doc, experiment, self._say, self.open, state)
        except (UserError, OSError) as error:
            self._failed(choice, str(error))
            return
        self._body.children = self.session.parts

    def _failed(self, choice: Choice, text: str) -> None:
        if choice == self.choice:
            self._body.children = [div("")]
            self._say(text)


def _prepared(choice: Choice, state: State | None) -> None:
    """Open a choice, and find the features that it will show first, in a thread."""
    experiment = opened(choice)
    example, target = experiment.beginning if state is None else (state.example, state.target)
    labels = [target] if example is None or example >= len(experiment.labels) else [target, experiment.labels[example]]
    place = state.place if state else experiment.place
    for label in map(int, labels):
        if 0 <= label < len(experiment.classes) and place in experiment.steerings:
            experiment.strong(label, 1, place)


def _with(units: Sequence[Unit], value: Unit) -> list[Unit]:
    return list(units) if value in units else [value, *units]
