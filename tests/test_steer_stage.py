"""The steer stage on a tiny pipeline: what is chosen, what is written, what is refused."""

import json
import re
import shutil
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from pydantic import ValidationError
from tiny import made
from torch import Tensor

from saefw.acts import Acts
from saefw.controls import Drawn, balanced
from saefw.errors import UserError
from saefw.metrics import Nmse
from saefw.plugin import NotYet, Run
from saefw.run import Watcher
from saefw.stages import steer, steer_edits
from saefw.stages.probe import ProbeStage
from saefw.stages.readers import opened
from saefw.stages.record import Record
from saefw.stages.steer import SaePick, Steer
from saefw.stages.train import Train
from saefw.stages.visuals import Visuals
from saefw.steering import Edit, Steering
from saefw.trained import open_sae
from saefw_linear import Linear
from saefw_topk import TopK

SETTINGS: dict[str, Any] = {
    "saes": "sweep",
    "probes": "probes",
    "visuals": "visuals",
    "sae": SaePick(layer=-3),
    "amounts": [1.0, -1.0, 4.0],
    "n_features": 2,
    "n_effect": 20,
}


def pipeline(path: Path, watcher: Watcher | None = None) -> Run:
    """A desk on which all above steering is made."""
    entries: dict[str, Any] = {"topk": TopK(k=3, expansion=2, lr=0.003), "poor": TopK(k=1, expansion=2, lr=1e-5)}
    probes = {f"p{i}": Linear(lr=lr, steps=60) for i, lr in enumerate((1e-5, 3e-2))}
    run = tiny.desk(path, {"saes": entries, "probes": probes}, metrics={"nmse": Nmse}, watcher=watcher)
    made(run, "acts", Record(backbone="tiny", datasets=["tiny"], layers=[0, 1, 2]))
    made(run, "sweep", Train(acts="acts", saes=["poor", "topk"], layers=[0, 2], n_tokens=8192, batch_size=256))
    made(run, "visuals", Visuals(saes="sweep", acts="acts", top=4))
    made(run, "probes", ProbeStage(acts="acts", probes=list(probes)))
    made(run, "early", ProbeStage(acts="acts", layer=1, probes=list(probes)))
    return run


class Steered:
    """The unit under test, and the parts it was made of, opened again."""

    def __init__(self, run: Run) -> None:
        self.run = run
        (self.unit,) = made(run, "steer", Steer(**SETTINGS))
        sae, probe, _, _, recording = self.unit.needs
        self.acts = Acts(run.folder(recording))
        self.sae = open_sae(sae.given["sae"], run.folder(sae))
        self.probe = opened(probe, run)
        self.backbone = recording.given["backbone"].build("cpu")
        self.engine = Steering(self.backbone, self.sae, self.probe, 0, 2)
        self.test = self.acts.of_split("test")

    def sql(self, query: str) -> list[tuple[Any, ...]]:
        with self.run.db() as db:
            return db.execute(query.replace("$unit", f"'{self.unit.address}'")).fetchall()

    def tokens(self, examples: Any) -> Tensor:
        return torch.cat([x for _, x in self.acts.read("all", np.asarray(examples))])

    def features(self, kind: str, way: str = "") -> dict[int, set[int]]:
        """By target, the features of its edits, over all images."""
        rows = self.sql(
            "SELECT DISTINCT target, feature FROM edit JOIN edit_feature USING (unit, edit) "
            f"WHERE unit = $unit AND chosen_by = '{kind}' AND way = '{way or kind}'"
        )
        return {target: {f for t, f in rows if t == target} for target, _ in rows}

    def usable(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Tensor]:
        """Frequency and dense codes [e, p, s] of the train images, by numpy, and p99 as the tables have it."""
        train = self.acts.of_split("train")
        x_epd = self.tokens(train)[:, 1:]
        codes = self.sae.dense(x_epd.flatten(0, 1)).view(len(train), 16, -1)
        flat, looks = codes.flatten(0, 1).numpy(), self.unit.needs[2].address
        p99 = np.array([row[0] for row in self.sql(f"SELECT p99 FROM feature WHERE unit = '{looks}' ORDER BY feature")])
        for at_rank, values in zip(p99, flat.T, strict=True):
            wanted = np.quantile(values[values > 0], 0.99, method="lower") if (values > 0).any() else 0
            assert at_rank == pytest.approx(wanted, rel=1 / 128)
        return (flat > 0).mean(axis=0), p99, codes


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Steered:
    return Steered(pipeline(tmp_path_factory.mktemp("steer")))


def test_the_best_sae_of_the_layer_and_the_surest_of_the_best_probes_are_picked(steered: Steered) -> None:
    sae, probe, visuals, classes, recording = steered.unit.needs
    assert sae.given["sae"].k == 3 and recording.content["layer"] == 0
    assert probe.given["probe"].lr == 3e-2
    assert visuals == classes and visuals.needs == (sae, recording)


def test_every_image_role_kind_and_amount_is_one_edit(steered: Steered) -> None:
    n = len(steered.test)
    rows = steered.sql(
        "SELECT edit, example, role, way || chosen_by, dose, target, place, mode FROM edit WHERE unit = $unit "
        "ORDER BY edit"
    )
    assert [row[0] for row in rows] == list(range(n * 2 * 4 * 3 * 3))
    assert len({row[1:5] for row in rows}) == len(rows)
    assert {row[1] for row in rows} == set(steered.test.tolist())
    assert {row[6:] for row in rows} == {("patches", "set")}
    labels = steered.acts.labels
    assert all((row[5] == labels[row[1]]) == (row[2] == "own class") for row in rows)
    other = [row[5] for row in rows if row[2:5] == ("other class", "effecteffect", 1.0)]
    assert np.ptp(np.bincount(other)) <= 1
    n_logits = steered.sql("SELECT count(*) FROM edit_logit WHERE unit = $unit")[0][0]
    assert n_logits == len(rows) * 3
    with_features = steered.sql(
        "SELECT way, chosen_by = way, count(*) FROM edit JOIN edit_feature USING (unit, edit) WHERE unit = $unit "
        "GROUP BY ALL"
    )
    f = {"effect": 2, "mass": 2, "ap": 2, "single": 1}
    assert {row[:2]: row[2] for row in with_features} == {
        (way, chosen): n * 2 * 3 * f[way] for way in f for chosen in (True, False)
    }


def test_features_by_effect_are_those_of_finite_differences_on_train(steered: Steered) -> None:
    frequency, p99, _ = steered.usable()
    reading = steered.engine.reading(steered.tokens(steered.acts.of_split("train")))
    assert len(reading.tokens_btd) > SETTINGS["n_effect"], "or the sample would not be one"
    told = steered.features("effect")
    for target, features in told.items():
        # The sample of train images is not known here, so look at the mean over all: its best must be among the best.
        shifts = []
        for feature in range(steered.sae.d_sae):
            up = steered.engine.edit(reading, [Edit(feature, "add", float(1e-2 * p99[feature]))])
            usable = 0 < frequency[feature] < 0.5
            shifts.append(float((up - reading.logits_bc)[:, target].mean()) if usable else -np.inf)
        ranked = np.argsort(shifts)[::-1]
        assert features <= set(ranked[:5].tolist()) and len(features) == 2


def test_features_by_mass_are_those_of_numpy_on_train(steered: Steered) -> None:
    frequency, _, codes = steered.usable()
    train = steered.acts.of_split("train")
    labels = steered.acts.labels[train]
    mass = codes.double().sum(dim=1).numpy()
    fires = (codes > 0).any(dim=1).numpy()
    for target, features in steered.features("mass").items():
        share = mass[labels == target].sum(axis=0) / np.maximum(mass.sum(axis=0), 1e-12)
        score = share * fires[labels == target].mean(axis=0)
        score[(frequency == 0) | (frequency >= 0.5)] = -1
        assert features == set(np.argsort(-score, kind="stable")[:2].tolist())


def test_the_logits_follow_from_the_tables_alone(steered: Steered) -> None:
    """One image at a time, the features and amounts of the tables give the logits of the tables."""
    _, p99, _ = steered.usable()
    rows = steered.sql(
        "SELECT edit, any_value(example), list(feature), list(f.amount) "
        "FROM edit JOIN edit_feature f USING (unit, edit) "
        "WHERE unit = $unit AND chosen_by = way GROUP BY edit ORDER BY edit"
    )
    for edit, example, features, amounts in rows[::17]:
        reading = steered.engine.reading(steered.tokens([example]))
        edits = [Edit(f, "set", a * float(p99[f])) for f, a in zip(features, amounts, strict=True)]
        logits = steered.engine.edit(reading, edits)[0]
        told = steered.sql(f"SELECT before, after FROM edit_logit WHERE unit = $unit AND edit = {edit} ORDER BY label")
        np.testing.assert_allclose([row[0] for row in told], reading.logits_bc[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose([row[1] for row in told], logits, rtol=1e-3, atol=1e-3)


def test_controls_share_norm_image_and_target_with_the_edit(steered: Steered) -> None:
    pairs = steered.sql(
        "SELECT e.norm, c.norm, c.chosen_by FROM edit e JOIN edit c USING (unit, example, role, dose, target, way) "
        "WHERE unit = $unit AND e.chosen_by = e.way AND c.chosen_by != c.way"
    )
    assert len(pairs) == len(steered.test) * 2 * 4 * 3 * 2
    for norm, control, kind in pairs:
        assert norm > 0
        assert control == pytest.approx(norm, rel=1e-4), kind
    for way in ("effect", "mass", "ap", "single"):
        like, chosen = steered.features("like features", way), steered.features(way)
        assert all(not like[target] & chosen[target] for target in chosen)


@pytest.mark.parametrize(("mode", "amounts"), [("scale", [0.0, 3.0]), ("set", [0.0, 1.0]), ("set", [0.0])])
def test_controls_have_the_norm_of_the_edit_where_only_what_fires_changes(
    steered: Steered, mode: str, amounts: list[float]
) -> None:
    run = steered.run
    stage = Steer(**{**SETTINGS, "mode": mode, "amounts": amounts, "max_frequency": 0.4, "n_features": 1})
    redrawn: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        firing = Drawn.firing

        def counted(self: Drawn, example: int, target: int, fires_s: Any) -> Any:
            redrawn.append(example)
            return firing(self, example, target, fires_s)

        patch.setattr(Drawn, "firing", counted)
        (unit,) = made(run, "off", stage)
    assert redrawn, "or this tests nothing"
    with run.db() as db:
        pairs = db.execute(
            "SELECT e.norm, c.norm FROM edit e JOIN edit c USING (unit, example, role, dose, target, way) "
            "WHERE unit = ? AND e.chosen_by = 'effect' AND c.chosen_by IN ('like features', 'random directions')",
            [unit.address],
        ).fetchall()
        told = dict(db.execute("SELECT name, value FROM final WHERE unit = ?", [unit.address]).fetchall())
    assert len(pairs) == len(steered.test) * 2 * len(amounts) * 2 and max(norm for norm, _ in pairs) > 0
    for norm, control in pairs:
        assert control == pytest.approx(norm, rel=1e-4)
    assert told["n_controls_left_out"] == 0


def test_a_control_that_nothing_can_give_a_norm_is_left_out_and_counted(steered: Steered) -> None:
    """An SAE of which one feature fires on [CLS]: switching that one off, there is nothing to compare with."""
    run = steered.run
    cls = Train(acts="acts", saes=["poor"], layers=[2], tokens="cls", n_tokens=8192, batch_size=256)
    made(run, "poor sweep", cls)
    made(run, "poor looks", Visuals(saes="poor sweep", acts="acts", top=4))
    settings = {"saes": "poor sweep", "visuals": "poor looks", "place": "cls", "max_frequency": 1.0, "n_features": 1}
    (unit,) = made(run, "poor", Steer(**{**SETTINGS, **settings, "sae": SaePick(), "mode": "scale", "amounts": [0.0]}))
    with run.db() as db:
        rows = db.execute(
            "SELECT e.norm, c.norm FROM edit e LEFT JOIN edit c ON c.unit = e.unit AND c.example = e.example "
            "AND c.role = e.role AND c.way = e.way AND c.chosen_by = 'like features' "
            "WHERE e.unit = ? AND e.chosen_by = e.way",
            [unit.address],
        ).fetchall()
        told = dict(db.execute("SELECT name, value FROM final WHERE unit = ?", [unit.address]).fetchall())
        ((n_edits,),) = db.execute("SELECT count(*) FROM edit WHERE unit = ?", [unit.address]).fetchall()
        ((n_of_logits,),) = db.execute(
            "SELECT count(DISTINCT edit) FROM edit_logit WHERE unit = ?", [unit.address]
        ).fetchall()
    missing = [norm for norm, control in rows if control is None]
    assert missing and min(missing) > 0
    assert all(control == 0 for norm, control in rows if norm == 0)
    assert told["n_controls_left_out"] == len(missing)
    assert told["n_edits"] == n_edits == n_of_logits == len(rows) * 3 - len(missing)


def test_metrics_are_those_of_sql(steered: Steered) -> None:
    told = dict(steered.sql("SELECT name, value FROM final WHERE unit = $unit"))
    shifts = steered.sql(
        "SELECT way, chosen_by, avg(l.after - l.before) FROM edit e JOIN edit_logit l USING (unit, edit) "
        "WHERE unit = $unit AND label = target AND role = 'other class' AND dose = 4 GROUP BY ALL"
    )
    for way, kind, shift in shifts:
        name = way if kind == way else f"{way}_{kind.replace(' ', '_')}"
        assert told[f"shift_{name}"] == pytest.approx(shift, abs=1e-5)
    assert told["n_images"] == len(steered.test) and told["n_edits"] == len(steered.test) * 72
    assert 0 <= told["classes_above_controls_effect"] <= 3 and -1 <= told["rank_correlation"] <= 1
    controls = told["shift_effect_like_features"], told["shift_effect_random_directions"]
    assert told["shift_effect"] > max(controls)


def test_what_is_told_of_an_edit_follows_from_its_logits(steered: Steered) -> None:
    """With three classes every logit is stored, so the columns of `edit` and the rows of `outcome` are told again."""
    rows = steered.sql(
        "SELECT any_value(e.target), any_value(e.before), any_value(e.after), any_value(others), any_value(spread), "
        "list(l.before ORDER BY label), list(l.after ORDER BY label) FROM edit e JOIN edit_logit l USING (unit, edit) "
        "WHERE unit = $unit GROUP BY edit"
    )
    for target, before, after, others, spread, was, became in rows:
        x, y = torch.tensor(was), torch.tensor(became)
        rest = torch.cat([(y - x)[:target], (y - x)[target + 1 :]])
        wanted = [x.softmax(0)[target], y.softmax(0)[target], rest.mean(), rest.abs().mean()]
        np.testing.assert_allclose([before, after, others, spread], wanted, rtol=1e-3, atol=1e-4)
    differ = steered.sql(
        "WITH told AS (SELECT way, target, avg(spread) AS mean, count(*) AS n FROM edit WHERE unit = $unit "
        "AND role = 'other class' AND chosen_by = way AND dose = 4 GROUP BY ALL) SELECT o.mean - t.mean, o.n - t.n "
        "FROM outcome o JOIN told t USING (way, target) WHERE o.unit = $unit AND role = 'other class' AND dose = 4 "
        "AND chosen_by = way AND against IS NULL AND measure = 'spread'"
    )
    assert len(differ) == 12
    np.testing.assert_allclose(np.array(differ, dtype=float), 0, atol=1e-5)


def test_labels_of_test_images_do_not_reach_the_choice(
    steered: Steered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images, those of test under other labels: the same features of every class, in the same order."""
    plain = tiny.TinyImages.__getitem__

    def mislabelled(self: tiny.TinyImages, index: int) -> Any:
        example = plain(self, index)
        return example if example.split != "test" else example._replace(label=(example.label + 1) % 3)

    monkeypatch.setattr(tiny.TinyImages, "__getitem__", mislabelled)
    other = Steered(pipeline(tmp_path))
    assert not np.array_equal(other.acts.labels[other.test], steered.acts.labels[steered.test])
    query = "SELECT way, label, rank, feature, score, predicted FROM choice WHERE unit = $unit ORDER BY ALL"
    assert other.sql(query) == steered.sql(query) and len(steered.sql(query)) > 4 * 3 * 2


def test_the_first_example_is_an_edit_of_the_tables(steered: Steered) -> None:
    shown = json.loads((steered.run.folder(steered.unit) / "first.json").read_text())
    ((example, role, kind, amount),) = steered.sql(
        f"SELECT example, role, chosen_by, dose FROM edit WHERE unit = $unit AND edit = {shown['edit']}"
    )
    assert (shown["example"], role, kind, shown["amount"]) == (example, "other class", "effect", amount)
    assert shown["key"] == steered.acts.keys[example]
    assert shown["from"] == steered.acts.classes[steered.acts.labels[example]]
    assert max(shown["before"], key=shown["before"].__getitem__) == shown["from"]
    assert max(shown["after"], key=shown["after"].__getitem__) == shown["to"] != shown["from"]
    logits = steered.sql(f"SELECT after FROM edit_logit WHERE edit = {shown['edit']} AND unit = $unit ORDER BY label")
    wanted = torch.tensor([row[0] for row in logits]).softmax(dim=0)
    np.testing.assert_allclose(list(shown["after"].values()), wanted, atol=1e-5)
    features = steered.sql(f"SELECT feature FROM edit_feature WHERE unit = $unit AND edit = {shown['edit']}")
    assert sorted(shown["features"]) == sorted(row[0] for row in features)


def tables(folder: Path, order: str = "ALL") -> dict[str, dict[str, Any]]:
    with duckdb.connect() as db:
        return {
            name: db.execute(f"SELECT * EXCLUDE (unit) FROM '{folder}/{name}.parquet' ORDER BY {order}").fetchnumpy()
            for name in ("edit", "edit_feature", "edit_logit", "choice")
        }


def copied(steered: Steered, path: Path) -> Path:
    """A folder in which all above steering is made already."""
    shutil.copytree(steered.run.store.root, path / "runs", ignore=shutil.ignore_patterns("steer"))
    return path


class Stop(Exception):
    """What ends a run in the middle."""


class Stopper(Watcher):
    """Ends the run when so many test images are done."""

    def __init__(self) -> None:
        self.after: int | None = None
        self.told: list[tuple[int, str]] = []

    def progressed(self, stage: str, done: int, total: int, what: str) -> None:
        self.told.append((done, what))
        if what == "images" and stage == "steer" and done == self.after:
            raise Stop


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_was_stopped_goes_on_and_batches_do_not_matter(
    steered: Steered, tmp_path: Path, damaged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stopper = Stopper()
    run = pipeline(copied(steered, tmp_path), stopper)
    stopper.after = 10
    with pytest.raises(Stop):
        made(run, "steer", Steer(**SETTINGS, batch_size=5))
    stopper.after, stopper.told = None, []
    parts = sorted(run.store.begin(run.made_by("steer")[0]).glob("part-*"))
    assert len(parts) == 2
    if damaged:
        parts[1].write_bytes(parts[1].read_bytes()[:-1] + bytes([parts[1].read_bytes()[-1] ^ 1]))
    edited: list[slice] = []
    with pytest.MonkeyPatch.context() as patch:
        edit = steer_edits.edited

        def counted(engine: Any, plan: Any, acts: Any, part: slice, device: str) -> Any:
            edited.append(part)
            return edit(engine, plan, acts, part, device)

        patch.setattr(steer, "edited", counted)
        (unit,) = made(run, "steer", Steer(**SETTINGS, batch_size=5))
    told = f"{parts[1]}: damaged; it is not used, and what it held is made again"
    assert caplog.messages == ([told] if damaged else [])
    assert edited == [*([slice(5, 10)] if damaged else []), slice(10, 12)], "images already done were done again"
    assert "train images" not in {what for _, what in stopper.told}, "the gradient was taken again"
    assert unit == steered.unit
    assert not list(run.folder(unit).glob("part-*"))
    ours, theirs = tables(run.folder(unit)), tables(steered.run.folder(steered.unit))
    for name, columns in theirs.items():
        for column, values in columns.items():
            if values.dtype.kind == "f":
                np.testing.assert_allclose(ours[name][column], values, rtol=1e-3, atol=1e-3)
            else:
                assert np.array_equal(ours[name][column], values), (name, column)


def test_same_seed_same_bytes_and_another_seed_other_controls(steered: Steered, tmp_path: Path) -> None:
    twin = Steered(pipeline(copied(steered, tmp_path)))
    for name in (
        "edit.parquet",
        "edit_feature.parquet",
        "edit_logit.parquet",
        "outcome.parquet",
        "metric.parquet",
        "first.json",
    ):
        one, two = steered.run.folder(steered.unit) / name, twin.run.folder(twin.unit) / name
        assert one.read_bytes() == two.read_bytes(), name
    (other,) = made(twin.run, "other", Steer(**SETTINGS, seed=1))
    assert other != twin.unit
    before, after = tables(twin.run.folder(twin.unit)), tables(twin.run.folder(other))
    assert not np.array_equal(before["edit_feature"]["feature"], after["edit_feature"]["feature"])


def test_a_probe_before_the_end_is_read_there(steered: Steered) -> None:
    (unit,) = made(steered.run, "half", Steer(**{**SETTINGS, "probes": "early", "n_examples": 6, "mode": "add"}))
    probe = opened(unit.needs[1], steered.run)
    table = tables(steered.run.folder(unit), "1, 2")
    edits, logits = table["edit"], table["edit_logit"]
    assert sorted(steered.acts.labels[np.unique(edits["example"])]) == [0, 0, 1, 1, 2, 2]
    tokens = steered.tokens([edits["example"][0]])
    wanted = probe(steered.backbone.blocks[1](tokens)[:, 0])[0]
    assert edits["edit"][0] == 0
    np.testing.assert_allclose(logits["before"][logits["edit"] == 0], wanted, rtol=1e-4, atol=1e-4)
    assert len(logits["label"]) == len(edits["edit"]) * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sae": SaePick(layer=-1)},
            "steer: the probe reads [CLS] after block 2, which patches edited after block 2 cannot reach; "
            "choose an SAE of layer 1 or lower, or a probe with token: mean of layer 2",
        ),
        ({"sae": SaePick(layer=1)}, "steer: sae: 'sweep' has no SAE of layer 1 (there are: 0, 2)"),
        (
            {"place": "cls"},
            "steer: place: topk, tiny on tiny, layer 0 was trained on patches, but the edit is on cls; "
            "choose another SAE, or say allow_off_distribution: true",
        ),
        ({"patches": [0, 16]}, "steer: patches: there is no patch 16 (there are: 0 to 15)"),
        ({"sae": SaePick(layer=0, below={"nmse": 0})}, "sweep: none of 2 has nmse <= 0 (the least nmse is LEAST)"),
    ],
)
def test_what_does_not_fit_together_is_refused(steered: Steered, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        list(Steer(**{**SETTINGS, **settings}).units(steered.run))
    assert re.sub(r"is [\d.]+\)", "is LEAST)", str(caught.value)) == message


def test_tables_over_other_tokens_are_refused(steered: Steered) -> None:
    run = steered.run
    run.listed("looks", list(Visuals(saes="sweep", acts="acts", top=4, tokens="cls").units(run)))
    with pytest.raises(UserError) as error:
        list(Steer(**{**SETTINGS, "visuals": "looks"}).units(run))
    assert str(error.value) == (
        "steer: 'looks' has no tables of topk, tiny on tiny, layer 0 over the patches of the images of tiny on tiny, "
        "layer 2"
    )


def test_tables_over_other_images_than_train_are_refused(steered: Steered) -> None:
    """Those that say p99 of the features as well as those that say their classes."""
    run = steered.run
    run.listed("looked on test", list(Visuals(saes="sweep", acts="acts", top=4, split="test").units(run)))
    for settings in (
        {"visuals": "looked on test"},
        {"visuals": "looked on test", "classes": "visuals"},
        {"classes": "looked on test"},
    ):
        with pytest.raises(UserError) as caught:
            list(Steer(**{**SETTINGS, **settings}).units(run))
        assert str(caught.value) == (
            "steer: 'looked on test' looked at the test split, but features are chosen on train alone"
        )


def test_off_distribution_is_allowed_when_it_is_said(steered: Steered) -> None:
    stage = Steer(**{**SETTINGS, "place": "cls", "allow_off_distribution": True, "n_examples": 3})
    (unit,) = made(steered.run, "cls", stage)
    assert set(tables(steered.run.folder(unit))["edit"]["place"]) == {"cls"}


def test_an_sae_of_cls_is_edited_on_cls(steered: Steered) -> None:
    run = steered.run
    cls = Train(acts="acts", saes=["topk"], layers=[2], tokens="cls", n_tokens=8192, batch_size=256)
    (sae,) = made(run, "sweep of cls", cls)
    (looks,) = made(run, "looks at cls", Visuals(saes="sweep of cls", acts="acts", top=4))
    settings = {"saes": "sweep of cls", "visuals": "looks at cls", "place": "cls", "max_frequency": 1.0}
    (unit,) = made(run, "steer cls", Steer(**{**SETTINGS, **settings, "sae": SaePick()}))
    assert unit.needs[0] == sae and unit.needs[2:4] == (looks, looks)
    edits = tables(run.folder(unit), "1, 2")
    with run.db() as db:
        p99 = dict(db.execute("SELECT feature, p99 FROM feature WHERE unit = ?", [looks.address]).fetchall())
    recording = Acts(run.folder(sae.needs[0]))
    trained = open_sae(sae.given["sae"], run.folder(sae))
    probe = opened(unit.needs[1], run)
    # Block 2 is the last and the probe reads what it puts out, so an edit of [CLS] there is one product by hand.
    rows = edits["edit"]["edit"][(edits["edit"]["chosen_by"] == "effect") & (edits["edit"]["dose"] == 4)]
    for edit in rows[::7]:
        here = edits["edit_feature"]["edit"] == edit
        features = edits["edit_feature"]["feature"][here]
        ((_, x_11d),) = recording.read("cls", edits["edit"]["example"][edits["edit"]["edit"] == edit])
        before = trained.dense(x_11d[0])[0, features]
        change = torch.tensor([4 * p99[f] for f in features.tolist()]) - before
        wanted = probe(x_11d[0] + trained.scale * (change @ trained.W_dec[features]))[0]
        told = edits["edit_logit"]["after"][edits["edit_logit"]["edit"] == edit]
        np.testing.assert_allclose(told, wanted, rtol=1e-3, atol=1e-3)


def test_patches_of_the_last_block_are_read_by_the_mean_of_patches(steered: Steered) -> None:
    """Where [CLS] cannot be reached: one product by hand, as no block follows."""
    run = steered.run
    made(run, "means", ProbeStage(acts="acts", probes=["p1"], token="mean"))
    settings = {"probes": "means", "sae": SaePick(layer=-1), "n_examples": 6, "mode": "add"}
    (unit,) = made(run, "steer by mean", Steer(**{**SETTINGS, **settings}))
    sae, probe, looks, _, recording = unit.needs
    trained, reader, acts = open_sae(sae.given["sae"], run.folder(sae)), opened(probe, run), Acts(run.folder(recording))
    assert probe.content["token"] == "mean" and acts.layer == probe.needs[0].content["layer"] == 2
    with run.db() as db:
        p99 = dict(db.execute("SELECT feature, p99 FROM feature WHERE unit = ?", [looks.address]).fetchall())
    edits = tables(run.folder(unit), "1, 2")
    rows = edits["edit"]["edit"][(edits["edit"]["chosen_by"] == "effect") & (edits["edit"]["dose"] == 4)]
    for edit in rows[::5]:
        features = edits["edit_feature"]["feature"][edits["edit_feature"]["edit"] == edit]
        ((_, x_1pd),) = acts.read("patches", edits["edit"]["example"][edits["edit"]["edit"] == edit])
        change = torch.tensor([4 * p99[f] for f in features.tolist()]) @ trained.W_dec[features]
        wanted = reader(x_1pd.mean(dim=1) + trained.scale * change)[0]
        told = edits["edit_logit"]["after"][edits["edit_logit"]["edit"] == edit]
        np.testing.assert_allclose(told, wanted, rtol=1e-3, atol=1e-3)


def test_chosen_patches_are_edited_by_raw_amounts(steered: Steered) -> None:
    run, patches, own = steered.run, [9, 2, 3], copy(steered)
    (own.unit,) = made(run, "some", Steer(**{**SETTINGS, "patches": patches, "raw": True, "amounts": [0.5, 2.0]}))
    told = tables(run.folder(own.unit))
    edit, logit, chosen = told["edit"], told["edit_logit"], told["edit_feature"]
    wanted = Edit(0, "set", 2.0, patches)
    for row in np.flatnonzero((edit["chosen_by"] == "effect") & (edit["dose"] == 2))[::7]:
        reading = steered.engine.reading(own.tokens([edit["example"][row]]))
        features = chosen["feature"][chosen["edit"] == edit["edit"][row]]
        after = steered.engine.edit(reading, [wanted._replace(feature=int(feature)) for feature in features])[0]
        np.testing.assert_allclose(logit["after"][logit["edit"] == edit["edit"][row]], after, rtol=1e-4, atol=1e-4)
    # Both controls have its norm, on these patches alone; what is predicted is the slope there.
    norm = {kind: edit["norm"][edit["chosen_by"] == kind] for kind in ("like features", "random directions")}
    of = edit["norm"][edit["chosen_by"] == edit["way"]]
    np.testing.assert_allclose(norm["random directions"], of, rtol=1e-4)
    np.testing.assert_allclose(norm["like features"], of, rtol=1e-4)
    ((feature, label, predicted),) = own.sql("SELECT feature, label, predicted FROM choice WHERE unit = $unit LIMIT 1")
    train = own.acts.of_split("train")[balanced(own.acts.labels[own.acts.of_split("train")], SETTINGS["n_effect"], 0)]
    backbone, sae, probe = deepcopy(steered.backbone), deepcopy(steered.sae), deepcopy(steered.probe)
    wide = Steering(backbone.double(), sae.double(), probe.double(), 0, 2)
    reading = wide.reading(own.tokens(train).double())
    up, down = (wide.edit(reading, [Edit(feature, "add", step, patches)])[:, label] for step in (1e-5, -1e-5))
    p99 = own.sql(f"SELECT p99 FROM feature WHERE unit = '{own.unit.needs[2].address}' AND feature = {feature}")[0][0]
    assert predicted == pytest.approx(float((up - down).mean() / 2e-5) * p99, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patches": [3, 3]}, "a patch is named once (got 3 twice)"),
        ({"patches": [3], "place": "cls"}, "patches are edited with place: patches (got place: cls)"),
        ({"raw": True, "mode": "scale"}, "amounts have no unit with mode: scale; leave out raw"),
    ],
)
def test_patches_and_units_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Steer(**{**SETTINGS, **settings})
    assert message in str(caught.value)


def test_more_features_than_there_are(steered: Steered) -> None:
    stage = Steer(**{**SETTINGS, "n_features": 30})
    with pytest.raises(UserError, match=r"an edit of 30 and its control need 60$"):
        made(steered.run, "greedy", stage)


def test_it_cannot_be_planned_before_the_sweep_is_made(tmp_path: Path) -> None:
    run = tiny.desk(tmp_path, {"saes": {"topk": TopK(k=3)}, "probes": {"p": Linear()}})
    run.listed("acts", list(Record(backbone="tiny", datasets=["tiny"], layers=[0, 2]).units(run)))
    run.listed("sweep", list(Train(acts="acts", saes=["topk"], layers=[0]).units(run)))
    run.listed("probes", list(ProbeStage(acts="acts", probes=["p"]).units(run)))
    with pytest.raises(NotYet, match="decided once sweep is made"):
        list(Steer(**SETTINGS).units(run))


def test_names_do_not_change_the_address(steered: Steered) -> None:
    run = steered.run
    for name in ("sweep", "probes", "visuals"):
        run.listed(f"my {name}", run.made_by(name))
    renamed = {**SETTINGS, "saes": "my sweep", "probes": "my probes", "visuals": "my visuals", "batch_size": 3}
    (unit,) = Steer(**renamed).units(run)
    assert unit.address == steered.unit.address


def test_what_is_allowed_does_not_change_the_address(steered: Steered) -> None:
    (unit,) = Steer(**SETTINGS, allow_off_distribution=True).units(steered.run)
    assert unit.address == steered.unit.address


def test_an_image_that_is_gone_is_named(steered: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: tiny.TinyImages, index: int) -> Image.Image:
        raise FileNotFoundError("no such file")

    monkeypatch.setattr(tiny.TinyImages, "image", gone)
    with pytest.raises(UserError) as caught:
        made(steered.run, "again", Steer(**{**SETTINGS, "seed": 3, "amounts": [4.0]}))
    assert re.fullmatch(r"image 'tiny-\d{3}' cannot be read \(it is missing\)", str(caught.value))
