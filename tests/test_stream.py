"""The order of a stream, against one told in plain words; rows of files, against the file in memory."""

import os
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saefw import rows, stream
from saefw.stream import Stream

VECTOR = 4096
"""Bytes of a vector here: 256 of them in a MiB."""

Place = tuple[int, int]


def filled(token: int, start: int, stop: int, into_nb: rows.Bytes, cache: bool) -> bool:
    """Put the number of token and example in the place of each vector."""
    numbers_n2 = into_nb.view(np.float32)
    numbers_n2[:, 0] = token
    numbers_n2[:, 1] = np.arange(start, stop)
    return start % 3 == 0


def drawn(made: Stream, n_batches: int) -> list[Place]:
    return [
        (token, example) for _ in range(n_batches) for token, example in next(made)[:, :2].int().tolist()
    ]  # fmt: skip


def oracle(seed: int, epoch: int, n_tokens: int, n_examples: int, in_buffer: int, in_block: int) -> list[Place]:
    """An epoch's order: vectors as lists, blocks, segments and phases as lists of lists."""
    n_ranges = max(1, n_examples // in_block)
    ranges = [range(i * n_examples // n_ranges, (i + 1) * n_examples // n_ranges) for i in range(n_ranges)]
    fits = n_tokens * n_examples <= in_buffer
    range_tr = np.tile(np.arange(n_ranges), (n_tokens, 1))
    token_rt = np.tile(np.arange(n_tokens), (n_ranges, 1))
    if not fits:
        rng = np.random.default_rng([seed, epoch, 1])
        range_tr, token_rt = rng.permuted(range_tr, axis=1), rng.permuted(token_rt, axis=1)
    blocks = [
        [(int(token), example) for example in ranges[range_tr[token, turn]]]
        for turn in range(n_ranges)
        for token in token_rt[turn]
    ]
    longest = max(map(len, ranges))
    n_slots = 1 if fits else max(2, min(stream.SEGMENTS, in_buffer // longest))
    n_segments = 1 if fits else -(-len(blocks) // max(1, in_buffer // longest // n_slots))
    segments = []
    for s in range(n_segments):
        lying = list(chain(*blocks[s * len(blocks) // n_segments : (s + 1) * len(blocks) // n_segments]))
        # A buffer with room for all, or for the only block there is, is read once.
        shuffle = np.random.default_rng([seed, 0 if n_segments == 1 else epoch, 2, s + 1]).permutation(len(lying))
        segments.append([lying[i] for i in shuffle])
    live = min(max(1, n_slots - 1), n_segments)
    n_phases = n_segments - live + 1
    there = [[p for p in range(n_phases) if p <= s < p + live] for s in range(n_segments)]
    order: list[Place] = []
    for p in range(n_phases):
        found: list[Place] = []
        for s in range(p, p + live):
            n, nth = len(there[s]), there[s].index(p)
            found += segments[s][len(segments[s]) * nth // n : len(segments[s]) * (nth + 1) // n]
        order += [found[i] for i in np.random.default_rng([seed, epoch, 3, p + 1]).permutation(len(found))]
    return order


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 150),
    st.integers(1, 40),
    st.sampled_from([0, 1]),
    st.sampled_from([1, 2, 3, 16]),
    st.integers(1, 700),
    st.integers(0, 2**40),
    st.integers(1, 5),
    st.data(),
)
def test_the_order_is_that_of_the_oracle(
    n_tokens: int,
    n_examples: int,
    in_block: int,
    buffer_mb: int,
    segments: int,
    batch_size: int,
    seed: int,
    readers: int,
    data: st.DataObject,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BLOCK_BYTES", in_block * VECTOR)
        patch.setattr(stream, "SEGMENTS", segments)
        patch.setattr(stream, "READERS", readers)
        shape = n_tokens, n_examples, VECTOR // 4
        made = Stream(filled, shape, torch.float32, batch_size, seed, buffer_mb)
        epochs = [
            oracle(seed, epoch, n_tokens, n_examples, buffer_mb * 256, in_block)
            for epoch in range(3 + batch_size // (n_tokens * n_examples))
        ]
        every = {(token, example) for token in range(n_tokens) for example in range(n_examples)}
        assert all(len(epoch) == len(every) and set(epoch) == every for epoch in epochs), "once an epoch"
        told = list(chain(*epochs))
        n_batches = min(8, len(told) // batch_size)
        assert drawn(made, n_batches) == told[: n_batches * batch_size]
        for position in data.draw(st.lists(st.integers(0, len(told) // batch_size - 1), min_size=1, max_size=3)):
            made.seek(position)
            assert made.position == position
            assert drawn(made, 1) == told[position * batch_size : (position + 1) * batch_size]


@pytest.mark.parametrize("readers", [1, 2, 7])
def test_the_order_hangs_on_no_thread(readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 4 * VECTOR)
    monkeypatch.setattr(stream, "READERS", readers)
    rng = np.random.default_rng(readers)

    def slow(token: int, start: int, stop: int, into_nb: rows.Bytes, cache: bool) -> bool:
        time.sleep(rng.uniform(0, 0.002))
        return filled(token, start, stop, into_nb, cache)

    made = Stream(slow, (5, 120, VECTOR // 4), torch.float32, 50, 3, 1)
    assert drawn(made, 24) == oracle(3, 0, 5, 120, 256, 4) + oracle(3, 1, 5, 120, 256, 4)


def test_what_is_read_again_may_stay_in_the_cache_and_what_fits_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 4 * VECTOR)
    calls: list[tuple[int, int, bool]] = []

    def told(token: int, start: int, stop: int, into_nb: rows.Bytes, cache: bool) -> bool:
        calls.append((token, start, cache))
        return filled(token, start, stop, into_nb, cache)

    drawn(Stream(told, (2, 100, VECTOR // 4), torch.float32, 200, 0, 1), 3)
    assert sorted(calls) == [(token, start, False) for token in range(2) for start in range(0, 100, 4)]
    calls.clear()
    large = Stream(told, (4, 100, VECTOR // 4), torch.float32, 400, 0, 1)
    drawn(large, 2)
    again = [(token, start) for token, start, cache in calls if cache]
    assert {cache for *_, cache in calls} == {False, True}
    assert set(again) >= {(token, start) for token in range(4) for start in range(0, 100, 4)}


def test_a_fault_of_reading_is_told_and_reading_goes_on_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 4 * VECTOR)
    away = True

    def sometimes(token: int, start: int, stop: int, into_nb: rows.Bytes, cache: bool) -> bool:
        if away and start == 40:
            raise OSError("the disk is away")
        return filled(token, start, stop, into_nb, cache)

    made = Stream(sometimes, (4, 100, VECTOR // 4), torch.float32, 400, 0, 1)
    with pytest.raises(OSError, match="the disk is away"):
        next(made)
    away = False
    assert drawn(made, 1) == oracle(0, 0, 4, 100, 256, 4)


def test_the_buffer_is_as_large_as_it_is_told_to_be() -> None:
    made = Stream(filled, (196, 2000, 64), torch.float16, 4096, 0, 4)
    next(made)
    assert 3.5 * 2**20 < made._buffer().nbytes <= (4 << 20) * 17 / 16, "with one segment more"


def test_a_batch_stays_as_it_is_while_anything_is_made_of_it() -> None:
    made = Stream(filled, (3, 5000, 128), torch.float32, 4096, 0, 1)  # 2 MiB a batch
    first = next(made)
    told, part, row = first.clone(), first.numpy()[5:], first[7]
    del first
    others = [next(made) for _ in range(6)]
    assert np.array_equal(part, told.numpy()[5:]) and torch.equal(row, told[7])
    assert len({x.data_ptr() for x in others}) == 6
    del others
    assert len({next(made).data_ptr() for _ in range(6)}) == 1, "memory is written again"


# Rows of files


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(0, 5000),
    st.lists(st.integers(0, 99), min_size=1, max_size=60),
    st.sampled_from(["as drawn", "ascending", "each once", "a range"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2000),
    st.integers(1, 3000),
)
def test_rows_are_those_of_the_file(
    folder: Path, d: int, start: int, drawn_n: list[int], how: str, cache: bool, cold: bool, gap: int, most: int
) -> None:
    orders = {"as drawn": drawn_n, "ascending": sorted(drawn_n), "each once": sorted({*drawn_n})}
    rows_n = np.array(orders[how]) if how in orders else range(min(drawn_n), max(drawn_n) + 1)
    data = np.random.default_rng(d).integers(0, 256, start + 100 * d, dtype=np.uint8)
    path = folder / "rows"
    path.write_bytes(data.tobytes())
    if cold and hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    into_nd = np.zeros((len(rows_n), d), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "GAP", gap)
        patch.setattr(rows, "MOST", most)
        rows.read(path, start, rows_n, into_nd, cache)
    assert np.array_equal(into_nd, data[start:].reshape(100, d)[rows_n])


@pytest.mark.skipif(rows._mincore is None, reason="the system does not tell")
def test_what_the_cache_holds(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(1 << 20))
    assert rows.held(path), "just written"
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert not rows.held(path)
    rows.read(path, 0, np.arange(256), np.zeros((256, 4096), dtype=np.uint8), cache=False)
    assert not rows.held(path), "read past it"
    rows.read(path, 0, np.arange(256), np.zeros((256, 4096), dtype=np.uint8), cache=True)
    assert rows.held(path)


def test_the_cache_of_an_empty_file_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "rows").touch()
    assert rows.held(tmp_path / "rows")


@pytest.mark.parametrize("cache", [True, False])
def test_a_file_that_ends_too_early(tmp_path: Path, cache: bool) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(1000))
    with pytest.raises(EOFError, match="ends before byte 1010"):
        rows.read(path, 10, np.arange(100), np.zeros((100, 10), dtype=np.uint8), cache)
