"""What is checked of a probe.

Shapes: n tokens, d d_model, c classes.
"""

import torch
from torch import Tensor

from saefw.plugin import Probe, ProbeConfig, Task
from saefw.testing.contract import described, equal, expect, near, stored
from saefw.testing.entry import check_entry

N_FIT = 180
"""How many of the tokens it is fitted to."""


def check_probe(config: ProbeConfig) -> None:
    """Check a probe on three well separated clouds: it learns them, its state is all of it, a sweep changes nothing."""
    check_entry(config)
    task = Task(8, ("red", "green", "blue"))
    generator = torch.Generator().manual_seed(0)
    y_n = torch.arange(240) % 3
    x_nd = 5 + torch.randn(240, 8, generator=generator) + 6 * torch.eye(8)[y_n]
    given_nd, labels_n = x_nd[:N_FIT].clone(), y_n[:N_FIT]
    probe = _fitted(config, task, given_nd, labels_n)
    equal("probe.untouched", given_nd, x_nd[:N_FIT])
    for n in (60, 1, 0):
        _check_logits(probe, x_nd[N_FIT : N_FIT + n], 3)
    logits_nc = probe(x_nd[N_FIT:])
    right = float((logits_nc.argmax(dim=1) == y_n[N_FIT:]).double().mean())
    expect("probe.learns", right >= 0.9, "90 %", f"{right:.0%}")
    given = float(logits_nc.softmax(dim=1)[torch.arange(len(logits_nc)), y_n[N_FIT:]].mean())
    expect("probe.calibration", given > 1 / 3, "more than 1 of 3", f"{given:.3f}")
    equal("probe.again", _fitted(config, task, given_nd, labels_n)(x_nd), probe(x_nd))
    wider = _fitted(config, Task(8, tuple("abcde")), given_nd, labels_n)
    _check_logits(wider, x_nd[:4], 5, "with two classes without tokens, ")

    empty = config.build(task)
    expect("probe.type", isinstance(empty, Probe), "a Probe", type(empty).__name__, "build()")
    empty.load_state_dict(stored(probe.state_dict()))
    equal("probe.stored", empty.eval()(x_nd), probe(x_nd))
    told: list[tuple[int, int]] = []
    sweep = type(config).fit_many(
        [config, config], task, given_nd, labels_n, lambda done, total: told.append((done, total))
    )
    expect("probe.sweep", len(sweep) == 2, "2 probes", len(sweep))
    for i, one in enumerate(sweep):
        near("probe.sweep", one(x_nd), probe(x_nd), f"member {i}")
    rises = bool(told) and told[-1][0] == told[-1][1] and told == sorted(told)
    expect("probe.steps", rises, "(1, n) to (n, n)", told[-3:])


def _check_logits(probe: Probe, x_nd: Tensor, n_classes: int, where: str = "") -> None:
    logits_nc, wanted = probe(x_nd), f"float32 {[len(x_nd), n_classes]}"
    where += f"of {len(x_nd)} tokens"
    expect("probe.logits", described(logits_nc) == wanted, wanted, described(logits_nc), where)
    expect("probe.logits", bool(logits_nc.isfinite().all()), "finite numbers", "NaN or infinity", where)


def _fitted(config: ProbeConfig, task: Task, x_nd: Tensor, y_n: Tensor) -> Probe:
    probe = config.fit(task, x_nd, y_n)
    expect("probe.type", isinstance(probe, Probe), "a Probe", type(probe).__name__, "fit()")
    return probe.eval()
