"""Softmax regression: the stacked fit is the fit one by one, and both are torch's AdamW."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

import saefw_linear
from saefw.plugin import Task
from saefw_linear import Linear, LinearProbe

TASK = Task(5, ("a", "b", "c"))


def clouds(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three Gaussian clouds off the origin, float64 so that the order of a sum hardly shows."""
    generator = torch.Generator().manual_seed(seed)
    y_n = torch.arange(n) % 3
    centres = torch.tensor([[2.0, 0, 0, 1, 0], [0, 2, 0, 0, 1], [0, 0, 2, 1, 1]], dtype=torch.float64)
    noise = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return (centres[y_n] + noise) * torch.tensor([1.0, 10, 0.1, 1, 1]) + 2, y_n


def by_torch(config: Linear, x_nd: Tensor, y_n: Tensor) -> nn.Linear:
    """The oracle: torch's own layer, loss, gradient and optimiser, on shuffled epochs that run into each other."""
    layer = nn.Linear(5, 3, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    decays = [
        {"params": [layer.weight], "weight_decay": config.weight_decay},
        {"params": [layer.bias], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(decays, lr=config.lr)
    z_nd = (x_nd - x_nd.mean(0)) / x_nd.std(0, correction=0) if config.standardise else x_nd
    n, size = len(x_nd), min(config.batch_size, len(x_nd))
    generator = torch.Generator().manual_seed(config.seed)
    epochs = torch.cat([torch.randperm(n, generator=generator) for _ in range(config.steps * size // n + 1)])
    for step in range(config.steps):
        batch = epochs[step * size : (step + 1) * size]
        loss = cross_entropy(layer(z_nd[batch]), y_n[batch])
        for parameter, gradient in zip(
            layer.parameters(), torch.autograd.grad(loss, list(layer.parameters())), strict=True
        ):
            parameter.grad = gradient
        optimiser.step()
    return layer


@pytest.mark.parametrize("batch_size", [25, 1000])
def test_the_stacked_fit_is_torchs_fit_of_each_member(batch_size: int) -> None:
    x_nd, y_n = clouds(61)
    members = [
        Linear(lr=lr, weight_decay=decay, steps=40, batch_size=batch_size)
        for lr in (1e-3, 1e-2, 0.3)
        for decay in (0.0, 0.1, 3.0)
    ]
    fitted = Linear.fit_many(members, TASK, x_nd, y_n, lambda done, total: None)
    for config, probe in zip(members, fitted, strict=True):
        oracle = by_torch(config, x_nd, y_n)
        assert isinstance(probe, LinearProbe)
        # The mean is kept in float32, which Adam's division by small gradients makes visible.
        torch.testing.assert_close(probe.weight.double(), oracle.weight.detach().T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(probe.bias.double(), oracle.bias.detach(), rtol=1e-4, atol=1e-5)


def test_tokens_as_they_are_are_fitted_as_they_are() -> None:
    """As torch's fit without the shift and the scale; in one sweep with a standardised member, and by itself."""
    x_nd, y_n = clouds(61)
    raw, standard = Linear(lr=0.01, steps=40, standardise=False), Linear(lr=0.01, steps=40)
    together = Linear.fit_many([raw, standard], TASK, x_nd, y_n, lambda done, total: None)
    layer = by_torch(raw, x_nd, y_n)
    probe = together[0]
    assert isinstance(probe, LinearProbe)
    torch.testing.assert_close(probe.weight.double(), layer.weight.detach().T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe(x_nd.float()).double(), layer(x_nd).detach(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(probe.weight, together[1].state_dict()["weight"])
    assert "standardise" not in standard.content() and raw.content()["standardise"] is False


@pytest.mark.parametrize("batch_size", [16, 1000])
def test_members_of_a_stack_do_not_see_each_other(batch_size: int) -> None:
    x_nd, y_n = clouds(50)
    members = [
        Linear(lr=0.1, steps=30, batch_size=batch_size),
        Linear(lr=0.01, steps=20, batch_size=batch_size),
        Linear(lr=0.02, weight_decay=1.0, steps=30, batch_size=batch_size),
        Linear(lr=0.1, steps=30, batch_size=batch_size, seed=1),
    ]
    together = Linear.fit_many(members, TASK, x_nd, y_n, lambda done, total: None)
    for member, probe in zip(members, together, strict=True):
        alone = member.fit(TASK, x_nd, y_n)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(probe.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    same = torch.equal(together[0].state_dict()["weight"], together[3].state_dict()["weight"])
    assert same == (batch_size == 1000), "the seed must matter exactly where there are batches to order"


def test_a_decay_that_would_diverge_stays_finite() -> None:
    x_nd, y_n = clouds(60)
    probe = Linear(lr=1.0, weight_decay=10.0, steps=200).fit(TASK, x_nd, y_n)
    assert isinstance(probe, LinearProbe)
    assert probe.weight.abs().max() < 10


def test_a_constant_dimension_is_left_alone() -> None:
    x_nd, y_n = clouds(60)
    x_nd[:, 4] = 0.1
    probe = Linear(steps=50).fit(TASK, x_nd.float(), y_n)
    logits = probe(x_nd.float())
    assert logits.isfinite().all()
    assert (logits.argmax(1) == y_n).double().mean() > 0.8


def test_progress_counts_the_steps_of_all_stacks() -> None:
    x_nd, y_n = clouds(30)
    seen: list[tuple[int, int]] = []
    Linear.fit_many([Linear(steps=3), Linear(steps=2)], TASK, x_nd, y_n, lambda done, of: seen.append((done, of)))
    assert seen == [(i, 5) for i in range(1, 6)]


def test_a_stored_state_gives_the_same_logits() -> None:
    x_nd, y_n = clouds(30)
    probe = Linear(steps=5).fit(TASK, x_nd.float(), y_n)
    again = Linear(steps=5).build(TASK)
    again.load_state_dict(probe.state_dict())
    assert torch.equal(again(x_nd.float()), probe(x_nd.float()))


class Largest(TorchFunctionMode):
    """Notes the bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made._base is None and not any(made is arg for arg in args):
            self.bytes = max(self.bytes, made.nbytes)
        return made


def test_no_copy_of_the_tokens_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in float64, nor standardised, nor of their classes: with many tokens a batch is all there is."""
    monkeypatch.setattr(saefw_linear, "PART", 1000)
    x_nd, y_n = clouds(30_000)
    x_nd = x_nd.float()
    with Largest() as largest:
        Linear(steps=3, batch_size=64).fit(Task(5, tuple(map(str, range(50)))), x_nd, y_n)
    # The order of the tokens, 8 bytes each.
    assert largest.bytes == 8 * len(x_nd) < x_nd.nbytes
