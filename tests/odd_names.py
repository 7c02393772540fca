"""The tiny images under names that HTML would take for its own, and an experiment on them, to test the page with."""

from pathlib import Path
from typing import Literal

import tiny

from saefw import pipeline, registry
from saefw.catalog import Catalog
from saefw.plugin import Dataset, DatasetConfig, Example, hookimpl

REGISTRY = f"""
saefw: 1
plugins: [{Path(tiny.__file__)}, {Path(__file__)}]
device: cpu
backbones: {{tiny: {{use: tiny-vit}}}}
datasets: {{odd: {{use: odd-set}}, other: {{use: tiny-set, n: 30, seed: 3}}}}
saes: {{topk: {{use: topk, k: 4, expansion: 2, lr: 0.003}}}}
probes: {{linear: {{use: linear, lr: 0.01}}}}
stages:
  acts: {{use: record, backbone: tiny, datasets: [odd, other], layers: [0, -1]}}
  sweep: {{use: train, acts: acts, saes: [topk], layers: [0], n_tokens: 4096, batch_size: 256}}
  looks: {{use: visuals, saes: sweep, acts: acts, top: 6}}
  probes: {{use: probe, acts: acts, probes: [linear]}}
  steer: {{use: steer, saes: sweep, probes: probes, visuals: looks, amounts: [1, 8], max_frequency: 2}}
"""


class OddSet(tiny.TinySet):
    """The tiny images."""

    use: Literal["odd-set"] = "odd-set"  # type: ignore[assignment]

    def build(self, base: Path) -> Dataset:
        return OddImages(self.n, self.seed, frozenset())


class OddImages(tiny.TinyImages):
    """With odd names."""

    classes = ("<b>red</b>", "green & co", "<script>blue()</script>")

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        return example._replace(key=f"<i>{example.key}</i>")


@hookimpl
def saefw_datasets() -> list[type[DatasetConfig]]:
    """One: odd-set."""
    return [OddSet]


def made(folder: Path, text: str = REGISTRY) -> Path:
    """Make everything that a registry asks for in a folder; return where it lies."""
    (folder / "registry.yaml").write_text(text)
    catalog = Catalog()
    pipeline.run(registry.read(folder / "registry.yaml", catalog), catalog)
    return folder / "registry.yaml"
