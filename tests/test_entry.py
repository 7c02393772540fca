"""The settings of an entry: what its markers say, what a place opens, what `vary` expands to."""

import math
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from saefw.entry import Entry, Knob, Late, Names, Place, expand
from saefw.errors import UserError


class Thing(Entry):
    """Every marker once."""

    use: Literal["thing"] = "thing"

    lr: float = Field(default=1e-3, gt=0)
    """Counts."""

    root: Place = Place("$HERE/train")
    """Counts as written."""

    workers: Annotated[int, Knob] = 2
    """Does not count."""

    acts: Annotated[str, Names("stages")] = ""
    """Does not count."""

    saes: Annotated[list[str], Names("saes")] = Field(default_factory=list)
    """Does not count."""

    bias: Annotated[bool, Late] = True
    """Counts if false."""

    bounds: Annotated[list[int], Late] = Field(default_factory=lambda: [1])
    """Counts if not [1]."""


def test_content_leaves_out_knobs_names_and_late_defaults() -> None:
    content = {"revision": 1, "use": "thing", "lr": 1e-3, "root": "$HERE/train"}
    assert Thing().content() == content
    assert Thing(workers=9, acts="a", saes=["b"], bias=True, bounds=[1]).content() == content


def test_content_holds_a_late_setting_off_its_default() -> None:
    assert Thing(bias=False, bounds=[]).content().items() >= {"bias": False, "bounds": []}.items()


def test_content_holds_the_revision_of_the_class() -> None:
    class Thing2(Thing):
        """Its code changed."""

        revision = 2

    assert Thing2().content() == Thing().content() | {"revision": 2}


def test_numbers_are_one_number_however_they_are_written() -> None:
    """YAML 1.1 reads 4e-4 as text."""
    assert Thing.model_validate({"lr": "4e-4"}).content() == Thing(lr=0.0004).content()


def test_names_are_listed_with_their_kinds() -> None:
    assert list(Thing.names()) == [("acts", "stages"), ("saes", "saes")]


def test_entries_are_frozen_and_closed() -> None:
    thing = Thing()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(thing, "lr", 1.0)  # noqa: B010 (mypy knows, too)
    with pytest.raises(ValidationError, match="Extra inputs"):
        Thing.model_validate({"zebra": 1})


@pytest.mark.parametrize("value", [math.nan, math.inf, "nan", "-inf"])
def test_entries_refuse_numbers_that_are_no_json(value: object) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        Thing.model_validate({"lr": value})


def test_the_words_below_a_setting_describe_it() -> None:
    assert Thing.model_fields["workers"].description == "Does not count."


def test_a_place_is_expanded_only_when_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = Thing().root
    assert isinstance(place, Place) and place == "$HERE/train"
    monkeypatch.setenv("HERE", "photos")
    assert place.open(tmp_path) == tmp_path / "photos/train"
    monkeypatch.setenv("HERE", "/data")
    assert place.open(tmp_path) == Path("/data/train")
    monkeypatch.setenv("HOME", "/home/me")
    assert Place("~/x").open(tmp_path) == Path("/home/me/x")
    assert Thing.model_validate({"root": "${HERE}/x"}).root.open(tmp_path) == Path("/data/x")


def test_a_relative_place_counts_from_where_it_was_read(tmp_path: Path) -> None:
    read = Thing.model_validate({"root": "photos"}, context=tmp_path).root
    assert read.open() == tmp_path / "photos"
    assert read.open(Path("/data")) == Path("/data/photos")
    assert Place("photos").open() == Path("photos")
    assert read == Thing.model_validate({"root": "photos"}).root == "photos"


def test_a_place_with_an_unset_variable_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HERE", raising=False)
    with pytest.raises(UserError) as caught:
        Thing().root.open(tmp_path)
    assert str(caught.value) == "'$HERE/train': the variable $HERE is not set"
    with pytest.raises(UserError) as caught:
        Place("${HERE}/train").open(tmp_path)
    assert str(caught.value) == "'${HERE}/train': the variable ${HERE} is not set"


def test_a_place_is_not_empty() -> None:
    with pytest.raises(ValidationError, match="at least 1 character"):
        Thing.model_validate({"root": ""})


def test_expand_lists_every_combination_the_last_key_fastest() -> None:
    assert list(expand({"a": [7, 8], "b": ["x", "y", "z"]})) == [
        {"a": 0, "b": 0},
        {"a": 0, "b": 1},
        {"a": 0, "b": 2},
        {"a": 1, "b": 0},
        {"a": 1, "b": 1},
        {"a": 1, "b": 2},
    ]


def test_expand_of_nothing_is_one_member() -> None:
    assert list(expand({})) == [{}]
