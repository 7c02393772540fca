"""Activations on disk, against arrays in memory."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from saefw import stream
from saefw.acts import Acts
from saefw.errors import UserError
from saefw.imagesets import Example
from saefw.moments import Moments
from saefw.shards import DTYPES, Layout, Writer


@pytest.fixture(autouse=True, scope="module")
def no_power_cuts() -> Iterator[None]:
    """Hundreds of small files are written here; waiting for the disk each time would tell nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)
        yield


def vectors(layout: Layout, seed: int = 0) -> Tensor:
    """Activations [example, token, d_model] in which every vector is another."""
    generator = torch.Generator().manual_seed(seed)
    shape = layout.n_examples, layout.n_tokens, layout.d_model
    acts_etd = torch.randn(shape, generator=generator) + torch.arange(layout.d_model)
    numbers = torch.arange(layout.n_examples * layout.n_tokens).view(layout.n_examples, layout.n_tokens)
    acts_etd[..., 0] = numbers
    return acts_etd.to(DTYPES[layout.dtype])


def layout_of(n_examples: int, side: int = 2, n_prefix: int = 1, d_model: int = 3, dtype: str = "float32") -> Layout:
    prefix = ("cls", "register")[:n_prefix]
    return Layout(n_examples, n_prefix + side * side, prefix, d_model, (side, side), 0, dtype)


def examples_of(layout: Layout, train: Tensor | None = None) -> list[Example]:
    """Images of one class, all of them to train on, or those of a mask."""
    mask = [True] * layout.n_examples if train is None else train.tolist()
    return [Example(f"{i}.png", 0, "train" if mask[i] else "test", Image.Image) for i in range(layout.n_examples)]


def recording(folder: Path, layout: Layout, per_shard: int, train: Tensor | None = None) -> tuple[Acts, Tensor]:
    """Write a recording; return it opened, and what should be in it, float32."""
    acts_etd = vectors(layout)
    writer = Writer(folder, layout, examples_of(layout, train), per_shard * layout.example_bytes)
    for shard in writer.missing():
        span = writer.span(shard)
        writer.write(shard, acts_etd[span.start : span.stop].transpose(0, 1))
    writer.finish()
    return Acts(folder), acts_etd.float()


def rows(x: Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in x.reshape(-1, x.shape[-1]).tolist()]


shapes = st.tuples(
    st.integers(1, 23), st.integers(1, 3), st.integers(0, 2), st.integers(2, 5), st.sampled_from(list(DTYPES))
)


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(1, 25), st.integers(1, 9), st.data())
def test_read_in_order(shape: tuple[int, int, int, int, str], per_shard: int, batch: int, data: st.DataObject) -> None:
    layout = layout_of(*shape)
    every = st.integers(0, layout.n_examples - 1)
    examples = np.array(data.draw(st.lists(every, max_size=30)), dtype=np.int64)
    with TemporaryDirectory() as folder:
        acts, truth_etd = recording(Path(folder), layout, per_shard)
        kinds = {"all": truth_etd, "patches": truth_etd[:, layout.n_prefix :], "cls": truth_etd[:, :1]}
        for tokens, expected_etd in kinds.items():
            if tokens == "cls" and not layout.prefix:
                continue
            read = list(acts.read(tokens, examples, batch))
            assert [len(some) for some, _ in read][:-1] == [batch] * (len(read) - 1)
            assert [i for some, _ in read for i in some] == examples.tolist()
            assert all(x.dtype == torch.float32 and x.is_contiguous() for _, x in read)
            for some, x_etd in read:
                assert torch.equal(x_etd, expected_etd[some])
        assert torch.equal(torch.cat([x for _, x in acts.read("all", batch=batch)]), truth_etd)


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(1, 25), st.integers(1, 50), st.integers(0, 3), st.booleans(), st.data())
def test_shuffled(
    shape: tuple[int, int, int, int, str],
    per_shard: int,
    batch_size: int,
    seed: int,
    small: bool,
    data: st.DataObject,
) -> None:
    layout = layout_of(*shape)
    every = st.integers(0, layout.n_examples - 1)
    chosen = sorted(data.draw(st.sets(every, min_size=1)))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if small:  # blocks of two vectors, and a buffer that holds one block
            vector_bytes = layout.d_model * DTYPES[layout.dtype].itemsize
            patch.setattr(stream, "BLOCK_BYTES", 2 * vector_bytes)
        acts, truth_etd = recording(Path(folder), layout, per_shard)
        expected = rows(truth_etd[chosen, layout.n_prefix :])
        shuffled = acts.shuffled("patches", np.array(chosen), batch_size, seed, buffer_mb=0 if small else 1)
        n_batches = -(-3 * len(expected) // batch_size)
        batches = [next(shuffled) for _ in range(n_batches)]
        assert all(x.shape == (batch_size, layout.d_model) and x.dtype == DTYPES[layout.dtype] for x in batches)
        drawn = rows(torch.cat(batches).float())
        for epoch in range(3):
            assert sorted(drawn[epoch * len(expected) : (epoch + 1) * len(expected)]) == sorted(expected)

        position = data.draw(st.integers(0, n_batches - 1))
        shuffled.seek(position)
        assert shuffled.position == position and torch.equal(next(shuffled), batches[position])
        again = acts.shuffled("patches", np.array(chosen), batch_size, seed, buffer_mb=0 if small else 1)
        again.seek(position)
        assert torch.equal(next(again), batches[position])


def test_order_is_of_seed_and_epoch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 5 * 12)
    layout = layout_of(40)
    found = {}
    for per_shard in (40, 7, 1):
        folder = tmp_path / str(per_shard)
        folder.mkdir()
        acts, _ = recording(folder, layout, per_shard)
        for seed in (0, 1):
            shuffled = acts.shuffled("patches", np.arange(40), 160, seed, buffer_mb=0)
            found[per_shard, seed] = [next(shuffled) for _ in range(2)]
    for seed in (0, 1):
        for per_shard in (7, 1):
            assert torch.equal(torch.cat(found[per_shard, seed]), torch.cat(found[40, seed]))
    assert not torch.equal(found[40, 0][0], found[40, 1][0]), "another seed, another order"
    assert not torch.equal(found[40, 0][0], found[40, 0][1]), "another epoch, another order"


def test_everything_in_the_buffer_is_a_perfect_shuffle(tmp_path: Path) -> None:
    """Each vector is as likely at each place: means over many epochs lie within five standard errors."""
    acts, _ = recording(tmp_path, layout_of(12), 5)
    shuffled = acts.shuffled("patches", np.arange(12), 48, 0)
    n_epochs = 400
    place = torch.stack([next(shuffled)[:, 0].argsort().double() for _ in range(n_epochs)])
    error = 48 / 12**0.5 / n_epochs**0.5
    assert ((place.mean(0) - 23.5).abs() < 5 * error).all()
    assert (place.std(0) > 0.85 * 48 / 12**0.5).all()


def test_a_small_buffer_still_mixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a store 20 times the buffer, batches share images and tokens at most 1.5 times as often as by pure chance."""
    d_model, n_examples = 64, 5120
    monkeypatch.setattr(stream, "BLOCK_BYTES", 16 << 10)  # 64 blocks in the buffer, a quarter of the default
    acts, _ = recording(tmp_path, layout_of(n_examples, side=4, n_prefix=0, d_model=d_model), 1500)
    shuffled = acts.shuffled("patches", np.arange(n_examples), 256, 0, buffer_mb=1)
    assert shuffled.n_vectors * d_model * 4 == 20 << 20
    image = token = pairs = 0
    for _ in range(shuffled.n_vectors // 256):
        numbers = next(shuffled)[:, 0].long()
        pairs += 256 * 255
        image += int((numbers[:, None] // 16 == numbers // 16).sum()) - 256
        token += int((numbers[:, None] % 16 == numbers % 16).sum()) - 256
    assert image / pairs <= 1.5 * 15 / shuffled.n_vectors
    assert token / pairs <= 1.5 / 16


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(1, 25), st.data())
def test_statistics(shape: tuple[int, int, int, int, str], per_shard: int, data: st.DataObject) -> None:
    layout = layout_of(*shape)
    train = torch.tensor(data.draw(st.lists(st.booleans(), min_size=layout.n_examples, max_size=layout.n_examples)))
    with TemporaryDirectory() as folder:
        acts, truth_etd = recording(Path(folder), layout, per_shard, train)
        for tokens in ("patches", "cls") if layout.prefix else ("patches",):
            if not train.any():
                with pytest.raises(UserError) as none:
                    acts.stats(tokens)
                assert str(none.value) == f"{folder}: has no train images, so no mean and scale of its {tokens}"
                continue
            kept = truth_etd[train][:, layout.n_prefix :] if tokens == "patches" else truth_etd[train][:, :1]
            x_nd = kept.reshape(-1, layout.d_model).numpy().astype(np.float64)
            stats = acts.stats(tokens)
            assert stats.n == len(x_nd) and stats.mean.dtype == stats.var.dtype == torch.float64
            spread_d = x_nd.std(0)
            np.testing.assert_array_less(np.abs(stats.mean.numpy() - x_nd.mean(0)), 1e-6 * spread_d + 1e-12)
            np.testing.assert_allclose(stats.var, x_nd.var(0), rtol=1e-6, atol=1e-13)
            expected = np.sqrt(((x_nd - x_nd.mean(0)) ** 2).sum(1).mean() / layout.d_model)
            assert stats.scale == pytest.approx(expected, rel=1e-6, abs=1e-13)
            ratio = np.linalg.norm(x_nd.mean(0)) / np.linalg.norm(spread_d) if spread_d.any() else sys.float_info.max
            assert stats.offset_ratio == pytest.approx(ratio, rel=1e-6, abs=1e-6) or not x_nd.any()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 40), st.sampled_from(list(DTYPES)), st.floats(0, 30), st.integers(0, 2**31))
def test_moments_against_float64(n: int, d_model: int, dtype: str, offset: float, seed: int) -> None:
    """Far from zero, with an outlying vector in front and a dimension a thousand times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    x_nd = torch.randn(n, d_model, generator=generator) + offset
    x_nd[:, -1] *= 50
    x_nd[0] *= 20
    x_nd = x_nd.to(DTYPES[dtype])
    moments = Moments.none(d_model)
    for part in (x_nd[:1], x_nd[1 : n // 2], x_nd[:0], x_nd[max(1, n // 2) :]):
        moments.add(part)
    wide_nd = x_nd.double()
    assert moments.n == n
    np.testing.assert_array_less((moments.mean_d - wide_nd.mean(0)).abs(), 1e-6 * wide_nd.std(0, correction=0) + 1e-12)
    np.testing.assert_allclose(moments.var_d, wide_nd.var(0, correction=0), rtol=2e-6, atol=1e-12)
    assert moments.norms == pytest.approx(float(wide_nd.norm(dim=1).sum()), rel=1e-6)
    if n > 1:
        ratio = wide_nd.mean(0).norm() / wide_nd.var(0, correction=0).sum().sqrt()
        assert moments.offset_ratio == pytest.approx(float(ratio), rel=1e-5, abs=1e-6)
    else:
        assert moments.offset_ratio == sys.float_info.max, "one vector has no spread"


def test_moments_far_from_zero() -> None:
    """A mean ten thousand times the spread costs no digits of the variance, as a plain sum of squares would."""
    x_nd = torch.randn(5000, 4) + 1e4
    moments = Moments.none(4)
    for part in (x_nd[:1], x_nd[1:601], x_nd[:0], x_nd[601:]):
        moments.add(part)
    np.testing.assert_allclose(moments.var_d, x_nd.double().numpy().var(0), rtol=1e-6)
    assert moments.offset_ratio == pytest.approx(1e4, rel=0.02)


def test_moments_of_nothing() -> None:
    assert (Moments.none(3).n, Moments.none(3).offset_ratio) == (0, 0.0)


def test_the_library_reads_a_shard(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for dtype in DTYPES:
        folder = tmp_path / dtype
        folder.mkdir()
        layout = layout_of(5, dtype=dtype)
        recording(folder, layout, 3)
        loaded = load_file(folder / "acts-00001.safetensors")
        assert list(loaded) == ["acts"]
        assert torch.equal(loaded["acts"], vectors(layout)[3:].transpose(0, 1))


def test_complete_shards_are_kept_and_others_are_not(tmp_path: Path) -> None:
    layout = layout_of(10)
    recording(tmp_path, layout, 3)

    def missing(per_shard: int = 3) -> list[int]:
        return Writer(tmp_path, layout, examples_of(layout), per_shard * layout.example_bytes).missing()

    assert missing() == []
    assert missing(4) == [0, 1, 2], "shards of another size"
    cut, turned, gone = (tmp_path / f"acts-0000{i}.safetensors" for i in (0, 1, 3))
    cut.write_bytes(cut.read_bytes()[:-1])
    data = bytearray(turned.read_bytes())
    data[-1] ^= 1
    turned.write_bytes(data)
    gone.unlink()
    (tmp_path / "moments-00002.safetensors").write_bytes(b"torn")
    assert missing() == [0, 1, 2, 3]


def test_made_again_at_another_shard_size_leaves_nothing(tmp_path: Path) -> None:
    layout = layout_of(10)
    recording(tmp_path, layout, 2)
    acts, truth_etd = recording(tmp_path, layout, 6)
    assert sorted(path.name for path in tmp_path.glob("*-0*")) == [
        f"{kind}-0000{i}.safetensors" for kind in ("acts", "moments") for i in (0, 1)
    ]
    assert torch.equal(next(acts.read("all"))[1], truth_etd)


def test_a_recording_of_many_shards_keeps_no_file_open(tmp_path: Path) -> None:
    acts, truth_etd = recording(tmp_path, layout_of(300), 1)
    before = len(os.listdir("/proc/self/fd"))
    (_, found_etd), *_ = acts.read("all", batch=300)
    assert torch.equal(found_etd, truth_etd) and len(acts._open) == 300
    assert len(os.listdir("/proc/self/fd")) == before


def test_shards_are_mapped_and_not_read(tmp_path: Path) -> None:
    """What is changed in the file is seen; what is changed in memory does not come into the file."""
    acts, _ = recording(tmp_path, layout_of(4), 2)
    path = tmp_path / "acts-00001.safetensors"
    mapped_ted = acts._mapped(1)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(7).tobytes())
    assert mapped_ted[-1, -1, -1] == 7
    data = path.read_bytes()
    mapped_ted[:] = 0
    assert path.read_bytes() == data


def test_no_examples(tmp_path: Path) -> None:
    acts, _ = recording(tmp_path, layout_of(0), 3)
    assert list(acts.read("all")) == []
    with pytest.raises(UserError) as none:
        acts.shuffled("patches", np.arange(0), 4, 0)
    assert str(none.value) == f"{tmp_path}: there are no patches of the examples asked for"
    with pytest.raises(UserError) as none:
        acts.stats("cls")
    assert str(none.value) == f"{tmp_path}: has no train images, so no mean and scale of its cls"


def told(call: Callable[[], object]) -> str:
    """Return what a call that fails tells the user."""
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_faults_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(why: str) -> str:
        return f"{tmp_path}: the recording is damaged ({why}); delete the folder to make it again"

    no_index = f"[Errno 2] No such file or directory: '{tmp_path / 'acts.json'}'"
    assert told(lambda: Acts(tmp_path)) == damaged(no_index)
    acts, _ = recording(tmp_path, layout_of(5, n_prefix=0), 3)
    assert told(lambda: acts.stats("cls")) == f"{tmp_path}: has no [CLS]; its backbone has none"
    assert told(lambda: next(acts.read("pathces"))) == "tokens: 'pathces' is none of patches, cls, all"
    with pytest.raises(IndexError):
        next(acts.read("all", np.array([5])))
    with monkeypatch.context() as patch:
        patch.setattr("duckdb.connect", failing)
        assert told(lambda: Acts(tmp_path).keys) == (
            f"{tmp_path / 'example.parquet'}: cannot be read (Out of Memory Error: too little); nothing is deleted for "
            "that; make it readable, or delete it, and its unit is made again"
        )
    (tmp_path / "example.parquet").write_bytes(b"")
    assert told(lambda: Acts(tmp_path).keys) == (
        f"{tmp_path / 'example.parquet'}: cannot be read; delete {tmp_path} to make it again"
    )
    shard = tmp_path / "acts-00001.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(b"")
    assert told(lambda: Acts(tmp_path)) == damaged(f"{shard.name} is not {size} bytes long")
    (tmp_path / "acts.json").write_text(json.dumps({"shards": []}))
    assert told(lambda: Acts(tmp_path)) == damaged("'grid'")


def failing(*_: object) -> None:
    """Fail as DuckDB does where memory ends."""
    raise duckdb.OutOfMemoryException("Out of Memory Error: too little\nand what one may do")
