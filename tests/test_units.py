"""The address of a unit: what moves it and what must not."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from saefw.entry import Entry, Knob, Late, Names, Place
from saefw.unit import Unit, canonical


class Made(Entry):
    """Something to make."""

    use: Literal["made"] = "made"

    k: int = 8
    """Counts."""

    lr: float = 1e-3
    """Counts."""

    root: Place = Place("$IMAGES/train")
    """Counts as it is written."""

    workers: Annotated[int, Knob] = 4
    """Does not count."""

    acts: Annotated[str, Names("stages")] = "acts"
    """Does not count."""

    bias: Annotated[bool, Late] = True
    """Counts where it is not at its default."""

    extra: Annotated[list[int], Late] = Field(default_factory=list)
    """Counts where it is not at its default."""


def address(*, revision: int = 1, label: str = "", needs: tuple[Unit, ...] = (), **settings: Any) -> str:
    cls: type[Made] = type("Made", (Made,), {"revision": revision, "__module__": __name__}) if revision != 1 else Made
    return Unit("fake", cls.model_validate(settings).content(), needs, label).address


def test_golden_addresses() -> None:
    """A changed hash makes everything that anybody has made anew: it must be a decision."""
    first = Unit("record", {"revision": 1, "use": "made", "layer": -2, "lr": 0.0004, "name": "Größe"})
    second = Unit("train", {"sae": {"k": 8}, "n_tokens": 1_000_000, "seed": None, "lr": 1e-05}, (first,))
    third = Unit("steer", {}, (second, first))
    assert first.text == (
        '{"content":{"layer":-2,"lr":0.0004,"name":"Gr\\u00f6\\u00dfe","revision":1,"use":"made"},'
        '"needs":[],"stage":"record"}'
    )
    assert [first.address, second.address, third.address] == ["2642f3ccd005", "feb9078d6f1f", "e0facee01589"]
    assert address() == "3b12e34885ea"


@pytest.mark.parametrize(
    "settings",
    [
        {"label": "another name"},
        {"workers": 1},
        {"acts": "recorded"},
        {"bias": True},
        {"extra": []},
        {"k": 8},
        {"lr": "1e-3"},
    ],
)
def test_what_does_not_count(settings: dict[str, Any]) -> None:
    assert address(**settings) == address()


@pytest.mark.parametrize(
    "settings",
    [
        {"k": 9},
        {"lr": 1.1e-3},
        {"root": "$IMAGES/test"},
        {"bias": False},
        {"extra": [1]},
        {"revision": 2},
        {"needs": (Unit("fake", {}),)},
    ],
)
def test_what_counts(settings: dict[str, Any]) -> None:
    assert address(**settings) != address()


def test_a_place_is_hashed_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    before = address()
    monkeypatch.setenv("IMAGES", "/elsewhere")
    assert address() == before


def test_a_new_setting_that_is_late_leaves_old_addresses() -> None:
    class Older(Entry):
        """Made, before it had `bias` and `extra`."""

        use: Literal["made"] = "made"
        k: int = 8
        lr: float = 1e-3
        root: Place = Place("$IMAGES/train")

    assert Unit("fake", Older().content()).address == address()


def test_a_new_member_touches_no_other() -> None:
    before = {k: address(k=k) for k in (8, 16)}
    after = {k: address(k=k) for k in (4, 8, 16)}
    assert {k: after[k] for k in before} == before and len(set(after.values())) == 3


def test_needs_count_by_content_and_order() -> None:
    a, b = Unit("fake", {"n": 1}), Unit("fake", {"n": 2})
    assert address(needs=(a, b)) != address(needs=(b, a))
    assert address(needs=(a,)) == address(needs=(Unit("fake", {"n": 1}, label="renamed", given={"x": object()}),))
    deep = Unit("fake", {}, (Unit("fake", {}, (a,)),))
    assert deep.address != Unit("fake", {}, (Unit("fake", {}, (b,)),)).address


def test_the_stage_counts() -> None:
    assert Unit("train", {}).address != Unit("probe", {}).address


def test_equal_units_are_one() -> None:
    units = [Unit("fake", {"n": 1}, label="x"), Unit("fake", {"n": 1}, label="y"), Unit("fake", {"n": 2})]
    assert len(set(units)) == 2 and units[0] == units[1] != units[2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_number_no_address(value: float) -> None:
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        canonical({"lr": value})


def test_what_is_not_json_has_no_address() -> None:
    with pytest.raises(TypeError):
        Unit("fake", {"x": {1, 2}}).address  # noqa: B018


def test_canonical_is_one_text() -> None:
    assert canonical({"b": [1, 2.0, None, True], "a": {"ü": "x"}}) == '{"a":{"\\u00fc":"x"},"b":[1,2.0,null,true]}'
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})
