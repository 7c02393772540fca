"""A step of each SAE of a sweep, on the same tokens, several SAEs at a time where that is quicker.

The step of one SAE does not keep all cores busy: between its products lie sums and searches that are short, or that one
thread does. Several at a time, each on its share of the threads, fill them. What comes out is what each would give
alone, as no sum of a step hangs on the number of threads (see `saefw.sums`; in the libraries that torch uses, those of
a product were not seen to either). And the same sweep on the same machine, gone on with, has the same shares again.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from threading import Barrier
from typing import Self

import torch
from torch import Tensor

from saefw.sparse import Scratch
from saefw.training import Training

MANY = 1 << 22
"""How many pre-activations a batch has at least: with fewer a step is mostly Python, and of that one thread runs at a
time."""

AT_ONCE = 4
"""How many take a step at once, at most: what of a step is Python, 2 ms and more, one waits for at a time."""

PATIENCE = 1.0
"""Seconds that a stop waits for steps that have begun: what is whole by then must be saved before the process ends."""


class Abreast:
    """Takes steps of some SAEs; to be closed, as it has threads."""

    def __init__(self, trainings: Sequence[Training], batch_size: int) -> None:
        """Choose who is taken together with others, for batches of so many tokens."""
        n_threads = torch.get_num_threads()
        able = [training for training in trainings if _fits(training, batch_size)]
        n = max(1, min(n_threads, len(able), AT_ONCE))
        self._able = {id(training) for training in able} if n > 1 else set()
        self._spare = [Scratch() for _ in range(n)]
        self._pool = ThreadPoolExecutor(n, "saefw-step", _begin, (n_threads // n,))
        if n > 1:
            all_begun = Barrier(n)
            try:
                list(self._pool.map(lambda _: all_begun.wait(), range(n)))
            finally:
                all_begun.abort()
                torch.set_num_threads(n_threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False)

    def step(self, trainings: Sequence[Training], x_nd: Tensor, dead_after: int) -> None:
        """Take one step of each of the SAEs, or of some, on tokens as they were recorded."""
        if not trainings:
            return
        first = trainings[0]

        def normalised(recorded_nd: Tensor) -> Tensor:
            # Of one recording all have the same mean and scale.
            found_nd: Tensor = first.sae.normalise(recorded_nd.to(first.device).float())
            return found_nd

        # Not here: the threads that torch would use for it go on spinning a while, in the way of what follows.
        x_nd = self._pool.submit(normalised, x_nd).result() if self._able else normalised(x_nd)

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
        """Make all calls, several at a time; who is told to stop comes back soon, and when no further one can begin."""
        futures = [self._pool.submit(call) for call in calls]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures, PATIENCE)


def _begin(n_threads: int) -> None:
    """Give the calling thread so many of torch's threads."""
    torch.set_num_threads(n_threads)
    # When first asked, a thread takes what was set last, in whichever thread that was.
    torch.get_num_threads()


def _fits(training: Training, batch_size: int) -> bool:
    """Whether a step is quicker beside another, and does not draw what the other should."""
    worth = batch_size * training.sae.d_sae >= MANY
    return worth and training.device == "cpu" and not training.sae.may_draw()
