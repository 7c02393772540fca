"""Images without labels go through every stage that needs none."""

from pathlib import Path
from typing import Any, Literal

import pytest
from tiny import TinyImages, TinySet, desk

from saefw.acts import Acts
from saefw.errors import UserError
from saefw.plugin import Dataset, Example, Run, StageConfig, Unit
from saefw.stages.charts import Pareto
from saefw.stages.drawings import FeatureGrid
from saefw.stages.figures import Draw
from saefw.stages.probe import ProbeStage
from saefw.stages.record import Record
from saefw.stages.train import Train, saefw_metrics
from saefw.stages.visuals import Visuals
from saefw_linear import Linear
from saefw_topk import TopK


class Bare(TinySet):
    """The tiny set, and nobody knows what is on its images."""

    use: Literal["bare"] = "bare"  # type: ignore[assignment]

    def build(self, base: Path) -> Dataset:
        return BareImages(self.n, self.seed, frozenset(self.broken))


class BareImages(TinyImages):
    """The images of Bare."""

    classes = ()  # type: ignore[assignment]

    def __getitem__(self, index: int) -> Example:
        return super().__getitem__(index)._replace(label=-1)


def made(run: Run, name: str, stage: StageConfig) -> list[Unit]:
    run.enter(name)
    units = list(stage.units(run))
    run.listed(name, units)
    stage.make(units, run)
    assert units and all(run.store.has(unit) for unit in units)
    return units


def test_from_recording_to_figures(tmp_path: Path) -> None:
    families: dict[str, Any] = {
        "datasets": {"bare": Bare()},
        "saes": {"topk": TopK(k=3, expansion=2, lr=0.003)},
        "figures": {"front": Pareto(), "grid": FeatureGrid()},
        "probes": {"linear": Linear()},
    }
    run = desk(tmp_path, families, metrics=saefw_metrics())
    (recording,) = made(run, "acts", Record(backbone="tiny", datasets=["bare"], layers=[-1]))
    acts = Acts(run.folder(recording))
    assert acts.classes == [] and set(acts.labels.tolist()) == {-1}
    made(run, "sweep", Train(acts="acts", saes=["topk"], n_tokens=4096, batch_size=256))
    made(run, "visuals", Visuals(saes="sweep", acts="acts", top=4))
    drawn = made(run, "figures", Draw(figures=["front", "grid"], of=["sweep", "visuals"]))
    assert [len(list(run.folder(unit).glob("*.png"))) for unit in drawn] == [1, 1]
    with run.db() as db:
        tables = "class", "class_feature", "prediction"
        assert [db.execute(f"SELECT count(*) FROM {table}").fetchone() for table in tables] == [(0,)] * 3
        assert db.execute("SELECT count(*) > 0, count(DISTINCT feature) > 0 FROM top_example").fetchone() == (
            True,
            True,
        )
        assert db.execute("SELECT count(*) FROM feature_class").fetchone() == (0,)
    with pytest.raises(UserError) as told:
        made(run, "probes", ProbeStage(acts="acts", layer=-1, probes=["linear"]))
    assert str(told.value) == "tiny on bare, layer 2: has 0 classes; a probe tells two or more apart"
