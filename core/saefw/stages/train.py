"""Trains every SAE of a sweep on one stream of tokens, and measures them.

Shapes: n tokens, d d_model, s d_sae.
"""

import math
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from saefw import peers, samples
from saefw.abreast import Abreast
from saefw.acts import Acts, Stats
from saefw.blocks import resolve
from saefw.live import Live, acts_of
from saefw.metrics import L0, L0P95, Cosine, Dead, Dense, Dense1, ExplainedVariance, L0Median, Nmse, coherence, measure
from saefw.plugin import (
    BackboneConfig,
    Knob,
    Metric,
    Names,
    Pace,
    Run,
    SaeConfig,
    StageConfig,
    Unit,
    UserError,
    hookimpl,
    settings,
    timed,
)
from saefw.sae import Sae
from saefw.shards import DTYPES, check_tokens
from saefw.start import SAMPLE, start
from saefw.stream import BUFFER_MB, Stream
from saefw.trained import write_sae
from saefw.training import CHECKPOINT, Training
from saefw.unit import canonical

TOKENS = 8192
"""How many tokens, about, are measured at once."""

SAMPLED = 16
"""How many valid tokens lie beside a trained SAE, to see that it still gives their codes."""

VALID = 8192
"""How many valid tokens are looked at while an SAE is trained."""

WORTH = 20
"""Between two checkpoints lies so many times what writing one takes, at least."""

NARROW, SOME = 1536, 1024
"""The features of an SAE, and the tokens of a batch, with which the time of a step is tried, unless there are fewer."""

PAUSE = 0.1
"""Seconds between two words about progress."""

Examples = np.ndarray[Any, np.dtype[np.int64]]


class Train(StageConfig):
    """Trains SAEs on the train split of a recording and measures them on its valid split."""

    revision: ClassVar[int] = 2
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

    validate_every: Annotated[float, Knob] = Field(0.1, gt=0, le=1)
    """Share of the steps between two looks at a sample of valid tokens, always the same; 1: only at the end."""

    checkpoint_every: Annotated[float, Knob] = Field(10.0, ge=0)
    """Seconds between two checkpoints; longer where writing them would take more than a twentieth of the time."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit for each recording and SAE.

        Raises:
            UserError: a layer was not recorded, or without these tokens, or not one batch is asked for.

        """
        if self.n_tokens < self.batch_size:
            raise UserError(f"train: n_tokens is {self.n_tokens}, less than one batch of {self.batch_size}")
        shared = {name: value for name, value in self.content().items() if name not in ("use", "layers")}
        members, recordings = run.family("saes", self.saes), self._recordings(run)
        for acts in recordings:
            check_tokens("train: tokens", acts, "all", self.tokens, drawn=self.tokens == "patches")
        listed = {
            Unit(
                "train",
                {**shared, "sae": member.entry.content()},
                needs=(acts,),
                label=f"{member.label}, {acts.label}",
                given={"sae": member.entry},
            ): None
            for acts in recordings
            for member in members
        }
        yield from listed

    def _recordings(self, run: Run) -> list[Unit]:
        units = run.made_by(self.acts, "record")
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
        """Return the bytes of all weights, built without memory for them."""
        config: SaeConfig = unit.given["sae"]
        backbone: BackboneConfig = unit.needs[0].given["backbone"]
        with torch.device("meta"):
            sae = config.fresh(backbone.describe().d_model)
        return sum(tensor.numel() * tensor.element_size() for tensor in sae.state_dict().values())

    def work(self, unit: Unit, run: Run) -> str:
        """Return how many tokens there are to train on."""
        return f"{self.n_tokens:,} tokens"

    def duration(self, units: Sequence[Unit], run: Run, pace: Pace) -> float:
        """Return the seconds of all steps; measuring a valid token counts as one to train on, which takes longer."""
        counts = {acts: samples.sizes(acts, run) for acts in dict.fromkeys(unit.needs[0] for unit in units)}
        total = 0.0
        for unit in units:
            acts, config = unit.needs[0], unit.given["sae"]
            info = samples.shape(acts)
            n_valid = counts[acts]["valid"] * (info.grid[0] * info.grid[1] if self.tokens == "patches" else 1)
            what = f"a token and feature of a {config.use} SAE of {info.d_model}"
            each = pace(what, partial(_step, config, info.d_model, self.batch_size, run.device))
            total += each * config.width(info.d_model) * (self.n_tokens + n_valid)
        for acts, n in counts.items():
            total += samples.reading(pace, acts, run, self._images(acts, n["train"]) + n["valid"])
        return total

    def _images(self, recording: Unit, n_train: int) -> int:
        """Return how many images bring the tokens to train on; no more than there are, if the buffer holds them all."""
        info, held = samples.shape(recording), recording.content["tokens"]
        n_patches = held if isinstance(held, int) else info.grid[0] * info.grid[1]
        n_tokens = 1 if self.tokens == "cls" else n_patches
        vector_bytes = info.d_model * DTYPES[recording.content["dtype"]].itemsize
        needed = math.ceil(self.n_tokens / n_tokens)
        return min(needed, n_train) if n_train * n_tokens * vector_bytes <= BUFFER_MB << 20 else needed

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
        acts = acts_of(recording, run)
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
        valid_nd = next(acts.shuffled(self.tokens, acts.of_split("valid"), VALID, self.seed)).to(run.device).float()
        for training in trainings:
            training.resume(run)
            if not training.step:
                sample = lru_cache(maxsize=1)(lambda: self._sample(acts, stats))
                start(training.sae, training.config, sample)
                if type(training.sae).prepare is not Sae.prepare:
                    training.sae.prepare(sample())
            elif self._validates(training.step, n_steps):
                # It may have been stopped just before; noted twice, it counts once.
                training.validate(run, valid_nd)
        dead_after = self.dead_after or min(math.ceil(self.n_tokens / 10), 10_000_000)
        failed: list[str] = []

        # A stop can leave some a checkpoint ahead of others: the stream starts with the last, the rest join in turn.
        first = min(training.step for training in trainings)
        train = acts.of_split("train")
        if isinstance(acts, Live) and not first:
            image, token = acts.mixing(self.tokens, train, self.batch_size, self.seed)
            for training in trainings:
                if not training.step:
                    run.log(training.unit, 0, same_image=image, same_token=token)
        stream = acts.shuffled(self.tokens, train, self.batch_size, self.seed)
        stream.seek(first)
        try:
            with Abreast(trainings, self.batch_size) as abreast:
                self._steps(run, trainings, abreast, stream, range(first, n_steps), valid_nd, dead_after, part, failed)
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
            self._finish(run, acts, stats, trainings, valid_nd[:SAMPLED])
        return failed

    def _valid(self, run: Run, acts: Acts) -> Iterator[Tensor]:
        """Yield the tokens of the valid split, and say how far they are."""
        telling, images, n = Clock(PAUSE), acts.of_split("valid"), 0
        for indices, x_etd in acts.read(self.tokens, images, max(1, TOKENS // acts.n_tokens)):
            yield x_etd.flatten(0, 1).to(run.device).float()
            n += len(indices)
            if telling.due():
                run.progress(n * x_etd.shape[1], len(images) * x_etd.shape[1], "valid tokens")
                telling.restart(PAUSE)

    def _sample(self, acts: Acts, stats: Stats) -> Tensor:
        """Return some normalised training tokens, always the same."""
        stream = acts.shuffled(self.tokens, acts.of_split("train"), SAMPLE, self.seed)
        x_nd: Tensor = (next(stream)[: stream.n_vectors].float() - stats.mean.float()) / stats.scale
        return x_nd

    def _steps(
        self,
        run: Run,
        trainings: list[Training],
        abreast: Abreast,
        stream: Stream,
        steps: range,
        valid_nd: Tensor,
        dead_after: int,
        part: tuple[int, int],
        failed: list[str],
    ) -> None:
        """Train on the stream to its end; one whose loss is no number leaves `trainings`, and `failed` says why."""
        n_steps = steps.stop
        saving, telling = Clock(self.checkpoint_every), Clock(PAUSE)
        for step in steps:
            x_nd = next(stream)
            logging, checkpointing = self._logs(step, n_steps), saving.due()
            validating = self._validates(step + 1, n_steps)
            stepping = [training for training in trainings if training.step <= step]
            abreast.step(stepping, x_nd, dead_after)
            for training in stepping:
                if (logging or checkpointing or validating) and not training.healthy():
                    failed.append(training.excuse())
                    trainings.remove(training)
                    continue
                if logging:
                    training.log(run)
                if validating:
                    training.validate(run, valid_nd)
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

    def _validates(self, done: int, n_steps: int) -> bool:
        """Whether there is a look at valid tokens after so many steps; after the last one there is a longer one."""
        return done % max(1, round(self.validate_every * n_steps)) == 0 and done < n_steps

    def _finish(self, run: Run, acts: Acts, stats: Stats, trainings: Sequence[Training], sample_nd: Tensor) -> None:
        """Measure, write and keep SAEs that are trained."""
        saes = [training.sae for training in trainings]
        measured = measure(saes, run.metrics, self._valid(run, acts))
        for training, values in zip(trainings, measured, strict=True):
            unit, config, address = training.unit, training.config, training.unit.needs[0].address
            about: dict[str, Any] = {
                "acts": address,
                "layer": acts.layer,
                "tokens": self.tokens,
                "d_model": acts.d_model,
            }
            about |= {"n_tokens": training.n_steps * self.batch_size, "offset_ratio": stats.offset_ratio}
            write_sae(training.sae, config, run.folder(unit), about, sample_nd)
            variant, n_features = config.content()["use"], training.sae.d_sae
            run.put(
                unit, "sae", acts=address, variant=variant, n_features=n_features, config=canonical(settings(config))
            )
            run.log(unit, training.n_steps, **values, **coherence(training.sae.W_dec))
        run.keep(*(training.unit for training in trainings), without=[CHECKPOINT])


def _depth(acts: Unit) -> int:
    backbone: BackboneConfig = acts.given["backbone"]
    return backbone.describe().n_blocks


def narrow(config: SaeConfig, d_model: int) -> SaeConfig:
    """Return a variant with few features, so that it can be tried fast; as it is, where so few do not fit it."""
    few = config.model_copy(update={"expansion": None, "d_sae": min(config.width(d_model), max(d_model, NARROW))})
    try:
        with torch.device("meta"):
            few.build(d_model)
    except UserError:
        return config
    return few


def _step(config: SaeConfig, d_model: int, batch_size: int, device: str) -> float:
    """Return the seconds of a step for a token and feature: of a narrow SAE, on a small batch of made-up tokens."""
    stats = Stats(torch.zeros(d_model), torch.ones(d_model), 1.0, 0.0, 1)
    training = Training(Unit("train", {}, given={"sae": narrow(config, d_model)}), d_model, stats, 1, device)
    x_nd = torch.randn(min(batch_size, SOME), d_model, device=device)

    def step() -> float:
        training.step = 0
        training.advance(x_nd, 2**62)
        return float(training.total)

    d_sae: int = training.sae.d_sae
    return timed(step) / len(x_nd) / d_sae


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
        "l0_median": L0Median,
        "l0_p95": L0P95,
        "dead": Dead,
        "dense": Dense,
        "dense_1pct": Dense1,
        "ev_saev": peers.EvSaev,
        "ev_saelens": peers.EvSaelens,
        "ev_dictionary_learning": peers.EvDictionaryLearning,
        "r2_overcomplete": peers.R2Overcomplete,
        "nmse_openai": peers.NmseOpenAi,
        "fvu_msae": peers.FvuMsae,
        "l2_ratio_saelens": peers.L2RatioSaelens,
        "bias_saelens": peers.BiasSaelens,
    }
