"""What benches have in common: rounds in turn, rows and their verdicts, the table, the file. No time is asserted."""

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from saefw.bench import frame, read
from saefw.bench.command import BENCHES
from saefw.bench.frame import Bench, Bound, Row, at_least, at_most, machine, memory, peak_memory
from saefw.cli import app
from saefw.errors import UserError

TINY = """
from saefw.bench.frame import at_least, at_most

def bench(bench):
    file = bench.folder / "numbers"
    bench.room(1000)
    file.write_bytes(bytes(1000))
    taken = bench.seconds("reads", {"whole": file.read_bytes, "twice": lambda: file.read_bytes() + file.read_bytes()})
    bench.part("A file of 1,000 bytes")
    bench.row("read at once", 1000 / taken["whole"], "bytes/s")
    bench.row("read two times", 1000 / taken["twice"], "bytes/s", "read at once", at_least(1e-9))
    bench.row("read on the moon", 1e9, "bytes/s", bound=at_least(1e9, "value"), reason="this machine is not there")
    bench.row("its size", file.stat().st_size, "bytes", bound=at_most(999, "value"))
"""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A bench `tiny`; returns the folder for temporary files, which is empty."""
    module = ModuleType("saefw.bench.tiny")
    exec(compile(TINY, "tiny.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "saefw.bench.tiny", module)
    monkeypatch.setitem(BENCHES, "tiny", "a small file")
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def called(*args: str, exit_code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).invoke(app, ["bench", *args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result.stderr if exit_code else result.stdout


def test_table_and_file(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    shown = called("tiny", "--rounds", "3", "--json", str(file))
    assert list(tiny.iterdir()) == []
    lines = [line.rstrip() for line in shown.splitlines()]
    assert max(map(len, lines)) <= 80 and "\x1b" not in shown
    here = machine()
    assert lines[0].startswith(f"{here.cpu}, {here.cores} core") and lines[0].endswith("; median of 3")
    start = lines.index("A file of 1,000 bytes")
    words = [line.split() for line in lines[start + 1 :]]
    assert words[0] == ["value", "unit", "reference", "ratio", "bound", "holds"]
    assert lines[start + 3].startswith("read at once") and lines[start + 4].startswith("  read two times")
    assert words[3][-3:] == [">=", "0.00", "yes"]
    assert words[4] == "read on the moon 1G bytes/s >= 1G cannot tell".split()
    assert words[5] == "its size 1000 bytes <= 999 no".split()
    assert lines[start + 7] == "read on the moon: this machine is not there"

    once, twice, moon, size = json.loads(file.read_text())
    keys = "bench part name value unit against reference bound reason ratio holds cpu cores threads"
    assert list(once) == keys.split()
    assert all((row["bench"], row["part"]) == ("tiny", "A file of 1,000 bytes") for row in (once, twice, moon, size))
    assert (once["reference"], once["ratio"], once["bound"], once["holds"], once["reason"]) == (None,) * 5
    assert (twice["against"], twice["reference"]) == ("read at once", once["value"])
    assert twice["ratio"] == twice["value"] / once["value"] > 0
    assert (twice["bound"], twice["holds"]) == ("ratio >= 1e-09", True)
    assert (moon["bound"], moon["holds"], moon["reason"]) == ("value >= 1e+09", None, "this machine is not there")
    assert (size["value"], size["bound"], size["holds"]) == (1000, "value <= 999", False)
    assert (once["cpu"], once["cores"], once["threads"]) == (here.cpu, here.cores, torch.get_num_threads())


def test_subjects_are_run_in_turn(tmp_path: Path) -> None:
    calls: list[str] = []

    def subject(name: str, pause: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            time.sleep(pause)

        return call

    told: list[tuple[str, int, int]] = []
    bench = Bench(None, 3, tmp_path, lambda *args: told.append(args))
    subjects = {"a": subject("a", 0.0), "b": subject("b", 0.01)}
    taken = bench.seconds("turns", subjects, subject("-", 0.02))
    assert "".join(calls) == "-a-b" * 4, "one round more than counts"
    assert told == [("turns", i, 8) for i in range(8)]
    assert list(taken) == ["a", "b"] and 0 < taken["a"] < 0.02 and taken["b"] >= 0.01


def test_median_of_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 0.0, 3.0, 0.0, 40.0])  # the warm-up ends without a look at the clock
    ticks = iter([100.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks, None) or next(clock))
    assert Bench(None, 3, tmp_path).seconds("", {"a": lambda: None}) == {"a": 5.0}


@pytest.mark.parametrize(
    ("bound", "value", "reference", "holds"),
    [
        (at_least(0.5), 1.0, 2.0, True),
        (at_least(0.5), 0.9, 2.0, False),
        (at_most(2.0), 4.0, 2.0, True),
        (at_most(2.0), 4.1, 2.0, False),
        (at_least(3.0, "value"), 3.0, 100.0, True),
        (at_most(3.0, "value"), 3.1, 100.0, False),
        (None, 1.0, 2.0, None),
    ],
)
def test_verdicts(bound: Bound | None, value: float, reference: float, holds: bool | None) -> None:
    assert Row("", value, "", "other", reference, bound).holds is holds
    assert Row("", value, "", "other", reference, bound, reason="too small a machine").holds is None


def test_a_reference_is_a_row_of_the_same_table(tmp_path: Path) -> None:
    bench = Bench(None, 1, tmp_path)
    bench.part("first")
    bench.row("a", 1.0, "MB")
    with pytest.raises(ValueError, match="there is no row 'a' in s"):
        bench.row("b", 1.0, "s", "a")
    bench.part("second")
    with pytest.raises(ValueError, match="there is no row 'a' in MB"):
        bench.row("b", 1.0, "MB", "a")


@pytest.mark.skipif(memory() is None, reason="the system does not tell")
def test_memory_of_ones_own_is_counted_and_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(64 << 20))
    with peak_memory() as peak:
        # Fresh from the system: what the process has freed before is no new memory.
        fresh = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        held = torch.frombuffer(fresh, dtype=torch.uint8).fill_(1)
        time.sleep(10 * frame.PAUSE)
    assert 60 << 20 < peak.bytes < 100 << 20 and held.sum()
    with peak_memory() as peak:
        mapped = torch.from_file(str(tmp_path / "file"), shared=False, size=64 << 20, dtype=torch.uint8)
        most = mapped.max()
        time.sleep(10 * frame.PAUSE)
    assert peak.bytes < 30 << 20 and most


def test_every_bench_is_there() -> None:
    assert called() == "".join(f"{name:<9} {what}\n" for name, what in BENCHES.items())
    for name in BENCHES:
        assert callable(import_module(f"saefw.bench.{name}").bench)


def test_faults_are_told(tiny: Path, tmp_path: Path) -> None:
    assert called("raed", exit_code=1) == "bench: there is no 'raed'; did you mean 'read'?\n"
    assert called("xyz", exit_code=1) == f"bench: there is no 'xyz' (there are: {', '.join(BENCHES)})\n"
    file = tmp_path / "none" / "rows.json"
    told = called("tiny", "--json", str(file), exit_code=1)
    assert told == f"{file}: there is no folder {file.parent}; nothing was measured\n"
    with pytest.raises(UserError, match=r"GB are needed and .* GB free; set TMPDIR to another disk"):
        Bench(None, 1, tmp_path).room(1 << 60)


def test_a_stop_leaves_no_file(tmp_path: Path) -> None:
    """Told to stop in the midst of a measurement, it ends at once and its files are gone."""
    code = f"""if True:
        import os, sys, types
        os.environ["TMPDIR"] = {str(tmp_path)!r}
        from saefw.bench.command import BENCHES
        import saefw.bench.frame, time
        def bench(bench):
            (bench.folder / "big").write_bytes(bytes(1000))
            print("ready", flush=True)
            bench.seconds("naps", {{"nap": lambda: time.sleep(60)}})
        BENCHES["tiny"] = "naps"
        sys.modules["saefw.bench.tiny"] = module = types.ModuleType("saefw.bench.tiny")
        module.bench = bench
        from saefw.__main__ import main
        sys.argv = ["saefw", "bench", "tiny"]
        main()
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    assert [path.name[:12] for path in tmp_path.iterdir()] == ["saefw-bench-"]
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert (said, process.returncode) == ("stopped\n", 130)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_record() -> None:
    """A small run of it measures every row."""
    shown = called("record", "--size", "8", "--rounds", "1")
    for row in ("forward alone", "recording from memory", "recording JPEG files", "time", "memory, at its peak"):
        assert row in shown
    assert "vit_tiny_patch16_224: 8 images" in shown and "saefw run --dry over 1,000 files" in shown


@pytest.mark.parametrize(("name", "size"), [("features", 1), ("tables", 4), ("pictures", 1)])
def test_a_bench_of_features_runs(name: str, size: int, tmp_path: Path) -> None:
    """No time is asserted, but what is measured has numbers, and the queries find something."""
    file = tmp_path / "rows.json"
    called(name, "--size", str(size), "--rounds", "1", "--json", str(file))
    rows = json.loads(file.read_text())
    assert all(row["value"] > 0 for row in rows)
    wanted, bounds = {
        "features": ("features counted and ranked", ["ratio >= 0.7"] * 3),
        "tables": ("classes of a feature", ["value <= 200"]),
        "pictures": ("tile in all", ["value <= 5"]),
    }[name]
    assert [row["bound"] for row in rows if row["name"] == wanted] == bounds


@pytest.mark.slow
def test_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small run of it measures every row."""
    monkeypatch.setattr(read, "LARGER", 2)
    file = tmp_path / "rows.json"
    shown = called("read", "--size", "250", "--rounds", "1", "--json", str(file))
    assert all(f"d_model {d_model}, float16, 0.25 GB, batch 4096\n" in shown for d_model in (192, 768))
    rows = json.loads(file.read_text())
    assert all(row["value"] > 0 for row in rows)
    names = [row["name"] for row in rows]
    for name in ("plain, from the cache", "shuffled, from the cache", "in order, as float32", "rows of mapped files"):
        assert names.count(name) == 2
    for name in ("pairs of one image", "pairs of one token", "shuffled"):
        assert all(f"{name}, d_model {d_model}" in names for d_model in (192, 768))


@pytest.mark.parametrize("full", [True, False])
def test_a_recording_to_be_read_is_one(tmp_path: Path, full: bool) -> None:
    acts = read.recording(tmp_path / "acts", 768, 1, full)
    assert (acts.n_tokens, acts.d_model, acts.n_examples) == (197, 768, read.SHARD_BYTES // (197 * 768 * 2))
    _, acts_etd = next(acts.read("cls", batch=64))
    assert acts_etd.shape == (64, 1, 768) and bool(acts_etd.std() > 0.9) is full
