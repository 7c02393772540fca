"""Images chosen evenly over classes."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from saefw.splits import stratified

LABELS = st.lists(st.integers(0, 4), max_size=60)


@given(LABELS, st.integers(0, 70), st.integers(0, 3))
def test_each_class_gives_its_share(labels: list[int], n: int, seed: int) -> None:
    keys = [f"image-{i}" for i in range(len(labels))]
    chosen = stratified(keys, labels, n, seed)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(n, len(labels))
    counts = Counter(labels[i] for i in chosen)
    for label, of in Counter(labels).items():
        assert abs(counts[label] - of * min(n, len(labels)) / len(labels)) <= 1
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
