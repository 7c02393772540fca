"""Several processes on one store, each started from the command line: two that make, one that reads."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fakes
import pytest

from saefw.store import Store

FILE = f"""
saefw: 1
plugins: [{fakes.__file__}]
stages:
  numbers: {{use: numbers, n: [1, 2, 3, 4], seconds: 0.1}}
  all: {{use: sums, of: numbers}}
"""

ALL = ["number 1", "number 2", "number 3", "number 4", "sum of numbers"]

Process = subprocess.Popen[str]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAEFW_BLOCK", "figures")  # the fakes bring a draw of their own
    (tmp_path / "registry.yaml").write_text(FILE)
    return tmp_path


def start(*args: str) -> Process:
    command = [sys.executable, "-m", "saefw", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def halted(base: Path, process: Process) -> None:
    """Let a run make one unit and halt it there, its locks in its hands."""
    while not fakes.made(base) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    assert process.poll() is None


def line_of(process: Process, word: str) -> str:
    """Wait for a line that holds a word; return what was printed until then."""
    assert process.stdout
    said = ""
    while word not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    return said


def labels(base: Path) -> list[str]:
    with Store(base / "runs").db() as db:
        return [row[0] for row in db.execute("SELECT label FROM unit ORDER BY ALL").fetchall()]


def waits(out: str) -> list[str]:
    return re.findall("^.*waiting.*$", out, re.M)


ASK = "SELECT label, count(*) AS n FROM unit JOIN metric USING (unit) GROUP BY ALL ORDER BY ALL"


def test_two_runs_and_a_reader(base: Path) -> None:
    """Each unit is made once; the one that waits says once for whom; a reader sees whole units all the while."""
    with start("run") as first:
        halted(base, first)
        with start("run") as second:
            said = line_of(second, "waiting")
            first.send_signal(signal.SIGCONT)
            seen = []
            while second.poll() is None:
                with start("sql", "--json", ASK) as reader:
                    rows, why = reader.communicate()
                if reader.returncode:
                    none = (
                        "runs/saefw.duckdb: there is no index yet; `saefw run` makes one, `saefw index` rebuilds it\n"
                    )
                    assert why == none
                else:
                    seen.append(json.loads(rows))
            outs = [process.communicate() for process in (first, second)]
    assert [first.returncode, second.returncode, *(err for _, err in outs)] == [0, 0, "", ""]
    assert Counter(fakes.made(base)) == dict.fromkeys(ALL, 1)
    assert labels(base) == ALL
    node = os.uname().nodename
    # The second may overtake it on the way to the next stage.
    assert waits(outs[0][0]) in (
        [], [f"all: waiting for process {second.pid} on {node}, which makes 'sum of numbers'"],
    )  # fmt: skip
    holder = f"process {first.pid} on {node}"
    (line,) = waits(said + outs[1][0])
    assert re.fullmatch(rf"numbers: waiting for {holder}, which makes 'number [1234]'", line)
    # Of what is there all rows are there: two measurements a number.
    assert seen and all(row["n"] == 2 for rows in seen for row in rows)


def test_the_one_waited_for_is_killed(base: Path) -> None:
    """The other takes over what is not made and ends as if it had been alone."""
    with start("run") as first:
        halted(base, first)
        with start("run") as second:
            line_of(second, "waiting")
            first.kill()
            rest, err = second.communicate()
    assert (second.returncode, err) == (0, "")
    assert "Made " in rest
    made = Counter(fakes.made(base))
    # What was being written when the other was killed is made again.
    assert set(made) == set(ALL) and sum(made.values()) <= len(ALL) + 1
    assert labels(base) == ALL
    assert not list(base.glob("runs/*/*.partial")) and not list(base.glob("runs/.saefw*"))
