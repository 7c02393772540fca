"""How fast recordings are read, beside plain reading of their files."""

from saefw.bench.frame import Bench


def bench(bench: Bench) -> None:
    """Measure."""
