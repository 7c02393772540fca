"""`saefw bench probe` and `saefw bench steer` on numbers so small that it takes no time; no time is asserted."""

from pathlib import Path

import pytest

from saefw.bench import probe as module
from saefw.bench import steer
from saefw.bench.frame import Bench


def test_the_sweep_has_rows_beside_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"N": 60, "D_MODEL": 8, "CLASSES": 3, "EPOCHS": 5, "BATCH": 20}.items():
        monkeypatch.setattr(module, name, value)
    bench = Bench(None, 1, tmp_path)
    module.bench(bench)
    ((title, rows),) = bench.parts
    assert title == "60 tokens of 8, 3 classes, 5 epochs in batches of 20, float32"
    one, all_of_them, whole, right = rows
    assert all_of_them.name == "30 probes at once" and all_of_them.reference == one.value > 0
    assert whole.value == all_of_them.value and whole.bound is not None and whole.bound.limit == 10
    assert 30 < right.value <= 100


def test_an_edit_has_rows_beside_the_bare_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"MODEL": "vit_tiny_patch16_224", "SIDE": 32, "K": 4, "CLASSES": 5, "BATCH": 3}.items():
        monkeypatch.setattr(steer, name, value)
    bench = Bench(None, 1, tmp_path)
    steer.bench(bench)
    (title, one), (_, many), (_, logits) = bench.parts
    assert title == "One image, float32: d_model 192, 12 blocks, 5 tokens, 3,072 features, 5 classes"
    edit, whole = (row for row in one if row.bound)
    assert edit.reference == one[0].value > 0 and edit.value == whole.value
    assert many[-1].reference == many[0].value > 0
    assert all(row.holds for row in logits)
