"""Torch's generators, of which a process has one a device: seeded, so that chance is each SAE's own, or untouched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from saefw.errors import UserError


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


@contextmanager
def untouched(who: Callable[[], str]) -> Iterator[None]:
    """See that nobody draws from the CPU's generator, as others may be at work at the same time.

    Raises:
        UserError: somebody did; `who()` is said to have, which is not asked before.

    """
    before = torch.get_rng_state()
    yield
    if not torch.equal(torch.get_rng_state(), before):
        raise UserError(
            f"{who()}: torch's generator was drawn from during a training step; if by the step, say `draws = True`"
        )
