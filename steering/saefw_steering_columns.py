"""The three columns of features on the Steer tab: which stand in them, and what their cards say."""

from collections.abc import Callable
from html import escape

from bokeh.models.layouts import Column

from saefw.experiment.opened import Experiment, Seen
from saefw_steering_card import Facts, FeatureCard, Ways
from saefw_steering_live import Live
from saefw_steering_state import Finder, State

FOUND = 12
"""Features of the third column that are shown at most."""

FINDERS: dict[Finder, str] = {
    "here": "Strongest in this image",
    "controls": "Controls: as frequent, chosen at random",
    "detectors": "Best detectors of a class",
    "effect": "Largest effect on a class",
    "numbers": "By number",
}


class Columns:
    """Features of the image's class, of another class, and those that are looked for."""

    def __init__(self, experiment: Experiment, live: Live, edited: Callable[[int], None]) -> None:
        """Make the cards that are always there; `edited` is called with a feature that somebody edits."""
        self.experiment, self._live, self._edited = experiment, live, edited
        self.groups: dict[str, list[FeatureCard]] = {"own": [], "other": [], "found": []}
        self.models = [Column(spacing=4, sizing_mode="stretch_width") for _ in self.groups]
        for group, n in (("own", 4), ("other", max(4, len(experiment.first.features) if experiment.first else 0))):
            self._grown(group, n)
        self._grown("found", 4)

    def show(self, state: State, seen: Seen, own: int) -> list[list[int]]:
        """Fill the columns for an image of a class, and return which features stand in them."""
        experiment = self.experiment
        edits = {edit.feature: edit for edit in state.edits}
        chosen: list[list[int]] = []
        for label, group in ((own, "own"), (state.target, "other")):
            strong = experiment.strong(label, 16, state.place)
            free = [s for s in strong if all(s not in before for before in chosen)]
            chosen.append(free[: len(self.groups[group])])
        taken = {feature for features in chosen for feature in features}
        # What is edited stays in sight.
        edited = [feature for feature in edits if feature not in taken]
        found = [f for f in self._found(state, seen) if f not in taken and f not in edited]
        chosen.append([*edited, *found[: FOUND if state.finder == "numbers" else 4]][:FOUND])
        experiment.about.load(feature for features in chosen for feature in features)
        self._grown("found", len(chosen[2]))
        for cards, features in zip(self.groups.values(), chosen, strict=True):
            for i, card in enumerate(cards):
                feature = features[i] if i < len(features) else None
                edit = edits.get(feature) if feature is not None else None
                card.show(
                    None if feature is None else self._facts(feature, seen, state.place),
                    edit.mode if edit else experiment.mode,
                    edit.amount if edit else None,
                )
        return chosen

    def cards(self) -> list[FeatureCard]:
        """Return all cards, also those that show nothing."""
        return [card for cards in self.groups.values() for card in cards]

    def _grown(self, group: str, n: int) -> None:
        """Have so many cards in a column; a card is made when it is first needed, since each takes time to draw."""
        cards = self.groups[group]
        if n > len(cards):
            made = range(len(cards), n)
            cards += [FeatureCard(f"{group}-{i}", group, self._live, self._ways, self._edited) for i in made]
            self.models[list(self.groups).index(group)].children = [card.model for card in cards]

    def _found(self, state: State, seen: Seen) -> list[int]:
        """Return the features of the third column."""
        experiment, place = self.experiment, state.place
        match state.finder:
            case "controls":
                return experiment.controls(state.example or 0, state.target, 4, place)
            case "detectors":
                return experiment.detectors(state.label, 16)
            case "effect":
                return experiment.strong(state.label, 16, place)
            case "numbers":
                return list(state.numbers)
            case _:
                return experiment.firing(seen, place, state.patches)[:32]

    def _ways(self, mode: str) -> Ways:
        amounts = self.experiment.amounts if mode == self.experiment.mode else [1.0]
        low, high = min(amounts), max(amounts)
        if mode == "set":
            return Ways(min(0, low), max(3, high), None, "set to")
        if mode == "add":
            return Ways(min(-3, low), max(3, high), 0.0, "add")
        if mode == "ablate":
            return Ways(min(0, low), max(1, high), 0.0, "less a share of")
        return Ways(min(0, low), max(5, high), 1.0, "multiplied by")

    def _facts(self, feature: int, seen: Seen, place: str) -> Facts:
        experiment, about = self.experiment, self.experiment.about[feature]
        values = seen.edited(place)[:, feature]
        images = "".join(
            f'<img src="{uri}" alt="" title="{escape(self._titled(example))}">'
            for uri, example in experiment.thumbnails(feature)
        )
        name, pure = "no class", ""
        if about.label >= 0:
            name = escape(experiment.classes[about.label])
            pure = f"{about.n_label} of {experiment.top} images, "
        called = escape(experiment.called().get(feature, ""))
        if called:
            name, pure = called, f"{name}, {pure}" if pure else ""
        facts = f"{pure}on {100 * about.frequency:.2g} % of {experiment.counted}"
        n = int((values > 0).sum())
        return Facts(
            feature,
            f'<div class="head"><button class="pick" data-light="{feature}" title="light where it fires">{feature}'
            f'</button><div><div class="name" title="{name}">{name}</div><div class="facts">{facts}</div></div></div>'
            f'<div class="strip">{images}</div>',
            float(values.max() / about.p99),
            n,
            "[CLS]" if place == "cls" else f"{n} patch{'es' * (n > 1)}",
        )

    def _titled(self, example: int) -> str:
        label = self.experiment.labels[example]
        return f"{self.experiment.key(example)}: {self.experiment.classes[label]}" if label >= 0 else ""
