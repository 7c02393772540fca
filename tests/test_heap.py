"""Freed memory is kept for the next step, and given back at the end."""

import ctypes
import resource
import subprocess
import sys

import numpy as np
import pytest

from saefw import heap


def faults() -> int:
    """Return how often the process waits for pages while 64 MB are asked for, filled and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(8 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_what_is_freed_is_kept_until_the_end() -> None:
    """Asked for again, memory is there without a page; at the end, and after a fault too, its pages are given back."""
    with pytest.raises(ZeroDivisionError), heap.kept():
        faults()
        kept = faults()
        1 / 0  # noqa: B018
    assert kept < 16 <= faults()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_what_another_thread_frees_is_kept_too() -> None:
    """Also a piece that would not fit a heap of its own."""
    said = subprocess.run([sys.executable, "-c", THREAD], capture_output=True, text=True, check=True).stdout
    assert int(said) < 16


THREAD = """
import resource, threading
import numpy as np
from saefw import heap
def work():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(16 << 20)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
faults = []
with heap.kept():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
print(faults[-1])
"""
