"""One SAE while it is trained, and its checkpoint.

Shapes: n tokens, d d_model, s d_sae.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from saefw import sealed
from saefw import tensors as files
from saefw.acts import Stats
from saefw.chance import seeded, untouched
from saefw.metrics import measure
from saefw.origin import whose
from saefw.plugin import PenalisedConfig, Run, SaeConfig, Unit

CHECKPOINT = "checkpoint.safetensors"

HELD = 1 << 18
"""How many numbers of the decoder fit a processor's cache, about, together with their gradient."""


class Training:
    """One SAE while it is trained: its weights, its optimiser, its place in the stream, and who has not fired."""

    def __init__(self, unit: Unit, d_model: int, stats: Stats, n_steps: int, device: str) -> None:
        """Start at step 0 with fresh weights, drawn by the entry's own seed."""
        self.unit, self.n_steps, self.step, self.device = unit, n_steps, 0, device
        self.config: SaeConfig = unit.given["sae"]
        with seeded(self.config.seed, 0):
            self.sae = self.config.fresh(d_model)
        self.sae.mean.copy_(stats.mean)
        self.sae.scale.fill_(stats.scale)
        self.sae.to(device).train()
        fused = torch.device(device).type in ("cpu", "cuda")
        self.adam = torch.optim.Adam([inline(p) for p in self.sae.parameters()], lr=self.config.lr, fused=fused)
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
        self.sae.zero_grad()
        lr, dead_s = learning_rate(self.config, self.step, self.n_steps), self.since_s >= dead_after
        for group in self.adam.param_groups:
            group["lr"] = lr
        with self._chance():
            loss = self.sae.loss(x_nd, dead_s)
        if isinstance(self.config, PenalisedConfig) and "penalty" in loss.terms:
            loss.terms["penalty"] = loss.terms["penalty"] * risen(self.step, self.config.sparsity_warmup)
        total = torch.stack(list(loss.terms.values())).sum()
        total.backward()  # type: ignore[no-untyped-call]
        self.total = total.detach()
        if self.config.unit_norm:
            drop_radial(self.sae.W_dec)
        if self.config.clip is not None:
            clip(self.sae.parameters(), self.config.clip)
        for mine, parameter in zip(self.adam.param_groups[0]["params"], self.sae.parameters(), strict=True):
            mine.grad = None if parameter.grad is None else inline(parameter.grad)
        self.adam.step()
        # Gradients are not kept until the next step: those of a sweep would take as much memory as its weights.
        self.adam.zero_grad()
        self.sae.zero_grad()
        if self.config.unit_norm:
            renormalise(self.sae.W_dec)
        self.sae.settle()
        self.since_s = torch.where(loss.fired_s > 0, 0, self.since_s + len(x_nd))
        terms = {f"train_{name}": term.detach() for name, term in loss.terms.items()}
        seen = {"train_l0": loss.fired_s.sum() / len(x_nd), "train_dead": dead_s.float().mean(), "lr": lr}
        self.values = {**terms, **seen}
        self.step += 1
        self.whole = True

    def _chance(self) -> AbstractContextManager[None]:
        """Give a step torch's generator, seeded by its SAE and number, or see that it needs none."""
        if self.device == "cpu" and not self.sae.may_draw():
            return untouched(partial(whose, type(self.sae)))
        return seeded(self.config.seed, self.step + 1, self.device)

    def log(self, run: Run) -> None:
        """Note what the last step measured."""
        run.log(self.unit, self.step - 1, **{name: float(value) for name, value in self.values.items()})

    def validate(self, run: Run, valid_nd: Tensor) -> None:
        """Note the metrics of recorded tokens that it is not trained on."""
        (values,) = measure([self.sae], run.metrics, [valid_nd])
        self.sae.train()
        run.log(self.unit, self.step, **values)

    def healthy(self) -> bool:
        """Whether the last loss and all weights are finite."""
        numbers = [self.total, *self.sae.parameters()]
        return all(bool(number.isfinite().all()) for number in numbers)

    def excuse(self) -> str:
        """Say that the loss is no number any more, by which of its terms, and what to try."""
        terms = {name.removeprefix("train_"): float(x) for name, x in self.values.items() if name.startswith("train_")}
        wrong = [f"{name} is {x:g}" for name, x in terms.items() if not math.isfinite(x)]
        more = ", a longer warmup, or clip: 1" if self.config.clip is None else " or a longer warmup"
        return (
            f"{self.unit.label}: the loss is {float(self.total):g} after {self.step} of {self.n_steps} steps with "
            f"lr {self.config.lr:g}{' (' + ', '.join(wrong) + ')' if wrong else ''}; "
            f"try a smaller lr{more}"
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
        for index, parameter in enumerate(self.adam.param_groups[0]["params"] if step else ()):
            moments = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros(())}
            wanted |= {f"adam.{index}.{name}": tensor for name, tensor in moments.items()}
        files.check(tensors, files.form({**wanted, "since_s": self.since_s}))


def learning_rate(config: SaeConfig, step: int, n_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: a line up, a plateau, and the fall to 0 at step n_steps."""
    left = 1.0 if config.schedule == "constant" else min(1.0, (n_steps - step) / (config.decay * n_steps))
    fall = (1 - math.cos(math.pi * left)) / 2 if config.schedule == "cosine" else left
    return config.lr * min(risen(step, config.warmup), fall)


def risen(step: int, warmup: int) -> float:
    """Return which share of a weight holds at a step, counted from 0, that rises on a line over some steps."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def inline(x: Tensor) -> Tensor:
    """Return a tensor as it lies in memory, W_enc as [s, d]: Adam's one pass over it needs no copy then."""
    return x.detach() if x.is_contiguous() else x.detach().T


def clip(parameters: Iterable[Parameter], largest: float) -> None:
    """Scale all gradients down to a common L2 norm; a smaller one costs no pass over them."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if norm > largest:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)


@torch.no_grad()
def drop_radial(W_dec: Parameter) -> None:
    """Take out of the gradient of each decoder row [s, d] its part along the row: it would only change the norm."""
    if W_dec.grad is None:
        return
    # A few rows at a time, so that they are read from memory once.
    n_rows = max(1, HELD // W_dec.shape[1])
    for rows, gradient in zip(torch.split(W_dec, n_rows), torch.split(W_dec.grad, n_rows), strict=True):
        along = (gradient * rows).sum(dim=1, keepdim=True) / rows.square().sum(dim=1, keepdim=True)
        gradient.addcmul_(along, rows, value=-1)


@torch.no_grad()
def renormalise(W_dec: Parameter) -> None:
    """Bring each decoder row [s, d] to L2 norm 1."""
    W_dec.div_(W_dec.norm(dim=1, keepdim=True))
