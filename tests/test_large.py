"""Registries of thousands of entries, members, stages: the work grows as they do, and no faster."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakes
import kinds
import pytest

from saefw import errors, pipeline, registry
from saefw.catalog import Catalog
from saefw.errors import Faults
from saefw.places import Spot
from saefw.store import Store
from saefw.unit import Unit

N = 2_000
"""Enough that what looks at all of them for each of them goes beyond every bound below."""


@pytest.fixture
def catalog() -> Catalog:
    return Catalog([kinds, fakes], entry_points=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count what would be called more often than there are entries if something looked at all of them for each."""
    counted: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **more: Any) -> Any:
            counted[name] += 1
            return real(*args, **more)

        monkeypatch.setattr(owner, name, call)

    count(Unit, "__hash__")
    count(Spot, "walk")
    count(Store, "has")
    count(errors, "get_close_matches")
    yield counted


def planned(path: Path, text: str, catalog: Catalog) -> list[pipeline.StagePlan]:
    """Do what `saefw run --dry` does, but for the printing."""
    path.write_text(text)
    read = registry.read(path, catalog)
    desk = pipeline.desk(read, catalog)
    plans = pipeline.plan(read, catalog, run=desk)
    for plan in plans:
        pipeline.costs(read, desk, plan)
    return plans


def test_ten_thousand_entries(tmp_path: Path, catalog: Catalog, calls: Counter[str]) -> None:
    saes = "".join(f"  a{i}: {{use: relu, l1: {i}}}\n" for i in range(10_000))
    (plan,) = planned(tmp_path / "r.yaml", f"saefw: 1\nsaes:\n{saes}stages: {{n: {{use: numbers}}}}\n", catalog)
    assert len(plan.missing) == 3
    assert calls["__hash__"] < 100 and calls["walk"] < 100 and calls["has"] < 100


def test_thousands_of_members_and_units(tmp_path: Path, catalog: Catalog, calls: Counter[str]) -> None:
    text = f"""saefw: 1
saes: {{a: {{use: topk, most: 999, vary: {{k: {list(range(1, 41))}, seed: {list(range(50))}}}}}}}
stages:
  one: {{use: numbers, n: {list(range(N))}}}
  many: {{use: numbers, n: [0], vary: {{plus: {list(range(N))}}}}}
  sum: {{use: sums, of: one}}
"""
    plans = planned(tmp_path / "r.yaml", text, catalog)
    assert [len(plan.missing) for plan in plans] == [N, N, 1]
    assert calls["has"] <= 2 * (2 * N + 1)
    assert calls["__hash__"] < 60 * N and calls["walk"] < 10 * N


def test_thousands_of_stages(tmp_path: Path, catalog: Catalog, calls: Counter[str]) -> None:
    stages = "".join(
        f"  n{i}: {{use: numbers, n: [{i}]}}\n  s{i}: {{use: sums, of: n{i // 2}}}\n" for i in range(N // 2)
    )
    plans = planned(tmp_path / "r.yaml", f"saefw: 1\nstages:\n{stages}", catalog)
    assert len(plans) == N and sum(len(plan.missing) for plan in plans) == N
    assert calls["has"] <= 2 * N and calls["__hash__"] < 60 * N and calls["walk"] < 10 * N


@pytest.mark.parametrize("n", [900, N])
def test_thousands_of_faults(tmp_path: Path, catalog: Catalog, calls: Counter[str], n: int) -> None:
    """All are told; the words that would be right are looked for a hundred times at most."""
    (tmp_path / "r.yaml").write_text(
        "saefw: 1\nsaes:\n"
        + "".join(f"  a{i}: {{use: topkk}}\n" for i in range(n // 2))
        + "stages:\n  n: {use: numbers}\n"
        + "".join(f"  s{i}: {{use: sums, of: m{i}}}\n" for i in range(n // 2))
    )
    with pytest.raises(Faults) as caught:
        registry.read(tmp_path / "r.yaml", catalog)
    lines = [line.removeprefix(f"{tmp_path}/") for line in caught.value.lines]
    assert len(lines) == n // 2 * 2
    assert lines[0] == (
        "r.yaml:3:8: saes.a0.use: no plugin brings 'topkk'; did you mean 'topk'? (there are: relu, topk)"
    )
    assert lines[n // 2 - 1].endswith(f"saes.a{n // 2 - 1}.use: no plugin brings 'topkk'")
    assert lines[-1].endswith(f": 'm{n // 2 - 1}' is not one of the stages above it")
    assert calls["get_close_matches"] <= registry.HINTED
