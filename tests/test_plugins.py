"""Everything that the built-in plugins bring keeps the contract."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import TinySet, TinyVit

from saefw.catalog import Catalog
from saefw.entry import KINDS, Entry
from saefw.errors import Faults
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

    A class that cannot do without settings (where the images are) is checked by the tests of its own, and so is a probe
    that is not fitted: it learns nothing of the tokens that it is given.
    """
    registry = read(TOP / "registry.yaml", Catalog())
    for kind in KINDS:
        seen = set()
        for members in registry.families[kind].values():
            # The last member of a sweep stands for all: they differ in numbers only.
            yield pytest.param(members[-1].entry, id=f"{kind}-{members[-1].label}")
            seen.add(members[-1].entry.content()["use"])
        for use, cls in CATALOG.lookup(kind).items():
            if use not in {*seen, "zero-shot"} and not any(info.is_required() for info in cls.model_fields.values()):
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


SEEDS = """\
saefw: 1
backbones: {vit: {use: digits-vit}}
datasets: {digits: {use: digits}}
saes: {relu: {use: relu, seed: -1}}
probes: {linear: {use: linear, seed: 4294967296}}
stages:
  acts: {use: record, backbone: vit, datasets: [digits], layers: [2]}
  sweep: {use: train, acts: acts, saes: [relu], seed: -1}
  looks: {use: visuals, saes: sweep, acts: acts}
  steer: {use: steer, saes: sweep, visuals: looks, probes: acts, seed: -1}
"""


def test_a_seed_that_no_generator_takes_is_a_fault_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text(SEEDS)
    with pytest.raises(Faults) as told:
        read(path, Catalog())
    assert told.value.lines == [
        f"{path}:5:32: probes.linear.seed: Input should be less than 4294967296 (got 4294967296)",
        f"{path}:8:49: stages.sweep.seed: Input should be greater than or equal to 0 (got -1)",
        f"{path}:10:66: stages.steer.seed: Input should be greater than or equal to 0 (got -1)",
    ]


@pytest.mark.parametrize("name", sorted(CATALOG.metrics))
def test_metric(name: str) -> None:
    check_metric(CATALOG.metrics[name])


def test_what_the_tests_use_keeps_the_contract_too() -> None:
    check_backbone(TinyVit())
    check_dataset(TinySet(), TOP)
