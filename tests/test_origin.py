"""Tests that the code of a file has one hash, whatever its comments, and whoever else parses Python meanwhile."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saefw import origin


def test_comments_docstrings_and_layout_are_no_code(tmp_path: Path) -> None:
    file = tmp_path / "my.py"
    told = []
    for text in (
        "def f(x):\n    return x + 1\n",
        '"""Adds."""\n\n\ndef f(\n    x,\n):\n    """Add one."""\n    return (x + 1)  # to it\n',
        "def f(x):\n    return x + 2\n",
        "def f(x:\n",
    ):
        file.write_text(text)
        told.append(origin.code(file))
    assert told[0] == told[1] != told[2]
    assert len(told[0]) == len(told[2]) == 8
    assert told[3] == origin.code(tmp_path / "none.py") == ""


def test_a_file_is_parsed_once_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my.py"
    parsed: list[bytes] = []
    real = origin._parsed

    def noted(text: bytes) -> ast.Module:
        parsed.append(text)
        return real(text)

    monkeypatch.setattr(origin, "_parsed", noted)
    file.write_text("x = 1\n")
    first = [origin.code(file) for _ in range(3)]
    file.write_text("x = 2\n")
    os.utime(file, ns=(1, 1))  # a clock may be too coarse to tell two writes apart
    assert origin.code(file) not in first
    assert parsed == [b"x = 1\n", b"x = 2\n"]


def test_a_thread_that_parses_too_disturbs_nothing() -> None:
    code = """if True:
        import ast, gc, threading, time
        from contextlib import suppress
        from pathlib import Path
        from saefw import origin

        texts = [file.read_bytes() for file in sorted(Path(origin.__file__).parent.glob("*.py"))]
        quiet = [ast.dump(origin._parsed(text)) for text in texts]
        stop = threading.Event()

        def parse():
            while not stop.is_set():
                with suppress(SystemError):
                    ast.parse(texts[0])

        gc.callbacks.append(lambda *_: time.sleep(0))  # so the threads take turns in the middle of a tree
        gc.set_threshold(50)
        other = threading.Thread(target=parse)
        other.start()
        ours = []

        def look():
            ours.append([ast.dump(origin._parsed(text)) for text in texts])

        us = [threading.Thread(target=look) for _ in range(2)]
        try:
            for thread in us:
                thread.start()
            for thread in us:
                thread.join()
            assert ours == [quiet, quiet]
        finally:
            stop.set()
            other.join()
        assert gc.isenabled()
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
