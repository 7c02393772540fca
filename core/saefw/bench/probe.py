"""How long a sweep of linear probes takes, beside fitting its members one by one.

As many tokens, classes and members as the classification experiment has on Caltech-101.
"""

from typing import cast

import torch

from saefw.bench.frame import Bench, at_least, at_most
from saefw.catalog import Catalog
from saefw.plugin import Probe, ProbeConfig, Task

N, D_MODEL, CLASSES, EPOCHS, BATCH = 3000, 768, 101, 20, 512
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)
DECAYS = (0.01, 0.1, 1.0, 10.0, 100.0)

SECONDS = 10.0
"""The whole sweep may take so long on two cores."""


def bench(bench: Bench) -> None:
    """Measure the fit of a sweep at once, and of one of its members alone."""
    cls = cast(type[ProbeConfig], Catalog().lookup("probes")["linear"])
    steps = EPOCHS * -(-N // BATCH)
    settings = [{"lr": lr, "weight_decay": decay} for lr in RATES for decay in DECAYS]
    members = [cls.model_validate({**each, "steps": steps, "batch_size": BATCH}) for each in settings]
    generator = torch.Generator().manual_seed(0)
    y_n = torch.arange(N) % CLASSES
    x_nd = torch.randn(N, D_MODEL, generator=generator) + 0.3 * torch.randn(CLASSES, D_MODEL, generator=generator)[y_n]
    task = Task(D_MODEL, tuple(map(str, range(CLASSES))))

    def fitted(n: int) -> list[Probe]:
        return cls.fit_many(members[:n], task, x_nd, y_n, lambda done, total: None)

    taken = bench.seconds("fits", {"all": lambda: fitted(len(members)), "one": lambda: fitted(1)})
    bench.part(f"{N:,} tokens of {D_MODEL}, {CLASSES} classes, {EPOCHS} epochs in batches of {BATCH}, float32")
    bench.row("one by one", taken["one"] * len(members), "s")
    bench.row(f"{len(members)} probes at once", taken["all"], "s", "one by one", at_most(1.0))
    bench.row(f"{len(members)} probes, in all", taken["all"], "s", bound=at_most(SECONDS, "value"))
    # A fit that learns nothing would be fast.
    right = max(float((probe(x_nd).argmax(dim=1) == y_n).double().mean()) for probe in fitted(len(members)))
    bench.row("of train right, the best", 100 * right, "%", bound=at_least(90, "value"))
