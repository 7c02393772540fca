"""Softmax regression on one token; a whole sweep is fitted as one stacked problem.

Shapes: m members, n tokens, b tokens of a batch, d d_model, c classes; `W_cmd` has shape [c, m, d].
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Annotated, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from saefw.plugin import Late, Probe, ProbeConfig, Task, hookimpl

BETAS = (0.9, 0.999)
EPS = 1e-8
"""AdamW's usual constants (Loshchilov and Hutter 2019, arXiv:1711.05101), as in torch.optim.AdamW."""

PART = 1 << 16
"""Tokens that are summed in float64 at a time."""


class Linear(ProbeConfig):
    """Softmax regression, by default on standardised tokens, fitted by AdamW from weights at zero."""

    use: Literal["linear"] = "linear"

    lr: float = Field(0.01, gt=0)
    """Learning rate of AdamW, constant."""

    weight_decay: float = Field(0.01, ge=0)
    """Decoupled decay of the weights, not of the bias: each step takes away lr x weight_decay of them, at most all."""

    steps: int = Field(400, gt=0)
    """Steps of AdamW."""

    batch_size: int = Field(4096, gt=0)
    """Tokens a step; all of them if there are no more than that."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Of the order of the batches; without effect when every step sees all tokens."""

    standardise: Annotated[bool, Late] = True
    """Shift and scale every dimension to mean 0 and standard deviation 1 over the train tokens, which the probe keeps
    and does to all it reads; false: fit to the tokens as they are."""

    def build(self, task: Task) -> "LinearProbe":
        """Return one with all weights at zero."""
        return LinearProbe(task.d_model, len(task.classes))

    def fit(self, task: Task, x_nd: Tensor, y_n: Tensor) -> Probe:
        """Return one fitted to tokens x (float32) and labels y (int64)."""
        return self.fit_many([self], task, x_nd, y_n, lambda done, total: None)[0]

    @classmethod
    def fit_many(
        cls, members: Sequence[ProbeConfig], task: Task, x_nd: Tensor, y_n: Tensor, done: Callable[[int, int], None]
    ) -> list[Probe]:
        """Fit all members at once, each with its own lr and weight decay.

        Members that differ in steps, batch size, seed or standardisation see other batches and are stacked apart.

        Args:
            members: of this class.
            task: what to learn.
            x_nd: float32 [n, d], on the device to compute on.
            y_n: int64 [n].
            done: told (steps done, steps in all).

        """
        linear = cast("Sequence[Linear]", members)
        as_is = torch.zeros_like(x_nd[0]), torch.ones_like(x_nd[0])
        standard = _standard(x_nd) if any(member.standardise for member in linear) else as_is
        order = sorted(range(len(linear)), key=lambda i: linear[i]._schedule())
        stacks = [list(stack) for _, stack in groupby(order, key=lambda i: linear[i]._schedule())]
        total, before = sum(linear[stack[0]].steps for stack in stacks), 0
        fitted: dict[int, Probe] = {}
        for stack in stacks:
            mean_d, std_d = standard if linear[stack[0]].standardise else as_is
            tokens = Tokens(x_nd, y_n, mean_d, std_d)
            W_cmd, b_cm = _fit([linear[i] for i in stack], len(task.classes), tokens, done, before, total)
            before += linear[stack[0]].steps
            for place, i in enumerate(stack):
                probe = linear[i].build(task).to(x_nd.device)
                state = {"weight": W_cmd[:, place].T, "bias": b_cm[:, place], "mean": mean_d, "std": std_d}
                probe.load_state_dict(state)
                fitted[i] = probe.requires_grad_(False).eval()
        return [fitted[i] for i in range(len(linear))]

    def _schedule(self) -> tuple[int, int, int, bool]:
        """What members of one stack have in common."""
        return self.steps, self.batch_size, self.seed, self.standardise


class LinearProbe(Probe):
    """(x - mean) / std, times the weights, plus the bias."""

    mean: Tensor
    std: Tensor

    def __init__(self, d_model: int, n_classes: int) -> None:
        """Start with weights at zero, mean 0 and std 1."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model, n_classes))
        self.bias = nn.Parameter(torch.zeros(n_classes))
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("std", torch.ones(d_model))

    def forward(self, x_nd: Tensor) -> Tensor:
        """Return the logits, float32 [n, c]."""
        return ((x_nd - self.mean) / self.std) @ self.weight + self.bias


class Tokens(NamedTuple):
    """What is fitted; standardised batch by batch, since a copy of all would double the memory."""

    x_nd: Tensor
    y_n: Tensor
    mean_d: Tensor
    std_d: Tensor

    def batch(self, some: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return some tokens, standardised, and their labels."""
        return (self.x_nd[some] - self.mean_d) / self.std_d, self.y_n[some]


def _standard(x_nd: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each dimension, float32 [d], summed in float64; 1 where it is constant."""
    wide = torch.float64 if x_nd.device.type != "mps" else torch.float32
    # Two passes over parts are as exact as a float64 copy of all, and hold none.
    mean_d = _summed(part_nd.to(wide) for part_nd in torch.split(x_nd, PART)) / len(x_nd)
    var_d = _summed((part_nd.to(wide) - mean_d).square() for part_nd in torch.split(x_nd, PART)) / len(x_nd)
    std_d = var_d.sqrt()
    # A constant float32 column leaves a rounding error of its own size, not an exact zero.
    constant = std_d <= 1e-6 * mean_d.abs()
    return mean_d.float(), torch.where(constant, 1.0, std_d).float()


def _summed(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum over the rows of all parts, [d]."""
    return torch.stack([part_nd.sum(dim=0) for part_nd in parts]).sum(dim=0)


def _fit(
    members: Sequence[Linear],
    n_classes: int,
    tokens: Tokens,
    done: Callable[[int, int], None],
    before: int,
    total: int,
) -> tuple[Tensor, Tensor]:
    """Run AdamW on the mean cross-entropy of each member; the gradient of softmax regression is written out.

    Returns weights [c, m, d] and biases [c, m].
    """
    (n, d), m, device = tokens.x_nd.shape, len(members), tokens.x_nd.device
    steps, batch_size, seed = members[0].steps, members[0].batch_size, members[0].seed
    lr_m1 = tokens.x_nd.new_tensor([member.lr for member in members])[:, None]
    # A factor below zero would make the weights grow without bound, as torch's AdamW does when lr x decay > 2.
    kept_m1 = tokens.x_nd.new_tensor([max(0.0, 1 - member.lr * member.weight_decay) for member in members])[:, None]
    # Classes first: one matmul serves all members, and a softmax over the first axis runs along memory.
    W_cmd, b_cm1 = tokens.x_nd.new_zeros(n_classes, m, d), tokens.x_nd.new_zeros(n_classes, m, 1)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (W_cmd, b_cm1)]
    # Taken once: memory that is asked for anew in every step costs more than what is computed in it.
    spare = [(torch.empty_like(p), torch.empty_like(p)) for p in (W_cmd, b_cm1)]
    whole = tokens.batch(slice(None)) if n <= batch_size else None
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        if whole:
            z_bd, y_b = whole
        else:
            while len(left) < batch_size:
                left = torch.cat([left, torch.randperm(n, generator=generator)])
            batch, left = left[:batch_size].to(device), left[batch_size:]
            z_bd, y_b = tokens.batch(batch)
        logits_cmb = (W_cmd.view(-1, d) @ z_bd.T).view(n_classes, m, -1).add_(b_cm1)
        error_cmb = logits_cmb.softmax(dim=0)
        error_cmb[y_b, :, torch.arange(len(y_b), device=device)] -= 1
        error_cmb /= len(y_b)
        gradients = ((error_cmb.view(n_classes * m, -1) @ z_bd).view_as(W_cmd), error_cmb.sum(dim=2, keepdim=True))
        W_cmd.mul_(kept_m1)
        for parameter, gradient, (first, second), (divisor, change) in zip(
            (W_cmd, b_cm1), gradients, moments, spare, strict=True
        ):
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            torch.div(second, 1 - BETAS[1] ** step, out=divisor).sqrt_().add_(EPS)
            torch.div(first, 1 - BETAS[0] ** step, out=change).mul_(lr_m1).div_(divisor)
            parameter.sub_(change)
        done(before + step, total)
    return W_cmd, b_cm1[:, :, 0]


@hookimpl
def saefw_probes() -> list[type[ProbeConfig]]:
    """One: linear."""
    return [Linear]
