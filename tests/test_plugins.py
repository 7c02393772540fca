"""Everything that the built-in plugins bring keeps the contract."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import TinySet, TinyVit

from saefw.catalog import Catalog
from saefw.entry import KINDS, Entry
from saefw.plugin import BackboneConfig, DatasetConfig, FigureConfig, ProbeConfig, SaeConfig, StageConfig
from saefw.registry import read
from saefw.testing import (
    check_backbone,
    check_dataset,
    check_figure,
    check_imports,
    check_metric,
    check_probe,
    check_sae,
    check_stage,
)

TOP = Path(__file__).parents[1]
CATALOG = Catalog()


def configs() -> Iterator[object]:
    """Every member of the embedded registry, and each class that it does not use with its defaults.

    A class that cannot do without settings (where the images are) is checked by the tests of its own.
    """
    registry = read(TOP / "registry.yaml", Catalog())
    for kind in KINDS:
        seen = set()
        for members in registry.families[kind].values():
            # The last member of a sweep stands for all: they differ in numbers only.
            yield pytest.param(members[-1].entry, id=f"{kind}-{members[-1].label}")
            seen.add(members[-1].entry.content()["use"])
        for use, cls in CATALOG.lookup(kind).items():
            if use not in seen and not any(info.is_required() for info in cls.model_fields.values()):
                yield pytest.param(cls(), id=f"{kind}-{use}")


@pytest.fixture(scope="module", autouse=True)
def light_modules() -> None:
    """All modules in one fresh Python, which the checks of single plugins then need not start again."""
    check_imports(cls.__module__ for kind in KINDS for cls in CATALOG.lookup(kind).values())


@pytest.mark.parametrize("config", list(configs()))
def test_plugin(config: Entry) -> None:
    if isinstance(config, BackboneConfig):
        check_backbone(config)
    elif isinstance(config, DatasetConfig):
        check_dataset(config, TOP)
    elif isinstance(config, SaeConfig):
        check_sae(config)
    elif isinstance(config, ProbeConfig):
        check_probe(config)
    elif isinstance(config, FigureConfig):
        check_figure(config)
    else:
        assert isinstance(config, StageConfig)
        check_stage(config)


@pytest.mark.parametrize("name", sorted(CATALOG.metrics))
def test_metric(name: str) -> None:
    check_metric(CATALOG.metrics[name])


def test_what_the_tests_use_keeps_the_contract_too() -> None:
    check_backbone(TinyVit())
    check_dataset(TinySet(), TOP)
