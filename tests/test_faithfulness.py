"""What probes still read of what SAEs reconstruct: against numpy and the blocks themselves."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import made
from torch import Tensor

from saefw.acts import Acts
from saefw.errors import UserError
from saefw.metrics import Nmse
from saefw.plugin import NotYet, Pick, Run, Unit
from saefw.run import Watcher
from saefw.stages import faithfulness
from saefw.stages.faithfulness import Faithfulness, recovered
from saefw.stages.gallery import Gallery
from saefw.stages.probe import ProbeStage
from saefw.stages.readers import opened
from saefw.stages.record import Record
from saefw.stages.steer import Steer
from saefw.stages.train import Train
from saefw.stages.visuals import Visuals
from saefw.steering import Steering
from saefw.trained import open_sae
from saefw_linear import Linear
from saefw_topk import TopK

SETTINGS: dict[str, Any] = {"saes": "sweep", "probes": "probes", "acts": "acts"}


def pipeline(path: Path, watcher: Watcher | None = None) -> Run:
    """A desk on which SAEs of two layers, of patches and of [CLS], and probes of two kinds are made."""
    saes = {"good": TopK(k=6, expansion=4, lr=0.003), "poor": TopK(k=1, expansion=2, lr=1e-5)}
    run = tiny.desk(path, {"saes": saes, "probes": {"p": Linear(steps=60)}}, {"nmse": Nmse}, watcher)
    made(run, "acts", Record(backbone="tiny", datasets=["tiny"], layers=[0, 2]))
    made(run, "sweep", Train(acts="acts", saes=["good", "poor"], layers=[0, 2], n_tokens=1024, batch_size=128))
    made(run, "of cls", Train(acts="acts", saes=["good"], layers=[2], tokens="cls", n_tokens=128, batch_size=32))
    made(run, "probes", ProbeStage(acts="acts", probes=["p"]))
    made(run, "means", ProbeStage(acts="acts", probes=["p"], token="mean"))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return pipeline(tmp_path_factory.mktemp("faithfulness"))


def rows(run: Run, unit: Unit) -> dict[str, dict[str, Any]]:
    with run.db() as db:
        found = db.execute("SELECT * FROM faithfulness WHERE unit = ?", [unit.address])
        names = [about[0] for about in found.description or ()]
        told = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    return {row["measure"]: row for row in told}


def naive(run: Run, unit: Unit, split: str) -> dict[str, list[float]]:
    """Accuracy and cross-entropy of clean, reconstructed and ablated images, one image at a time."""
    sae, probe, recording = unit.needs
    acts, place = Acts(run.folder(recording)), sae.content["tokens"]
    opened_sae, reader = open_sae(sae.given["sae"], run.folder(sae)), opened(probe, run)
    backbone = recording.given["backbone"].build("cpu")
    where = slice(0, 1) if place == "cls" else slice(1, None)
    train = torch.cat([x for _, x in acts.read("all", acts.of_split("train"))])[:, where]
    mean_d = train.double().flatten(0, 1).mean(dim=0).float()

    def logits(tokens_td: Tensor) -> Tensor:
        for block in backbone.blocks[acts.layer + 1 : probe.needs[0].content["layer"] + 1]:
            tokens_td = block(tokens_td[None])[0]
        read_d = tokens_td[1:].mean(dim=0) if probe.content["token"] == "mean" else tokens_td[0]
        out: Tensor = reader(read_d[None])[0]
        return out.double()

    found: dict[str, list[list[float]]] = {"accuracy": [], "cross_entropy": []}
    for example in acts.of_split(split):
        ((_, x_1td),) = acts.read("all", np.array([example]))
        label, versions = acts.labels[example], [x_1td[0].clone() for _ in range(3)]
        codes_ns = opened_sae.dense(x_1td[0, where])
        w = opened_sae
        versions[1][where] = (codes_ns @ w.W_dec + w.b_dec) * w.scale + w.mean
        versions[2][where] = mean_d
        out = [logits(version) for version in versions]
        found["accuracy"].append([float(x.argmax() == label) for x in out])
        found["cross_entropy"].append([float(x.logsumexp(0) - x[label]) for x in out])
    return {name: np.mean(values, axis=0).tolist() for name, values in found.items()}


@pytest.mark.parametrize(
    ("settings", "layers", "split"),
    [({}, {0}, "test"), ({"probes": "means", "split": "valid"}, {0, 2}, "valid"), ({"saes": "of cls"}, {2}, "test")],
)
def test_it_is_what_one_finds_image_by_image(run: Run, settings: dict[str, Any], layers: set[int], split: str) -> None:
    """Patches read by [CLS] of a later block, by the mean of patches also of their own block, [CLS] by itself."""
    units = made(run, f"faithful {settings}", Faithfulness(**{**SETTINGS, **settings}, batch_size=7))
    assert {unit.needs[2].content["layer"] for unit in units} == layers
    for unit in units:
        sae, probe, recording = unit.needs
        wanted, told = naive(run, unit, split), rows(run, unit)
        with run.db() as db:
            logged = dict(db.execute("SELECT name, value FROM final WHERE unit = ?", [unit.address]).fetchall())
        assert logged.pop("n_images") == len(Acts(run.folder(recording)).of_split(split))
        assert len(logged) == 8
        for measure, (clean, reconstructed, ablated) in wanted.items():
            row = told[measure]
            assert row["clean"] == pytest.approx(clean, rel=1e-4) == logged[f"{measure}_clean"]
            assert row["reconstructed"] == pytest.approx(reconstructed, rel=1e-4)
            assert row["ablated"] == pytest.approx(ablated, rel=1e-4)
            if clean != ablated:
                assert row["recovered"] == pytest.approx((reconstructed - ablated) / (clean - ablated), rel=1e-3)
                assert row["low"] <= row["recovered"] <= row["high"]
            whose = {key: row[key] for key in ("sae", "probe", "acts", "place", "split")}
            assert whose == {
                "sae": sae.address,
                "probe": probe.address,
                "acts": recording.address,
                "place": sae.content["tokens"],
                "split": split,
            }


def test_an_exact_sae_recovers_all_and_one_that_says_the_mean_nothing(run: Run) -> None:
    (_, _, recording), probe = made(run, "faithful", Faithfulness(**SETTINGS))[0].needs, run.made_by("probes")[0]
    acts, backbone = Acts(run.folder(recording)), recording.given["backbone"].build("cpu")
    test = acts.of_split("test")
    eye = torch.eye(16)
    for decoded, kind in ((torch.cat([eye, -eye]), 0), (torch.zeros(32, 16), 2)):
        sae = TopK(k=32, expansion=2).build(16).eval().requires_grad_(False)
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(decoded)
        sae.mean.copy_(acts.stats("patches").mean)
        steering = Steering(backbone, sae, opened(probe, run), 0, 2, keep_error=False)
        found_nmk = faithfulness._found(steering, acts, test, None, "cpu")
        torch.testing.assert_close(found_nmk[..., 1], found_nmk[..., kind], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found_nmk[..., 0], found_nmk[..., 2], rtol=1e-2)


def test_recovered() -> None:
    values = np.array([[0.9, 0.9, 0.1], [0.9, 0.1, 0.1], [0.9, 0.5, 0.1], [0.5, 2.5, 3.5], [0.3, 0.2, 0.3]])
    np.testing.assert_allclose(recovered(values), [1, 0, 0.5, 1 / 3, np.nan])


def test_the_interval_is_that_of_scipy() -> None:
    from scipy.stats import bootstrap

    from saefw.outcome import resampled

    rng = np.random.default_rng(0)
    found_nk = np.stack([rng.random(90) < share for share in (0.9, 0.7, 0.2)], axis=1).astype(np.float64)

    def share(x: Any, y: Any, z: Any, axis: int) -> Any:
        clean, reconstructed, ablated = (v.mean(axis=axis) for v in (x, y, z))
        return (reconstructed - ablated) / (clean - ablated)

    theirs = bootstrap(tuple(found_nk.T), share, paired=True, method="percentile", n_resamples=400, random_state=0)
    low, high = np.percentile(recovered(resampled(found_nk, 0)), [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)


class Stop(Exception):
    """What ends a run in the middle."""


class Stopper(Watcher):
    """Ends the run when so many images are done."""

    after = 0

    def progressed(self, stage: str, done: int, total: int, what: str) -> None:
        if stage == "faithful" and done == self.after:
            raise Stop


def test_a_stopped_run_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Faithfulness(**SETTINGS, batch_size=5)
    (whole, _) = made(run, "faithful", Faithfulness(**SETTINGS))
    stopper = Stopper()
    shutil.copytree(run.store.root, tmp_path / "runs", ignore=shutil.ignore_patterns("faithfulness"))
    broken = pipeline(tmp_path, stopper)
    stopper.after = 10
    with pytest.raises(Stop):
        made(broken, "faithful", stage)
    stopper.after, looked = 0, []
    found = faithfulness._found

    def counted(steering: Any, acts: Any, examples: Any, known: Any, device: str) -> Tensor:
        looked.append((len(examples), known is None))
        return found(steering, acts, examples, known, device)

    monkeypatch.setattr(faithfulness, "_found", counted)
    units = made(broken, "faithful", stage)
    # The first SAE's last two images, then all of the second's; what both are compared with is taken once.
    assert looked == [(2, True), (5, False), (5, False), (2, False)]
    assert whole == units[0] and not list(broken.folder(whole).glob("part-*"))
    for measure, row in rows(run, whole).items():
        for name, value in rows(broken, whole)[measure].items():
            assert value == (row[name] if isinstance(value, str) else pytest.approx(row[name], rel=1e-4, nan_ok=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"saes": "last"},
            "faithfulness: the probe reads [CLS] after block 2, which patches edited after block 2 cannot reach; "
            "choose an SAE of layer 1 or lower, or a probe with token: mean of layer 2",
        ),
        ({"acts": "only the last"}, "faithfulness: acts: 'only the last' has no layer 0 of the images of tiny on tiny, "
         "layer 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(run: Run, settings: dict[str, Any], message: str) -> None:
    run.listed("last", [unit for unit in run.made_by("sweep") if unit.needs[0].content["layer"] == 2])
    run.listed("only the last", [unit for unit in run.made_by("acts") if unit.content["layer"] == 2])
    with pytest.raises(UserError) as caught:
        list(Faithfulness(**{**SETTINGS, **settings}).units(run))
    assert str(caught.value) == message


def test_the_picked_probe_must_be_one_that_is_reached(run: Run) -> None:
    """Of one stage there may be probes that an SAE reaches and better ones that it does not."""
    run.listed("last", [unit for unit in run.made_by("sweep") if unit.needs[0].content["layer"] == 2])
    run.listed("both", [unit for name in ("probes", "means") for unit in run.made_by(name)])
    (cls,), (mean,) = run.made_by("probes")[-1:], run.made_by("means")[-1:]
    assert cls.needs == mean.needs and cls.needs[0].content["layer"] == 2
    with run.db() as db:
        loss = dict(db.execute("SELECT unit, value FROM final WHERE name = 'valid_loss'").fetchall())
    lower = loss[cls.address] < loss[mean.address]
    of_cls, of_mean = ("lowest", "highest") if lower else ("highest", "lowest")
    stage = Faithfulness(**{**SETTINGS, "saes": "last", "probes": "both", "probe": Pick(**{of_mean: "valid_loss"})})
    assert [unit.needs[1] for unit in stage.units(run)] == [mean] * 2
    stage = Faithfulness(**{**SETTINGS, "saes": "last", "probes": "both", "probe": Pick(**{of_cls: "valid_loss"})})
    with pytest.raises(UserError, match=r"^faithfulness: the probe reads \[CLS\] after block 2, which patches"):
        list(stage.units(run))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Faithfulness(**{**SETTINGS, "saes": "acts"}), "'acts' is a stage of record, not of train"),
        (Faithfulness(**{**SETTINGS, "probes": "sweep"}), "'sweep' is a stage of train, not of probe"),
        (Faithfulness(**{**SETTINGS, "acts": "sweep"}), "'sweep' is a stage of train, not of record"),
        (Gallery(visuals="acts"), "'acts' is a stage of record, not of visuals"),
        (ProbeStage(acts="sweep", probes=["p"]), "'sweep' is a stage of train, not of record"),
        (Train(acts="sweep", saes=["good"], n_tokens=1024), "'sweep' is a stage of train, not of record"),
        (Visuals(saes="probes", acts="acts"), "'probes' is a stage of probe, not of train"),
        (Visuals(saes="sweep", acts="sweep"), "'sweep' is a stage of train, not of record"),
        (Steer(saes="probes", probes="probes", visuals="acts"), "'probes' is a stage of probe, not of train"),
        (Steer(saes="sweep", probes="acts", visuals="acts"), "'acts' is a stage of record, not of probe"),
        (Steer(saes="sweep", probes="probes", visuals="acts"), "'acts' is a stage of record, not of visuals"),
    ],
)
def test_a_stage_that_makes_something_else_is_refused(run: Run, stage: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        list(stage.units(run))
    assert str(caught.value) == message


def test_a_chain_that_cannot_be_read_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    run = tiny.desk(tmp_path, {"saes": {"topk": TopK(k=3)}, "probes": {"p": Linear()}})
    run.listed("acts", list(Record(backbone="tiny", datasets=["tiny"], layers=[1, 2]).units(run)))
    run.listed("sweep", list(Train(acts="acts", saes=["topk"], layers=[2]).units(run)))
    run.listed("probes", list(ProbeStage(acts="acts", probes=["p"]).units(run)))
    with pytest.raises(UserError, match=r"or a probe with token: mean of layer 2$"):
        list(Faithfulness(**SETTINGS).units(run))
    run.listed("probes", list(ProbeStage(acts="acts", probes=["p"], token="mean").units(run)))
    with pytest.raises(NotYet, match=r"^decided once probes is made$"):
        list(Faithfulness(**SETTINGS).units(run))
