"""Edits that somebody saved under a name: each is a unit of the store, with rows in `saved_edit` and its like.

A unit comes into being by one rename, and a new index finds it; `saefw gc` keeps it.
"""

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pydantic import ValidationError

from saefw.care import write_atomically
from saefw.errors import UNPRINTED
from saefw.experiment.choices import Choice
from saefw.experiment.opened import After, Experiment, Seen
from saefw.pictures import png
from saefw.plugin import Unit, UserError
from saefw.store import SAVED
from saefw_steering_state import State

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 80
"""Characters of a name."""


class Saved(NamedTuple):
    """A saved edit."""

    unit: str
    """Its address."""

    name: str
    state: State


def saved(choice: Choice) -> list[Saved]:
    """Return the saved edits of the SAEs and probes of a choice's stage, by name."""
    saes, probes = ([unit.address for unit in units] for units in (choice.saes(), choice.probes()))
    with choice.run.store.db() as db:
        rows = db.execute(
            "SELECT s.unit, s.name, u.content->>'$.state' FROM saved_edit s JOIN unit u USING (unit) "
            "WHERE list_contains(?, s.sae) AND list_contains(?, s.probe) ORDER BY s.name, s.unit",
            [saes, probes],
        ).fetchall()
    found = []
    for unit, name, text in rows:
        try:
            found.append(Saved(unit, name, State.model_validate_json(text)))
        except ValidationError:  # of another version of the page; SQL has it all the same
            continue
    return found


def save(name: str, experiment: Experiment, state: State, seen: Seen, after: After, view: "Image") -> Saved:
    """Keep an edit under a name.

    Raises:
        UserError: the name is no name, or taken; or the image is the visitor's own, which is kept in memory alone.

    """
    name = re.sub(r"\s+", " ", name).strip()
    if not name or len(name) > LONGEST or UNPRINTED.search(name):
        raise UserError(f"a name has 1 to {LONGEST} characters that print (got {name[:LONGEST]!r})")
    if state.example is None:
        raise UserError("an edit of an image of your own is not saved, since that image stays in memory; export it")
    run, needs = experiment.choice.run, experiment.unit.needs
    unit = Unit(SAVED, {"name": name, "state": state.model_dump(mode="json")}, needs, label=name)
    run.store.sync()
    with run.store.db() as db:
        taken = db.execute("SELECT unit FROM saved_edit WHERE name = ?", [name]).fetchall()
    if taken and taken != [(unit.address,)]:
        raise UserError(f"there is an edit '{name}' already; choose another name, or delete that one first")
    run.enter(SAVED)
    with run.store.lock(unit, lambda holder: None):
        if not run.store.settled(unit):
            _write(unit, experiment, state, seen, after, view)
            run.keep(unit)
            run.publish()
        else:
            run.store.sync()
    return Saved(unit.address, name, state)


def delete(choice: Choice, address: str) -> None:
    """Delete a saved edit.

    Raises:
        UserError: there is none of this address, or it cannot be deleted.

    """
    store = choice.run.store
    if address not in {one.unit for one in saved(choice)}:
        raise UserError("that saved edit is not there any more")
    store.delete(store.root / SAVED / address, lambda holder: None)
    store.sync()


def _write(unit: Unit, experiment: Experiment, state: State, seen: Seen, after: After, view: "Image") -> None:
    run = experiment.choice.run
    sae, probe, _, _, recording = unit.needs
    assert state.example is not None
    run.put(
        unit,
        "saved_edit",
        name=unit.content["name"],
        sae=sae.address,
        probe=probe.address,
        acts=recording.address,
        example=state.example,
        place=state.place,
        directly=state.directly,
        patches=" ".join(map(str, state.patches)) if state.patches else None,
        norm=after.norm,
    )
    if state.edits:
        run.put(
            unit,
            "saved_feature",
            feature=[edit.feature for edit in state.edits],
            mode=[edit.mode for edit in state.edits],
            amount=[edit.amount for edit in state.edits],
        )
    before_c = seen.probability_c(state.place)
    run.put(unit, "saved_class", label=np.arange(len(before_c)), before=before_c, after=after.probability_c)
    write_atomically(run.folder(unit) / "view.png", png(view))
