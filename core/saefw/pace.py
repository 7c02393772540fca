"""Measures how long a piece of work takes on this machine.

What a run will take is guessed from such pieces, each tried for a moment on made-up numbers: nothing is downloaded, and
no backbone is built.
"""

from collections.abc import Callable, Mapping
from time import perf_counter

ENOUGH = 0.1
"""Seconds for which a piece of work is tried, after a first time that does not count."""


class Pace:
    """Seconds by piece of work; each is measured when it is first asked for."""

    def __init__(self, known: Mapping[str, float] | None = None) -> None:
        """Begin with what is known already."""
        self._seconds = dict(known or {})

    def __call__(self, what: str, sample: Callable[[], float]) -> float:
        """Return how long a piece of work takes.

        Args:
            what: its name, the same for the same work alone.
            sample: measures it, mostly by `timed`.

        """
        if what not in self._seconds:
            self._seconds[what] = sample()
        return self._seconds[what]


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes, on average; one that works on a GPU has to wait for it."""
    call()
    start, n = perf_counter(), 0
    while (gone := perf_counter() - start) < ENOUGH or not n:
        call()
        n += 1
    return gone / n
