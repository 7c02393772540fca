"""The registries in examples/ and benchmarks/: they check, plan what they say, and the one on real data runs."""

import math
import os
import re
from pathlib import Path
from typing import Any

import duckdb
import pytest
import tiny
import torch
import trees
from typer.testing import CliRunner

from saefw import pipeline
from saefw.acts import Acts
from saefw.catalog import Catalog
from saefw.cli import app
from saefw.pace import Pace
from saefw.plugin import BackboneConfig
from saefw.registry import read
from saefw.stages.visuals import FIRING
from saefw.trained import open_sae

EXAMPLES = Path(__file__).parents[1] / "examples"
CLIP = "clip_imagenet_classification.yaml"
REAL = "real_small.yaml"
VARIANTS = "variants.yaml"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (CLIP, "fine; 1 backbone, 4 datasets, 18 saes, 30 probes, 5 figures, 9 stages"),
        (REAL, "fine; 1 backbone, 2 datasets, 5 saes, 16 probes, 7 figures, 10 stages"),
        (VARIANTS, "fine; 1 backbone, 1 dataset, 21 saes, 1 figure, 3 stages"),
        ("../benchmarks/plain_topk.yaml", "fine; 1 backbone, 1 dataset, 6 saes, 3 stages"),
        ("../benchmarks/front.yaml", "fine; 1 backbone, 1 dataset, 25 saes, 1 figure, 4 stages"),
    ],
)
def test_they_check_without_images_and_weights(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGENET", raising=False)
    monkeypatch.delenv("SAEFW_DATA", raising=False)
    result = CliRunner().invoke(app, ["check", str(EXAMPLES / name)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"{EXAMPLES / name}: {said}"


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example on CLIP beside small trees in the form of the true ones: 15, 100, 18 and 204 images."""
    trees.imagenet(tmp_path / "ILSVRC")
    trees.caltech101(tmp_path / "data" / "caltech101", {"accordion": 85, "anchor": 20, "BACKGROUND_Google": 3})
    trees.cub200(tmp_path / "data" / "cub200")
    trees.flowers102(tmp_path / "data" / "flowers102")
    monkeypatch.setenv("IMAGENET", str(tmp_path / "ILSVRC"))
    path = tmp_path / "examples" / CLIP
    path.parent.mkdir()
    path.write_text((EXAMPLES / CLIP).read_text())
    return path


TRAIN = {"caltech": 45, "cub": 8, "flowers": 51}
"""Images of the train split of the small trees; ImageNet's has 12, and 3 are valid."""


def test_the_whole_experiment_is_planned(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_model(self: BackboneConfig, device: str) -> None:
        raise AssertionError("a plan builds no backbone")

    monkeypatch.setattr("saefw_open_clip.OpenClip.build", no_model)
    catalog = Catalog()
    registry = read(clip, catalog)
    desk = pipeline.desk(registry, catalog)
    plans = {plan.name: plan for plan in pipeline.plan(registry, catalog, run=desk)}
    assert {name: len(plan.units) for name, plan in plans.items()} == {
        "imagenet": 1, "tasks": 3 * 2, "sweep": 3 * 4 + 3 * 2, "visuals": 18, "sheets": 18, "classes": 18 * 3,
        "probes": 6 * 5 * 3, "steer": 0, "figures": 0,
    }  # fmt: skip
    assert (plans["steer"].reason, plans["figures"].reason) == (
        "decided once sweep is made", "decided once steer is made",
    )  # fmt: skip

    # 197 tokens of 768; in float16. An SAE of 32 x 768 features: W_enc, W_dec, b_enc,
    # b_dec, the mean and the scale. Tables: 20 maps of 196 patches a feature. 64 sheets of 20 images.
    token, n_features = 768, 24_576
    weights, tables = (2 * token + 1) * n_features + 2 * token + 1, n_features * 20 * 196
    drawn = 64 * 20 * 5000
    image = 197 * token
    costs = {name: list(pipeline.costs(registry, desk, plan).values()) for name, plan in plans.items()}
    assert costs["imagenet"] == [(15 * image * 2, "15 images")]
    assert costs["tasks"] == [
        (n * image * 2, f"{n} images") for n in (100, 18, 204) for _ in ("block 10", "block 11")
    ]  # fmt: skip
    assert costs["sweep"] == [(weights * 4, "100,000,000 tokens")] * 18
    # And of each image of a split its picture, and what waits of all features at most: 12 bytes, 16 of the strongest.
    most = tables + 204 * (224 * 224 * 3 + n_features * 12 + 32 * 16)
    assert len(costs["visuals"]) == 18 and len(costs["classes"]) == 54
    assert all(tables < cost.disk < most and not cost.work for cost in costs["visuals"] + costs["classes"])
    assert costs["sheets"] == [(drawn, "")] * 18
    assert costs["probes"] == [(0, "")] * 90
    # As of any SAE that may be picked: it is read by one probe of each set, and 5 figures are drawn of that.
    assert costs["steer"] == [(0, "")] * 3 and costs["figures"] == [(0, "")] * 5

    # A block takes 1 ms an image (11 of 12, then all), an image 20 ms of two cores, a token and feature 1 ns to train
    # on and 2 ns to encode, a token 1 us to count; the splits of the sets are those of the trees.
    named = ("imagenet", "caltech", "cub", "flowers")
    last = [f"clip on {name}, layer 10" for name in named]
    rates = {
        "an image of 197 tokens in a block of 768, float32": 1e-3,
        **{f"an image of {name}": 0.02 for name in named},
        **{f"a token and feature of a {use} SAE of 768": 1e-9 for use in ("relu", "topk")},
        **{f"a token and feature of a {use} SAE of 768, encoded": 2e-9 for use in ("relu", "topk")},
        f"a token of {FIRING} features, counted": 1e-6,
        f"a sheet, {last[0]}": 0.5,
        **{f"a picture, {label}": 0.08 for label in last},
        "a figure": 0.25,
        **{f"30 linear probes on {n} tokens of clip on {name}, layer 11": 7.0 for name, n in TRAIN.items()},
    }
    monkeypatch.setattr("saefw.stages.record.cores", lambda: 2)
    guessed = {name: pipeline.seconds(registry, desk, plan, Pace(rates)) for name, plan in plans.items()}
    n_train, n_valid = 12, 3
    assert guessed["imagenet"] == pytest.approx(15 * (11e-3 + 0.01))
    assert guessed["tasks"] == pytest.approx(322 * (12e-3 + 0.01))
    assert guessed["sweep"] == pytest.approx(18 * n_features * (100_000_000 + 196 * n_valid) * 1e-9)
    # So few images are all among the top ones of some feature, and each is opened once for all SAEs.
    assert guessed["visuals"] == pytest.approx(
        18 * (196 * n_train * (n_features * 2e-9 + 1e-6)) + n_train * (0.02 + 0.08)
    )
    n_tasks = sum(TRAIN.values())
    assert guessed["classes"] == pytest.approx(
        18 * (196 * n_tasks * (n_features * 2e-9 + 1e-6)) + n_tasks * (0.02 + 0.08)
    )
    # A test image is read, then edited in 2 roles by 4 ways, with its two controls, at 5 amounts: one block each time.
    # A train image is read, then each of up to 32 logits is followed back.
    n_test, n_passes = {"caltech": 50, "cub": 9, "flowers": 102}, 1 + 2 * 4 * 3 * 5
    speaks = {"caltech": 2, "cub": 3, "flowers": 32}
    assert guessed["steer"] == pytest.approx(
        1e-3 * sum(n_test[name] * n_passes + n * (1 + speaks[name]) for name, n in TRAIN.items())
    )
    assert guessed["sheets"] == 18 * 64 * 0.5
    assert guessed["probes"] == 21 and guessed["figures"] == 5 * 0.25

    total = (15 * 2 + 322 * 2 * 2) * image + 18 * weights * 4 + 18 * drawn
    total += sum(cost.disk for cost in costs["visuals"] + costs["classes"])
    result = CliRunner().invoke(app, ["run", str(clip), "--dry"])
    assert result.exit_code == 0, result.output
    *_, imagenet, tasks, sweep, visuals, sheets, classes, probes, steer, figures, said = result.stdout.splitlines()
    time = r"(< 1 min|\d+ (min|h|days))"
    for name, count, line in [
        ("imagenet", "1", imagenet), ("tasks", "6", tasks), ("sweep", "18", sweep), ("visuals", "18", visuals),
        ("sheets", "18", sheets), ("classes", "54", classes),
    ]:  # fmt: skip
        assert re.fullmatch(rf"{name} +{count} +[\d.]+ [kMG]B +{time} *", line), line
    assert re.fullmatch(rf"probes +90 +{time} *", probes)
    assert re.fullmatch(rf"steer +3 +{time} +decided once sweep is made", steer)
    assert re.fullmatch(rf"figures +5 +{time} +decided once steer is made", figures)
    assert re.fullmatch(
        rf"213 units to make, about {total / 1e9:.3g} GB, about {time} on \w+; 0 kept.",
        said,
    )
    assert not (clip.parents[1] / "runs").exists()


@pytest.mark.parametrize(
    ("gone", "why"),
    [
        ("IMAGENET", "38:3: stages.imagenet: '$IMAGENET': the variable $IMAGENET is not set"),
        ("data/cub200", "39:3: stages.tasks: {}/examples/../data/cub200: there is no such folder"),
    ],
)
def test_images_that_are_not_there_have_a_place(
    clip: Path, gone: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = clip.parents[1]
    if gone == "IMAGENET":
        monkeypatch.delenv(gone)
    else:
        (base / gone).rename(base / "away")
    result = CliRunner().invoke(app, ["run", str(clip), "--dry"])
    assert result.exit_code == 1
    assert result.stderr == f"{clip}:{why.format(base)}\n"


def test_every_variant_trains(tmp_path: Path) -> None:
    """The example with all variants, on a tiny backbone and tiny images, for few steps."""
    text = (EXAMPLES / VARIANTS).read_text()
    for word, smaller in {
        "saefw: 1": f"saefw: 1\nplugins: [{tiny.__file__}]",
        "digits-vit": "tiny-vit",
        "use: digits}": "use: tiny-set}",
        "1_150_000": "10_000",
        "../runs/variants": "runs",
    }.items():
        assert word in text
        text = text.replace(word, smaller)
    path = tmp_path / VARIANTS
    path.write_text(text)
    result = CliRunner().invoke(app, ["run", str(path)])
    assert result.exit_code == 0, result.output
    registry = read(path, Catalog())
    with duckdb.connect(str(tmp_path / "runs" / "saefw.duckdb"), read_only=True) as db:
        rows = db.execute(
            "SELECT p.variant, p.sae, l0, nmse, s.config->>'k' FROM pareto p JOIN sae s ON s.unit = p.sae"
        ).fetchall()
    assert len(rows) == 21 and {row[0] for row in rows} == set(registry.families["saes"])
    assert all(0 < l0 < 64 and math.isfinite(nmse) for _, _, l0, nmse, _ in rows)
    # What an archetypal one mixes its rows of is what was recorded.
    (sae, k) = next((row[1], row[4]) for row in rows if row[0] == "archetypal")
    config: Any = next(m.entry for m in registry.families["saes"]["archetypal"] if m.entry.content()["k"] == int(k))
    opened = open_sae(config, tmp_path / "runs" / "train" / sae)
    acts = Acts(next((tmp_path / "runs" / "record").iterdir()))
    x_nd = torch.cat([x_etd.flatten(0, 1) for _, x_etd in acts.read("patches", acts.of_split("train"))])
    assert torch.cdist(opened.get_buffer("points"), opened.normalise(x_nd)).amin(dim=1).max() < 1e-2


@pytest.mark.slow
@pytest.mark.skipif(
    "SAEFW_DATA" not in os.environ, reason="SAEFW_DATA, the folder of real weights and images, is not set"
)
def test_the_example_on_real_data_runs(tmp_path: Path) -> None:
    """All of it on few images, with small SAEs that train for a moment."""
    text = (EXAMPLES / REAL).read_text()
    for word, smaller in {
        "layout: classes, test: 0": "layout: classes, test: 0, limit: 100",
        "layout: splits": "layout: splits, limit: 505",
        "expansion: 8": "expansion: 2",
        "n_effect: 101": "n_effect: 50",
        "n_tokens: 1_000_000": "n_tokens: 40_000",
        "amounts: [0.5, 1, 2]": "amounts: [1, 2]\n    n_examples: 40",
    }.items():
        assert word in text
        text = text.replace(word, smaller)
    path = tmp_path / "examples" / REAL
    path.parent.mkdir()
    path.write_text(text)
    result = CliRunner().invoke(app, ["run", str(path)])
    assert result.exit_code == 0, result.output
    store = tmp_path / "runs" / "real_small"
    assert sorted(picture.stem for picture in store.glob("draw/*/*.png")) == [
        "before-after", "class-coverage", "confusion", "dose-response", "feature-grid", "pareto", "probe-grid",
    ]  # fmt: skip
    with duckdb.connect(str(store / "saefw.duckdb"), read_only=True) as db:
        counts = dict(db.execute("SELECT stage, count(*) FROM unit GROUP BY ALL").fetchall())
        assert counts == {
            "record": 3, "train": 5, "visuals": 10, "probe": 16, "faithfulness": 5, "gallery": 1, "steer": 1, "draw": 7,
        }  # fmt: skip
        (nmse,) = db.execute("SELECT max(nmse) FROM pareto").fetchall()[0]
        (accuracy,) = db.execute("SELECT max(value) FROM final WHERE name = 'test_accuracy'").fetchall()[0]
        assert nmse < 0.8 and accuracy > 0.3
        (n_edits,) = db.execute("SELECT count(*) FROM edit").fetchall()[0]
        # Images x roles x ways x kinds x amounts; the control of like features may have none that fires.
        assert 40 * 2 * 4 * 2 * 2 < n_edits <= 40 * 2 * 4 * 3 * 2
