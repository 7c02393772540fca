"""Live recordings, against recordings of the same images on disk."""

from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_steer_stage import SETTINGS
from tiny import TinyFolder, TinyImages, TinySet, made
from torch import Tensor

from saefw import live
from saefw.acts import Acts
from saefw.errors import UserError
from saefw.live import Live, acts_of, by_groups, mixing, number, pairs
from saefw.metrics import Nmse
from saefw.pace import Pace
from saefw.plugin import Dataset
from saefw.run import Run, Watcher
from saefw.stages.probe import ProbeStage
from saefw.stages.record import Record
from saefw.stages.steer import Steer
from saefw.stages.train import Train
from saefw.stages.visuals import Visuals
from saefw.trained import FILE
from saefw.unit import Unit
from saefw_linear import Linear
from saefw_topk import TopK

CLOSE = {"float32": 1e-5, "float16": 4e-3}
"""How far apart two vectors may be whose batches had other sizes: some digits of the dtype, of values up to about 4."""

LOADED: list[int] = []


class CountedSet(TinySet):
    """Notes which images are loaded."""

    def build(self, base: Path) -> Dataset:
        return CountedImages(self.n, self.seed, frozenset(self.broken))


class CountedImages(TinyImages):
    """Those of CountedSet."""

    def image(self, index: int) -> Any:
        LOADED.append(index)
        return super().image(index)


def both(run: Run, **settings: Any) -> tuple[Acts, Live, Unit]:
    """Record the tiny set on disk and live; return both opened, and the unit of the latter."""
    plain = {"backbone": "tiny", "datasets": ["tiny"], "layers": [1], "dtype": "float32"}
    ((disk,), (unit,)) = (made(run, "acts", Record(**{**plain, **settings, "live": on})) for on in (False, True))
    opened = acts_of(unit, run)
    assert isinstance(opened, Live) and type(acts_of(disk, run)) is Acts
    return Acts(run.folder(disk)), opened, unit


def drawn(acts: Acts, seed: int, n_batches: int, first: int = 0, **settings: Any) -> Tensor:
    stream = acts.shuffled("patches", acts.of_split("train"), 96, seed, **settings)
    stream.seek(first)
    return torch.cat([next(stream) for _ in range(n_batches)])


def places(x_nd: Tensor, acts: Acts, close: float) -> list[int]:
    """Return which of the train split's patches on disk each vector is, by plain comparison with all of them."""
    ((_, x_epd),) = acts.read("patches", acts.of_split("train"))
    apart_nm = (x_nd.float()[:, None] - x_epd.flatten(0, 1)).abs().amax(dim=2)
    near = apart_nm.min(dim=1)
    assert float(near.values.max()) < close
    return near.indices.tolist()


# What is kept


@pytest.mark.parametrize("settings", [{}, {"tokens": "cls"}, {"tokens": 5, "seed": 3}, {"shard_mb": 0.01}])
def test_a_live_recording_has_all_but_the_shards(settings: dict[str, Any], tmp_path: Path) -> None:
    run = tiny.desk(tmp_path)
    disk, opened, unit = both(run, **settings)
    ours, theirs = ({path.name: path for path in acts.folder.iterdir()} for acts in (opened, disk))
    shards = {name for name in theirs if name.startswith("acts-")}
    assert set(ours) == set(theirs) - shards - {"shard.parquet"} and shards
    assert ours["stats.safetensors"].read_bytes() == theirs["stats.safetensors"].read_bytes()
    assert (opened.keys, opened.labels.tolist(), opened.splits.tolist(), opened.classes) == (
        disk.keys, disk.labels.tolist(), disk.splits.tolist(), disk.classes,
    )  # fmt: skip
    with run.db() as db:
        rows = "SELECT * EXCLUDE unit FROM acts WHERE unit = ?"
        one, two = (db.execute(rows, [acts.folder.name]).fetchall() for acts in (opened, disk))
    assert one == two
    stage = Record(backbone="tiny", datasets=["tiny"], layers=[1], live=True)
    assert stage.disk(unit, run) == 0 and stage.work(unit, run) == "60 images"


def test_live_is_part_of_an_address_and_its_absence_is_not(tmp_path: Path) -> None:
    run = tiny.desk(tmp_path)
    stage = Record(backbone="tiny", datasets=["tiny"], layers=[1])
    (disk,), (unit,) = stage.units(run), stage.model_copy(update={"live": True}).units(run)
    assert unit.content == {**disk.content, "live": True} and "live" not in disk.content


def test_it_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("saefw.stages.record.check_room", lambda folder, n_bytes: asked.append(n_bytes))
    both(tiny.desk(tmp_path))
    assert asked == [60 * 17 * 16 * 4, 0]


def test_a_stopped_pass_goes_on(tmp_path: Path) -> None:
    class Stopper(Watcher):
        def progressed(self, stage: str, done: int, total: int, what: str) -> None:
            if done >= 40:
                raise KeyboardInterrupt

    settings: dict[str, Any] = {"backbone": "tiny", "datasets": ["tiny"], "layers": [1], "live": True}
    stage = Record(**settings, shard_mb=10 * 17 * 16 * 2 / 2**20, batch_size=10)
    families = {"datasets": {"tiny": CountedSet()}}
    with pytest.raises(KeyboardInterrupt):
        made(tiny.desk(tmp_path, families, watcher=Stopper()), "acts", stage)
    LOADED.clear()
    (unit,) = made(run := tiny.desk(tmp_path, families), "acts", stage)
    assert 0 < len(LOADED) <= 30 and set(LOADED) >= set(range(40, 60))
    (whole,) = made(other := tiny.desk(tmp_path / "b", families), "acts", stage)
    assert (run.folder(unit) / "stats.safetensors").read_bytes() == (
        other.folder(whole) / "stats.safetensors"
    ).read_bytes()


def test_without_a_backbone_it_has_nothing_to_read(tmp_path: Path) -> None:
    _, opened, _ = both(tiny.desk(tmp_path))
    plain = Acts(opened.folder)
    for ask in (lambda: next(plain.read("all")), lambda: plain.shuffled("all", np.arange(3), 4, 0)):
        with pytest.raises(UserError) as told:
            ask()
        assert str(told.value) == f"{opened.folder}: keeps no activations (it was recorded with live: true)"


# The same vectors


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("held", "tokens"), [("all", "all"), ("all", "cls"), ("patches", "patches"), (5, "patches")])
def test_in_order_it_reads_what_a_recording_holds(held: Any, tokens: str, dtype: str, tmp_path: Path) -> None:
    disk, opened, _ = both(tiny.desk(tmp_path), tokens=held, dtype=dtype)
    examples = np.random.default_rng(0).permutation(60)[:50]
    ours, theirs = (list(acts.read(tokens, examples, 23)) for acts in (opened, disk))
    assert [some.tolist() for some, _ in ours] == [some.tolist() for some, _ in theirs]
    for (_, x_etd), (_, y_etd) in zip(ours, theirs, strict=True):
        assert x_etd.dtype == torch.float32 and x_etd.shape == y_etd.shape
        torch.testing.assert_close(x_etd, y_etd, rtol=0, atol=CLOSE[dtype])
        assert torch.equal(x_etd.to(getattr(torch, dtype)).float(), x_etd)


def test_precision_is_that_of_the_recording(tmp_path: Path) -> None:
    disk, opened, _ = both(tiny.desk(tmp_path), precision="bfloat16")
    x, y = (torch.cat([x for _, x in acts.read("all")]) for acts in (opened, disk))
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("buffer_mb", [0, 1])
@pytest.mark.parametrize("dtype", CLOSE)
def test_each_vector_comes_once_an_epoch(dtype: str, buffer_mb: int, tmp_path: Path) -> None:
    """The buffer of 0 MiB holds two images; that of 1 MiB holds all."""
    disk, opened, _ = both(tiny.desk(tmp_path), dtype=dtype)
    x_nd = drawn(opened, 0, 21, buffer_mb=buffer_mb)
    assert x_nd.dtype == getattr(torch, dtype)
    n = 42 * 16
    found = places(x_nd, disk, CLOSE[dtype])
    epochs = [found[i * n : (i + 1) * n] for i in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert places(drawn(opened, 1, 7, buffer_mb=buffer_mb), disk, CLOSE[dtype]) != epochs[0]
    assert torch.equal(drawn(opened, 0, 21, buffer_mb=buffer_mb), x_nd)


@pytest.mark.parametrize("buffer_mb", [0, 1])
def test_seek_is_exact_to_the_bit(buffer_mb: int, tmp_path: Path) -> None:
    _, opened, _ = both(tiny.desk(tmp_path))
    told = drawn(opened, 5, 20, buffer_mb=buffer_mb)
    for first in (0, 3, 7, 16):
        assert torch.equal(drawn(opened, 5, 4, first, buffer_mb=buffer_mb), told[96 * first : 96 * (first + 4)])


def test_groups_are_run_whole_and_give_the_same_bits_each_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "SEGMENTS", 1)
    monkeypatch.setattr(live, "IMAGES", 16)
    _, opened, _ = both(tiny.desk(tmp_path))
    sizes: list[int] = []
    whole = opened._forward.outputs

    def outputs(batch: Any) -> Any:
        sizes.append(len(batch))
        return whole(batch)

    monkeypatch.setattr(opened._forward, "outputs", outputs)
    x_nd = drawn(opened, 0, 7)
    assert sorted(sizes) == [10, 16, 16]
    one, two = (np.unique(x.numpy(), axis=0) for x in (x_nd, drawn(opened, 0, 7, 7)))
    assert len(one) == 42 * 16 and np.array_equal(one, two)


def test_seek_skips_what_is_not_in_the_buffer_and_what_fits_is_run_once(tmp_path: Path) -> None:
    _, opened, _ = both(tiny.desk(tmp_path, {"datasets": {"tiny": CountedSet()}}))
    LOADED.clear()
    drawn(opened, 0, 21)
    assert sorted(LOADED) == opened.of_split("train").tolist()
    LOADED.clear()
    drawn(opened, 0, 1, 30, buffer_mb=0)  # which then reads ahead
    assert 0 < len(LOADED) < 20


@pytest.mark.parametrize("on", [False, True])
def test_what_is_asked_for_must_be_there(on: bool, tmp_path: Path) -> None:
    disk, opened, _ = both(tiny.desk(tmp_path), tokens="patches")
    acts = opened if on else disk
    for ask, why in (
        (lambda: next(acts.read("cls")), "has no [CLS]; it was recorded with tokens: patches"),
        (lambda: acts.shuffled("patches", np.arange(0), 4, 0), "there are no patches of the examples asked for"),
    ):
        with pytest.raises(UserError) as told:
            ask()
        assert str(told.value) == f"{acts.folder}: {why}"


# Images that are broken, or other ones


def test_what_was_broken_is_left_out_and_reads_as_zeros(tmp_path: Path) -> None:
    run = tiny.desk(tmp_path, {"datasets": {"tiny": TinySet(broken=[3, 40])}})
    disk, opened, unit = both(run, broken="skip")
    x, y = (torch.cat([x for _, x in acts.read("all")]) for acts in (opened, disk))
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert not x[[3, 40]].any() and opened.of_split("broken").tolist() == [3, 40]
    with run.db() as db:
        rows = db.execute("SELECT example, why FROM broken WHERE unit = ? ORDER BY 1", [unit.address]).fetchall()
    assert rows == [(3, "the file is cut short"), (40, "the file is cut short")]


@pytest.fixture
def of_files(tmp_path: Path) -> Live:
    images = TinySet().build(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(60):
        images[i].load().save(tmp_path / "images" / f"{i:02d}.png")
    run = tiny.desk(tmp_path, {"datasets": {"files": TinyFolder(root="images")}})
    return both(run, datasets=["files"])[1]


def test_an_image_that_broke_since_then_is_named(of_files: Live, tmp_path: Path) -> None:
    (tmp_path / "images" / "00.png").write_bytes(b"")
    for read in (lambda: list(of_files.read("all")), lambda: drawn(of_files, 0, 7)):
        with pytest.raises(UserError) as told:
            read()
        assert str(told.value) == "image '00.png' cannot be read (it is no image)"
    of_files.read("all", np.arange(1, 9))


def test_another_image_in_its_place_is_no_vector_of_it(of_files: Live, tmp_path: Path) -> None:
    (tmp_path / "images" / "00.png").rename(tmp_path / "images" / "000.png")
    of_files._dataset = TinyFolder(root="images").build(tmp_path)
    with pytest.raises(UserError) as told:
        list(of_files.read("all"))
    assert str(told.value) == (
        "image 0 of the dataset was '00.png' when it was recorded and is '000.png' now; put the images back as they "
        "were, or record them anew in another store"
    )


# What is made of it


def all_stages(path: Path, on: bool, watcher: Watcher | None = None) -> tuple[Run, dict[str, list[Unit]]]:
    entries: dict[str, Any] = {"topk": TopK(k=3, expansion=2, lr=0.003)}
    families = {"saes": entries, "probes": {"linear": Linear(lr=3e-2, steps=60)}}
    run = tiny.desk(path, families, metrics={"nmse": Nmse}, watcher=watcher)
    stages = {
        "acts": Record(backbone="tiny", datasets=["tiny"], layers=[0, 2], live=on),
        "sweep": Train(acts="acts", saes=["topk"], layers=[0], n_tokens=8192, batch_size=256, log_every=5),
        "visuals": Visuals(saes="sweep", acts="acts", top=4),
        "probes": ProbeStage(acts="acts", probes=["linear"]),
        "steer": Steer(**SETTINGS),
    }
    return run, {name: made(run, name, stage) for name, stage in stages.items()}


def final(run: Run, unit: Unit) -> dict[str, float]:
    with run.db() as db:
        return dict(db.execute("SELECT name, value FROM final WHERE unit = ?", [unit.address]).fetchall())


def test_every_stage_goes_on_from_it(tmp_path: Path) -> None:
    (live_run, ours), (disk_run, theirs) = all_stages(tmp_path / "a", True), all_stages(tmp_path / "b", False)
    for name in ("sweep", "visuals", "probes", "steer"):
        for one, two in zip(ours[name], theirs[name], strict=True):
            found, right = final(live_run, one), final(disk_run, two)
            assert set(found) ^ set(right) == ({"same_image", "same_token"} if name == "sweep" else set())
    (sae,), (other,) = ours["sweep"], theirs["sweep"]
    assert final(live_run, sae)["nmse"] == pytest.approx(final(disk_run, other)["nmse"], rel=0.1)
    (probe,), (reader,) = ours["probes"], theirs["probes"]
    assert final(live_run, probe)["test_accuracy"] == final(disk_run, reader)["test_accuracy"]


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("after", [1, 2, 5])
def test_training_goes_on_to_the_same_bytes(after: int, tmp_path: Path) -> None:
    class Killer(Watcher):
        left = after

        def logged(self, unit: Unit, step: int, values: Any) -> None:
            self.left -= unit.content["revision"] == Train.revision and "sae" in unit.content
            if not self.left:
                raise Stop

    with pytest.raises(Stop):
        all_stages(tmp_path / "a", True, Killer())
    (run, units), (other, whole) = all_stages(tmp_path / "a", True), all_stages(tmp_path / "b", True)
    for name in (FILE, "metric.parquet"):
        one, two = (desk.folder(made["sweep"][0]) / name for desk, made in ((run, units), (other, whole)))
        assert one.read_bytes() == two.read_bytes()


# How well it mixes


def test_pairs_are_those_counted_one_by_one() -> None:
    shape, batch_size = (6, 400, 128), 100  # 2400 vectors of 512 bytes, half of them in the buffer

    def fill(token: int, start: int, stop: int, into_nb: Any, cache: bool) -> bool:
        image_n, token_n = np.divmod(np.arange(start, stop), 6)
        number(into_nb, token_n, image_n)
        return False

    def stream() -> Any:
        return by_groups(fill, shape, torch.float32, batch_size, 7, 1)

    made = stream()
    same: Counter[str] = Counter()
    seen = []
    for _ in range(24):
        vectors = [tuple(row) for row in next(made).view(torch.int32)[:, :2].tolist()]
        seen += vectors
        for one, two in combinations(vectors, 2):
            same["token"] += one[0] == two[0]
            same["image"] += one[1] == two[1]
    assert sorted(seen) == [(token, image) for token in range(6) for image in range(400)]
    n_pairs = 24 * 100 * 99 / 2
    image, token = pairs(stream(), 24, 400, 6)
    assert image == pytest.approx(same["image"] / (n_pairs * 5 / 2399))
    assert token == pytest.approx(same["token"] / (n_pairs * 399 / 2399))


def test_mixing_is_chance_where_all_is_in_the_buffer_and_worse_by_as_much_as_it_is_too_small() -> None:
    image, token = mixing((16, 500, 64), torch.float16, 512, 0, 1, 64)
    assert image == pytest.approx(1, abs=0.3) and token == pytest.approx(1, abs=0.05)
    # Twenty times as many vectors as the buffer has, of which one in 16 is being filled.
    image, token = mixing((16, 20 * 512, 64), torch.float16, 512, 0, 1, 64)
    assert 15 < image < 30 and token == pytest.approx(1, abs=0.1)
    assert mixing((1, 500, 64), torch.float16, 64, 0, 1, 4)[0] == 1, "there are no pairs of one image"


# How long it takes


def test_the_time_of_forward_passes_is_told_where_they_are_made_again(tmp_path: Path) -> None:
    run = tiny.desk(tmp_path, {"saes": {"topk": TopK(k=3, expansion=2)}})
    seconds = {}
    for on in (False, True):
        acts = Record(backbone="tiny", datasets=["tiny"], layers=[1], live=on)
        run.listed("acts", list(acts.units(run)))
        for n_tokens in (320, 32_000):
            stage = Train(acts="acts", saes=["topk"], n_tokens=n_tokens, batch_size=64)
            pace = Pace({
                "an image of 17 tokens in a block of 16, float32": 10.0,
                "an image of tiny": 0.0,
                "a token and feature of a topk SAE of 16": 0.0,
            })  # fmt: skip
            seconds[on, n_tokens] = stage.duration(list(stage.units(run)), run, pace)
    # Two blocks; 20 images have 320 tokens, 42 are all there are to train on and fit into the buffer, 6 are valid.
    assert seconds == {(False, 320): 0, (False, 32_000): 0, (True, 320): 20 * 26, (True, 32_000): 20 * 48}
