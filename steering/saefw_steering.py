"""The steering page: an image, its features, and what the probe reads before and after they are edited.

`page` builds it in a Bokeh document, one session each; `serve` is the command `saefw serve`.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from bokeh.document import Document
from bokeh.models.css import GlobalInlineStyleSheet
from bokeh.models.layouts import Column, Row, TabPanel, Tabs
from bokeh.models.widgets import Button, Checkbox, RadioButtonGroup, Select
from PIL import Image

import saefw_steering_style as style
from saefw.errors import UserError
from saefw_compare import Compare
from saefw_experiment import Choice, Experiment, choices, opened
from saefw_explore import Explore
from saefw_findings import store_of
from saefw_steering_views import Bars, Facts, FeatureRow, Picture, Ways, div, verdict

if TYPE_CHECKING:
    from bokeh.server.server import Server

ROWS = 3
"""Features of a group: of the image's class, of another class, of the image."""

MODES = {"set": "Set to", "add": "Add", "scale": "Multiply", "ablate": "Ablate"}


def page(doc: Document, path: Path) -> None:
    """Fill a document with the page of a registry; a tab without anything to show has a sentence what to run."""
    doc.title = "saefw steering"
    whole = GlobalInlineStyleSheet(css=style.WHOLE)
    doc.add_root(
        Column(children=[tabs(path)], name="page", stylesheets=[whole, style.PAGE], sizing_mode="stretch_width")
    )


def tabs(path: Path) -> Tabs:
    """Return the tabs of the page, each built when somebody first looks at it."""
    explore: list[Explore] = []

    def steering() -> Any:
        return Column(children=_parts(choices(path)), sizing_mode="stretch_width")

    def exploring() -> Any:
        explore.append(Explore(store_of(path)))
        return explore[0].panel

    def comparing() -> Any:
        return Compare(store_of(path), look_at).panel

    def look_at(sae: str) -> bool:
        build(1)
        if not explore or not explore[0].show(sae):
            return False
        made.active = 1
        return True

    kinds = {"Steer": steering, "Explore": exploring, "Compare": comparing}
    panels = [TabPanel(title=title, child=Column(sizing_mode="stretch_width")) for title in kinds]
    made = Tabs(tabs=list(panels), name="tabs", sizing_mode="stretch_width", stylesheets=[style.TABS])
    built: set[int] = set()

    def build(active: int) -> None:
        if active in built:
            return
        built.add(active)
        child: Any = panels[active].child
        try:
            child.children = [list(kinds.values())[active]()]
        except UserError as error:
            built.remove(active)  # by the next look something may be made
            # A registry may have many faults; each is a line.
            lines = [re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(line)) for line in str(error).splitlines()]
            text = f"<h1>{panels[active].title}</h1>" + "".join(f"<p>{line}</p>" for line in lines)
            child.children = [_card(div(text), name="nothing")]

    made.on_change("active", lambda _attr, _old, active: build(active))
    build(0)
    return made


def serve(
    registry: Annotated[Path, typer.Argument(help="The registry whose experiment to show.")] = Path("registry.yaml"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen, on this machine only.")] = 5006,
    show: Annotated[bool, typer.Option(help="Open the page in the browser.")] = False,
) -> None:
    """Serve the steering page of an experiment, to this machine alone."""
    if not registry.is_file():
        raise UserError(f"there is no file {registry}; name a registry, or write one by `saefw init`")
    with suppress(UserError):  # the page says it
        opened(choices(registry)[0])  # so that nobody waits for the models
    listening = server(registry, port)
    typer.echo(f"The steering page is at http://localhost:{port}/steering (stop it with Ctrl-C).")
    if show:
        listening.io_loop.add_callback(listening.show, "/steering")
    listening.run_until_shutdown()


def server(registry: Path, port: int) -> "Server":
    """Return a server of the page that listens on this machine's loopback alone.

    Raises:
        UserError: the port is taken.

    """
    from bokeh.application import Application
    from bokeh.application.handlers.function import FunctionHandler
    from bokeh.server.server import Server

    app = Application(FunctionHandler(partial(page, path=registry)))
    # Only pages that this server sent may talk to it: another site in the same browser may not.
    origins = [f"{host}:{port}" for host in ("localhost", "127.0.0.1")]
    try:
        return Server({"/steering": app}, address="127.0.0.1", port=port, allow_websocket_origin=origins)
    except OSError as error:
        raise UserError(f"cannot listen on port {port} ({error.strerror}); name another: --port {port + 1}") from error


def _parts(found: Sequence[Choice]) -> list[Any]:
    """Return the parts of the page, with a choice among experiments where there are several."""
    body = Column(sizing_mode="stretch_width", children=Session(opened(found[0])).parts, name="experiment", spacing=14)
    if len(found) == 1:
        return [body]
    options: list[Any] = [(str(i), choice.unit.label) for i, choice in enumerate(found)]
    select = Select(
        options=options, value="0", title="Experiment", stylesheets=[style.FIELD], name="experiments", margin=0
    )

    def chosen(_attr: str, _old: str, new: str) -> None:
        body.children = Session(opened(found[int(new)])).parts

    select.on_change("value", chosen)
    return [select, body]


class Session:
    """What one visitor looks at and has changed; the experiment is shared by all."""

    def __init__(self, experiment: Experiment) -> None:
        """Build the widgets, and show the stored first example, untouched."""
        self.experiment = experiment
        first, classes = experiment.first, experiment.classes
        self.example = first.example if first else int(experiment.test[0])
        self.mode, self.lit = experiment.mode, -1
        options: list[Any] = [(str(i), name) for i, name in enumerate(classes)]
        present = set(experiment.labels[experiment.test].tolist())
        target = first.target if first else (int(experiment.labels[self.example]) + 1) % len(classes)

        self.header = div(
            f"<span class=brand>saefw steering</span><h1>{escape(experiment.title)}</h1>"
            f"<p class=faint>{escape(experiment.subtitle)}</p>"
        )
        field: dict[str, Any] = {"stylesheets": [style.FIELD], "margin": 0, "sizing_mode": "stretch_width"}
        self.of_class = Select(
            **field, name="class", title="Class", options=[o for o in options if int(o[0]) in present], value=None
        )
        self.image = Select(**field, name="image", title="Test image", options=[], value=None)
        self.target = Select(name="target", options=options, value=str(target), stylesheets=[style.FIELD], margin=0)
        self.picture = Picture(experiment.acts.grid, experiment.place == "patches", self.update)
        self.light = Checkbox(label="", active=False, name="light", margin=0, stylesheets=[style.CHECK])
        self.about_image = div("")
        self.about_patches = div("")
        self.all_patches = _button("All patches", "all-patches", lambda: self.picture.choose([]))
        self.modes = RadioButtonGroup(
            labels=list(MODES.values()),
            active=list(MODES).index(self.mode),
            name="mode",
            stylesheets=[style.BUTTON],
            margin=0,
        )
        self.groups = [
            [FeatureRow(f"{group}-{i}", self.update, self.lighten) for i in range(n)]
            for group, n in (
                ("own", ROWS),
                ("target", max(ROWS, len(first.features) if first else 0)),
                ("image", ROWS),
            )
        ]
        self.headings = [div(""), div("<h2>For another class</h2>", wide=False), div("")]
        self.bars = Bars(classes)
        self.verdict = div("", "verdict")
        self.parts = self._laid_out()

        self._connect()
        self.go_to(self.example)

    # How it is laid out

    def _laid_out(self) -> list[Any]:
        step = {"previous": ("←", partial(self.step, -1)), "next": ("→", partial(self.step, 1))}
        moves = [_button(label, name, do, width=38) for name, (label, do) in step.items()]
        moves.append(_button("Random", "random", self.random))
        left = _card(
            Row(children=[self.of_class, self.image], spacing=8, sizing_mode="stretch_width"),
            _buttons(*moves),
            self.picture.model,
            self.about_image,
            self.light,
            self.about_patches,
            self.all_patches,
            side=True,
        )
        first, classes = self.experiment.first, self.experiment.classes
        tools = [_button("Reset all", "reset-all", self.reset)]
        if first:
            label = f"First example: {classes[first.own]} → {classes[first.target]}"
            tools.insert(0, _button(label, "first", self.show_first, style.STRONG))
        rows = [Column(children=[r.model for r in group], sizing_mode="stretch_width") for group in self.groups]
        heads = [
            self.headings[0],
            Row(children=[self.headings[1], self.target], stylesheets=[style.BUTTONS], sizing_mode="stretch_width"),
            self.headings[2],
        ]
        units = div("<p class=faint>1 is a feature's 99th percentile</p>", wide=False)
        groups = (
            Column(children=[head, row], spacing=6, sizing_mode="stretch_width")
            for head, row in zip(heads, rows, strict=True)
        )
        middle = _card(_buttons(*tools, self.modes, units), *groups, spacing=16)
        key = "".join(
            f"<span><i style='background:{colour}'></i>{when}</span>"
            for colour, when in ((style.BEFORE, "before"), (style.AFTER, "after"))
        )
        right = _card(
            self.verdict, div(f"<h2><span class=key>{key}</span>Probability</h2>"), self.bars.model, side=True
        )
        columns = Row(children=[left, middle, right], stylesheets=[style.COLUMNS], sizing_mode="stretch_width")
        return [self.header, columns]

    def _connect(self) -> None:
        self._quiet = False

        def heard(do: Any) -> Any:
            return lambda _attr, _old, new: None if self._quiet else do(new)

        self.of_class.on_change("value", heard(lambda label: self.go_to(int(self.experiment.of_class(int(label))[0]))))
        self.image.on_change("value", heard(lambda example: self.go_to(int(example))))
        self.target.on_change("value", heard(lambda _: self.show_features()))
        self.light.on_change("active", heard(lambda _: self.show_picture()))
        self.modes.on_change("active", heard(self._mode_chosen))

    # What a visitor does

    def go_to(self, example: int) -> None:
        """Show an image; features that stay in sight stay edited."""
        experiment, self.example = self.experiment, example
        label = int(experiment.labels[example])
        self._quiet = True
        if self.of_class.value != str(label):
            self.of_class.value = str(label)
            images: list[Any] = [(str(e), self._named(int(e))) for e in experiment.of_class(label)]
            self.image.options = images
        self.image.value = str(example)
        if self.target.value == str(label):
            order = np.argsort(-experiment.seen(example).probability_c, kind="stable")
            self.target.value = str(next((int(c) for c in order if c != label), label))
        self._quiet = False
        name, key = escape(experiment.classes[label]), escape(experiment.keys[example])
        self.about_image.text = f"<p><b>{name}</b> <span class=faint>{key}, as the model sees it</span></p>"
        self.show_features()

    def step(self, by: int) -> None:
        """Go to the next or the previous image of the class."""
        ours = self.experiment.of_class(int(self.experiment.labels[self.example])).tolist()
        self.go_to(ours[(ours.index(self.example) + by) % len(ours)])

    def random(self) -> None:
        """Go to any test image."""
        self.go_to(int(np.random.default_rng().choice(self.experiment.test)))

    def show_first(self) -> None:
        """Go to the stored first example and edit its features by its amount, on all patches."""
        first = self.experiment.first
        assert first is not None
        self.mode = self.experiment.mode
        self._quiet = True
        self.modes.active = list(MODES).index(self.mode)
        self.target.value = str(first.target)
        self._quiet = False
        self._forget()
        self.picture.chosen = set()
        self.go_to(first.example)
        for row in self._rows():
            if row.facts and row.facts.feature in first.features:
                row.set(first.amount)
        self.update()

    def reset(self) -> None:
        """Leave every feature as observed, on all patches."""
        self._forget()
        self.picture.choose([])

    def lighten(self, feature: int) -> None:
        """Light the patches where a feature fires; the lit one again: none."""
        self._quiet = True
        self.light.active = not (self.light.active and self.lit == feature)
        self._quiet = False
        self.lit = feature
        self.show_picture()

    def _mode_chosen(self, active: int) -> None:
        self.mode = list(MODES)[active]
        self._forget()
        self.show_features()

    def _forget(self) -> None:
        for row in self._rows():
            row.set(None)

    # What is shown

    def show_features(self) -> None:
        """Fill the rows for the image and the target class."""
        experiment = self.experiment
        label, target = int(experiment.labels[self.example]), int(self.target.value)
        edits = self.edits()
        own, other, image = self.groups
        chosen: list[list[int]] = []
        for found, group in (
            (experiment.strong(label, 16), own),
            (experiment.strong(target, 16), other),
            (experiment.firing(self.example), image),
        ):
            free = [feature for feature in found if all(feature not in before for before in chosen)]
            chosen.append(free[: len(group)])
        for group, features in zip(self.groups, chosen, strict=True):
            for i, row in enumerate(group):
                feature = features[i] if i < len(features) else None
                row.show(
                    None if feature is None else self._facts(feature),
                    self._ways(),
                    None if feature is None else edits.get(feature),
                )
        self.headings[0].text = (
            f"<h2>For the class of the image, {escape(experiment.classes[label])} "
            f"<small>largest predicted effect on it</small></h2>"
        )
        largest = "value on [CLS]" if experiment.place == "cls" else "largest value on a patch"
        self.headings[2].text = f"<h2>Strongest in this image <small>{largest}</small></h2>"
        if all(self.lit not in features for features in chosen):
            self.lit = next((features[0] for features in (*chosen[2:], *chosen) if features), -1)
        self.show_picture()
        self.update()

    def show_picture(self) -> None:
        """Draw the image, lit or as it is."""
        experiment, about = self.experiment, self.experiment.about.get(self.lit)
        # A feature of [CLS] stands for nothing on a patch.
        self.light.disabled = experiment.counted == "images"
        on = bool(self.light.active) and not self.light.disabled and about is not None
        values = experiment.seen(self.example).patch_ps[:, self.lit] / about.p99 if on and about else None
        try:
            view = experiment.view(self.example)
        except UserError as error:  # the edit needs the recording alone
            view = Image.new("RGB", experiment.acts.grid[::-1], style.LINE)
            self.about_image.text = f"<p>{escape(str(error))}</p>"
        self.picture.show(
            view,
            None if values is None else values.astype(np.float64),
            f"feature {self.lit} at",
        )
        self.light.label = f"Light where {self.lit} fires"
        for row in self._rows():
            row.highlight(self.lit if on else None)

    def update(self) -> None:
        """Run the edit, and show what the probe reads."""
        experiment, edits, chosen = self.experiment, self.edits(), self.picture.chosen
        before_c = experiment.seen(self.example).probability_c
        patches = sorted(chosen) or None
        after_c = experiment.edit(self.example, edits, self.mode, patches) if edits else before_c
        n, of = len(edits), experiment.acts.grid[0] * experiment.acts.grid[1]
        where = "all patches" if not chosen else f"{len(chosen)} of {of} patches"
        hint = "tap patches, or drag over them, to edit only these" if not chosen else "tap them again to let them go"
        if experiment.place == "cls":
            where, hint = "[CLS]", "which the patches are not part of"
        self.about_patches.text = f"<p class='faint patches'>Edits are made on {where}; {hint}.</p>"
        self.all_patches.disabled = not chosen
        self.bars.show(before_c, after_c)
        done = f"{n} feature{'s' * (n > 1)} edited on {where}" if n else ""
        self.verdict.text = verdict(experiment.classes, before_c, after_c, done)

    def edits(self) -> dict[int, float]:
        """Return what is edited: by feature, the amount."""
        return {row.facts.feature: row.amount for row in self._rows() if row.facts and row.amount is not None}

    def _rows(self) -> list[FeatureRow]:
        return [row for group in self.groups for row in group]

    def _ways(self) -> Ways:
        amounts = self.experiment.amounts if self.mode == self.experiment.mode else [1.0]
        low, high = min(amounts), max(amounts)
        if self.mode == "set":
            return Ways(min(0, low), max(3, high), None, "set to")
        if self.mode == "add":
            return Ways(min(-3, low), max(3, high), 0.0, "add")
        if self.mode == "ablate":
            return Ways(min(0, low), max(1, high), 0.0, "less a share of")
        return Ways(min(0, low), max(5, high), 1.0, "multiplied by")

    def _facts(self, feature: int) -> Facts:
        experiment, about = self.experiment, self.experiment.about[feature]
        values = experiment.seen(self.example).edited_ps[:, feature]
        images = "".join(
            f'<img src="{uri}" alt="" title="{escape(self._titled(example))}">'
            for uri, example in experiment.thumbnails(feature)
        )
        name, pure = "no class", ""
        if about.label >= 0:
            name = escape(experiment.classes[about.label])
            pure = f"{about.n_label} of {experiment.top} images<br>"
        n = int((values > 0).sum())
        return Facts(
            feature,
            f'<div class="name" title="{name}">{name}</div>'
            f'<div class="facts">{pure}{100 * about.frequency:.2g} % of {experiment.counted}</div>',
            f"<div class=strip>{images}</div>",
            float(values.max() / about.p99),
            n,
            "[CLS]" if experiment.place == "cls" else f"{n} patch{'es' * (n > 1)}",
        )

    def _titled(self, example: int) -> str:
        label = self.experiment.labels[example]
        return f"{self.experiment.keys[example]}: {self.experiment.classes[label]}" if label >= 0 else ""

    def _named(self, example: int) -> str:
        experiment, key = self.experiment, self.experiment.keys[example]
        read = experiment.predicted.get(example, int(experiment.labels[example]))
        return key if read == experiment.labels[example] else f"{key}, read as {experiment.classes[read]}"


def _card(*children: Any, side: bool = False, spacing: int = 10, name: str | None = None) -> Column:
    return Column(
        children=list(children),
        css_classes=["side"] if side else [],
        stylesheets=[style.CARD],
        sizing_mode="stretch_width",
        spacing=spacing,
        name=name,
    )


def _button(label: str, name: str, do: Any, look: Any = style.BUTTON, width: int | None = None) -> Button:
    button = Button(label=label, name=name, stylesheets=[look], margin=0, width=width)
    button.on_click(do)
    return button


def _buttons(*children: Any) -> Row:
    return Row(children=list(children), stylesheets=[style.BUTTONS], sizing_mode="stretch_width")
