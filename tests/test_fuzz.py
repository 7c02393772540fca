"""The seeds of the fuzzer, each read once: good files, and bytes that once were a finding."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).parents[1]
SEEDS = sorted((TOP / "tests" / "fuzz").iterdir())


@pytest.fixture(scope="module")
def fuzz() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz", TOP / "scripts" / "fuzz.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.name)
def test_a_seed_is_read_or_refused(fuzz: Any, seed: Path, tmp_path: Path) -> None:
    fuzz.fed(seed.read_bytes(), tmp_path)


@pytest.mark.parametrize("seed", [path for path in SEEDS if path.name.endswith("-good")], ids=lambda path: path.name)
def test_a_good_file_is_read(fuzz: Any, seed: Path, tmp_path: Path) -> None:
    """Were it refused, nothing behind the first check would ever be fuzzed."""
    data = seed.read_bytes()
    fuzz.READERS[data[:1]](data[1:], tmp_path)


def test_every_kind_of_file_has_a_seed(fuzz: Any) -> None:
    assert {path.read_bytes()[:1] for path in SEEDS} == set(fuzz.READERS)
    assert sum(path.stat().st_size for path in SEEDS) < 200_000
