"""Images chosen evenly over classes."""

from collections import Counter
from fractions import Fraction
from hashlib import sha256

from hypothesis import example, given
from hypothesis import strategies as st

from saefw.splits import Split, carve, stratified

LABELS = st.lists(st.integers(0, 4), max_size=60)


@given(LABELS, st.integers(0, 70), st.integers(0, 3))
@example([1, 3, 2, 3, 3, 0, 3, 3], 3, 0)
def test_each_class_gives_its_share(labels: list[int], n: int, seed: int) -> None:
    keys = [f"image-{i}" for i in range(len(labels))]
    chosen = stratified(keys, labels, n, seed)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(n, len(labels))
    counts, sizes = Counter(labels[i] for i in chosen), Counter(labels)
    # There is one share that, of every class, rounds to what was chosen; at n / all of them it need not lie exactly.
    least = [Fraction(2 * counts[label] - 1, 2 * size) for label, size in sizes.items()]
    most = [Fraction(2 * counts[label] + 1, 2 * size) for label, size in sizes.items()]
    assert not labels or max(least) <= min(most)
    assert set(chosen) <= set(stratified(keys, labels, n + 1, seed))


@given(LABELS, st.integers(0, 60), st.permutations(range(60)))
def test_the_order_of_the_images_does_not_count(labels: list[int], n: int, order: list[int]) -> None:
    pairs = [(f"image-{i}", label) for i, label in enumerate(labels)]
    shuffled = [pairs[i] for i in order if i < len(pairs)]
    assert chosen(pairs, n) == chosen(shuffled, n)


def chosen(pairs: list[tuple[str, int]], n: int) -> set[tuple[str, int]]:
    return {pairs[i] for i in stratified([key for key, _ in pairs], [label for _, label in pairs], n)}


def test_another_seed_is_another_choice() -> None:
    keys = [f"image-{i}" for i in range(100)]
    assert stratified(keys, [0] * 100, 10, 0) != stratified(keys, [0] * 100, 10, 1)


def naive(keys: list[str], labels: list[int], n: int, seed: int) -> list[int]:
    """The definition, image by image: the i-th of m in the order of their hashes is wanted once i + 1/2 of m are."""
    drawn = {key: sha256(f"{seed}:{key}".encode()).digest() for key in keys}

    def turn(i: int) -> tuple[float, bytes]:
        ours = sorted(drawn[keys[j]] for j in range(len(keys)) if labels[j] == labels[i])
        return (ours.index(drawn[keys[i]]) + 0.5) / len(ours), drawn[keys[i]]

    return sorted(sorted(range(len(keys)), key=turn)[:n])


@given(LABELS, st.integers(0, 70), st.integers(0, 3))
def test_it_is_the_naive_choice(labels: list[int], n: int, seed: int) -> None:
    keys = [f"image-{i}" for i in range(len(labels))]
    assert stratified(keys, labels, n, seed) == naive(keys, labels, n, seed)


@given(LABELS, st.floats(0, 0.5), st.floats(0, 0.5), st.integers(0, 3))
def test_carving(labels: list[int], valid: float, test: float, seed: int) -> None:
    keys = [f"image-{i}" for i in range(len(labels))]
    splits: list[Split] = ["train"] * len(labels)
    carve(keys, labels, splits, valid, test, seed)
    found = Counter(splits)
    assert found["test"] == round(test * len(labels))
    assert found["valid"] == min(round(valid * len(labels)), len(labels) - found["test"])
    for label, of in Counter(labels).items():
        counts = Counter(split for split, other in zip(splits, labels, strict=True) if other == label)
        assert abs(counts["test"] - test * of) <= 1.5 and abs(counts["valid"] - valid * of) <= 2.5
    assert [i for i, split in enumerate(splits) if split == "test"] == stratified(keys, labels, found["test"], seed)


def test_carving_leaves_what_is_there() -> None:
    keys = [f"image-{i}" for i in range(20)]
    splits: list[Split] = ["train"] * 20
    splits[10:] = ["test"] * 10
    carve(keys, [0] * 20, splits, 0.2, 0.5)
    assert splits[10:] == ["test"] * 10 and Counter(splits[:10]) == {"train": 8, "valid": 2}
    only: list[Split] = ["test"] * 20
    carve(keys, [0] * 20, only, 0.2, 0.5)
    assert only == ["test"] * 20
