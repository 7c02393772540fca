"""Notes of features: files that are never written again, the newest counts, and the table of them."""

import json
import logging
import shutil
import threading
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from test_store import make, unit

from saefw import notes
from saefw.errors import UserError
from saefw.gc import find
from saefw.store import Store
from saefw.unit import canonical

SAE = "0123456789ab"


def told(root: Path) -> dict[int, tuple[str, str]]:
    return {feature: (note.name, note.text) for feature, note in notes.of(root, SAE).items()}


def rows(store: Store) -> list[Any]:
    with store.db() as db:
        return db.execute("SELECT sae, feature, name, text FROM note ORDER BY ALL").fetchall()


def test_the_newest_note_of_a_feature_counts_and_the_others_stay(tmp_path: Path) -> None:
    assert notes.of(tmp_path, SAE) == {} and notes.versions(tmp_path, SAE, 7) == []
    first = notes.write(tmp_path, SAE, 7, "  red \n squares ", "on  noise \n\nmostly\t3\n")
    notes.write(tmp_path, SAE, 70, "another")
    assert (first.name, first.text) == ("red squares", "on  noise\n\nmostly\t3")
    assert datetime.now(UTC) - first.made_at < timedelta(minutes=1)
    assert notes.write(tmp_path, SAE, 7, "red squares", first.text) == first  # nothing new is said
    second = notes.write(tmp_path, SAE, 7, "squares")
    assert told(tmp_path) == {7: ("squares", ""), 70: ("another", "")}
    assert notes.versions(tmp_path, SAE, 7) == [second, first]
    notes.write(tmp_path, SAE, 7, "", " ")
    assert told(tmp_path) == {70: ("another", "")}
    assert [note.name for note in notes.versions(tmp_path, SAE, 7)] == ["", "squares", "red squares"]


def test_the_next_note_is_the_newer_one_though_a_clock_is_ahead(tmp_path: Path) -> None:
    ahead = notes.write(tmp_path, SAE, 7, "first")._replace(made_at=datetime(2999, 1, 1, tzinfo=UTC))
    data = canonical({**ahead._asdict(), "made_at": ahead.made_at.isoformat()}).encode()
    (tmp_path / "notes" / SAE / f"7-{sha256(data).hexdigest()[:12]}.json").write_bytes(data)
    assert told(tmp_path) == {7: ("first", "")}
    assert notes.write(tmp_path, SAE, 7, "second").made_at > ahead.made_at
    assert told(tmp_path) == {7: ("second", "")}


def test_many_who_write_at_once_lose_nothing(tmp_path: Path) -> None:
    def write(who: int) -> None:
        for i in range(20):
            notes.write(tmp_path, SAE, i % 2, f"{who} says {i}")

    threads = [threading.Thread(target=write, args=[who]) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = {note.name for feature in (0, 1) for note in notes.versions(tmp_path, SAE, feature)}
    assert said == {f"{who} says {i}" for who in range(4) for i in range(20)}
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x" * 81, "", "name of a note: at most 80 characters (got 81)"),
        ("x", "y" * 4001, "text of a note: at most 4,000 characters (got 4,001)"),
        ("a\x1b[2J", "", "name of a note: '\\x1b' does not print"),
        ("a", "\u202etxt.exe", "text of a note: '\\u202e' does not print"),
    ],
)
def test_what_a_note_may_not_hold_is_said(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        notes.write(tmp_path, SAE, 7, name, text)
    assert str(caught.value) == said
    assert not list(tmp_path.iterdir())


def test_a_damaged_note_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes.write(tmp_path, SAE, 1, "whole")
    damages = ("{}", "[]", "\0", "", "[" * 9000, '{"sae": 3}', None)
    for feature, damage in enumerate(damages, 2):
        notes.write(tmp_path, SAE, feature, "was whole")
        (path,) = (tmp_path / "notes" / SAE).glob(f"{feature}-*")
        path.write_text(path.read_text().replace("was", "not") if damage is None else damage)
    (tmp_path / "notes" / SAE / "read me.json").write_text("{}")
    with caplog.at_level(logging.WARNING, "saefw"):
        assert told(tmp_path) == {1: ("whole", "")}
    assert len(caplog.messages) == len(damages)
    assert f"{path}: cannot be read, or is not what was written; this note is left out" in caplog.messages
    # That of another feature, or of another SAE, is not what the name says.
    copy = tmp_path / "notes" / SAE / f"9{next((tmp_path / 'notes' / SAE).glob('1-*')).name[1:]}"
    shutil.copyfile(next((tmp_path / "notes" / SAE).glob("1-*")), copy)
    assert 9 not in told(tmp_path)


def test_the_index_has_the_notes_that_count_and_finds_them_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    make(store, unit(1))
    store.sync()
    assert rows(store) == []
    notes.write(tmp_path, SAE, 7, 'it\'s "seven"', "<b>\n'")
    notes.write(tmp_path, SAE, 8, "eight")
    assert store.sync() == 0  # units; a note is none
    expected = [(SAE, 7, 'it\'s "seven"', "<b>\n'"), (SAE, 8, "eight", "")]
    assert rows(store) == expected
    before = store.root.joinpath("saefw.duckdb").stat().st_ino
    assert Store(tmp_path).sync() == 0
    assert store.root.joinpath("saefw.duckdb").stat().st_ino == before
    (tmp_path / "saefw.duckdb").unlink()
    assert Store(tmp_path).rebuild() == 1
    assert rows(store) == expected
    moved = tmp_path.with_name("moved")
    shutil.move(tmp_path, moved)
    notes.write(moved, SAE, 7, "", "")
    elsewhere = Store(moved)
    elsewhere.sync()
    assert rows(elsewhere) == expected[1:]


def test_stores_that_are_merged_keep_the_notes_of_both(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    notes.write(one, SAE, 7, "first")
    shutil.copytree(one, two)
    notes.write(one, SAE, 7, "said here")
    notes.write(two, SAE, 7, "said there")
    shutil.copytree(two / "notes", one / "notes", dirs_exist_ok=True)
    assert [note.name for note in notes.versions(one, SAE, 7)] == ["said there", "said here", "first"]


def test_gc_deletes_no_note(tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("saefw: 1\nstages: {}\n")
    runs = tmp_path / "runs"
    make(Store(runs), unit(1))
    notes.write(runs, unit(1).address, 7, "seven")
    spare = find([tmp_path / "registry.yaml"]).spare
    assert [one.address for one in spare] == [unit(1).address]
    assert all("notes" not in one.folder.parts for one in spare)


def test_a_note_is_one_small_file_that_anybody_can_read(tmp_path: Path) -> None:
    note = notes.write(tmp_path, SAE, 7, "Ångström", "")
    (path,) = tmp_path.rglob("*.json")
    assert path.parent == tmp_path / "notes" / SAE
    told = json.loads(path.read_text())
    assert told.pop("made_at") == note.made_at.isoformat(timespec="microseconds")
    assert told == {"sae": SAE, "feature": 7, "name": "Ångström", "text": ""}
