"""The probe stage: fitted on train, chosen on valid, reported on test."""

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tiny import made
from torch import Tensor

from saefw.acts import Acts
from saefw.errors import UserError
from saefw.inputs import Token
from saefw.plugin import Dataset, DatasetConfig, Example, Pick, Probe, Run, Task, Unit
from saefw.run import Watcher
from saefw.stages.probe import ProbeStage, open_probe
from saefw.stages.readers import opened
from saefw.stages.record import Record
from saefw_linear import Linear, LinearProbe

SWEEP = {f"p{i}": Linear(lr=lr, steps=60) for i, lr in enumerate((1e-4, 1e-2, 1e-1))}


def recorded(path: Path, **families: Any) -> Run:
    """A desk on which the tiny set is recorded after blocks 1 and 2."""
    run = tiny.desk(path, {"probes": SWEEP, **families})
    made(run, "acts", Record(backbone="tiny", datasets=["tiny"], layers=[1, 2]))
    return run


class Wild(Linear):
    """A probe whose fit ran away."""

    use: Literal["wild"] = "wild"  # type: ignore[assignment]

    @classmethod
    def fit_many(cls, members: Any, task: Task, x_nd: Tensor, y_n: Tensor, done: Any) -> list[Probe]:
        (probe,) = super().fit_many(members, task, x_nd, y_n, done)
        probe.state_dict()["weight"][3] = torch.inf
        return [probe]


class Stop(Exception):
    """Stands for a kill."""


class Killer(Watcher):
    """Stops a run when it has kept its n-th unit."""

    def __init__(self, after: int) -> None:
        self.left = after

    def kept(self, unit: Unit, folder: Path, seconds: float) -> None:
        self.left -= 1
        if not self.left:
            raise Stop


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = recorded(tmp_path_factory.mktemp("probe"))
    made(run, "probes", ProbeStage(acts="acts", probes=list(SWEEP)))
    return run


def naive(run: Run, unit: Unit, split: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Examples, classes and logits of a split, in float64 numpy from the files alone."""
    acts = Acts(run.folder(unit.needs[0]))
    examples = acts.of_split(split)
    x_nd = np.concatenate([x.double().numpy()[:, 0] for _, x in acts.read("all", examples)])
    state = {name: value.double().numpy() for name, value in load_file(run.folder(unit) / "probe.safetensors").items()}
    logits = (x_nd - state["mean"]) / state["std"] @ state["weight"] + state["bias"]
    return examples, acts.labels[examples], logits


def test_metrics_are_those_of_numpy(run: Run) -> None:
    for unit in run.made_by("probes"):
        with run.db() as db:
            told = dict(db.execute("SELECT name, value FROM final WHERE unit = ?", [unit.address]).fetchall())
        for split in ("train", "valid", "test"):
            _, labels, logits = naive(run, unit, split)
            logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            assert told[f"{split}_accuracy"] == (logits.argmax(axis=1) == labels).mean()
            assert told[f"{split}_loss"] == pytest.approx(-logs[np.arange(len(labels)), labels].mean(), rel=1e-5)
            assert told[f"n_{split}"] == len(labels)


def test_tables_hold_the_test_images_and_the_settings(run: Run) -> None:
    unit = run.made_by("probes")[1]
    examples, _, logits = naive(run, unit, "test")
    with run.db() as db:
        rows = db.execute(
            "SELECT example, predicted, margin FROM prediction WHERE unit = ? ORDER BY example", [unit.address]
        ).fetchnumpy()
        (about,) = db.execute(
            "SELECT acts, variant, config->>'$.lr' FROM probe WHERE unit = ?", [unit.address]
        ).fetchall()
    assert rows["example"].tolist() == examples.tolist()
    assert rows["predicted"].tolist() == logits.argmax(axis=1).tolist()
    ordered = np.sort(logits, axis=1)
    np.testing.assert_allclose(rows["margin"], ordered[:, -1] - ordered[:, -2], rtol=1e-4)
    assert about == (unit.needs[0].address, "linear", "0.01")


def test_confidence_accuracy_of_classes_and_confusion_are_those_of_numpy(run: Run) -> None:
    for unit in run.made_by("probes"):
        _, labels, logits = naive(run, unit, "test")
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        sure, predicted = shares.max(axis=1), shares.argmax(axis=1)
        right = predicted == labels
        with run.db() as db:
            told = dict(db.execute("SELECT name, value FROM final WHERE unit = ?", [unit.address]).fetchall())
            asked = [
                db.execute(f"SELECT {columns} WHERE unit = ? ORDER BY ALL", [unit.address]).fetchall()
                for columns in (
                    "bin, n, confidence, accuracy FROM calibration",
                    "label, predicted, n FROM confusion",
                    "label, class, n, accuracy FROM class_accuracy",
                )
            ]
        bins, confusion, by_class = asked
        wanted = []
        for i in range(15):
            here = (sure > i / 15) & (sure <= (i + 1) / 15)
            if here.any():
                wanted.append((i, here.sum(), sure[here].mean(), right[here].mean()))
        np.testing.assert_allclose(bins, wanted, rtol=1e-5)
        ece = sum(n * abs(confidence - accuracy) for _, n, confidence, accuracy in wanted) / len(right)
        assert told["test_ece"] == pytest.approx(ece, rel=1e-4)
        pairs = sorted(zip(labels.tolist(), predicted.tolist(), strict=True))
        assert confusion == [(*pair, pairs.count(pair)) for pair in sorted(set(pairs))]
        assert by_class == [
            (i, name, (labels == i).sum(), right[labels == i].mean()) for i, name in enumerate(tiny.TinyImages.classes)
        ]


def test_the_interval_of_the_accuracy_is_that_of_the_binomial(run: Run) -> None:
    """Right or wrong drawn anew over n images is a binomial number, of which scipy knows the quantiles."""
    from scipy.stats import binom

    for unit in run.made_by("probes"):
        with run.db() as db:
            told = dict(db.execute("SELECT name, value FROM final WHERE unit = ?", [unit.address]).fetchall())
        n, share = told["n_test"], told["test_accuracy"]
        for name, quantile in (("low", 0.025), ("high", 0.975)):
            near = [binom.ppf(q, n, share) / n for q in (quantile - 0.01, quantile + 0.01)]
            assert near[0] <= told[f"test_accuracy_{name}"] <= near[1]


@pytest.mark.parametrize("token", ["mean", 0, 15])
def test_other_tokens_are_read(run: Run, token: Token) -> None:
    (unit,) = made(run, f"of {token}", ProbeStage(acts="acts", token=token, layer=1, probes=["p1"]))
    assert unit.needs[0].content["layer"] == 1 and unit.content["token"] == token
    acts = Acts(run.folder(unit.needs[0]))
    x_etd = torch.cat([x.double() for _, x in acts.read("all", acts.of_split("train"))])
    x_nd = (x_etd[:, 1:].mean(dim=1) if token == "mean" else x_etd[:, 1 + int(token)]).numpy()
    state = load_file(run.folder(unit) / "probe.safetensors")
    np.testing.assert_allclose(state["mean"], x_nd.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state["std"], x_nd.std(axis=0), rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "token", "message"),
    [
        ("patches", "cls", "holds patches alone; record it with tokens: all or cls"),
        ("cls", "mean", "holds [CLS] alone; record it with tokens: all or patches"),
        (3, "mean", "holds 3 patches of each image; record it with tokens: all or patches"),
        ("patches", "embedding", "holds patches alone; record it with tokens: all"),
    ],
)
def test_a_token_that_is_not_recorded_is_refused_when_it_is_planned(
    tmp_path: Path, tokens: Any, token: Token, message: str
) -> None:
    run = tiny.desk(tmp_path, {"probes": SWEEP})
    run.listed("acts", list(Record(backbone="tiny", datasets=["tiny"], layers=[2], tokens=tokens).units(run)))
    with pytest.raises(UserError) as caught:
        list(ProbeStage(acts="acts", probes=["p0"], token=token).units(run))
    assert str(caught.value) == f"probe: token: tiny on tiny, layer 2 {message}"


def test_the_last_layer_is_read_and_standardised_on_train(run: Run) -> None:
    unit = run.made_by("probes")[0]
    assert unit.needs[0].content["layer"] == 2
    acts = Acts(run.folder(unit.needs[0]))
    x_nd = np.concatenate([x.double().numpy()[:, 0] for _, x in acts.read("cls", acts.of_split("train"))])
    state = load_file(run.folder(unit) / "probe.safetensors")
    np.testing.assert_allclose(state["mean"], x_nd.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["std"], x_nd.std(axis=0), rtol=1e-5)


def test_the_sweep_is_fitted_as_one_by_one(run: Run) -> None:
    for unit in run.made_by("probes"):
        acts = Acts(run.folder(unit.needs[0]))
        train = acts.of_split("train")
        x_nd = torch.cat([x[:, 0] for _, x in acts.read("cls", train)])
        alone = unit.given["probe"].fit(
            Task(acts.d_model, tuple(acts.classes)), x_nd, torch.from_numpy(acts.labels[train])
        )
        state = load_file(run.folder(unit) / "probe.safetensors")
        assert isinstance(alone, LinearProbe)
        torch.testing.assert_close(state["weight"], alone.weight.data, rtol=1e-3, atol=1e-4)


def test_the_best_is_chosen_on_valid(run: Run) -> None:
    right = {}
    for unit in run.made_by("probes"):
        _, labels, logits = naive(run, unit, "valid")
        right[unit] = (logits.argmax(axis=1) == labels).mean()
    assert right[run.best("probes", Pick(highest="valid_accuracy"))] == max(right.values())


def test_the_view_shows_the_best_of_each_recording_also_of_two_with_one_name(tmp_path: Path) -> None:
    runs = [recorded(tmp_path), recorded(tmp_path, datasets={"tiny": tiny.TinySet(seed=5)})]
    units = [unit for run in runs for unit in made(run, "probes", ProbeStage(acts="acts", probes=list(SWEEP)))]
    with runs[1].db() as db:
        rows = db.execute("SELECT acts, backbone, dataset, layer, probe, value FROM best_probe").fetchall()
        measured = {
            unit: dict(db.execute("SELECT name, value FROM final WHERE unit = ?", [unit.address]).fetchall())
            for unit in units
        }
    wanted = []
    for acts in dict.fromkeys(unit.needs[0] for unit in units):
        of = [unit for unit in units if unit.needs[0] == acts]
        best = min(of, key=lambda unit: (-measured[unit]["valid_accuracy"], measured[unit]["valid_loss"]))
        wanted.append((acts.address, "tiny", "tiny", 2, best.address, measured[best]["valid_accuracy"]))
    assert len(wanted) == 2 and sorted(rows) == sorted(wanted)


def test_a_probe_is_reopened(run: Run) -> None:
    unit = run.made_by("probes")[2]
    acts = Acts(run.folder(unit.needs[0]))
    probe = opened(unit, run)
    _, x = next(acts.read("cls", acts.of_split("test")))
    _, _, logits = naive(run, unit, "test")
    np.testing.assert_allclose(probe(x[:, 0]).numpy(), logits, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in probe.parameters())


def test_a_damaged_probe_is_named(run: Run, tmp_path: Path) -> None:
    unit = run.made_by("probes")[0]
    (tmp_path / "probe.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError) as caught:
        open_probe(unit.given["probe"], tmp_path, Task(16, tiny.TinyImages.classes))
    assert str(caught.value) == (
        f"{tmp_path / 'probe.safetensors'}: is not the probe it should be; delete {tmp_path} to make it again (Error "
        "while deserializing header: header too small)"
    )


def test_names_and_order_do_not_change_the_addresses(run: Run) -> None:
    units = run.made_by("probes")
    run.listed("renamed", run.made_by("acts"))
    again = list(ProbeStage(acts="renamed", layer=2, probes=["p2", "p0", "p1", "p0"]).units(run))
    assert {unit.address for unit in again} == {unit.address for unit in units}
    assert len(again) == 3
    earlier = list(ProbeStage(acts="acts", layer=-2, probes=["p0"]).units(run))
    assert earlier[0].needs[0].content["layer"] == 1


def test_same_seed_same_bytes(run: Run, tmp_path: Path) -> None:
    other = recorded(tmp_path)
    for unit in made(other, "probes", ProbeStage(acts="acts", probes=list(SWEEP))):
        for name in ("probe.safetensors", "prediction.parquet", "metric.parquet"):
            assert (other.folder(unit) / name).read_bytes() == (run.folder(unit) / name).read_bytes()


def test_a_layer_that_was_not_recorded(run: Run) -> None:
    with pytest.raises(UserError, match=r"^probe: layer 0 is not recorded by 'acts' \(there are: 1, 2\)$"):
        list(ProbeStage(acts="acts", layer=0, probes=["p0"]).units(run))


def test_progress_is_told_in_steps(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []

    class Listener(Watcher):
        def progressed(self, stage: str, done: int, total: int, what: str) -> None:
            if stage == "probes":
                told.append((done, total, what))

    run = tiny.desk(tmp_path, {"probes": SWEEP}, watcher=Listener())
    made(run, "acts", Record(backbone="tiny", datasets=["tiny"], layers=[2]))
    made(run, "probes", ProbeStage(acts="acts", probes=["p0", "p1"]))
    assert told == [(i, 60, "steps") for i in range(1, 61)]


class Without(DatasetConfig):
    """The tiny set, its examples changed."""

    use: str = "without"  # type: ignore[assignment, unused-ignore]
    label: int | None = None
    split: str | None = None

    def build(self, base: Path) -> Dataset:
        return Images(self, tiny.TinySet().build(base))


class Images:
    """The images of Without."""

    def __init__(self, config: Without, inner: Dataset) -> None:
        self.config, self.inner, self.classes = config, inner, inner.classes

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Example:
        example = self.inner[index]
        if self.config.label is not None:
            example = example._replace(label=self.config.label)
        if example.split == self.config.split:
            example = example._replace(split="train")
        return example


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Without(label=-1), "tiny on tiny, layer 2: the images of the train split have no labels; a probe needs them"),
        (Without(split="valid"), "tiny on tiny, layer 2: no image is in the valid split, on which probes are chosen"),
        (Without(split="test"), "tiny on tiny, layer 2: no image is in the test split, on which probes are reported"),
    ],
)
def test_a_dataset_that_cannot_be_probed(tmp_path: Path, dataset: Without, message: str) -> None:
    run = recorded(tmp_path, datasets={"tiny": dataset})
    with pytest.raises(UserError, match=f"^{message}$"):
        made(run, "probes", ProbeStage(acts="acts", probes=["p0"]))


def test_logits_that_are_no_numbers_are_told_and_nothing_is_kept(tmp_path: Path) -> None:
    desk = tiny.desk(tmp_path, {"probes": {"wild": Wild()}})
    made(desk, "acts", Record(backbone="tiny", datasets=["tiny"], layers=[-1]))
    with pytest.raises(UserError) as caught:
        made(desk, "probes", ProbeStage(acts="acts", probes=["wild"]))
    assert re.fullmatch(
        r"wild on tiny on tiny, layer 2, train: the probe's logits are NaN or infinite for \d+ of \d+ images, "
        r"first for image \d+; lower its learning rate, or record tokens that are finite",
        str(caught.value),
    )


def test_stopped_while_probes_are_kept(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those left are the ones that were fitted together with those kept, not fitted anew in other company."""
    stage = ProbeStage(acts="acts", probes=list(SWEEP))
    broken = tiny.desk(tmp_path, {"probes": SWEEP}, watcher=Killer(3))  # two recordings come first
    made(broken, "acts", Record(backbone="tiny", datasets=["tiny"], layers=[1, 2]))
    with pytest.raises(Stop):
        made(broken, "probes", stage)
    monkeypatch.setattr(Linear, "fit_many", None)
    again = tiny.desk(tmp_path, {"probes": SWEEP})
    made(again, "acts", Record(backbone="tiny", datasets=["tiny"], layers=[1, 2]))
    units = made(again, "probes", stage)
    for unit in units:
        files = [
            {path.name: path.read_bytes() for path in desk.folder(unit).iterdir() if path.name != "made.json"}
            for desk in (run, again)
        ]
        assert files[0] == files[1]
