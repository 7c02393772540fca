"""Faults injected into a store, and what each run then says, keeps and makes again.

Every case starts from a copy of one whole store, and ends with a run after which every file is the same to the byte.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple
from unittest.mock import ANY

import duckdb
import pytest
import tiny
from test_run import fingerprints
from typer.testing import CliRunner

from saefw.care import listed
from saefw.cli import app
from saefw.errors import UserError
from saefw.experiment.choices import choices
from saefw.experiment.opened import opened
from saefw.printer import size
from saefw.store import Store

REGISTRY = f"""
saefw: 1
plugins: [{tiny.__file__}]
backbones: {{vit: {{use: tiny-vit}}}}
datasets: {{images: {{use: tiny-set}}}}
saes:
  relu: {{use: relu, expansion: 2, warmup: 5}}
  topk: {{use: topk, expansion: 2, warmup: 5, k: 4}}
probes: {{linear: {{use: linear, steps: 20}}}}
figures: {{front: {{use: pareto}}}}
stages:
  acts: {{use: record, backbone: vit, datasets: [images], layers: [1, -1], dtype: float32, shard_mb: 0.02}}
  sweep: {{use: train, acts: acts, layers: [1], saes: [relu, topk], n_tokens: 2_000, batch_size: 100}}
  visuals: {{use: visuals, saes: sweep, acts: acts, top: 2}}
  sheets: {{use: sheets, visuals: visuals, features: {{n: 1}}}}
  probes: {{use: probe, acts: acts, probes: [linear]}}
  steer: {{use: steer, saes: sweep, probes: probes, visuals: visuals, n_features: 1, amounts: [1]}}
  figures: {{use: draw, figures: [front], of: [sweep]}}
"""
N_UNITS = 2 + 2 + 2 + 2 + 1 + 1 + 1

KEPT = "what is kept stays, and the next run goes on from there"
FULL = re.compile(rf"(?P<file>\S+): No space left on device; {KEPT}\n")
SHORT = re.compile(
    r"\S+: stages\.acts: (?P<file>\S+): [\d,]+ bytes are to be recorded, and [\d,]+ are free on its disk; make room, "
    r"put the store elsewhere, or record fewer layers or tokens\n"
)


class Said(NamedTuple):
    """What a call of the command line came to."""

    exit_code: int
    out: str
    err: str
    """What went to stderr, and before it the warnings."""


class Place:
    """A folder with registry.yaml and a store."""

    def __init__(self, base: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.base, self.store, self.caplog = base, Store(base / "runs"), caplog

    def __call__(self, command: str = "run", *args: str) -> Said:
        registry = str(self.base / "registry.yaml")
        given = [registry] if command in ("run", "check") else ["--registry", registry]
        self.caplog.clear()
        result = CliRunner(env={"COLUMNS": "80"}).invoke(app, [command, *args, *given])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        warned = "".join(f"{text}\n" for text in self.caplog.messages)
        return Said(result.exit_code, result.stdout, warned + result.stderr)

    def unit(self, stage: str, label: str) -> Path:
        """The folder of the unit of a stage whose label begins so."""
        folders = (self.store.root / stage).iterdir()
        (found,) = (x for x in folders if json.loads((x / "made.json").read_text())["label"].startswith(label))
        return found

    def where(self, stage: str) -> str:
        """How a message begins that has the place of a stage."""
        line = REGISTRY[: REGISTRY.index(f"  {stage}: {{")].count("\n") + 1
        return f"{self.base}/registry.yaml:{line}:3: stages.{stage}: "

    def forget(self, *stages: str) -> None:
        """Remove what these stages made, as one may."""
        for stage in stages:
            shutil.rmtree(self.store.root / stage)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The registry, run once."""
    base = tmp_path_factory.mktemp("made")
    (base / "registry.yaml").write_text(REGISTRY)
    result = CliRunner().invoke(app, ["run", str(base / "registry.yaml")])
    assert f"Made {N_UNITS} units" in result.output, result.output
    return base


@pytest.fixture
def place(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Place:
    shutil.copytree(made, tmp_path / "study")
    return Place(tmp_path / "study", caplog)


# Ways to injure a file


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\x00\xffgarbage" * 999)


SUM = "its SHA-256 is not the one in made.json"


# A file that something is made from


class Case(NamedTuple):
    """A damaged file of a kept unit, met while a later stage is made."""

    unit: tuple[str, str]
    """Its stage's folder, and how its label begins."""

    file: str
    injure: Callable[[Path], None]
    why: str
    missing: str
    """The folder of the stage that is made anew, and so needs the file."""

    stage: str
    """Its name in registry.yaml."""

    n_missing: int = 1


ACTS, SAE, PROBE, LOOKS = ("record", "vit on images, layer 1"), ("train", "topk"), ("probe", ""), ("visuals", "topk")
TO_TRAIN, TO_SEE, TO_STEER = ("train", "sweep", 2), ("visuals", "visuals", 2), ("steer", "steer")

CASES = {
    "a flipped byte in a shard": Case(ACTS, "acts-00002.safetensors", flip, SUM, *TO_TRAIN),
    "a shard cut short": Case(ACTS, "acts-00001.safetensors", cut, "100 bytes, not 20,760", *TO_TRAIN),
    "a shard gone": Case(ACTS, "acts-00000.safetensors", Path.unlink, "is not there", *TO_TRAIN),
    "a flipped byte in the statistics": Case(ACTS, "stats.safetensors", flip, SUM, *TO_TRAIN),
    "a flipped byte in a parquet": Case(ACTS, "example.parquet", flip, SUM, *TO_TRAIN),
    "a made.json of garbage": Case(ACTS, "made.json", garbage, "does not list the files of its unit", *TO_TRAIN),
    "a flipped byte in an SAE": Case(SAE, "sae.safetensors", flip, SUM, *TO_SEE),
    "an empty probe": Case(PROBE, "probe.safetensors", empty, "0 bytes, not 860", *TO_STEER),
    "a flipped byte in the pictures": Case(LOOKS, "picture.parquet", flip, SUM, *TO_STEER),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_damaged_file_that_is_needed(place: Place, case: Case) -> None:
    before = fingerprints(place.store)
    folder = place.unit(*case.unit)
    file, label = folder / case.file, json.loads((folder / "made.json").read_text())["label"]
    case.injure(file)
    place.forget(case.missing)
    others = {path: path.stat().st_ino for path in folder.glob("acts-*") if path != file}
    assert place("run", "--stage", case.stage) == (
        1,
        ANY,
        f"{place.where(case.stage)}{file}: damaged ({case.why}); '{label}' is set back: the next run makes it again, "
        "and all else is kept\n",
    )
    assert not folder.exists() and not (folder.with_name(f"{folder.name}.partial") / "made.json").exists()
    assert all(before.get(path) == digest for path, digest in fingerprints(place.store).items())
    said = place("run", "--stage", case.stage)
    assert (said.exit_code, said.err) == (0, "") and f"Made {1 + case.n_missing} units in " in said.out
    assert fingerprints(place.store) == before
    # Of a recording the damaged shard alone is recorded again.
    assert {path: path.stat().st_ino for path in others} == others


def test_damage_that_cannot_be_set_back(place: Place, mounted: Callable[..., None]) -> None:
    folder = place.unit(*ACTS)
    flip(folder / "acts-00000.safetensors")
    place.forget("train")
    mounted("--bind", folder.parent, folder.parent)
    mounted("-o", "remount,ro,bind", folder.parent)
    assert place("run", "--stage", "sweep").err == (
        f"{place.where('sweep')}{folder}/acts-00000.safetensors: damaged ({SUM}), and 'vit on images, layer 1' cannot "
        f"be set back; delete {folder}, and the next run makes it again\n"
    )


def test_a_unit_that_is_busy_cannot_be_set_back(place: Place, mounted: Callable[..., None]) -> None:
    folder = place.unit(*SAE)
    mounted("--bind", folder, folder)
    flip(folder / "unit.json")
    assert place()[::2] == (
        1, f"{place.where('sweep')}{folder}/unit.json: damaged ({SUM}), and 'topk, vit on images, layer 1' cannot be "
        f"set back; delete {folder}, and the next run makes it again\n",
    )  # fmt: skip


def test_a_run_that_makes_nothing_reads_no_file(place: Place) -> None:
    flip(place.unit(*ACTS) / "acts-00000.safetensors")
    assert place()[::2] == (0, "")


# A file that the index is made of


def test_a_damaged_table_of_a_unit_that_is_asked_for(place: Place) -> None:
    """It is met while the index is made anew: the unit counts as missing, and the same run makes it again."""
    before = fingerprints(place.store)
    file = place.unit(*SAE) / "metric.parquet"
    flip(file)
    (place.store.root / "saefw.duckdb").unlink()
    for command in (["run", "--dry"], ["check"]):
        assert place(*command)[::2] == (0, f"{file}: damaged ({SUM}); its unit counts as missing\n")
    said = place()
    assert (said.exit_code, said.err) == (
        0, f"{file}: damaged ({SUM}); 'topk, vit on images, layer 1' is made again\n",
    )  # fmt: skip
    assert "Made 1 unit in " in said.out
    assert fingerprints(place.store) == before
    with place.store.db() as db:
        assert db.execute("SELECT count(*) FROM unit").fetchall() == [(N_UNITS,)]


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("metric.parquet", "8,991 bytes, not {size:,}"),
        ("unit.json", "8,991 bytes, not {size:,}"),
        ("made.json", "does not list the files of its unit"),
    ],
)
def test_a_damaged_unit_that_nobody_asks_for(place: Place, file: str, why: str) -> None:
    """It is left out of the index and stops nobody."""
    path = place.unit(*SAE) / file
    why = why.format(size=path.stat().st_size)
    garbage(path)
    (place.store.root / "saefw.duckdb").unlink()
    text = REGISTRY.replace("saes: [relu, topk]", "saes: [relu]")
    (place.base / "registry.yaml").write_text(re.sub(r"  (visuals|sheets|steer|figures): \{.*\n", "", text))
    said = place()
    assert (said.exit_code, said.err) == (
        0, f"{path}: damaged ({why}); its unit is left out of the index; `saefw verify --mend` sets it back\n",
    )  # fmt: skip
    assert said.out.startswith("Nothing to make: 4 units kept in ")
    with place.store.db() as db:
        assert db.execute("SELECT count(*) FROM unit").fetchall() == [(N_UNITS - 1,)]


def test_a_damaged_unit_json_of_a_unit_that_is_asked_for(place: Place) -> None:
    before = fingerprints(place.store)
    file = place.unit(*SAE) / "unit.json"
    flip(file)
    said = place()
    assert said[::2] == (0, f"{file}: damaged ({SUM}); 'topk, vit on images, layer 1' is made again\n")
    assert fingerprints(place.store) == before


# The index


@pytest.mark.parametrize("injure", [cut, empty, garbage])
def test_a_damaged_index(place: Place, injure: Callable[[Path], None]) -> None:
    index = place.store.root / "saefw.duckdb"
    injure(index)
    assert place("sql", "FROM unit") == (
        1, "", f"{index}: damaged; `saefw index` makes it anew from the folders of the units\n",
    )  # fmt: skip
    assert place()[::2] == (0, f"{index}: cannot be read; made anew from the folders of the units\n")
    assert place()[::2] == (0, "")


def test_warnings_reach_the_terminal(place: Place) -> None:
    index = place.store.root / "saefw.duckdb"
    empty(index)
    code = "from saefw.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "check", str(place.base / "registry.yaml")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == f"{index}: cannot be read; made anew from the folders of the units\n"


def flip_a_block(index: Path, query: str = "FROM final") -> None:
    """Damage the index where a query fails, but nobody notices who only opens it and lists its units."""
    whole = index.read_bytes()
    for at in range(len(whole) - 5000, 0, -50_000):
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            with duckdb.connect(str(index), read_only=True) as db:
                db.execute("SELECT comment FROM duckdb_views()").fetchall()
                db.execute("SELECT unit FROM unit").fetchall()
                try:
                    db.execute(query).fetchall()
                except duckdb.Error:
                    return
        except duckdb.Error:
            continue
    raise AssertionError("no such block")


def test_an_index_that_turns_out_damaged_in_the_middle_of_a_query(place: Place) -> None:
    before = fingerprints(place.store)
    index = place.store.root / "saefw.duckdb"
    flip_a_block(index)
    assert place("sql", "FROM final")[::2] == (
        1, f"{index}: damaged; `saefw index` makes it anew from the folders of the units\n",
    )  # fmt: skip
    assert index.exists()
    said = place()
    assert said[::2] == (
        1, f"{place.where('steer')}{index}: damaged; it is removed, and the next run makes it anew from the folders\n",
    )  # fmt: skip
    assert place()[::2] == (0, "")
    assert fingerprints(place.store) == before


def test_an_index_that_turns_out_damaged_while_it_is_brought_up_to_date(place: Place) -> None:
    index = place.store.root / "saefw.duckdb"
    flip_a_block(index, "SELECT unit FROM metric")
    place.forget("steer")
    assert place("run", "--stage", "steer")[::2] == (
        0, f"{index}: damaged; made anew from the folders of the units\n",
    )  # fmt: skip
    assert place.store.whole()


def test_the_page_says_what_is_damaged_and_changes_nothing(place: Place) -> None:
    file = place.unit(*SAE) / "sae.safetensors"
    flip(file)
    (choice,) = choices(place.base / "registry.yaml")
    with pytest.raises(UserError) as caught:
        opened(choice)
    assert str(caught.value) == (
        f"{file}: damaged ({SUM}); `saefw verify --mend` sets 'topk, vit on images, layer 1' back, and `saefw run` "
        "makes it again"
    )
    assert file.exists()


def test_a_check_that_takes_long_says_how_far_it_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefw.run.PATIENCE", 0.0)
    monkeypatch.setattr("saefw.run.PAUSE", 0.0)
    monkeypatch.setattr("saefw.printer.EVERY", 0.0)
    total = sum(size for size, _ in listed(place.unit(*ACTS)).values())
    place.forget("train")
    lines = [line for line in place("run", "--stage", "sweep").out.splitlines() if "bytes checked" in line]
    assert len(lines) > 5
    assert re.fullmatch(rf"sweep: {total:,} of {total:,} bytes checked \(100 %\), \S+/s, \S+ s left", lines[-1])


# The disk


@pytest.fixture
def small(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, mounted: Callable[..., None]) -> Place:
    """A whole store on a disk of 20 MiB."""
    (tmp_path / "disk").mkdir()
    mounted("-t", "tmpfs", "-o", "size=20m", "tmpfs", tmp_path / "disk")
    shutil.copytree(made, tmp_path / "disk" / "study")
    return Place(tmp_path / "disk" / "study", caplog)


def fill(path: Path, pages: int) -> None:
    """Fill the disk but for some pages of 4 KiB."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    with path.open("rb+") as file:
        file.truncate(max(0, path.stat().st_size - 4096 * pages))


@pytest.mark.parametrize(
    ("missing", "stage", "free", "named"),
    [
        ("record", "acts", [0, 9, 40, 300], {"locks/*", "runs", ".partial/*", "saefw.duckdb"}),
        ("train", "sweep", [4, 5, 6, 8, 10, 12, 14], {"checkpoint.*", "sae.*", "sample.*"}),
        ("visuals", "visuals", [4, 12, 20, 28, 36], {"images.bin", "pairs.bin", "picture.parquet"}),
        ("draw", "figures", [4, 300], {"pareto.*", "saefw.duckdb"}),
    ],
)
def test_a_full_disk(small: Place, missing: str, stage: str, free: list[int], named: set[str]) -> None:
    """Whatever it is that finds no room: one sentence, and with room again the run goes on to the same bytes."""
    before, hit = fingerprints(small.store), set()
    for pages in free:
        for folder in (missing, "locks"):
            shutil.rmtree(small.store.root / folder, ignore_errors=True)
        small.store.sync()
        fill(small.base / "filler", pages)
        said = small("run", "--stage", stage)
        (small.base / "filler").unlink()
        full = FULL.fullmatch(said.err) or SHORT.fullmatch(said.err)
        assert said.exit_code == 1 and full, said.err
        hit.add(full["file"].removeprefix(f"{small.store.root}/"))
        assert all(before[path] == digest for path, digest in fingerprints(small.store).items())
    said = small("run", "--stage", stage)
    assert (said.exit_code, said.err) == (0, ""), said.err
    assert fingerprints(small.store) == before
    assert all(any(fnmatch(file, f"*{pattern}") for file in hit) for pattern in named), hit


def test_units_stay_kept_when_the_index_finds_no_room(small: Place) -> None:
    before = fingerprints(small.store)
    small.forget("draw")
    small.store.sync()
    fill(small.base / "filler", 300)
    assert small()[::2] == (1, f"{small.store.root}/saefw.duckdb: No space left on device; {KEPT}\n")
    assert fingerprints(small.store) == before
    (small.base / "filler").unlink()
    said = small()
    assert said[::2] == (0, "") and said.out.startswith(f"Nothing to make: {N_UNITS} units kept")
    with small.store.db() as db:
        assert db.execute("SELECT count(*) FROM unit").fetchall() == [(N_UNITS,)]


def test_a_store_that_is_read_only(small: Place, mounted: Callable[..., None]) -> None:
    """What is made can be looked at; what is not is said in one sentence."""
    drawn = small.unit("draw", "front").name
    small.forget("draw")
    small.store.sync()
    mounted("-o", "remount,ro", small.base.parent)
    assert small("run", "--stage", "steer")[::2] == (0, "")
    assert small("sql", "FROM pareto")[::2] == (0, "")
    assert small("verify")[::2] == (0, "")
    assert small()[::2] == (1, f"{small.store.root}/locks/{drawn}: Read-only file system; {KEPT}\n")
    mounted("-o", "remount,rw", small.base.parent)
    small.forget("train")
    mounted("-o", "remount,ro", small.base.parent)
    assert small()[::2] == (1, f"{small.store.root}/locks/index: Read-only file system; {KEPT}\n")
    assert small("verify", "--mend")[::2] == (0, "")
    mounted("-o", "remount,rw", small.base.parent)
    flip(small.unit(*ACTS) / "acts.json")
    mounted("-o", "remount,ro", small.base.parent)
    assert small("verify", "--mend").err == (
        f"{small.unit(*ACTS)}: cannot be set back (Read-only file system); make the store writable\n"
    )


# The images

FOLDER = REGISTRY.replace("{use: tiny-set}", "{use: tiny-folder, root: images}")


@pytest.fixture
def folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Place:
    """Nothing made yet, of a folder of 60 images."""
    (tmp_path / "images").mkdir()
    for i in range(60):
        tiny.TinyImages(60, 0, frozenset()).image(i).save(tmp_path / "images" / f"{i:02d}.png")
    (tmp_path / "registry.yaml").write_text(FOLDER)
    return Place(tmp_path, caplog)


def test_the_folder_of_the_images_vanishes(folder: Place) -> None:
    images, away = folder.base / "images", folder.base / "away"
    images.rename(away)
    why = f"[Errno 2] No such file or directory: '{images}'"
    gone = f"dataset 'tiny-folder' cannot be opened ({why}); put it back and run again\n"
    assert folder("run", "--dry")[::2] == (1, folder.where("acts") + gone)
    assert folder()[::2] == (1, folder.where("acts") + gone)
    away.rename(images)
    assert folder("run", "--stage", "acts")[::2] == (0, "")
    images.rename(away)
    # What needs no images goes on without them.
    assert folder("run", "--stage", "sweep")[::2] == (0, "")
    assert folder()[::2] == (1, folder.where("visuals") + gone)
    away.rename(images)
    said = folder()
    assert said[::2] == (0, "") and f"Made {N_UNITS - 4} units" in said.out


def test_an_image_vanishes_while_it_is_recorded(folder: Place) -> None:
    image = folder.base / "images" / "31.png"
    data = image.read_bytes()
    image.unlink()
    (folder.base / "images" / "31.png").symlink_to(folder.base / "nowhere")
    assert folder("run", "--stage", "acts")[::2] == (
        1, f"{folder.where('acts')}image '31.png' cannot be read (it is missing); mend it, or leave out what cannot be "
        "read with broken: skip in the stage that records\n",
    )  # fmt: skip
    before = {path: path.stat().st_ino for path in folder.store.root.glob("record/*/acts-*")}
    assert before
    image.unlink()
    image.write_bytes(data)
    assert folder("run", "--stage", "acts")[::2] == (0, "")
    after = {path.stat().st_ino for path in folder.store.root.glob("record/*/acts-*")}
    assert set(before.values()) < after


# saefw verify


def said_size(place: Place) -> str:
    """How many bytes verify says that there are."""
    return size(sum(n for folder in place.store.kept().values() for n, _ in listed(folder).values()))


def test_verify(place: Place) -> None:
    n_bytes = said_size(place)
    assert place("verify") == (0, f"{place.store.root}: {N_UNITS} units, {n_bytes}, fine\n", "")
    record = place("verify", "record")
    assert re.fullmatch(rf"{re.escape(str(place.store.root))}: 2 units, \d+(\.\d+)? kB, fine\n", record.out)
    assert (record.exit_code, record.err) == (0, "")
    assert place("verify", "recrod").err == f"{place.store.root}: has no units of 'recrod'; did you mean 'record'?\n"
    acts, sae = place.unit(*ACTS), place.unit(*SAE)
    flip(acts / "acts-00001.safetensors")
    (acts / "moments-00000.safetensors").unlink()
    whole = (sae / "sae.safetensors").stat().st_size
    cut(sae / "sae.safetensors")
    (sae / "note.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in place.store.root.rglob("*")}
    registry = f" --registry {place.base}/registry.yaml"
    found = f"""\
{acts}/acts-00001.safetensors: damaged ({SUM})
{acts}/moments-00000.safetensors: damaged (is not there)
{sae}/sae.safetensors: damaged (100 bytes, not {whole:,})
{sae}/note.txt: not one of its unit's files
"""
    total = f"{place.store.root}: {N_UNITS} units, {n_bytes}, 2 damaged"
    assert place("verify") == (
        1, found, f"{total}; `saefw verify --mend{registry}` puts that right, and `saefw run` makes them again\n",
    )  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in place.store.root.rglob("*")} == before
    assert place("verify", "--mend") == (
        0, f"{found}{total}; that is put right, and `saefw run` makes them again\n", "",
    )  # fmt: skip
    said = place()
    assert said[::2] == (0, "") and "Made 2 units in " in said.out
    assert place("verify") == (0, f"{place.store.root}: {N_UNITS} units, {n_bytes}, fine\n", "")


def test_verify_of_a_file_that_cannot_be_read(place: Place) -> None:
    """It is named and stays, with all of its unit; what is damaged is mended all the same."""
    before = fingerprints(place.store)
    n_bytes = said_size(place)
    file, damaged = place.unit(*ACTS) / "acts-00001.safetensors", place.unit(*SAE) / "sae.safetensors"
    elsewhere = place.base / "elsewhere.safetensors"
    file.rename(elsewhere)
    file.symlink_to(file)
    unread = (
        f"{file}: cannot be read (Too many levels of symbolic links); nothing is deleted for that; make it readable, "
        "or delete it, and its unit is made again\n"
    )
    total = f"{place.store.root}: {N_UNITS} units, {n_bytes}, 1 of which a file cannot be read"
    assert place("verify", "--mend") == (1, unread, f"{total}\n")
    whole = damaged.stat().st_size
    cut(damaged)
    assert place("verify", "--mend") == (
        1, f"{unread}{damaged}: damaged (100 bytes, not {whole:,})\n",
        f"{total}, 1 damaged; that is put right, and `saefw run` makes it again\n",
    )  # fmt: skip
    said = place("run", "--stage", "sweep")
    assert (said.exit_code, said.err) == (1, f"{place.where('sweep')}{unread}")
    elsewhere.rename(file)
    assert place()[::2] == (0, "")
    assert fingerprints(place.store) == before


def test_verify_of_a_damaged_index(place: Place) -> None:
    index = place.store.root / "saefw.duckdb"
    total = f"{place.store.root}: {N_UNITS} units, {said_size(place)}"
    flip_a_block(index)
    assert place("verify") == (
        1, f"{index}: damaged\n",
        f"{total}, the index damaged; `saefw verify --mend --registry {place.base}/registry.yaml` puts that right\n",
    )  # fmt: skip
    assert place("verify", "--mend") == (
        0, f"{index}: damaged\n{total}, the index damaged; that is put right\n", "",
    )  # fmt: skip
    assert place("verify") == (0, f"{total}, fine\n", "")


def test_verify_says_how_far_it_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefw.printer.EVERY", 0.0)
    *lines, last = place("verify").out.splitlines()
    total = sum(size for folder in place.store.kept().values() for size, _ in listed(folder).values())
    told = re.compile(rf"verify: [\d,]+ of {total:,} bytes \(\d+ %\)(, \S+/s, \S+ s left)?")
    assert len(lines) > 1 and all(told.fullmatch(line) for line in lines), lines
    assert last == f"{place.store.root}: {N_UNITS} units, {said_size(place)}, fine"


def test_a_made_json_that_names_files_elsewhere_harms_nothing(place: Place) -> None:
    """It is taken for damaged, and what it names is not touched."""
    folder, mine = place.unit(*SAE), place.base / "mine.txt"
    mine.write_text("mine")
    told = json.loads((folder / "made.json").read_text())
    told["files"]["../../../mine.txt"] = {"bytes": 3, "sha256": ""}
    (folder / "made.json").write_text(json.dumps(told))
    # Its unit's bytes count for none: nobody says how many there are.
    total = size(sum(n for path in place.store.kept().values() if path != folder for n, _ in listed(path).values()))
    assert place("verify", "--mend") == (
        0, f"{folder}/made.json: damaged (does not list the files of its unit)\n{place.store.root}: {N_UNITS} units, "
        f"{total}, 1 damaged; that is put right, and `saefw run` makes it again\n", "",
    )  # fmt: skip
    assert mine.read_text() == "mine"
