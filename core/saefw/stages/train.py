"""Trains every SAE of a sweep on one stream of tokens; saves and reopens them.

Shapes: n tokens, d d_model, s d_sae.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor
from torch.nn import Parameter

from saefw import sealed
from saefw import tensors as files
from saefw.acts import Acts, Stats
from saefw.blocks import resolve
from saefw.care import write_atomically
from saefw.metrics import L0, Cosine, Dead, Dense, ExplainedVariance, Nmse
from saefw.plugin import (
    BackboneConfig,
    Codes,
    Knob,
    Metric,
    Names,
    Run,
    SaeConfig,
    StageConfig,
    Unit,
    UserError,
    hookimpl,
    settings,
)
from saefw.sae import Sae
from saefw.sealed import HEADER
from saefw.stream import Stream
from saefw.unit import canonical

FILE = "sae.safetensors"
CHECKPOINT = "checkpoint.safetensors"
TOKENS = 8192
"""How many tokens, about, are measured at once."""

WORTH = 20
"""Between two checkpoints lies so many times what writing one takes, at least."""

WIDEST = 1 << 20
"""The largest d_model that a file may speak of."""

PAUSE = 0.1
"""Seconds between two words about progress."""

Examples = np.ndarray[Any, np.dtype[np.int64]]


class Train(StageConfig):
    """Trains SAEs on the train split of a recording and measures them on its valid split."""

    use: Literal["train"] = "train"

    acts: Annotated[str, Names("stages")]
    """The stage that recorded the activations."""

    saes: Annotated[list[str], Names("saes")] = Field(min_length=1)
    """The SAEs to train, each on every layer."""

    layers: list[int] | None = Field(None, min_length=1)
    """Which of the recorded layers, negative ones from the end; null: all."""

    tokens: Literal["patches", "cls"] = "patches"
    """Which tokens to train on."""

    n_tokens: int = Field(1_000_000, gt=0)
    """Tokens to train on; the recording is read again from its start, in another order, as often as that takes."""

    batch_size: int = Field(1024, gt=0)
    """Tokens a step; a last step that would not be full is left out."""

    seed: int = Field(0, ge=0)
    """Of the order of the tokens."""

    dead_after: int | None = Field(None, gt=0)
    """A feature is dead, for terms of the loss that revive, when it has not fired for so many training tokens.

    Null: a tenth of n_tokens, at most 10 million.
    """

    log_every: Annotated[int, Knob] = Field(50, gt=0)
    """Steps between two notes of the training loss."""

    checkpoint_every: Annotated[float, Knob] = Field(10.0, ge=0)
    """Seconds between two checkpoints; longer where writing them would take more than a twentieth of the time."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit for each recording and SAE.

        Raises:
            UserError: a layer was not recorded, or not one batch is asked for.

        """
        if self.n_tokens < self.batch_size:
            raise UserError(f"train: n_tokens is {self.n_tokens}, less than one batch of {self.batch_size}")
        shared = {name: value for name, value in self.content().items() if name not in ("use", "layers")}
        members = run.family("saes", self.saes)
        listed = {
            Unit(
                "train",
                {**shared, "sae": member.entry.content()},
                needs=(acts,),
                label=f"{member.label}, {acts.label}",
                given={"sae": member.entry},
            ): None
            for acts in self._recordings(run)
            for member in members
        }
        yield from listed

    def _recordings(self, run: Run) -> list[Unit]:
        units = run.made_by(self.acts)
        if self.layers is None:
            return units
        chosen: list[Unit] = []
        for layer in self.layers:
            found = [unit for unit in units if unit.content["layer"] == resolve(layer, _depth(unit))]
            if not found:
                layers = ", ".join(str(layer) for layer in sorted({unit.content["layer"] for unit in units}))
                raise UserError(f"train: layer {layer} is not recorded by '{self.acts}' (there are: {layers})")
            chosen += found
        return chosen

    def disk(self, unit: Unit, run: Run) -> int:
        """Return the bytes of the weights, in float32."""
        config: SaeConfig = unit.given["sae"]
        backbone: BackboneConfig = unit.needs[0].given["backbone"]
        d_model = backbone.describe().d_model
        d_sae = config.expansion * d_model
        return 4 * (2 * d_model * d_sae + d_sae + 2 * d_model)

    def work(self, unit: Unit, run: Run) -> str:
        """Return how many tokens there are to train on."""
        return f"{self.n_tokens:,} tokens"

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Train the units of each recording together, one after the other recording.

        Raises:
            UserError: a recording cannot be trained on, or the loss of an SAE is no number; the others are kept.

        """
        groups: dict[Unit, list[Unit]] = {}
        for unit in units:
            groups.setdefault(unit.needs[0], []).append(unit)
        failed: list[str] = []
        for i, (acts, group) in enumerate(groups.items()):
            failed += self._train(run, acts, group, (i, len(groups)))
        if failed:
            raise UserError("\n".join(failed))

    def _train(self, run: Run, recording: Unit, units: Sequence[Unit], part: tuple[int, int]) -> list[str]:
        """Train units on one recording, keep those that end well, and return what is to be said of the others."""
        acts = Acts(run.folder(recording))
        if not len(acts.of_split("valid")):
            raise UserError(
                f"{recording.label}: no image is in the valid split, on which SAEs are measured; give the dataset one"
            )
        stats, n_steps = acts.stats(self.tokens), self.n_tokens // self.batch_size
        if not stats.scale > 0:
            raise UserError(
                f"{recording.label}: all {self.tokens} of the train split are the same; nothing to train on"
            )
        trainings = [Training(unit, acts.d_model, stats, n_steps, run.device) for unit in units]
        for training in trainings:
            training.resume(run)
        dead_after = self.dead_after or min(math.ceil(self.n_tokens / 10), 10_000_000)
        failed: list[str] = []

        # A stop can leave some a checkpoint ahead of others: the stream starts with the last, the rest join in turn.
        first = min(training.step for training in trainings)
        stream = acts.shuffled(self.tokens, acts.of_split("train"), self.batch_size, self.seed)
        stream.seek(first)
        try:
            self._steps(run, trainings, stream, range(first, n_steps), dead_after, part, failed)
        except BaseException:
            # Told to stop, or broken: what is whole goes on from here, whatever was in the middle of a step from its
            # last checkpoint. Its last step may not be logged yet; logged twice, it counts once.
            for training in trainings:
                if training.whole and training.healthy():
                    if training.values and self._logs(training.step - 1, n_steps):
                        training.log(run)
                    training.checkpoint(run)
            raise
        if trainings:
            self._finish(run, acts, trainings)
        return failed

    def _steps(
        self,
        run: Run,
        trainings: list["Training"],
        stream: Stream,
        steps: range,
        dead_after: int,
        part: tuple[int, int],
        failed: list[str],
    ) -> None:
        """Train on the stream to its end; one whose loss is no number leaves `trainings`, and `failed` says why."""
        n_steps = steps.stop
        saving, telling = Clock(self.checkpoint_every), Clock(PAUSE)
        for step in steps:
            x_nd = trainings[0].sae.normalise(next(stream).to(run.device))
            logging, checkpointing = self._logs(step, n_steps), saving.due()
            for training in list(trainings):
                if training.step > step:
                    continue
                training.advance(x_nd, dead_after)
                if (logging or checkpointing) and not training.healthy():
                    failed.append(training.excuse())
                    trainings.remove(training)
                elif logging:
                    training.log(run)
            if checkpointing:
                begun = time.monotonic()
                for training in trainings:
                    training.checkpoint(run)
                saving.restart(max(self.checkpoint_every, WORTH * (time.monotonic() - begun)))
            if telling.due() or step == n_steps - 1:
                done = (part[0] * n_steps + step + 1) * self.batch_size
                run.progress(done, part[1] * n_steps * self.batch_size, "tokens")
                telling.restart(PAUSE)
            if not trainings:
                return

    def _logs(self, step: int, n_steps: int) -> bool:
        """Whether the loss of a step is noted."""
        return step % self.log_every == 0 or step == n_steps - 1

    def _finish(self, run: Run, acts: Acts, trainings: Sequence["Training"]) -> None:
        """Measure, write and keep SAEs that are trained."""
        measured = measure(acts, acts.of_split("valid"), self.tokens, [training.sae for training in trainings], run)
        for training, values in zip(trainings, measured, strict=True):
            unit, config, address = training.unit, training.config, training.unit.needs[0].address
            about = {"acts": address, "layer": acts.layer, "tokens": self.tokens, "d_model": acts.d_model}
            training.write(run.folder(unit), {**about, "n_tokens": training.n_steps * self.batch_size})
            variant, n_features = config.content()["use"], training.sae.d_sae
            run.put(
                unit, "sae", acts=address, variant=variant, n_features=n_features, config=canonical(settings(config))
            )
            run.log(unit, training.n_steps, **values)
        run.keep(*(training.unit for training in trainings), without=[CHECKPOINT])


def _depth(acts: Unit) -> int:
    backbone: BackboneConfig = acts.given["backbone"]
    return backbone.describe().n_blocks


class Clock:
    """Says when some seconds have passed."""

    def __init__(self, seconds: float) -> None:
        """Start it."""
        self.restart(seconds)

    def restart(self, seconds: float) -> None:
        """Be due in so many seconds."""
        self._due = time.monotonic() + seconds

    def due(self) -> bool:
        """Whether they have passed."""
        return time.monotonic() >= self._due


class Training:
    """One SAE while it is trained: its weights, its optimiser, its place in the stream, and who has not fired."""

    def __init__(self, unit: Unit, d_model: int, stats: Stats, n_steps: int, device: str) -> None:
        """Start at step 0 with fresh weights, drawn by the entry's own seed."""
        self.unit, self.n_steps, self.step, self.device = unit, n_steps, 0, device
        self.config: SaeConfig = unit.given["sae"]
        with seeded(self.config.seed, 0):
            self.sae = self.config.build(d_model)
        self.sae.mean.copy_(stats.mean)
        self.sae.scale.fill_(stats.scale)
        self.sae.to(device).train()
        fused = torch.device(device).type in ("cpu", "cuda")
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=self.config.lr, fused=fused)
        self.since_s = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=device)
        self.total = torch.zeros(())
        self.values: dict[str, Any] = {}
        """What there is to log of the last step, not yet as numbers."""

        self.whole = True
        """Whether it stands between two steps."""

    def advance(self, x_nd: Tensor, dead_after: int) -> None:
        """Take one step on normalised tokens.

        The order matters: were the rows brought to norm 1 before Adam's step, they would be saved at another norm,
        and were the gradient clipped before its useless part is taken out, the useful part would be clipped too.
        """
        self.whole = False
        lr, dead_s = learning_rate(self.config, self.step, self.n_steps), self.since_s >= dead_after
        for group in self.adam.param_groups:
            group["lr"] = lr
        with seeded(self.config.seed, self.step + 1, self.device):
            loss = self.sae.loss(x_nd, dead_s)
        total = torch.stack(list(loss.terms.values())).sum()
        self.adam.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        self.total = total.detach()
        if self.config.unit_norm:
            drop_radial(self.sae.W_dec)
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.config.clip)
        self.adam.step()
        if self.config.unit_norm:
            renormalise(self.sae.W_dec)
        self.since_s = torch.where(loss.fired_s > 0, 0, self.since_s + len(x_nd))
        terms = {f"train_{name}": term.detach() for name, term in loss.terms.items()}
        seen = {"train_l0": loss.fired_s.sum() / len(x_nd), "train_dead": dead_s.float().mean(), "lr": lr}
        self.values = {**terms, **seen}
        self.step += 1
        self.whole = True

    def log(self, run: Run) -> None:
        """Note what the last step measured."""
        run.log(self.unit, self.step - 1, **{name: float(value) for name, value in self.values.items()})

    def healthy(self) -> bool:
        """Whether the last loss and all weights are finite."""
        numbers = [self.total, *self.sae.parameters()]
        return all(bool(number.isfinite().all()) for number in numbers)

    def excuse(self) -> str:
        """Say that the loss is no number any more, and what to try."""
        return (
            f"{self.unit.label}: the loss is {float(self.total):g} after {self.step} of {self.n_steps} steps with "
            f"lr {self.config.lr:g}; try a smaller lr, a longer warmup, or clip: 1"
        )

    def checkpoint(self, run: Run) -> None:
        """Write all that going on needs: weights, Adam's moments, the step (also the place in stream and log)."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for index, state in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": tensor for name, tensor in state.items()}
        about = {"step": self.step, "log": run.mark(self.unit)}
        sealed.write(run.folder(self.unit) / CHECKPOINT, {**tensors, "since_s": self.since_s}, about)

    def resume(self, run: Run) -> None:
        """Go on from the unit's checkpoint, if there is one and both it and the log up to it are whole."""
        found = sealed.read(run.folder(self.unit) / CHECKPOINT, self._check)
        if found is None or not run.rewind(self.unit, found[1]["log"]):
            run.rewind(self.unit)
            return
        tensors, about = found
        self.since_s.copy_(tensors.pop("since_s"))
        states: dict[int, dict[str, Tensor]] = {}
        for key in [key for key in tensors if key.startswith("adam.")]:
            _, index, name = key.split(".")
            states.setdefault(int(index), {})[name] = tensors.pop(key)
        self.adam.load_state_dict({**self.adam.state_dict(), "state": states})
        self.sae.load_state_dict({key.removeprefix("sae."): tensor for key, tensor in tensors.items()})
        self.step = about["step"]

    def _check(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """See that it is a checkpoint of such a training: before the first step, Adam has no moments."""
        step = files.number(about.get("step"), 0, self.n_steps, "step")
        if not isinstance(about.get("log"), str):
            raise ValueError("log must be a mark")
        wanted = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for index, parameter in enumerate(self.sae.parameters() if step else ()):
            moments = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros(())}
            wanted |= {f"adam.{index}.{name}": tensor for name, tensor in moments.items()}
        files.check(tensors, files.form({**wanted, "since_s": self.since_s}))

    def write(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the trained SAE for `open_sae`; `about` goes into the file's header beside its settings."""
        header = {**about, "config": self.config.content(), "normalisation": "(x - mean) / scale"}
        _write(folder / FILE, self.sae.state_dict(), header)


def learning_rate(config: SaeConfig, step: int, n_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: a line up, a plateau, a line down to 0 at step n_steps."""
    rise = (step + 1) / config.warmup if step < config.warmup else 1.0
    falling = config.decay * n_steps
    fall = (n_steps - step) / falling if n_steps - step < falling else 1.0
    return config.lr * min(rise, fall)


@torch.no_grad()
def measure(acts: Acts, examples: Examples, tokens: str, saes: Sequence[Sae], run: Run) -> list[dict[str, float]]:
    """Return what `saefw_metrics` brought, of each SAE over the tokens of some images, and n_valid_tokens."""
    rows = [{name: metric() for name, metric in run.metrics.items()} for _ in saes]
    n_tokens = 0
    telling = Clock(PAUSE)
    for sae in saes:
        sae.eval()
    for indices, x_etd in acts.read(tokens, examples, max(1, TOKENS // acts.n_tokens)):
        x_nd = x_etd.flatten(0, 1).to(run.device)
        n_tokens += len(x_nd)
        for sae, metrics in zip(saes, rows, strict=True):
            codes = sae.encode(x_nd)
            batch = x_nd, sae.decode(codes), codes
            if x_nd.device.type == "mps":  # has no float64
                batch = batch[0].cpu(), batch[1].cpu(), Codes(codes.indices.cpu(), codes.values.cpu(), codes.d_sae)
            for metric in metrics.values():
                metric.add(*batch)
        if telling.due():
            run.progress(n_tokens, n_tokens // len(indices) * len(examples), "valid tokens")
            telling.restart(PAUSE)
    return [{**{name: metric.result() for name, metric in row.items()}, "n_valid_tokens": n_tokens} for row in rows]


@torch.no_grad()
def drop_radial(W_dec: Parameter) -> None:
    """Take out of the gradient of each decoder row [s, d] its part along the row: it would only change the norm."""
    if W_dec.grad is not None:
        along_s = (W_dec.grad * W_dec).sum(dim=1, keepdim=True) / W_dec.square().sum(dim=1, keepdim=True)
        W_dec.grad -= along_s * W_dec


@torch.no_grad()
def renormalise(W_dec: Parameter) -> None:
    """Bring each decoder row [s, d] to L2 norm 1."""
    W_dec.div_(W_dec.norm(dim=1, keepdim=True))


@contextmanager
def seeded(seed: int, step: int, device: str = "cpu") -> Iterator[None]:
    """Seed torch's generators by an SAE's seed and a step, so that nothing depends on who trains beside.

    That of the CPU is put back. (`torch.manual_seed` would do, but takes longer than a step of a small SAE.)
    """
    # The CPU's generator looks at the lower 32 bits alone, so the seed has to be in them: an odd factor keeps any
    # two below 2**32 apart.
    number, before = (seed * 0x9E3779B1 + step) % 2**63, torch.get_rng_state()
    torch.default_generator.manual_seed(number)
    if (kind := torch.device(device).type) != "cpu":
        getattr(torch, kind).manual_seed(number)
    try:
        yield
    finally:
        torch.set_rng_state(before)


# Files


def open_sae(config: SaeConfig, folder: Path, device: str = "cpu") -> Sae:
    """Return the trained SAE in a unit's folder, in eval mode, its weights frozen.

    Raises:
        UserError: the file is missing, damaged, or of an SAE with other settings.

    """
    path = folder / FILE
    try:
        tensors, header = _read(path)
        d_model = files.number(header.get("d_model"), 1, WIDEST, "d_model")
        n_numbers = sum(tensor.numel() for tensor in tensors.values())
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); delete {folder} to train it again") from error
    if header.get("config") != config.content():
        raise UserError(f"{path}: holds an SAE with other settings than asked for; delete {folder} to train that one")
    does_not_fit = f"{path}: does not fit its SAE; delete {folder} to train it again"
    # Before one is built: a width that no file of this size can have would cost memory.
    if n_numbers < d_model**2 * config.expansion:
        raise UserError(f"{does_not_fit} ({n_numbers} numbers are too few for a d_model of {d_model})")
    with seeded(config.seed, 0):
        sae = config.build(d_model)
    try:
        files.check(tensors, files.form(sae.state_dict()))
    except ValueError as error:
        raise UserError(f"{does_not_fit} ({error})") from error
    sae.load_state_dict(tensors)
    return sae.to(device).eval().requires_grad_(False)


def _write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(ready, metadata={HEADER: canonical(header)}))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = files.read(path)
    return tensors, files.parsed(metadata.get(HEADER, ""))


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """One: train."""
    return [Train]


@hookimpl
def saefw_metrics() -> dict[str, type[Metric]]:
    """What every SAE is measured by."""
    return {
        "nmse": Nmse,
        "explained_variance": ExplainedVariance,
        "cosine": Cosine,
        "l0": L0,
        "dead": Dead,
        "dense": Dense,
    }
