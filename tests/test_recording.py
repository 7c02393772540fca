"""The pass that records: what is read, run and written at once, and which tokens are kept."""

import errno
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from hashlib import shake_256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL.Image import Image
from pydantic import ValidationError
from tiny import TinyBackbone, TinySet, TinyVit, desk, made
from torch import Tensor

from saefw.acts import Acts
from saefw.blocks import outputs
from saefw.errors import UserError
from saefw.originals import opened
from saefw.plugin import Backbone, Example
from saefw.recording import Broken, Hands, held, prepared, stored
from saefw.run import Run
from saefw.shards import Layout, Writer
from saefw.stages.probe import ProbeStage
from saefw.stages.record import Record
from saefw.stages.steer import Steer
from saefw.stages.train import Train
from saefw.stages.visuals import Visuals
from saefw.unit import Unit
from saefw_linear import Linear
from saefw_topk import TopK


@pytest.fixture(autouse=True, scope="module")
def no_power_cuts() -> Iterator[None]:
    """Many small files are written here; waiting for the disk each time would tell nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda number: None)
        yield


def record(run: Run, **given: Any) -> list[Unit]:
    return made(run, "acts", Record(**{"backbone": "tiny", "datasets": ["tiny"], "layers": [1], **given}))


def truth(n: int, layers: list[int]) -> dict[int, Tensor]:
    """What the blocks put out for the first images of the tiny set, one image at a time."""
    vit, dataset = TinyVit().build("cpu"), TinySet(n=n).build(Path())
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for i in range(n):
        for layer, tokens_btd in outputs(vit, vit.prepare(dataset[i].load())[None], layers).items():
            found[layer].append(tokens_btd)
    return {layer: torch.cat(some) for layer, some in found.items()}


def drawn(key: str, n: int, seed: int) -> list[int]:
    """The patches of 16 that docs/formats.md says are drawn."""
    digest = shake_256(f"{seed}:{key}".encode()).digest(8 * 16)
    number = {patch: int.from_bytes(digest[8 * patch : 8 * patch + 8], "big") for patch in range(16)}
    return sorted(sorted(number, key=lambda patch: number[patch])[:n])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 25),
    st.integers(1, 27),
    st.integers(1, 9),
    st.sampled_from([[2], [0, 2]]),
    st.sampled_from(["all", "patches", "cls", 1, 5, 16]),
    st.integers(0, 3),
)
def test_records_the_tokens_asked_for(
    n: int, per_shard: int, batch_size: int, layers: list[int], tokens: str | int, seed: int
) -> None:
    """Whatever the sizes of shards and batches, down to one image."""
    seed = seed if isinstance(tokens, int) else 0
    expected = truth(n, layers)
    n_tokens = tokens if isinstance(tokens, int) else {"all": 17, "patches": 16, "cls": 1}[tokens]
    with TemporaryDirectory() as folder:
        run = desk(Path(folder), {"datasets": {"some": TinySet(n=n)}})
        knobs = {"batch_size": batch_size, "shard_mb": per_shard * n_tokens * 16 * 4 / 2**20 + 1e-6}
        units = record(run, datasets=["some"], layers=layers, tokens=tokens, seed=seed, dtype="float32", **knobs)
        for unit, layer in zip(units, layers, strict=True):
            acts = Acts(run.folder(unit))
            assert len(acts.shards) == -(-n // per_shard) and acts.n_tokens == n_tokens
            (_, found_etd), *_ = acts.read("all", batch=n)
            for i in range(n):
                patches = drawn(f"tiny-{i:03d}", tokens, seed) if isinstance(tokens, int) else list(range(16))
                kept = {"all": list(range(17)), "cls": [0]}.get(str(tokens), [1 + patch for patch in patches])
                torch.testing.assert_close(found_etd[i], expected[layer][i, kept], rtol=1e-5, atol=1e-5)
                if tokens != "cls":
                    assert acts.patches(np.array([i])).tolist() == [patches]
            train = acts.of_split("train")
            kind = "cls" if tokens == "cls" else "patches"
            kept_nd = found_etd[train][:, acts.n_prefix if kind == "patches" else 0 :].reshape(-1, 16).double()
            if len(kept_nd):
                assert (acts.stats(kind).mean - kept_nd.mean(0)).abs().max() < 1e-6


def test_fewer_patches_are_some_of_more_and_a_seed_draws_others(tmp_path: Path) -> None:
    run = desk(tmp_path)
    (few,), (many,), (other,) = (
        record(run, **kept) for kept in ({"tokens": 4}, {"tokens": 9}, {"tokens": 4, "seed": 1})
    )
    assert len({few.address, many.address, other.address}) == 3
    assert few.content["tokens"] == 4 and "seed" not in few.content and other.content["seed"] == 1
    places = [Acts(run.folder(unit)).patches(np.arange(60)) for unit in (few, many, other)]
    assert all(set(a) <= set(b) for a, b in zip(places[0].tolist(), places[1].tolist(), strict=True))
    assert (places[0] != places[2]).any() and len({tuple(row) for row in places[0].tolist()}) > 50
    with run.db() as db:
        rows = db.execute("SELECT tokens, n_tokens, prefix FROM acts ORDER BY ALL").fetchall()
    assert rows == [("4", 4, ""), ("4", 4, ""), ("9", 9, "")]


def test_every_patch_is_drawn_as_often() -> None:
    layout = Layout.of(0, ("cls",), 3, (4, 4), 0, "float32", 4)
    times = np.bincount(np.concatenate([layout.patches(f"image {i}") for i in range(4000)]), minlength=16)
    assert abs(times - 1000).max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_what_is_downstream_takes_the_tokens_that_are_there(tmp_path: Path) -> None:
    """An SAE is trained on what was recorded, and what does not fit is refused while planning, in one sentence."""
    probes, saes = {"p": Linear(lr=0.01, steps=5)}, {"topk": TopK(k=3, expansion=2)}
    train = {"saes": ["topk"], "n_tokens": 512, "batch_size": 128}
    refused = {
        "all": [],
        "patches": [
            "train: tokens: tiny on tiny, layer 1 holds patches alone; record it with tokens: all or cls",
            "probe: token: tiny on tiny, layer 1 holds patches alone; record it with tokens: all or cls",
        ],
        "cls": ["train: tokens: tiny on tiny, layer 1 holds [CLS] alone; record it with tokens: all or patches"],
        5: [
            "visuals: acts: tiny on tiny, layer 1 holds 5 patches of each image; record it with tokens: all or patches",
            "train: tokens: tiny on tiny, layer 1 holds 5 patches of each image; record it with tokens: all or cls",
            "probe: token: tiny on tiny, layer 1 holds 5 patches of each image; record it with tokens: all or cls",
        ],
    }
    for tokens, expected in refused.items():
        run = desk(tmp_path / str(tokens), {"probes": probes, "saes": saes})
        record(run, tokens=tokens)
        said = []
        for stage in (
            Train(acts="acts", tokens="patches", **train),
            Visuals(saes="patches", acts="acts", top=2),
            Train(acts="acts", tokens="cls", **train),
            Visuals(saes="cls", acts="acts", top=2),
            ProbeStage(acts="acts", layer=1, probes=["p"]),
        ):
            name = stage.tokens if isinstance(stage, Train) else stage.use
            run.listed(name, [])
            try:
                assert all(run.store.has(unit) for unit in made(run, name, stage))
            except UserError as error:
                said.append(str(error))
        assert said == expected
        trained = [*run.made_by("patches"), *run.made_by("cls")]
        assert len(trained) == {"all": 2, "patches": 1, "cls": 1}.get(str(tokens), 1)


def test_steering_needs_all_tokens(tmp_path: Path) -> None:
    run = desk(tmp_path, {"probes": {"p": Linear(lr=0.01, steps=5)}, "saes": {"topk": TopK(k=3, expansion=2)}})
    made(run, "whole", Record(backbone="tiny", datasets=["tiny"], layers=[2]))
    made(run, "acts", Record(backbone="tiny", datasets=["tiny"], layers=[0], tokens="patches"))
    made(run, "sweep", Train(acts="acts", saes=["topk"], n_tokens=512, batch_size=128))
    made(run, "visuals", Visuals(saes="sweep", acts="acts", top=2))
    made(run, "probes", ProbeStage(acts="whole", probes=["p"]))
    with pytest.raises(UserError) as told:
        list(Steer(sae={"lowest": "n_valid_tokens"}, saes="sweep", probes="probes", visuals="visuals").units(run))
    assert str(told.value) == ("steer: visuals: tiny on tiny, layer 0 holds patches alone; record it with tokens: all")


class Headless(TinyVit):
    """Says that it has no [CLS]."""

    def describe(self) -> Any:
        return super().describe()._replace(prefix=("register",))


def test_faults_of_the_tokens(tmp_path: Path) -> None:
    run = desk(tmp_path, {"backbones": {"headless": Headless()}})
    for wrong, text in (
        ({"tokens": "cls", "backbone": "headless"}, "record: tokens: headless has no [CLS]; record patches, or all"),
        ({"tokens": 17}, "record: tokens: tiny has 16 patches (got 17)"),
    ):
        with pytest.raises(UserError) as told:
            record(run, **wrong)
        assert str(told.value) == text
    with pytest.raises(ValidationError, match="seed is of the patches that are drawn; with tokens: all none are"):
        record(run, seed=1)
    (unit,) = record(run, tokens="cls")
    with pytest.raises(UserError) as told:
        Acts(run.folder(unit)).stats("patches")
    assert str(told.value) == f"{run.folder(unit)}: has no patches; it was recorded with tokens: cls"
    (unit,) = record(run, tokens=3)
    with pytest.raises(UserError) as told:
        Acts(run.folder(unit)).stats("cls")
    assert str(told.value) == f"{run.folder(unit)}: has no [CLS]; it was recorded with tokens: 3"


BUILT: list[str] = []


class BuiltVit(TinyVit):
    """Notes that it is built."""

    def build(self, device: str) -> TinyBackbone:
        BUILT.append(device)
        return super().build(device)


def test_a_backbone_is_built_once_for_all_datasets(tmp_path: Path) -> None:
    run = desk(tmp_path, {"backbones": {"vit": BuiltVit()}, "datasets": {"more": TinySet(n=9, seed=1)}})
    BUILT.clear()
    units = record(run, backbone="vit", datasets=["tiny", "more"], layers=[0, 1])
    assert BUILT == ["cpu"]
    record(run, backbone="vit", datasets=["tiny", "more"], layers=[0, 1])
    assert BUILT == ["cpu"], "nothing was missing"
    alone = desk(tmp_path / "alone", {"backbones": {"vit": BuiltVit()}, "datasets": {"more": TinySet(n=9, seed=1)}})
    for unit in record(alone, backbone="vit", datasets=["more"], layers=[0, 1]):
        name = "acts-00000.safetensors"
        assert (alone.folder(unit) / name).read_bytes() == (run.folder(unit) / name).read_bytes()
        assert unit in units


def test_a_full_disk_while_the_next_shard_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the run, and the shards before are kept and not run again."""
    whole, n = Writer.write, 0

    def write(self: Writer, shard: int, *given: Any) -> None:
        if shard == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.folder / "acts-00002.safetensors"))
        whole(self, shard, *given)

    run = desk(tmp_path)
    knobs = {"shard_mb": 0.01, "batch_size": 4}
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", write)
        with pytest.raises(OSError, match=r"No space left on device: .*acts-00002\.safetensors"):
            record(run, **knobs)
    (unit,) = Record(backbone="tiny", datasets=["tiny"], layers=[1]).units(run)
    assert not run.store.has(unit)
    assert sorted(path.name for path in run.folder(unit).glob("acts-*")) == [
        "acts-00000.safetensors", "acts-00001.safetensors",
    ]  # fmt: skip
    seen: list[str] = []

    def counted(example: Example) -> Image:
        seen.append(example.key)
        return opened(example)

    monkeypatch.setattr("saefw.recording.opened", counted)
    record(run, **knobs)
    n = Acts(run.folder(unit)).shards[2].first
    assert sorted(seen) == [f"tiny-{i:03d}" for i in range(n, 60)]


def test_too_little_room_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = desk(tmp_path, {"backbones": {"vit": BuiltVit()}, "datasets": {"more": TinySet(n=9, seed=1)}})
    needed = (60 + 9) * 2 * 17 * 16 * 2
    BUILT.clear()
    wanted = {"backbone": "vit", "datasets": ["tiny", "more"], "layers": [0, 1]}
    with monkeypatch.context() as patch:
        free = needed - 1
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, free))
        with pytest.raises(UserError) as told:
            record(run, **wanted)
        assert str(told.value) == (
            f"{run.store.root}: {needed:,} bytes are to be recorded, and {free:,} are free on its disk; make room, "
            "put the store elsewhere, or record fewer layers or tokens"
        )
        assert BUILT == []
        free += 1
        record(run, **wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a priority is that of the whole process")
def test_threads_stand_back_where_the_forward_pass_needs_the_cores() -> None:
    vit, tiny = TinyVit().build("cpu"), TinySet(n=9).build(Path())
    seen: list[int] = []

    def note() -> None:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def load(example: Example) -> Image:
        note()
        return example.load()

    examples = [tiny[i]._replace(load=partial(load, tiny[i])) for i in range(9)]
    ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    for device, priority in (("cpu", 19), ("cuda:0", ours)):
        seen.clear()
        images = [image for image in prepared(examples, vit, 2, lambda: 4, device) if not isinstance(image, Broken)]
        with Hands(2, device) as hands:
            hands.take([note, note])
        assert seen == [priority] * 11
        assert torch.equal(torch.stack(images), torch.stack([vit.prepare(tiny[i].load()) for i in range(9)]))
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == ours


def test_hands_do_it_all_and_tell_of_the_first_fault() -> None:
    done: list[int] = []
    with Hands(3, "cpu") as hands:
        hands.take([partial(done.append, i) for i in range(5)])
        hands.wait()
        assert sorted(done) == list(range(5))

        def fail() -> None:
            raise UserError("it cannot be written")

        hands.take([fail])
        with pytest.raises(UserError, match="it cannot be written"):
            hands.wait()
        hands.wait()
    with pytest.raises(UserError, match="it cannot be written"), Hands(1, "cpu") as hands:
        hands.take([fail])
    with pytest.raises(KeyboardInterrupt), Hands(1, "cpu") as hands:
        hands.take([fail])
        raise KeyboardInterrupt


def test_a_batch_as_it_is_stored() -> None:
    """Against looking at every number."""
    keys, generator = ["a", "b", "c"], torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x_btd = torch.randn(3, 5, 4, generator=generator) * 100
        assert torch.equal(stored(x_btd, dtype, 7, keys), x_btd.to(dtype))
        for bad in (float("nan"), float("inf"), -float("inf")):
            broken_btd = x_btd.clone()
            broken_btd[1, 4, 3] = bad
            with pytest.raises(UserError) as told:
                stored(broken_btd, dtype, 7, keys)
            assert str(told.value) == "layer 7: the activations of image 'b' are not finite"
    for large, fits in ((65519.0, True), (65520.0, False), (-65520.0, False)):
        x_btd = torch.zeros(3, 5, 4)
        x_btd[2, 0, 1] = large
        if fits:
            assert stored(x_btd, torch.float16, 7, keys)[2, 0, 1] == 65504
            continue
        with pytest.raises(UserError) as told:
            stored(x_btd, torch.float16, 7, keys)
        assert str(told.value) == (
            "layer 7: image 'c' has an activation of 65520, and float16 ends at 65504; "
            "record with dtype: bfloat16 or float32"
        )


def test_held_tokens_are_views_where_nothing_is_drawn() -> None:
    x_btd = torch.randn(2, 7, 3)
    for tokens, first, n in (("all", 0, 7), ("patches", 3, 4), ("cls", 0, 1)):
        layout = Layout.of(2, ("cls", "register", "register"), 3, (2, 2), 0, "float32", tokens)
        found_btd = held(x_btd, 3, layout, ["a", "b"])
        assert torch.equal(found_btd, x_btd[:, first : first + n])
        assert found_btd.untyped_storage().data_ptr() == x_btd.untyped_storage().data_ptr()
    layout = Layout.of(2, ("cls", "register", "register"), 3, (2, 2), 0, "float32", 2, seed=4)
    expected = torch.stack([x_btd[i, 3 + layout.patches(key)] for i, key in enumerate("ab")])
    assert torch.equal(held(x_btd, 3, layout, ["a", "b"]), expected)
    assert isinstance(TinyVit().build("cpu"), Backbone)
