"""Recording, against a plain forward pass of everything at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tiny import TinyBackbone, TinyImages, TinySet, TinyVit, desk
from torch import Tensor

from saefw.acts import Acts
from saefw.errors import UserError
from saefw.plugin import Dataset, DatasetConfig, Example
from saefw.run import Run, Watcher
from saefw.stages.record import Record
from saefw.unit import Unit

Rows = list[tuple[str, int, Any, int]]
"""What a list of images says: name, class, split, number in TinySet."""


def record(run: Run, **settings: Any) -> list[Unit]:
    plain = {"backbone": "tiny", "datasets": ["tiny"], "layers": [1, 2], "dtype": "float32"}
    stage = Record(**{**plain, **settings})
    units = list(stage.units(run))
    stage.make([unit for unit in units if not run.store.has(unit)], run)
    return units


def truth() -> dict[int, Tensor]:
    """All tokens of all images by layer, as timm's blocks put them out."""
    vit, dataset = TinyVit().build("cpu"), TinySet().build(Path())
    tokens = vit.embed(torch.stack([vit.prepare(dataset[i].load()) for i in range(len(dataset))]))
    found = {}
    for layer, block in enumerate(vit.blocks):
        found[layer] = tokens = block(tokens)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "made.json"}


def test_records_what_the_blocks_put_out(tmp_path: Path) -> None:
    run = desk(tmp_path)
    expected = truth()
    for unit, layer in zip(record(run, batch_size=16), (1, 2), strict=True):
        acts = Acts(run.folder(unit))
        found = torch.cat([x for _, x in acts.read("all")])
        torch.testing.assert_close(found, expected[layer], rtol=1e-5, atol=1e-5)
        assert (acts.layer, acts.d_model, acts.grid, acts.n_prefix, acts.n_tokens) == (layer, 16, (4, 4), 1, 17)
        assert acts.classes == ["red", "green", "blue"]
        assert acts.keys == [f"tiny-{i:03d}" for i in range(60)]
        assert acts.labels.tolist() == [i % 3 for i in range(60)]
        assert [len(acts.of_split(split)) for split in ("train", "valid", "test")] == [42, 6, 12]
        train_nd = found[acts.of_split("train"), 1:].reshape(-1, 16).numpy().astype(np.float64)
        stats = acts.stats("patches")
        np.testing.assert_allclose(stats.mean, train_nd.mean(0), rtol=1e-6)
        assert stats.scale == pytest.approx(train_nd.var(0).mean() ** 0.5)
        assert stats.n == 42 * 16 and acts.stats("cls").n == 42


def test_tables(tmp_path: Path) -> None:
    run = desk(tmp_path)
    units = record(run, shard_mb=1)
    with run.db() as db:
        assert db.execute(
            "SELECT unit, backbone, dataset, layer, tokens, d_model, grid_h, grid_w FROM acts ORDER BY layer"
        ).fetchall() == [
            (unit.address, "tiny", "tiny", layer, "all", 16, 4, 4) for unit, layer in zip(units, (1, 2), strict=True)
        ]
        acts = Acts(run.folder(units[0]))
        patches = torch.cat([x for _, x in acts.read("patches", acts.of_split("train"))]).double()
        (norm,) = db.execute("SELECT mean_norm FROM acts WHERE layer = 1").fetchall()[0]
        assert norm == pytest.approx(float(patches.norm(dim=2).mean()), rel=1e-6)
        assert db.execute("SELECT count(*), sum(n_examples), min(length(sha256)) FROM shard").fetchall() == [
            (2, 120, 64)
        ]
        assert db.execute("SELECT count(*) FROM example WHERE split = 'valid'").fetchall() == [(12,)]
        assert db.execute("SELECT DISTINCT label, name FROM class ORDER BY label").fetchall() == [
            (0, "red"), (1, "green"), (2, "blue"),
        ]  # fmt: skip


def test_same_settings_same_bytes(tmp_path: Path) -> None:
    first, second = desk(tmp_path / "a"), desk(tmp_path / "b")
    ours, theirs = record(first), record(second)
    for one, two in zip(ours, theirs, strict=True):
        assert one.address == two.address
        assert files(first.folder(one)) == files(second.folder(two))


def test_knobs_change_no_address_and_no_result(tmp_path: Path) -> None:
    run = desk(tmp_path / "a")
    plain = record(run, layers=[1])
    knobs = {"batch_size": 7, "workers": 1, "shard_mb": 3}
    other = desk(tmp_path / "b", {"backbones": {"name": TinyVit()}})
    assert record(other, layers=[-2], backbone="name", **knobs) == plain
    x, y = (torch.cat([x for _, x in Acts(r.folder(plain[0])).read("all")]) for r in (run, other))
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_workers_change_no_byte(tmp_path: Path) -> None:
    found = []
    for workers in (None, 1, 5):
        run = desk(tmp_path / str(workers))
        (unit,) = record(run, layers=[1], workers=workers, batch_size=7)
        found.append(files(run.folder(unit)))
    assert found[0] == found[1] == found[2]


def test_precision_is_that_of_the_matrix_products(tmp_path: Path) -> None:
    run = desk(tmp_path)
    expected = truth()[2]
    (full,) = record(run, layers=[2])
    for precision, digits in (("bfloat16", 8), ("float16", 11)):
        (unit,) = record(run, layers=[2], precision=precision)
        assert unit.content == {**full.content, "precision": precision}
        found = torch.cat([x for _, x in Acts(run.folder(unit)).read("all")])
        error = float((found - expected).norm() / expected.norm())
        assert 2.0 ** -(digits + 3) < error < 2.0 ** -(digits - 2), precision
    assert set(full.content) == {"revision", "backbone", "dataset", "layer", "tokens", "dtype"}


def test_one_pass_serves_all_layers_and_families(tmp_path: Path) -> None:
    counted = CountedVit()
    run = desk(tmp_path, {"backbones": {"counted": counted}, "datasets": {"more": TinySet(n=30, seed=1)}})
    CALLS.clear()
    units = record(run, backbone="counted", datasets=["tiny", "more"], layers=[0, 1, -2])
    assert [unit.label for unit in units] == [
        "counted on tiny, layer 0", "counted on tiny, layer 1", "counted on more, layer 0", "counted on more, layer 1",
    ]  # fmt: skip
    assert CALLS == [60, 30], "images that were embedded"
    assert Acts(run.folder(units[3])).n_examples == 30


CALLS: list[int] = []


class CountedVit(TinyVit):
    """Notes how many images it embeds, but for the blank one on which the blocks are tried."""

    def build(self, device: str) -> TinyBackbone:
        vit = super().build(device)
        vit.model.patch_embed.register_forward_hook(  # type: ignore[union-attr]
            lambda module, args, out: CALLS.append(len(args[0])) if bool(args[0].std() > 0) else None
        )
        return vit


def test_progress_and_disk(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int, str]] = []

    class Notes(Watcher):
        def progressed(self, stage: str, done: int, total: int, what: str) -> None:
            seen.append((stage, done, total, what))

    run = desk(tmp_path, watcher=Notes())
    units = record(run, batch_size=25)
    assert seen == [("test", done, 60, "images") for done in (0, 25, 50, 60)]
    stage = Record(backbone="tiny", datasets=["tiny"], layers=[1], dtype="float16")
    assert stage.disk(next(iter(stage.units(run))), run) == 60 * 17 * 16 * 2
    size = (run.folder(units[0]) / "acts-00000.safetensors").stat().st_size
    assert 0 < size - stage.model_copy(update={"dtype": "float32"}).disk(units[0], run) < 200


def test_the_images_of_a_set_are_listed_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    whole = TinySet.build

    def build(self: TinySet, base: Path) -> Any:
        opened.append(self.content())
        return whole(self, base)

    monkeypatch.setattr(TinySet, "build", build)
    run = desk(tmp_path)
    stage = Record(backbone="tiny", datasets=["tiny"], layers=[1, 2])
    units = list(stage.units(run))
    assert [stage.work(unit, run) for unit in units] == ["60 images"] * 2
    assert [stage.disk(unit, run) for unit in units] == [60 * 17 * 16 * 2] * 2
    stage.make(units, run)
    assert opened == [TinySet().content()]
    assert len(run.dataset(TinySet(limit=10))) == 10
    assert len(opened) == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_the_rounded_float32(tmp_path: Path, dtype: str) -> None:
    run = desk(tmp_path)
    (full,), (half,) = record(run, layers=[2]), record(run, layers=[2], dtype=dtype)
    assert full.address != half.address
    x, y = (torch.cat([x for _, x in Acts(run.folder(unit)).read("all")]) for unit in (full, half))
    assert torch.equal(x.to(getattr(torch, dtype)).float(), y)


class LoudVit(TinyVit):
    """Its activations are too large for float16, or for any dtype."""

    use: Literal["tiny-vit"] = "tiny-vit"

    factor: float = 1e5

    def build(self, device: str) -> TinyBackbone:
        vit = super().build(device)
        blocks: Any = vit.model.blocks
        blocks[1].register_forward_hook(lambda module, args, out: out * self.factor)
        return vit


def test_overflow_names_layer_and_image(tmp_path: Path) -> None:
    run = desk(tmp_path, {"backbones": {"loud": LoudVit(), "broken": LoudVit(factor=3e38)}})
    with pytest.raises(UserError) as told:
        record(run, backbone="loud", dtype="float16")
    assert str(told.value).startswith("layer 1: image 'tiny-000' has an activation of ")
    assert str(told.value).endswith(", and float16 ends at 65504; record with dtype: bfloat16 or float32")
    record(run, backbone="loud", dtype="bfloat16")
    with pytest.raises(UserError, match="layer 1: the activations of image 'tiny-000' are not finite"):
        record(run, backbone="broken")


def test_broken_image_is_named(tmp_path: Path) -> None:
    run = desk(tmp_path, {"datasets": {"cut": TinySet(broken=[33])}})
    with pytest.raises(UserError) as told:
        record(run, datasets=["cut"])
    assert str(told.value) == (
        "image 'tiny-033' cannot be read (the file is cut short); mend it, or leave out what cannot be read with "
        "broken: skip in the stage that records"
    )


def test_faults_of_the_settings(tmp_path: Path) -> None:
    run = desk(tmp_path, {"datasets": {"none": TinySet(n=0)}})
    with pytest.raises(UserError, match="layer 3: there are 3 blocks"):
        record(run, layers=[3])
    with pytest.raises(UserError, match="tiny on none, layer 1: the dataset has no images"):
        record(run, datasets=["none"])


class StoppedVit(CountedVit):
    """Is interrupted in the middle of the image set, once."""

    def build(self, device: str) -> TinyBackbone:
        vit = super().build(device)
        if not CALLS:
            vit.model.register_module("patch_embed", Stop(vit.model.get_submodule("patch_embed")))
        return vit


class Stop(torch.nn.Module):
    """Does what a module does, until 40 images are through."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        if sum(CALLS) >= 40:
            raise KeyboardInterrupt
        tokens: Tensor = self.module(images)
        return tokens


def test_goes_on_where_it_was_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Complete shards are not recorded again, damaged ones are, and the result is the same to the byte."""
    settings = {"backbone": "vit", "layers": [0, 1], "shard_mb": 0.01, "batch_size": 4}
    whole = desk(tmp_path / "whole", {"backbones": {"vit": StoppedVit()}})
    stopped = desk(tmp_path / "stopped", {"backbones": {"vit": StoppedVit()}})
    CALLS[:] = [0]
    expected = record(whole, **settings)
    CALLS.clear()
    with pytest.raises(KeyboardInterrupt):
        record(stopped, **settings)
    folder = stopped.store.partial(expected[1])
    # Nine images are a shard: four shards are complete, the fifth is lost.
    assert len(list(folder.glob("acts-*"))) == 4 and not stopped.store.has(expected[1])
    (folder / "acts-00002.safetensors").write_bytes(b"damaged")
    moments = folder / "moments-00001.safetensors"
    moments.write_bytes(moments.read_bytes()[:-1] + bytes([moments.read_bytes()[-1] ^ 1]))
    (folder / "acts-00004.safetensors.part").write_bytes(b"torn")
    CALLS[:] = [0]
    assert record(stopped, **settings) == expected
    assert sum(CALLS) == 60 - 2 * 9
    assert caplog.messages == [f"{moments}: damaged; it is not used, and what it held is made again"]
    for unit in expected:
        assert files(stopped.folder(unit)) == files(whole.folder(unit))
    CALLS[:] = [0]
    record(stopped, **settings)
    assert sum(CALLS) == 0


class Listed(DatasetConfig):
    """Images of TinySet, as a file beside registry.yaml lists them: name, class, split, number there."""

    use: Literal["listed"] = "listed"

    def build(self, base: Path) -> Dataset:
        return ListedImages(json.loads((base / "list.json").read_text()))


class ListedImages(TinyImages):
    """The images of Listed."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(len(rows), 0, frozenset())
        self.rows = rows

    def __getitem__(self, index: int) -> Example:
        key, label, split, number = self.rows[index]
        return Example(key, label, split, lambda: self.image(number))


ADDED = ("new.png", 0, "train", 99)


@pytest.mark.parametrize(
    ("change", "again", "n_images"),
    [
        (lambda rows: [*rows[:20], *rows[21:]], 2, 59 - 2 * 9),
        (lambda rows: [*rows[:10], ADDED, *rows[10:]], 3, 61 - 9),
        (lambda rows: [*rows, ADDED], 0, 61 - 4 * 9),
        (lambda rows: [(*rows[0][:2], "test", 0), *rows[1:]], 1, 60 - 3 * 9),
        (lambda rows: [*rows[:30], ("30.png", 1, "train", 30), *rows[31:]], 1, 60 - 3 * 9),
        (lambda rows: rows[::-1], 4, 60),
    ],
    ids=["removed", "added", "added at the end", "of another split", "of another class", "in another order"],
)
def test_a_shard_of_other_images_is_not_gone_on_from(
    change: Callable[[Rows], Rows], again: int, n_images: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is recorded after the dataset changed is, to the byte, what it would be from the start."""
    settings = {"backbone": "vit", "datasets": ["listed"], "layers": [0, 1], "shard_mb": 0.01, "batch_size": 4}
    rows: Rows = [(f"{i:02d}.png", 0, "train", i) for i in range(60)]

    def at(path: Path, rows: Rows) -> Run:
        path.mkdir(exist_ok=True)
        (path / "list.json").write_text(json.dumps(rows))
        return desk(path, {"backbones": {"vit": StoppedVit()}, "datasets": {"listed": Listed()}})

    CALLS.clear()
    with pytest.raises(KeyboardInterrupt):
        record(at(tmp_path / "stopped", rows), **settings)
    stopped, fresh = at(tmp_path / "stopped", change(rows)), at(tmp_path / "fresh", change(rows))
    CALLS[:] = [0]
    units = record(stopped, **settings)
    assert sum(CALLS) == n_images
    said = f"listed: {again} of 7 shards hold other images than the dataset has now; they are recorded again"
    assert caplog.messages == ([said] if again else [])
    record(fresh, **settings)
    for unit in units:
        assert files(stopped.folder(unit)) == files(fresh.folder(unit))
