"""The Steer tab of one visitor: an image, three columns of its features, what the probe reads before and after."""

from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import Any, Literal

import numpy as np
from bokeh.document import Document
from bokeh.events import ButtonClick
from PIL import Image

from saefw.errors import UserError
from saefw.experiment.opened import After, Change, Experiment, Seen
from saefw.experiment.tables import Guide
from saefw_steering_columns import FINDERS, FOUND, Columns
from saefw_steering_keep import Keeper
from saefw_steering_layout import Widgets
from saefw_steering_live import Live
from saefw_steering_state import Edited, Past, State
from saefw_steering_views import Picture, verdict
from saefw_steering_work import Newest
from saefw_upload import uploaded

LISTED = 200
"""Images of a class that are listed; any other is found by its number or its key."""


class Session:
    """What one visitor looks at and has changed; the experiment is shared by all."""

    def __init__(
        self,
        doc: Document,
        experiment: Experiment,
        say: Callable[[str], None],
        open_: Callable[[State], None],
        state: State | None = None,
    ) -> None:
        """Build the widgets, and show a state, by default the stored first example, untouched.

        Args:
            doc: where it is shown.
            experiment: what is shown.
            say: told what a visitor can mend; an empty text: nothing.
            open_: shows a state of whichever experiment.
            state: one of this experiment.

        """
        self.experiment, self._say, self._open = experiment, say, open_
        self.example: int | None = None
        self.seen: Seen
        self.after: After
        self.view: Image.Image
        self.own = 0
        """The class of the image: its label or, where it has none, what the probe takes it for."""
        self.edits: dict[int, Edited] = {}
        self.lit = -1
        self._quiet = False
        self._past = Past()
        self._newest, self._rankings = Newest(doc, self._failed), Newest(doc, self._failed)
        self.picture = Picture(experiment.acts.grid, self._guarded(self._patches_chosen))
        self.live = Live()
        self.columns = Columns(experiment, self.live, self._edited)
        self.w = Widgets(experiment, self.picture, self.columns, self.live, FINDERS)
        self.keeper = Keeper(self)
        self.parts = self.w.laid_out(self.keeper.model)
        self._connect()
        start, target = experiment.beginning
        usual = State(
            sae=experiment.choice.sae.address,
            probe=experiment.choice.probe.address,
            example=start,
            target=target,
            place=experiment.place,
        )
        try:
            self.apply(state or usual)
        except UserError as error:
            self.apply(usual)
            say(str(error))
        self.remember()
        self._newest.open = self._rankings.open = True

    def _guarded(self, do: Callable[..., Any]) -> Callable[..., None]:
        """Return a callback that says what a visitor can mend; the page stays alive."""

        def done(*args: Any) -> None:
            if self._quiet:
                return
            try:
                self._say("")
                do(*args)
            except (UserError, OSError) as error:
                self._say(str(error))

        return done

    def pressed(self, do: Callable[[], None]) -> Callable[[], None]:
        """Return the callback of a button: `_guarded`, and without the event that Bokeh would pass."""
        guarded = self._guarded(do)
        return lambda: guarded()

    def _connect(self) -> None:
        def heard(model: Any, prop: str, do: Callable[[Any], None]) -> None:
            call = self._guarded(do)
            model.on_change(prop, lambda _attr, _old, new: call(new))

        w = self.w
        heard(w.of_class, "value", lambda label: self.go_to(int(self._listed(int(label))[0])))
        heard(w.image, "value", lambda example: self.go_to(int(example)))
        heard(w.split, "value", self._split_chosen)
        heard(w.find, "value", self._find)
        heard(w.upload, "value", lambda data: self.bring(str(data)))
        heard(w.target, "value", lambda _: self.show_features())
        heard(w.finder, "value", lambda _: self.show_features())
        heard(w.label, "value", lambda _: self.show_features())
        heard(w.numbers, "value", lambda _: self.show_features())
        heard(w.light, "active", lambda _: self._light())
        heard(w.place, "active", lambda _: self._place_chosen())
        heard(w.directly, "active", lambda _: self.update())
        heard(w.top, "value", lambda _: self.update())
        heard(w.signal, "tags", lambda tags: self._key(tags))
        pressed: dict[str, Callable[[], None]] = {
            "previous": partial(self.step, -1),
            "next": partial(self.step, 1),
            "random": self.random,
            "undo": partial(self.travel, -1),
            "redo": partial(self.travel, 1),
            "reset-all": self.reset,
            "all-patches": partial(self.picture.choose, []),
            **{f"guide-{guide.name}": partial(self.show_guide, guide) for guide in self.experiment.guides},
        }
        for name, do in pressed.items():
            w.buttons[name].on_click(self.pressed(do))

    def _key(self, tags: Sequence[Any]) -> None:
        match tags:
            case ["light", _, int(feature)] if feature in self.experiment.about:
                self.lighten(feature)
        if tags and (button := self.w.buttons.get(str(tags[0]))) is not None and not button.disabled:
            button._trigger_event(ButtonClick(button))

    # The state

    @property
    def place(self) -> Literal["patches", "cls"]:
        """The tokens that are edited."""
        return "cls" if self.w.place.active == 1 else "patches"

    def state(self) -> State:
        """Return all that was chosen."""
        w: Any = self.w
        return State(
            sae=self.experiment.choice.sae.address,
            probe=self.experiment.choice.probe.address,
            split=w.split.value,
            example=self.example,
            target=int(w.target.value),
            place=self.place,
            directly=w.directly.active and self.place in self.experiment.direct,
            patches=tuple(sorted(self.picture.chosen)) if self.place == "patches" else (),
            edits=tuple(self.edits.values()),
            finder=w.finder.value,
            label=int(w.label.value),
            numbers=tuple(s for s in self._numbers() if s in self.experiment.about)[:FOUND],
            top=int(w.top.value),
        )

    def apply(self, state: State) -> None:
        """Show a state of this experiment.

        Raises:
            UserError: it speaks of a class, a feature, a place or an image that is not here.

        """
        experiment, w = self.experiment, self.w
        if (label := max(state.target, state.label)) >= (n := len(experiment.classes)):
            raise UserError(f"there is no class {label} here (there are 0 to {n - 1})")
        for edit in state.edits:
            if edit.feature not in experiment.about:
                raise UserError(f"feature {edit.feature}: none of this number fires on the training images")
        experiment.check_place(state.place)
        if state.example is not None:
            self._check(state.example)
        self._quiet = True
        w.split.value = state.split
        w.target.value, w.finder.value, w.label.value = str(state.target), state.finder, str(state.label)
        w.numbers.value, w.top.value = " ".join(map(str, state.numbers)), str(state.top)
        w.place.active, w.directly.active = int(state.place == "cls"), state.directly
        self.edits = {edit.feature: edit for edit in state.edits}
        self.picture.choose(state.patches, quiet=True)
        self._quiet = False
        self._look(state.example)
        self.show_features()

    def remember(self, what: str = "") -> None:
        """Note the state as a step that can be undone; changes of one feature in a row, `what`, are one step."""
        self._past.note(self.state(), what)
        self._moves()

    def _moves(self) -> None:
        self.w.buttons["undo"].disabled = not self._past.at(-1)
        self.w.buttons["redo"].disabled = not self._past.at(1)

    def travel(self, by: int) -> None:
        """Undo a step (-1), or redo it (1)."""
        if (state := self._past.at(by)) is not None:
            if state.example is None and self.example is not None:
                raise UserError("the image that was brought is not kept; bring it again")
            self._past.go(by)
            self.apply(state)
            self._moves()

    # What a visitor does

    def go_to(self, example: int) -> None:
        """Show an image; what is edited stays edited."""
        self._check(example)
        self._look(example)
        self.show_features()

    def bring(self, data: str) -> None:
        """Show an image of the visitor's own, base64, which stays in memory."""
        if data:
            self.seen, self.view = self.experiment.read(uploaded(data))
            self._look(None)
            self.show_features()

    def _find(self, text: str) -> None:
        if text.strip():
            self.go_to(self.experiment.find(text))

    def step(self, by: int) -> None:
        """Go to the next or the previous image of the class."""
        ours = self.experiment.of_class(self.own, str(self.w.split.value))
        if not len(ours):
            raise UserError("there is no image of this class in the split; choose another")
        at = int(np.searchsorted(ours, -1 if self.example is None else self.example))
        here = at < len(ours) and ours[at] == self.example
        self.go_to(int(ours[(at + by if here or by < 0 else at) % len(ours)]))

    def random(self) -> None:
        """Go to any image of the split."""
        examples = self.experiment.of_split(str(self.w.split.value))
        if not len(examples):
            raise UserError(f"there is no labelled image in the {self.w.split.value} split; choose another")
        self.go_to(int(np.random.default_rng().choice(examples)))

    def show_guide(self, guide: Guide) -> None:
        """Go to an edit that the steer stage stored, on all that it edits."""
        self.apply(
            State(
                sae=self.experiment.choice.sae.address,
                probe=self.experiment.choice.probe.address,
                example=guide.example,
                target=guide.target,
                place=self.experiment.place,
                edits=tuple(self._edit(feature, self.experiment.mode, guide.amount) for feature in guide.features),
            )
        )

    def reset(self) -> None:
        """Leave every feature as observed, on all patches."""
        self.edits = {}
        for card in self.columns.cards():
            card.set(None)
        self.picture.choose([], quiet=True)
        self.show_features()

    def lighten(self, feature: int) -> None:
        """Light the patches where a feature fires; the lit one again: none."""
        self._quiet = True
        self.w.light.active = not (self.w.light.active and self.lit == feature)
        self._quiet = False
        self.lit = feature
        self._light()

    def _light(self) -> None:
        self.show_picture()
        self.live.show()

    def show_saved(self, state: State) -> None:
        """Show a saved state, of this experiment or of another."""
        self._open(state)

    def _split_chosen(self, split: str) -> None:
        examples = self.experiment.of_split(split)
        if not len(examples):
            raise UserError(f"there is no labelled image in the {split} split; choose another")
        self._look(int(examples[0]))
        self.show_features()

    def _patches_chosen(self) -> None:
        # They propose their own features.
        if self.w.finder.value == "here":
            self.show_features()
        else:
            self.update()

    def _place_chosen(self) -> None:
        if self.place not in self.experiment.steerings:
            self._quiet = True
            self.w.place.active = 1 - int(self.w.place.active or 0)
            self._quiet = False
            self.experiment.check_place("cls" if self.place == "patches" else "patches")
        self.show_features()

    def _edited(self, feature: int) -> None:
        for card in self.columns.cards():
            if card.facts and card.facts.feature == feature:
                if (edited := card.edited) is not None:
                    self.edits[feature] = edited
                else:
                    self.edits.pop(feature, None)
        self._guarded(self.update)(f"feature {feature}")

    def _edit(self, feature: int, mode: str, amount: float) -> Edited:
        return Edited.model_validate({"feature": feature, "mode": mode, "amount": amount})

    def _check(self, example: int) -> None:
        experiment = self.experiment
        if not 0 <= example < experiment.acts.n_examples:
            raise UserError(f"there is no image {example} (there are 0 to {experiment.acts.n_examples - 1})")
        if experiment.acts.splits[example] == "broken":
            raise UserError(f"image {example} could not be read when it was recorded, so there is nothing to steer")

    def _listed(self, label: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self.experiment.of_class(label, str(self.w.split.value))

    # What is shown

    def _look(self, example: int | None) -> None:
        """Take an image; one that the visitor brought is there already."""
        experiment, w, trouble = self.experiment, self.w, ""
        if example is not None:
            self.seen = experiment.seen(example)
            try:
                self.view = experiment.view(example)
            except UserError as error:  # the edit needs the recording alone
                self.view, trouble = Image.new("RGB", experiment.acts.grid[::-1], "#8b93a1"), str(error)
        self.example = example
        label = -1 if example is None else int(experiment.labels[example])
        probability_c = self.seen.probability_c(self.place if self.place in experiment.steerings else experiment.place)
        self.own = label if label >= 0 else int(probability_c.argmax())
        self._quiet = True
        if example is not None and (split := str(experiment.acts.splits[example])) in w.split.options:
            w.split.value = split
        ours = self._listed(self.own)
        here = int(np.searchsorted(ours, example or 0))
        start = max(0, min(here - LISTED // 2, len(ours) - LISTED))
        shown = ours[start : start + LISTED].tolist()
        w.of_class.value = str(self.own) if len(ours) else None
        images: list[Any] = [("", "an image of your own")] if example is None else []
        images += [(str(e), self._named(e)) for e in shown]
        if example is not None and example not in shown:
            images.insert(0, (str(example), experiment.key(example)))
        w.image.options = images
        w.image.value = "" if example is None else str(example)
        if w.target.value == str(self.own):
            order = np.argsort(-probability_c, kind="stable")
            w.target.value = str(next((int(c) for c in order if c != self.own), self.own))
        self._quiet = False
        if trouble:
            w.about_image.text = f"<p>{escape(trouble)}</p>"
        elif example is None:
            w.about_image.text = (
                "<p><b>your image</b> <span class=faint>as the model sees it; kept in memory alone</span></p>"
            )
        else:
            name = escape(experiment.classes[label]) if label >= 0 else "no class"
            w.about_image.text = (
                f"<p><b>{name}</b> <span class=faint>{escape(experiment.key(example))}, number {example}, "
                f"as the model sees it</span></p>"
            )

    def show_features(self) -> None:
        """Fill the columns for the image, the target class and what is looked for."""
        experiment, w = self.experiment, self.w
        asked = self._numbers()
        if silent := [feature for feature in asked if feature not in experiment.about]:
            self._say(f"feature {silent[0]}: none of this number fires on the training images")
        state = self.state()
        labels = {self.own, state.target, *([state.label] if state.finder == "effect" else [])}
        unknown = [label for label in labels if not experiment.knows(label, state.place)]
        if unknown and self._rankings.waited_for:
            w.busy(unknown)
            self._rankings.ask(
                lambda: [experiment.strong(label, 1, state.place) for label in unknown],
                lambda _: self.show_features(),
            )
            self.show_picture()
            self.update()
            return
        chosen = self.columns.show(state, self.seen, self.own)
        edited = any(edit.feature in chosen[2] for edit in state.edits)
        w.headings(self.own, self.example is None, edited, self.finding(), len(chosen[2]))
        if all(self.lit not in features for features in chosen):
            self.lit = next((features[0] for features in (*chosen[2:], *chosen) if features), -1)
        of_cls = experiment.counted == "images"
        shown = [] if of_cls else [feature for features in chosen for feature in features]
        self.picture.heat.data = {str(f): self.seen.patch_ps[:, f] / experiment.about.p99_s[f] for f in shown}
        self.show_picture()
        self.update()

    def finding(self) -> str:
        """Return, in words, what the third column shows."""
        finder = str(self.w.finder.value)
        if finder == "here" and self.place == "patches" and self.picture.chosen:
            return "Strongest on the chosen patches"
        return next(said for name, said in FINDERS.items() if name == finder)

    def _numbers(self) -> list[int]:
        """Return the features that are asked for by number."""
        words = str(self.w.numbers.value).replace(",", " ").split()
        return list(dict.fromkeys(int(word) for word in words if word.isdecimal() and len(word) < 10))

    def show_picture(self) -> None:
        """Draw the image, lit or as it is."""
        experiment, w = self.experiment, self.w
        # A feature of [CLS] stands for nothing on a patch.
        w.light.disabled = experiment.counted == "images" or self.lit < 0
        on = bool(w.light.active) and not w.light.disabled
        values = self.seen.patch_ps[:, self.lit] / experiment.about.p99_s[self.lit] if on else None
        self.picture.show(self.view, None if values is None else values.astype(np.float64), f"feature {self.lit} at")
        w.light.label = f"Light where {self.lit} fires"
        for card in self.columns.cards():
            card.highlight(self.lit if on else None)

    def update(self, what: str = "") -> None:
        """Run the edit, and show what the probe reads."""
        place, patches = self.place, sorted(self.picture.chosen) or None
        changes = [Change(edit.feature, edit.mode, edit.amount) for edit in self.edits.values()]
        directly = bool(self.w.directly.active) and place in self.experiment.direct
        self.w.places(place, self.picture, self.experiment)
        self.remember(what)
        state, seen = self.state(), self.seen
        self._newest.ask(
            partial(self.experiment.edit, seen, changes, place, patches, directly),
            lambda after: self._show(state, seen, after),
        )

    def _show(self, state: State, seen: Seen, after: After) -> None:
        self.after = after
        before_c = seen.probability_c(state.place)
        done, texts = self.done(state), self.live.texts
        texts["bars"] = self.w.bars.drawn(before_c, after.probability_c, state.top)
        texts["verdict"] = verdict(self.experiment.classes, before_c, after.probability_c, done)
        texts["norm"] = f"<p class=faint>Norm of the edit: <b>{after.norm:.3g}</b></p>" if done else ""
        self.keeper.changed(state)
        self.live.show()

    def _failed(self, text: str) -> None:
        self._say(text)
        self.live.show()

    def done(self, state: State) -> str:
        """Return, in words, what a state edits; nothing if it edits nothing."""
        n, of = len(state.edits), self.experiment.acts.grid[0] * self.experiment.acts.grid[1]
        if not n:
            return ""
        where = f"{len(state.patches)} of {of} patches" if state.patches else "all patches"
        if state.place == "cls":
            where = "[CLS]"
        where += ", straight into the probe" if state.directly else ""
        return f"{n} feature{'s' * (n > 1)} edited on {where}"

    def _named(self, example: int) -> str:
        experiment, key = self.experiment, self.experiment.key(example)
        read = experiment.predicted[example]
        return key if read in (-1, experiment.labels[example]) else f"{key}, read as {experiment.classes[read]}"
