"""The train stage: one stream for all, resumable to the byte, measured on valid tokens."""

import itertools
import json
import multiprocessing
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pytest
import tiny
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from saefw import near, sae
from saefw.acts import Acts, Stats
from saefw.chance import seeded
from saefw.errors import UserError
from saefw.plugin import Run, SaeConfig, Unit
from saefw.run import Watcher
from saefw.sae import Loss, Sae
from saefw.stages import train as module
from saefw.stages.record import Record
from saefw.stages.train import Train, saefw_metrics
from saefw.store import Store
from saefw.trained import CONFIG, FILE, SAMPLE, TOLERANCE, open_sae
from saefw.training import CHECKPOINT, Training, learning_rate
from saefw_archetypal import Archetypal
from saefw_batchtopk import BatchTopK
from saefw_gated import Gated
from saefw_jumprelu import JumpRelu
from saefw_matryoshka import Matryoshka
from saefw_relu import Relu
from saefw_topk import TopK

SAES: dict[str, SaeConfig] = {
    "relu": Relu(expansion=2, l1=0.02, warmup=3),
    "topk": TopK(expansion=3, k=3, warmup=3, seed=1),
}
N_STEPS = 12
STAGE = Train(
    acts="acts", saes=list(SAES), layers=[1], n_tokens=64 * N_STEPS + 5, batch_size=64, log_every=5, validate_every=0.3
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the tiny set is recorded after blocks 1 and 2."""
    path = tmp_path_factory.mktemp("recorded")
    recording(path)
    return path


def recording(path: Path, saes: Mapping[str, SaeConfig] = SAES, watcher: Watcher | None = None, **more: Any) -> Run:
    run = tiny.desk(path, {"saes": saes, **more}, metrics=saefw_metrics(), watcher=watcher)
    stage = Record(backbone="tiny", datasets=["tiny"], layers=[1, 2])
    units = list(stage.units(run))
    if missing := [unit for unit in units if not run.store.has(unit)]:
        stage.make(missing, run)
    run.listed("acts", units)
    run.enter("sweep")
    return run


def fresh(path: Path, store: Path, **more: Any) -> Run:
    """A desk of its own on which the recording lies ready: a copy of nothing but its folder's name."""
    (path / "runs").mkdir(parents=True, exist_ok=True)
    if not (path / "runs" / "record").exists():
        (path / "runs" / "record").symlink_to(store / "runs" / "record")
    return recording(path, **more)


def trained(run: Run, stage: Train = STAGE) -> list[Unit]:
    units = list(stage.units(run))
    stage.make([unit for unit in units if not run.store.has(unit)], run)
    run.listed("sweep", units)
    return units


def results(run: Run, units: Sequence[Unit]) -> list[tuple[bytes, ...]]:
    """All that a unit holds but the time it took."""
    folders = [run.folder(unit) for unit in units]
    names = (FILE, CONFIG, SAMPLE, "metric.parquet", "sae.parquet")
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {*names, "unit.json", "made.json"}
    return [tuple((folder / name).read_bytes() for name in names) for folder in folders]


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Unit]]:
    """A run that nothing disturbed."""
    run = fresh(tmp_path_factory.mktemp("whole"), store)
    return run, trained(run)


# What is made


def test_the_same_settings_give_the_same_bytes(whole: tuple[Run, list[Unit]], store: Path, tmp_path: Path) -> None:
    again = fresh(tmp_path, store)
    torch.manual_seed(99)
    assert results(again, trained(again)) == results(*whole)


def test_an_sae_opens_as_it_was_trained(whole: tuple[Run, list[Unit]]) -> None:
    run, units = whole
    for unit, config in zip(units, SAES.values(), strict=True):
        rng = torch.get_rng_state()
        sae = open_sae(config, run.folder(unit))
        assert torch.equal(torch.get_rng_state(), rng)
        assert not sae.training and not any(parameter.requires_grad for parameter in sae.parameters())
        stats = Acts(run.folder(unit.needs[0])).stats("patches")
        torch.testing.assert_close(sae.mean, stats.mean.float())
        assert sae.scale.item() == pytest.approx(stats.scale)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae))
        with safe_open(run.folder(unit) / FILE, "pt") as file:
            assert set(file.keys()) == {"W_enc", "b_enc", "W_dec", "b_dec", "mean", "scale"}


def test_metrics_are_those_of_numpy_on_the_valid_tokens(whole: tuple[Run, list[Unit]]) -> None:
    run, units = whole
    acts = Acts(run.folder(units[0].needs[0]))
    valid = acts.of_split("valid")
    x = np.concatenate([x_etd.flatten(0, 1).double().numpy() for _, x_etd in acts.read("patches", valid)])
    assert 0 < len(valid) < acts.n_examples
    for unit in units:
        sae = open_sae(unit.given["sae"], run.folder(unit)).double()
        codes = sae.dense(torch.from_numpy(x))
        x_hat = sae.reconstruct(codes).numpy() * sae.scale.numpy() + sae.mean.numpy()
        with run.db() as db:
            told = dict(db.execute("SELECT name, value FROM final WHERE unit = ?", [unit.address]).fetchall())
        nmse = ((x - x_hat) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
        assert told["nmse"] == pytest.approx(nmse, rel=1e-4)
        assert told["explained_variance"] == pytest.approx(1 - nmse, rel=1e-4)
        assert told["l0"] == pytest.approx((codes > 0).double().sum(dim=1).mean().item(), rel=1e-3)
        assert told["dead"] == ((codes > 0).sum(dim=0) == 0).double().mean().item()
        assert told["n_valid_tokens"] == len(x) == len(valid) * 16


def test_the_log_holds_terms_by_step(whole: tuple[Run, list[Unit]]) -> None:
    run, units = whole
    for unit, term in zip(units, ("train_penalty", "train_aux"), strict=True):
        with run.db() as db:
            rows = db.execute("SELECT name, step FROM metric WHERE unit = ?", [unit.address]).fetchall()
            row = db.execute("SELECT acts, variant, n_features, config->>'$.expansion' FROM sae WHERE unit = ?",
                             [unit.address]).fetchone()  # fmt: skip
        assert len(set(rows)) == len(rows)
        steps: dict[str, list[int]] = {}
        for name, step in rows:
            steps.setdefault(name, []).append(step)
        for name in ("train_mse", term, "train_l0", "train_dead", "lr"):
            assert sorted(steps.pop(name)) == [0, 5, 10, 11]
        assert {steps.pop("decoder_cos_max")[0], steps.pop("decoder_cos_mean")[0]} == {N_STEPS}
        assert set(steps) == {*saefw_metrics(), "n_valid_tokens"}
        assert {tuple(sorted(each)) for each in steps.values()} == {(4, 8, N_STEPS)}
        config = unit.given["sae"]
        assert row == (unit.needs[0].address, config.use, 16 * config.expansion, str(config.expansion))


def test_valid_tokens_are_looked_at_while_it_trains(whole: tuple[Run, list[Unit]], store: Path, tmp_path: Path) -> None:
    """The same ones each time, of the valid split alone; what is trained does not change by it."""
    run, units = whole
    with run.db() as db:
        seen = dict(
            db.execute(
                "SELECT step, value FROM metric WHERE unit = ? AND name = 'n_valid_tokens'", [units[0].address]
            ).fetchall()
        )
    acts = Acts(run.folder(units[0].needs[0]))
    assert seen == {4: module.VALID, 8: module.VALID, N_STEPS: 16 * len(acts.of_split("valid"))}
    blind = fresh(tmp_path, store)
    others = trained(blind, STAGE.model_copy(update={"validate_every": 1.0}))
    assert [unit.address for unit in others] == [unit.address for unit in units]
    assert [blind.folder(unit).joinpath(FILE).read_bytes() for unit in others] == [
        run.folder(unit).joinpath(FILE).read_bytes() for unit in units
    ]
    with blind.db() as db:
        assert not db.execute("FROM metric WHERE name = 'nmse' AND step < ?", [N_STEPS]).fetchall()


def test_training_lowers_the_error(store: Path, tmp_path: Path) -> None:
    run = fresh(tmp_path, store, saes={"topk": TopK(expansion=4, k=6, lr=1e-2, warmup=10)})
    (unit,) = trained(run, Train(acts="acts", saes=["topk"], layers=[2], n_tokens=20_000, batch_size=128))
    with run.db() as db:
        told = dict(db.execute("SELECT name, value FROM final WHERE unit = ?", [unit.address]).fetchall())
    assert told["nmse"] < 0.35 and told["l0"] <= 6


def test_a_cls_sae_is_trained_on_cls(store: Path, tmp_path: Path) -> None:
    run = fresh(tmp_path, store, saes={"topk": TopK(expansion=2, k=3)})
    (unit,) = trained(run, STAGE.model_copy(update={"saes": ["topk"], "tokens": "cls"}))
    acts = Acts(run.folder(unit.needs[0]))
    sae = open_sae(TopK(expansion=2, k=3), run.folder(unit))
    torch.testing.assert_close(sae.mean, acts.stats("cls").mean.float())


# Who trains beside


def test_a_member_added_later_is_as_if_it_had_been_there(
    whole: tuple[Run, list[Unit]], store: Path, tmp_path: Path
) -> None:
    run = fresh(tmp_path, store)
    trained(run, STAGE.model_copy(update={"saes": ["topk"]}))
    kept = run.folder(next(iter(STAGE.model_copy(update={"saes": ["topk"]}).units(run)))).stat().st_mtime_ns
    units = trained(run)
    assert results(run, units) == results(*whole)
    assert run.folder(units[1]).stat().st_mtime_ns == kept


class Noisy(SaeConfig):
    """A variant whose loss draws at random."""

    use: Literal["noisy"] = "noisy"

    def build(self, d_model: int) -> "NoisySae":
        return NoisySae(d_model, self.width(d_model))


class NoisySae(Sae):
    """While it trains, each feature is silent half of the time."""

    def activate(self, pre_ns: Tensor) -> Tensor:
        return pre_ns.relu() * (torch.rand_like(pre_ns) < 0.5) if self.training else pre_ns.relu()


def test_chance_is_each_members_own(store: Path, tmp_path: Path) -> None:
    noisy = {"noisy": Noisy(expansion=2), "other": Noisy(expansion=2, seed=1)}
    files = []
    for i, names in enumerate((["noisy"], ["other", "noisy"])):
        run = fresh(tmp_path / str(i), store, saes=noisy)
        units = trained(run, STAGE.model_copy(update={"saes": names}))
        files.append((run.folder(units[-1]) / FILE).read_bytes())
    assert files[0] == files[1]


def test_each_seed_draws_other_weights_and_another_course() -> None:
    seeds = (0, 1, 2, 2**31, 2**32 - 1)
    made = [training(Noisy(expansion=2, seed=seed)) for seed in seeds]
    weights = {tuple(one.sae.W_dec.detach().flatten().tolist()) for one in made}
    assert len(weights) == len(seeds)
    for step in (0, 1, 7):
        drawn = set()
        for seed in seeds:
            with seeded(seed, step):
                drawn.add(float(torch.rand(())))
        assert len(drawn) == len(seeds)


# Stopped and gone on


class Stop(Exception):
    """Stands for a kill."""


class Killer(Watcher):
    """Stops a run when it logs a step of one member for the n-th time."""

    def __init__(self, after: int) -> None:
        self.left = after

    def logged(self, unit: Unit, step: int, values: Mapping[str, float]) -> None:
        self.left -= 1
        if not self.left:
            raise Stop


@pytest.mark.parametrize("after", range(1, 15))
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    after: int, whole: tuple[Run, list[Unit]], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while either member logs, also while the first logs its last results and the other did not yet."""
    monkeypatch.setattr(module, "WORTH", 0)
    often = STAGE.model_copy(update={"checkpoint_every": 0.0})
    with pytest.raises(Stop):
        trained(fresh(tmp_path, store, watcher=Killer(after)), often)
    run = fresh(tmp_path, store)
    starts = [step for step in starting_steps(run) if step is not None]
    assert len(starts) == 2
    assert results(run, trained(run)) == results(*whole)


@pytest.mark.parametrize("names", [["topk"], ["relu", "topk"]])
@pytest.mark.parametrize("killed", range(1, N_STEPS + 1))
def test_killed_in_any_step_it_goes_on_to_the_same_bytes(
    killed: int,
    names: list[str],
    whole: tuple[Run, list[Unit]],
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed without a word in the middle of a step of the last member: there is only what lay on the disk."""
    stage = STAGE.model_copy(update={"saes": names, "checkpoint_every": 0.0})
    advance, checkpoint, dead = Training.advance, Training.checkpoint, False

    def advance_or_die(self: Training, x_nd: Tensor, dead_after: int) -> None:
        nonlocal dead
        if dead := self.step == killed - 1 and isinstance(self.config, TopK):
            raise Stop
        advance(self, x_nd, dead_after)

    def checkpoint_if_alive(self: Training, run: Run) -> None:
        if not dead:
            checkpoint(self, run)

    with monkeypatch.context() as patch:
        patch.setattr(module, "WORTH", 0)
        patch.setattr(Training, "advance", advance_or_die)
        patch.setattr(Training, "checkpoint", checkpoint_if_alive)
        with pytest.raises(Stop):
            trained(fresh(tmp_path, store), stage)
    run = fresh(tmp_path, store)
    units = trained(run, stage)
    chosen = [unit for unit in whole[1] if unit in units]
    assert len(chosen) == len(names) and results(run, units) == results(whole[0], chosen)


@pytest.mark.parametrize(
    "config",
    [
        BatchTopK(expansion=2, k=3, warmup=3), JumpRelu(expansion=2, weight=0.1), Gated(expansion=2, l1=0.1),
        Matryoshka(expansion=2, k=3, prefixes=[0.5], sampled=True), Archetypal(expansion=2, k=3, candidates=16),
    ],
    ids=lambda config: config.use,
)  # fmt: skip
@pytest.mark.parametrize("nearly", [False, True])
def test_every_variant_goes_on_to_the_same_bytes(
    nearly: bool, config: SaeConfig, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what is active is found by a product in bfloat16."""
    monkeypatch.setattr(module, "WORTH", 0)
    monkeypatch.setattr(sae, "WORTH", 0)
    monkeypatch.setattr(sae, "has_bfloat16", lambda: nearly)
    for place in (near, sae):
        monkeypatch.setattr(place, "MANY", 1.0)
    stage = STAGE.model_copy(update={"saes": ["one"], "checkpoint_every": 0.0})
    whole = fresh(tmp_path / "whole", store, saes={"one": config})
    stopped = fresh(tmp_path / "stopped", store, saes={"one": config}, watcher=Killer(3))
    with pytest.raises(Stop):
        trained(stopped, stage)
    again = fresh(tmp_path / "stopped", store, saes={"one": config})
    (unit,) = stage.units(again)
    assert (again.store.partial(unit) / CHECKPOINT).exists()
    assert results(again, trained(again, stage)) == results(whole, trained(whole, stage))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("names", [["topk"], ["relu", "topk"]])
def test_killed_by_the_system_at_any_time_it_goes_on_to_the_same_bytes(
    names: list[str], store: Path, tmp_path: Path
) -> None:
    """A process of its own, killed with SIGKILL again and again until it comes to its end."""
    # The one to compare with has as many threads: they decide the order of sums.
    fresh(tmp_path / "whole", store)
    unbroken = multiprocessing.get_context("fork").Process(target=_train, args=(tmp_path / "whole", store, names))
    unbroken.start()
    unbroken.join()
    fresh(tmp_path, store)
    rng, kills = random.Random(len(names)), 0
    code: int | None = -signal.SIGKILL
    while code:
        child = multiprocessing.get_context("fork").Process(target=_train, args=(tmp_path, store, names))
        child.start()
        # Later each time: one that is always killed too early would never end.
        child.join(rng.uniform(0, 0.1 * (1 + kills)))
        child.kill()
        child.join()
        code = child.exitcode
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    assert kills > 1
    run = fresh(tmp_path, store)
    units = list(STAGE.model_copy(update={"saes": names}).units(run))
    assert len(units) == len(names) and results(run, units) == results(fresh(tmp_path / "whole", store), units)


def _train(path: Path, store: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    module.WORTH = 0
    run = fresh(path, store, watcher=Slow())
    trained(run, STAGE.model_copy(update={"saes": names, "checkpoint_every": 0.0}))


class Slow(Watcher):
    """Takes its time over each note, so that on no machine an SAE is done before it was killed twice."""

    def logged(self, unit: Unit, step: int, values: Mapping[str, float]) -> None:
        time.sleep(0.1)


def test_layers_are_trained_one_after_the_other_as_if_alone(store: Path, tmp_path: Path) -> None:
    both = fresh(tmp_path / "both", store)
    units = trained(both, STAGE.model_copy(update={"layers": [1, 2]}))
    assert len(units) == 2 * len(SAES)
    for layer in (1, 2):
        alone = fresh(tmp_path / str(layer), store)
        wanted = trained(alone, STAGE.model_copy(update={"layers": [layer]}))
        chosen = [unit for unit in units if unit.needs[0].content["layer"] == layer]
        assert results(both, chosen) == results(alone, wanted)


def test_a_stop_loses_no_step(whole: tuple[Run, list[Unit]], store: Path, tmp_path: Path) -> None:
    """Told to stop long before a checkpoint is due, every SAE goes on from the step it had done."""
    with pytest.raises(Stop):
        trained(fresh(tmp_path, store, watcher=Killer(3)))
    run = fresh(tmp_path, store)
    done = [step for step in starting_steps(run) if step is not None]
    assert len(done) == 2 and min(done) > 1
    assert results(run, trained(run)) == results(*whole)


def test_a_stop_between_a_step_and_its_note_loses_neither(
    whole: tuple[Run, list[Unit]], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, log = 3, Run.log

    def stopped(self: Run, unit: Unit, step: int, **values: float) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Stop
        log(self, unit, step, **values)

    monkeypatch.setattr(Run, "log", stopped)
    with pytest.raises(Stop):
        trained(fresh(tmp_path, store))
    run = fresh(tmp_path, store)
    assert len([step for step in starting_steps(run) if step]) == 2
    assert results(run, trained(run)) == results(*whole)


def starting_steps(run: Run) -> list[int | None]:
    steps = []
    for unit in STAGE.units(run):
        training = Training(unit, 16, Stats(torch.zeros(16), torch.ones(16), 1.0, 0.0, 1), N_STEPS, "cpu")
        training.resume(run)
        steps.append(training.step if (run.store.partial(unit) / CHECKPOINT).exists() else None)
    return steps


def test_members_may_be_checkpoints_apart(
    whole: tuple[Run, list[Unit]], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between two checkpoints leaves one member ahead; the other catches up and nothing is trained twice."""
    often, checkpoint = STAGE.model_copy(update={"checkpoint_every": 0.0}), Training.checkpoint

    def checkpoint_or_die(self: Training, run: Run) -> None:
        if self.step == 4 and isinstance(self.config, TopK):
            raise Stop
        checkpoint(self, run)

    monkeypatch.setattr(module, "WORTH", 0)
    monkeypatch.setattr(Training, "checkpoint", checkpoint_or_die)
    with pytest.raises(Stop):
        trained(fresh(tmp_path, store), often)
    monkeypatch.undo()
    run = fresh(tmp_path, store)
    assert starting_steps(run) == [4, 3]
    advance, steps = Training.advance, []

    def noted(self: Training, x_nd: Tensor, dead_after: int) -> None:
        steps.append((self.unit.label, self.step))
        advance(self, x_nd, dead_after)

    monkeypatch.setattr(Training, "advance", noted)
    assert results(run, trained(run)) == results(*whole)
    assert len(set(steps)) == len(steps) == (N_STEPS - 4) + (N_STEPS - 3)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "log"])
def test_a_damaged_checkpoint_is_not_used(
    damage: str, whole: tuple[Run, list[Unit]], store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is one whose log is damaged; that SAE is trained anew, the other goes on, and the bytes are the same."""
    with pytest.raises(Stop):
        trained(fresh(tmp_path, store, watcher=Killer(8)), STAGE.model_copy(update={"checkpoint_every": 0.0}))
    run = fresh(tmp_path, store)
    folder = run.store.partial(next(iter(STAGE.units(run))))
    path = folder / ("metric.jsonl" if damage == "log" else CHECKPOINT)
    data = path.read_bytes()
    flipped = data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]
    path.write_bytes({"cut": data[:-7], "flipped": flipped, "empty": b"", "log": data.replace(b"1", b"2")}[damage])
    first, second = starting_steps(fresh(tmp_path, store))
    assert first == 0 and second
    told = f"{path}: damaged; it is not used, and what it held is made again"
    assert set(caplog.messages) == {told}
    assert results(run, trained(run)) == results(*whole)


# One step


def training(config: SaeConfig, n_steps: int = 100, d_model: int = 6) -> Training:
    unit = Unit("train", {}, label="an SAE", given={"sae": config})
    return Training(unit, d_model, Stats(torch.zeros(d_model), torch.ones(d_model), 1.0, 0.0, 1), n_steps, "cpu")


def gradients(made: Training) -> dict[str, Tensor]:
    """Return what will be those of the last step, as Adam sees them; they are not kept."""
    seen: dict[str, Tensor] = {}

    def look(*_: object) -> None:
        seen.update({name: p.grad.clone() for name, p in made.sae.named_parameters() if p.grad is not None})

    made.adam.register_step_pre_hook(look)
    return seen


@pytest.mark.parametrize("config", [Relu(expansion=3, l1=0.1, lr=0.05), TopK(expansion=3, k=4, lr=0.05)])
def test_rows_stay_at_norm_one_and_no_gradient_lies_along_them(config: SaeConfig) -> None:
    made = training(config)
    seen, generator = gradients(made), torch.Generator().manual_seed(0)
    for _ in range(20):
        before_sd = made.sae.W_dec.detach().clone()
        made.advance(torch.randn(50, 6, generator=generator), 10**9)
        gradient_sd = seen["W_dec"]
        assert gradient_sd.norm() > 1e-3
        assert ((gradient_sd * before_sd).sum(dim=1).abs() < 1e-6).all()
        torch.testing.assert_close(made.sae.W_dec.detach().norm(dim=1), torch.ones(18))
        assert not torch.equal(made.sae.W_dec, before_sd)


def test_free_rows_are_left_alone() -> None:
    made = training(Relu(expansion=3, unit_norm=False, lr=0.05))
    for _ in range(5):
        made.advance(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), 10**9)
    assert ((made.sae.W_dec.norm(dim=1) - 1).abs() > 1e-3).any()


def test_the_gradient_is_clipped() -> None:
    x_nd = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    norms = []
    for clip in (None, 0.01):
        made = training(Relu(expansion=3, clip=clip, l1=0.1))
        seen = gradients(made)
        made.advance(x_nd, 10**9)
        norms.append(torch.stack([gradient.norm() for gradient in seen.values()]).norm().item())
    assert norms[0] > 0.1 and norms[1] == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = Relu(lr=2.0, warmup=4, decay=0.25)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates == pytest.approx([0.5, 1, 1.5, *[2] * 13, 1.6, 1.2, 0.8, 0.4])
    cosine = [learning_rate(Relu(lr=2.0, warmup=0, schedule="cosine", decay=0.5), step, 8) for step in range(8)]
    assert cosine == pytest.approx([2, 2, 2, 2, 2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])
    assert [learning_rate(Relu(lr=3.0, warmup=0, schedule="constant"), step, 5) for step in range(5)] == [3.0] * 5


def test_a_penalty_rises_over_its_warm_up_and_nothing_else_does() -> None:
    x_nd = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    shares = []
    risen_, full = (training(Relu(expansion=3, l1=0.1, lr=1e-9, sparsity_warmup=steps)) for steps in (4, 0))
    for _ in range(6):
        for made in (risen_, full):
            made.advance(x_nd, 10**9)
        shares.append((risen_.values["train_penalty"] / full.values["train_penalty"]).item())
        assert risen_.values["train_mse"].item() == pytest.approx(full.values["train_mse"].item(), rel=1e-5)
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1], rel=1e-4)


def test_a_start_from_data_is_that_of_the_train_tokens_and_goes_on_after_a_stop(store: Path, tmp_path: Path) -> None:
    saes = {"topk": TopK(expansion=3, k=3, init="data", b_dec="median")}
    stage = STAGE.model_copy(update={"saes": ["topk"]})
    whole_ = fresh(tmp_path / "a", store, saes=saes)
    wanted = results(whole_, trained(whole_, stage))
    with pytest.raises(Stop):
        trained(fresh(tmp_path / "b", store, saes=saes, watcher=Killer(2)), stage)
    again = fresh(tmp_path / "b", store, saes=saes)
    assert results(again, trained(again, stage)) == wanted


class Scripted(SaeConfig):
    """A variant that fires by a script: one row of features a step."""

    use: Literal["scripted"] = "scripted"

    script: list[list[int]] = Field(default_factory=list)

    def build(self, d_model: int) -> "ScriptedSae":
        return ScriptedSae(d_model, self.width(d_model), self.script)


class ScriptedSae(Sae):
    """Fires by its script and notes who was dead."""

    def __init__(self, d_model: int, d_sae: int, script: list[list[int]]) -> None:
        super().__init__(d_model, d_sae)
        self.script, self.dead = iter(script), list[list[int]]()

    def activate(self, pre_ns: Tensor) -> Tensor:
        return pre_ns.relu()

    def loss(self, x_nd: Tensor, dead_s: Tensor) -> Loss:
        self.dead.append(dead_s.nonzero().flatten().tolist())
        fired_s = torch.zeros(self.d_sae, dtype=torch.int64)
        fired_s[next(self.script)] = 2
        return Loss({"mse": (x_nd @ self.W_enc).square().mean()}, fired_s)


def test_a_feature_is_dead_after_so_many_tokens_and_alive_when_it_fires() -> None:
    script = [[0, 1, 2], [0, 1], [0], [0, 3], [0, 2], [0]]
    made = training(Scripted(expansion=2, script=script), d_model=2)
    shares = []
    for _ in script:
        made.advance(torch.ones(10, 2), 20)
        shares.append(made.values["train_dead"].item())
    sae = made.sae
    assert isinstance(sae, ScriptedSae)
    # Three batches of 10 tokens without firing are 30, of which the third sees 20 behind it.
    assert sae.dead == [[], [], [3], [2, 3], [1, 2], [1]]
    assert made.since_s.tolist() == [0, 40, 10, 20]
    assert shares == [0, 0, 0.25, 0.5, 0.5, 0.25]


def planted() -> tuple[Tensor, Iterator[Tensor], Stats]:
    """A dictionary, tokens that are three of its rows at a time, and their statistics."""
    generator = torch.Generator().manual_seed(1234)  # not that of the weights, which would begin at the solution
    rows_sd = torch.nn.functional.normalize(torch.randn(32, 20, generator=generator), dim=1)

    def batch() -> Tensor:
        chosen = torch.rand(512, 32, generator=generator).topk(3, dim=1).indices
        values = torch.rand(512, 3, generator=generator) + 0.5
        return torch.zeros(512, 32).scatter(1, chosen, values) @ rows_sd + 2

    sample = torch.cat([batch() for _ in range(8)]).double()
    variance = sample.var(dim=0, correction=0)
    stats = Stats(sample.mean(dim=0), variance, variance.mean().sqrt().item(), 0.0, len(sample))
    return rows_sd, (batch() for _ in itertools.count()), stats


@pytest.mark.parametrize(
    "config", [Relu(expansion=2, l1=0.1, lr=0.02, warmup=20), TopK(expansion=2, k=3, lr=0.02, warmup=20)]
)
def test_a_planted_dictionary_is_found(config: SaeConfig) -> None:
    rows_sd, batches, stats = planted()
    made = Training(Unit("train", {}, given={"sae": config}), 20, stats, 250, "cpu")
    start = (rows_sd @ made.sae.W_dec.T).amax(dim=1).mean().item()
    for x_nd in itertools.islice(batches, 250):
        made.advance(made.sae.normalise(x_nd), 10_000)
    found = (rows_sd @ made.sae.W_dec.detach().T).amax(dim=1).mean().item()
    assert start < 0.7 and found > 0.9


# What may be wrong


def test_a_member_that_diverges_is_named_and_the_others_are_kept(
    whole: tuple[Run, list[Unit]], store: Path, tmp_path: Path
) -> None:
    wild = {**SAES, "wild": Relu(expansion=2, lr=1e30, clip=None, unit_norm=False)}
    run = fresh(tmp_path, store, saes=wild)
    with pytest.raises(UserError) as error:
        trained(run, STAGE.model_copy(update={"saes": ["relu", "wild", "topk"]}))
    label = "wild, tiny on tiny, layer 1"
    assert re.fullmatch(
        rf"{re.escape(label)}: the loss is (nan|inf) after \d of 12 steps with lr 1e\+30 \(mse is (nan|inf).*\); "
        "try a smaller lr, a longer warmup, or clip: 1",
        str(error.value),
    )
    units = list(STAGE.units(run))
    assert all(run.store.has(unit) for unit in units)
    assert results(run, units) == results(*whole)


def test_without_a_valid_split_nothing_is_trained(tmp_path: Path) -> None:
    run = recording(tmp_path, datasets={"tiny": tiny.TinySet(n=12)})
    with pytest.raises(UserError) as error:
        trained(run)
    assert str(error.value) == (
        "tiny on tiny, layer 1: no image is in the valid split, on which SAEs are measured; give the dataset one"
    )


def test_a_layer_must_be_recorded(store: Path, tmp_path: Path) -> None:
    run = fresh(tmp_path, store)
    with pytest.raises(UserError) as error:
        list(STAGE.model_copy(update={"layers": [0]}).units(run))
    assert str(error.value) == "train: layer 0 is not recorded by 'acts' (there are: 1, 2)"
    with pytest.raises(UserError) as error:
        list(STAGE.model_copy(update={"layers": [7]}).units(run))
    assert str(error.value) == "layer 7: there are 3 blocks, 0 to 2, or -3 to -1 from the end"


def test_layers_are_named_from_either_end_and_never_twice(store: Path, tmp_path: Path) -> None:
    run = fresh(tmp_path, store)

    def units(layers: list[int] | None) -> list[Unit]:
        return list(STAGE.model_copy(update={"layers": layers}).units(run))

    assert units([-2]) == units([1]) == units([1, -2]) and len(units([1])) == len(SAES)
    assert units(None) == units([1, 2])
    assert units([1])[0].label == "relu, tiny on tiny, layer 1"


def test_knobs_and_names_are_not_in_the_address(store: Path, tmp_path: Path) -> None:
    run = fresh(tmp_path, store)
    addresses = [unit.address for unit in STAGE.units(run)]
    same = STAGE.model_copy(update={"log_every": 1, "checkpoint_every": 1.0, "layers": [-2]})
    assert [unit.address for unit in same.units(run)] == addresses
    for change in ({"n_tokens": 999}, {"batch_size": 32}, {"seed": 1}, {"tokens": "cls"}, {"dead_after": 7}):
        assert not {unit.address for unit in STAGE.model_copy(update=change).units(run)} & set(addresses)


def test_less_than_one_batch_is_refused(store: Path, tmp_path: Path) -> None:
    run = fresh(tmp_path, store)
    with pytest.raises(UserError) as error:
        list(STAGE.model_copy(update={"n_tokens": 63}).units(run))
    assert str(error.value) == "train: n_tokens is 63, less than one batch of 64"


def test_too_large_a_k_is_refused_before_anything_is_trained(store: Path, tmp_path: Path) -> None:
    run = fresh(tmp_path, store, saes={**SAES, "topk": TopK(expansion=2, k=40)})
    with pytest.raises(UserError) as error:
        trained(run)
    assert str(error.value) == "topk: k is 40, but there are 32 features"
    assert not any(run.store.has(unit) for unit in STAGE.units(run))


HEADER = "Error while deserializing header: "
CUTS = (
    (-5, f"{HEADER}incomplete metadata, file not fully covered"),
    (20, f"{HEADER}invalid header length"),
    (0, f"{HEADER}header too small"),
)
NOTHING = "Expecting value: line 1 column 1 (char 0)"
DAMAGES = {
    CONFIG: (
        (20, "Unterminated string starting at: line 2 column 10 (char 11)"),
        (0, "Expecting value: line 1 column 1 (char 0)"),
    ),
    FILE: CUTS,
    SAMPLE: CUTS,
}
"""By file, to how many bytes it is cut and what is said then."""


def test_a_file_that_cannot_be_used_is_named(whole: tuple[Run, list[Unit]], tmp_path: Path) -> None:
    run, units = whole
    config = SAES["relu"]
    shutil.copytree(run.folder(units[0]), tmp_path, dirs_exist_ok=True)

    def told(config: SaeConfig, why: str) -> None:
        with pytest.raises(UserError) as error:
            open_sae(config, tmp_path)
        assert str(error.value) == why

    for name, damages in DAMAGES.items():
        path = tmp_path / name
        good = path.read_bytes()
        gone = "No such file or directory" if name == CONFIG else f"No such file or directory: {path}"
        for damaged, why in ((None, gone), *damages):
            path.unlink()
            if damaged is not None:
                path.write_bytes(good[:damaged])
            told(config, f"{path}: cannot be read ({why}); delete {tmp_path} to train it again")
            path.write_bytes(good)
    told(
        Relu(expansion=2, l1=0.03, warmup=3),
        f"{tmp_path / CONFIG}: is of an SAE with other settings than asked for; delete {tmp_path} to train that one",
    )
    assert open_sae(config, tmp_path).d_sae == 32


def test_a_config_says_what_the_sae_is(whole: tuple[Run, list[Unit]]) -> None:
    run, units = whole
    for unit, config in zip(units, SAES.values(), strict=True):
        acts = Acts(run.folder(unit.needs[0]))
        stats = acts.stats("patches")
        assert json.loads((run.folder(unit) / CONFIG).read_text()) == {
            "variant": config.content()["use"],
            "settings": config.content(),
            "acts": unit.needs[0].address,
            "layer": 1,
            "tokens": "patches",
            "n_tokens": 64 * N_STEPS,
            "d_model": 16,
            "d_sae": config.width(16),
            "normalisation": "x_n = (x - mean) / scale",
            "offset_ratio": pytest.approx(
                float(np.linalg.norm(stats.mean.numpy()) / np.sqrt(stats.var.numpy().sum())), rel=1e-9
            ),
            "inference": "codes = select((x_n - b_dec) W_enc + b_enc), x_hat = (codes W_dec + b_dec) scale + mean",
            "select": (type(config).__doc__ or "").splitlines()[0],
            "tolerance": TOLERANCE,
        }
        sample = load_file(run.folder(unit) / SAMPLE)
        valid_nd = next(acts.shuffled("patches", acts.of_split("valid"), module.VALID, STAGE.seed))
        assert torch.equal(sample["x"], valid_nd[:16])
        codes = open_sae(config, run.folder(unit)).encode(sample["x"])
        assert torch.equal(sample["indices"], codes.indices) and torch.equal(sample["values"], codes.values)


@pytest.mark.parametrize("changed", ["W_enc", "b_enc", "mean", "scale"])
def test_other_codes_than_when_it_was_trained_are_noticed(
    changed: str, whole: tuple[Run, list[Unit]], tmp_path: Path
) -> None:
    """Rounding is not; nor is one token of which all codes are others."""
    run, units = whole
    shutil.copytree(run.folder(units[1]), tmp_path, dirs_exist_ok=True)
    good, config = load_file(tmp_path / FILE), SAES["topk"]
    save_file({**good, changed: good[changed] * (1 + 1e-6)}, tmp_path / FILE)
    open_sae(config, tmp_path)
    save_file({**good, changed: good[changed] * 1.1 + 0.1}, tmp_path / FILE)
    with pytest.raises(UserError) as error:
        open_sae(config, tmp_path)
    told = str(error.value)
    apart = re.search(r"they are (\S+) apart", told)
    assert apart and float(apart[1]) > TOLERANCE
    assert told == (
        f"{tmp_path / SAMPLE}: its tokens get other codes than when the SAE was trained (they are {apart[1]} apart; "
        f"0.001 is rounding), so its weights, or the code of 'topk', are not what they were; "
        f"delete {tmp_path} to train it again"
    )
    save_file(good, tmp_path / FILE)
    sample = load_file(tmp_path / SAMPLE)
    sample["indices"][0] = (sample["indices"][0] + 1) % 48
    save_file(sample, tmp_path / SAMPLE)
    open_sae(config, tmp_path)


def test_progress_counts_tokens_to_the_end(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, str]] = []

    class Ears(Watcher):
        def progressed(self, stage: str, done: int, total: int, what: str) -> None:
            assert stage == "sweep"
            told.append((done, total, what))

    monkeypatch.setattr(module, "PAUSE", 0.0)
    run = fresh(tmp_path, store, watcher=Ears())
    told.clear()
    trained(run, STAGE.model_copy(update={"layers": None}))
    total = 2 * N_STEPS * 64
    tokens = [(done, of) for done, of, what in told if what == "tokens"]
    assert tokens == [(64 * step, total) for step in range(1, 2 * N_STEPS + 1)]
    assert told[-1][0] == told[-1][1] and told[-1][2] == "valid tokens"


def test_the_disk_is_foreseen(whole: tuple[Run, list[Unit]]) -> None:
    run, units = whole
    for unit in units:
        size = (run.folder(unit) / FILE).stat().st_size
        assert STAGE.disk(unit, run) == pytest.approx(size, abs=1500)
        assert STAGE.work(unit, run) == f"{STAGE.n_tokens:,} tokens"


def test_the_index_is_one_store(whole: tuple[Run, list[Unit]]) -> None:
    run, units = whole
    run.publish()
    with duckdb.connect(str(Store(run.store.root).root / "saefw.duckdb"), read_only=True) as db:
        found = {row[0] for row in db.execute("SELECT sae FROM pareto").fetchall()}
    assert found == {unit.address for unit in units}
