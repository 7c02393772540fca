"""The widgets of the Steer tab, and how they are laid out."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bokeh.models.layouts import Column, Row
from bokeh.models.sources import ColumnDataSource
from bokeh.models.widgets import Button, Checkbox, FileInput, RadioButtonGroup, Select, TextInput

import saefw_steering_style as style
from saefw.experiment.opened import Experiment
from saefw_steering_columns import Columns
from saefw_steering_live import Live
from saefw_steering_views import Bars, Picture, div

GUIDES = {
    "turn": "{own} → {target}",
    "control": "its control",
    "back": "{own} → {target}",
}
"""What the buttons of the guided examples say."""

WHY = {
    "turn": "the features of largest predicted effect on the other class",
    "control": "as many features that fire as often, changed by the same amount",
    "back": "the other way round",
}


class Widgets:
    """What the Steer tab is made of."""

    def __init__(
        self,
        experiment: Experiment,
        picture: Picture,
        columns: Columns,
        live: Live,
        finders: Mapping[Any, str],
    ) -> None:
        """Make the widgets, empty as yet."""
        self.experiment, self.picture, self.columns, self.live = experiment, picture, columns, live
        classes = experiment.classes
        options: list[Any] = [(str(i), name) for i, name in enumerate(classes)]
        present = set(experiment.labels.tolist())
        field: dict[str, Any] = {"stylesheets": [style.FIELD], "margin": 0, "sizing_mode": "stretch_width"}
        splits: list[Any] = ["test", "valid", "train"]
        self.split = Select(**field, name="split", title="Split", options=splits, value="test")
        of = [option for option in options if int(option[0]) in present]
        self.of_class = Select(**field, name="class", title="Class", options=of, value=None)
        self.image = Select(**field, name="image", title="Image", options=[], value=None)
        self.find = TextInput(**field, name="find", placeholder="number or key", title="Find")
        self.upload = FileInput(
            **field, name="upload", accept="image/jpeg,image/png,image/webp", title="Or bring one of your own (8 MiB)"
        )
        self.light = Checkbox(label="", active=False, name="light", margin=0, stylesheets=[style.CHECK])
        self.directly = Checkbox(
            label="straight into the probe, past the blocks",
            active=False,
            name="directly",
            margin=0,
            stylesheets=[style.CHECK],
        )
        self.place = RadioButtonGroup(
            labels=["Patches", "[CLS]"],
            active=int(experiment.place == "cls"),
            name="place",
            stylesheets=[style.BUTTON],
            margin=0,
        )
        self.about_image, self.about_patches = div(""), live.div("where")
        self.target = Select(**field, name="target", options=options, value="0")
        finder_options: list[Any] = list(finders.items())
        self.finder = Select(**field, name="finder", options=finder_options, value="here")
        self.label = Select(**field, name="label", options=options, value="0")
        self.numbers = TextInput(**field, name="numbers", placeholder="for example 77 221")
        self.heads = [div(""), div(""), div("")]
        self.bars = Bars(classes)
        self.bars_place, self.verdict, self.norm = live.div("bars"), live.div("verdict"), live.div("norm")
        tops: list[Any] = ["5", "10", "20", "50"]
        self.top = Select(options=tops, value="10", name="top", width=64, margin=0, stylesheets=[style.FIELD])
        # Read and written by the page's own script.
        self.signal = ColumnDataSource(name="signal")
        self.buttons: dict[str, Button] = {}
        for name, label, width in (
            ("previous", "←", 36),
            ("next", "→", 36),
            ("random", "Random", None),
            ("all-patches", "All patches", None),
            ("undo", "Undo", None),
            ("redo", "Redo", None),
            ("reset-all", "Reset all", None),
        ):
            self.buttons[name] = button(label, name, width=width)
        for guide in experiment.guides:
            label = GUIDES[guide.name].format(own=classes[guide.own], target=classes[guide.target])
            self.buttons[f"guide-{guide.name}"] = button(label, f"guide-{guide.name}", style.STRONG)

    def laid_out(self, keeper: Any) -> list[Any]:
        """Return the tab from top to bottom; `keeper` stands below the bars."""
        keys = " ".join(f"<kbd>{key}</kbd> {what}" for key, what in (("n", "next"), ("r", "random"), ("0", "reset")))
        left = card(
            "image",
            Row(children=[self.split, self.of_class], spacing=6, sizing_mode="stretch_width"),
            Row(children=[self.image, self.find], spacing=6, sizing_mode="stretch_width"),
            row(*(self.buttons[name] for name in ("previous", "next", "random")), div(keys, "faint", wide=False)),
            self.picture.model,
            self.about_image,
            row(self.place, self.buttons["all-patches"]),
            self.directly,
            self.about_patches,
            self.light,
            self.upload,
        )
        guides = [self.buttons[f"guide-{guide.name}"] for guide in self.experiment.guides]
        said = "".join(
            f"<br>{escape(str(b.label))}: {WHY[g.name]}" for b, g in zip(guides, self.experiment.guides, strict=True)
        )
        tools = [self.buttons[name] for name in ("undo", "redo", "reset-all")]
        extras: list[list[Any]] = [
            [div("<div class=room></div>")],
            [self.target],
            [self.finder, self.label, self.numbers],
        ]
        columns: list[Any] = [
            Column(children=[head, *extra, cards], spacing=4, sizing_mode="stretch_width")
            for head, extra, cards in zip(self.heads, extras, self.columns.models, strict=True)
        ]
        middle = card(
            "features",
            row(*tools, *([div("<span class=faint>Examples:</span>", wide=False)] if guides else []), *guides),
            div(f"<p class=faint>Amounts are in units of a feature's 99th percentile.{said}</p>"),
            Row(children=columns, stylesheets=[style.GROUPS], sizing_mode="stretch_width"),
        )
        key = "<span class=key><span><i class=before></i>before</span><span><i class=after></i>after</span></span>"
        right = card(
            "bars",
            self.verdict,
            div(f"<h2>{key}Probability, %, and its change</h2>"),
            self.bars_place,
            self.norm,
            row(div("<span class=faint>Classes shown</span>", wide=False), self.top),
            keeper,
        )
        return [
            Row(
                children=[left, middle, right],
                stylesheets=[style.COLUMNS],
                sizing_mode="stretch_width",
                tags=[self.signal, self.live.source],
            )
        ]

    def headings(self, own: int, brought: bool, edited: bool, finding: str, n: int) -> None:
        """Say above each column what its features are."""
        whose = "what the probe reads" if brought else "the class of the image"
        name, target = escape(self.experiment.classes[own]), escape(self.target_name())
        self.heads[0].text = f"<h2 class=own>For {name} <small>{whose}, by predicted effect</small></h2>"
        self.heads[1].text = f"<h2 class=other>For {target} <small>another class, by predicted effect</small></h2>"
        more = "what is edited, and " if edited else ""
        none = "" if n else "<br><small>there is none</small>"
        self.heads[2].text = f"<h2 class=found>{finding} <small>{more}not in the other columns</small>{none}</h2>"
        self.label.visible = self.finder.value in ("detectors", "effect")
        self.numbers.visible = self.finder.value == "numbers"

    def busy(self, labels: Sequence[int]) -> None:
        """Say above the first column that features are looked for, which takes some seconds."""
        names = ", ".join(escape(self.experiment.classes[label]) for label in labels)
        self.heads[0].text = f"<div class=busy>Looking for the features with most effect on {names} …</div>"

    def target_name(self) -> str:
        """Return the name of the other class."""
        return self.experiment.classes[int(str(self.target.value))]

    def places(self, place: str, picture: Picture, experiment: Experiment) -> None:
        """Say where edits are made."""
        chosen, of = picture.chosen, picture.grid[0] * picture.grid[1]
        picture.choosing = place == "patches"
        self.directly.visible = place in experiment.direct
        self.buttons["all-patches"].disabled = not chosen or place == "cls"
        if place == "cls":
            where, hint = "[CLS]", "which the patches are not part of"
        elif chosen:
            where, hint = f"{len(chosen)} of {of} patches", "tap them again to let them go"
        else:
            where, hint = "all patches", "tap patches, or drag over them, to edit only these"
        off = "" if place == experiment.trained_on else f" The SAE was trained on {experiment.trained_on} alone."
        self.live.texts["where"] = f"<p class=faint>Edits are made on {where}; {hint}.{off}</p>"


def card(name: str, *children: Any) -> Column:
    """Return parts on paper of their own."""
    return Column(
        children=list(children), css_classes=[name], stylesheets=[style.CARD], sizing_mode="stretch_width", spacing=8
    )


def button(label: str, name: str, look: Any = style.BUTTON, width: int | None = None) -> Button:
    """Return a button of ours."""
    return Button(label=label, name=name, stylesheets=[look], margin=0, width=width)


def row(*children: Any) -> Row:
    """Return parts side by side, on several lines where there is no room."""
    return Row(children=list(children), stylesheets=[style.BUTTONS], sizing_mode="stretch_width")
