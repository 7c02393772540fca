"""A step of each SAE of a sweep, on the same tokens, two SAEs at a time where that is quicker.

The step of one small SAE does not keep all cores busy: between its products lie sums and searches that are short, or
that one thread does. Two at a time fill them. Each has all threads of torch, as it would have alone, and so the same
sums in the same order.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Self

import torch
from torch import Tensor

from saefw.near import LARGE
from saefw.sparse import Scratch
from saefw.training import Training

MANY = 1 << 22
"""How many pre-activations a batch has at least: with fewer a step is mostly Python, and of that one thread runs at a
time."""


class Abreast:
    """Takes steps of some SAEs; to be closed, as it has threads."""

    def __init__(self, trainings: Sequence[Training], batch_size: int) -> None:
        """Choose who is taken two at a time, for batches of so many tokens."""
        able = [training for training in trainings if _fits(training, batch_size)]
        self._able = {id(training) for training in able} if len(able) > 1 else set()
        self._spare = [Scratch(), Scratch()]
        self._pool = ThreadPoolExecutor(len(self._spare), "saefw-step")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def step(self, trainings: Sequence[Training], x_nd: Tensor, dead_after: int) -> None:
        """Take one step of each of the SAEs, or of some, on tokens as they were recorded."""
        if not trainings:
            return
        # Of one recording all have the same mean and scale.
        x_nd = trainings[0].sae.normalise(x_nd.to(trainings[0].device).float())

        def advance(training: Training) -> None:
            # Memory for pre-activations goes with a step, not with an SAE: so there is no more than is used at once.
            scratch = training.sae.scratch = self._spare.pop()
            try:
                training.advance(x_nd, dead_after)
            finally:
                self._spare.append(scratch)

        self._all([partial(advance, training) for training in trainings if id(training) in self._able])
        for training in trainings:
            if id(training) not in self._able:
                advance(training)

    def _all(self, calls: Sequence[Callable[[], None]]) -> None:
        """Make all calls, two at a time; who is told to stop comes back when none is in the middle of one."""
        futures = [self._pool.submit(call) for call in calls]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)


def _fits(training: Training, batch_size: int) -> bool:
    """Whether a step is quicker beside another: it is not if both do not fit the processor's cache, or either draws."""
    sae = training.sae
    small = sae.W_enc.numel() < LARGE and batch_size * sae.d_sae >= MANY
    return small and training.device == "cpu" and torch.get_num_threads() > 1 and not sae.may_draw()
