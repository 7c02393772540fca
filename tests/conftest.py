"""What all tests share: mounts, and silence at exit."""

import atexit
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

if "PYTEST_XDIST_WORKER" in os.environ:  # one of as many processes as there are cores; also for what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@atexit.register
def _hush() -> None:
    """Close stderr when all is said.

    pytest holds fixtures, and with them classes of DuckDB, until the interpreter is gone; DuckDB's bindings then report
    them as leaked, sixty lines below the result, though no process that is not a test ever leaks them.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@pytest.fixture
def mounted() -> Iterator[Callable[..., None]]:
    """Mount, and unmount in the end."""
    places: list[Path] = []

    def mount(*args: object) -> None:
        done = subprocess.run(["mount", *map(str, args)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount here ({done.stderr.strip()})")
        if isinstance(args[-1], Path) and args[-1] not in places:
            places.append(args[-1])

    yield mount
    for path in places:
        subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    """The system's Chromium, without a window; tests that need it are skipped where there is none."""
    from playwright.sync_api import sync_playwright

    if not (path := shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")):
        pytest.skip("there is no chromium on this machine")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
