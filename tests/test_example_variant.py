"""The variant in examples/: its registry loads, trains it beside a built-in one, and what it says of itself is so."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import duckdb
import pytest
import tiny
import torch
from typer.testing import CliRunner

from saefw.catalog import Catalog
from saefw.cli import app
from saefw.registry import read
from saefw.testing import check_sae
from saefw.trained import open_sae

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def fresh_imports() -> Iterator[None]:
    """Forget the drop-in before and after: two folders hold a file of its name."""
    path = sys.path.copy()
    sys.modules.pop("my_variant", None)
    yield
    sys.modules.pop("my_variant", None)
    sys.path[:] = path


@pytest.fixture
def example(fresh_imports: None) -> ModuleType:
    Catalog().add_files([EXAMPLES / "my_variant.py"])
    return sys.modules["my_variant"]


def test_the_registry_is_right_as_it_stands(example: ModuleType) -> None:
    registry = read(EXAMPLES / "my_variant.yaml", Catalog())
    members = registry.families["saes"]["sparing"]
    assert [type(member.entry) for member in members] == [example.Sparing] * 3
    check_sae(members[0].entry)  # type: ignore[arg-type]


def test_it_runs_and_opens_again(fresh_imports: None, tmp_path: Path) -> None:
    """The whole command on a copy with a tiny backbone, tiny images and few tokens."""
    shutil.copy(EXAMPLES / "my_variant.py", tmp_path)
    text = (EXAMPLES / "my_variant.yaml").read_text()
    for word, smaller in {
        "[my_variant.py]": f"[my_variant.py, {tiny.__file__}]",
        "digits-vit": "tiny-vit",
        "use: digits}": "use: tiny-set}",
        "600_000": "20_000",
        "lr: 0.003": "lr: 0.03, warmup: 5",
        "[0.01, 0.02, 0.03]": "[0.02]",
    }.items():
        assert word in text
        text = text.replace(word, smaller)
    path = tmp_path / "my_variant.yaml"
    path.write_text(text)

    result = CliRunner().invoke(app, ["run", str(path)])
    assert result.exit_code == 0, result.output
    made = sorted((tmp_path / "runs" / "my_variant" / "train").iterdir())
    assert CliRunner().invoke(app, ["run", str(path)]).exit_code == 0
    assert sorted((tmp_path / "runs" / "my_variant" / "train").iterdir()) == made and len(made) == 2
    with duckdb.connect(str(tmp_path / "runs" / "my_variant" / "saefw.duckdb"), read_only=True) as db:
        rows = db.execute("SELECT variant, sae, l0, nmse FROM pareto ORDER BY variant").fetchall()
    assert [row[0] for row in rows] == ["relu", "sparing"]
    assert all(0 < l0 < 64 and nmse < 0.7 for _, _, l0, nmse in rows)

    registry = read(path, Catalog())
    (member,) = registry.families["saes"]["sparing"]
    sae = open_sae(member.entry, tmp_path / "runs" / "my_variant" / "train" / rows[1][1])  # type: ignore[arg-type]
    assert type(sae).__name__ == "SparingSae"
    assert sae.encode(torch.zeros(3, 16)).d_sae == 64


def test_it_pulls_on_weak_codes_like_l1_and_half_as_hard_at_the_knee(example: ModuleType) -> None:
    sae = example.Sparing(expansion=1, weight=0.3, knee=2.0).build(3)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
    x_nd = torch.tensor([[1e-6, 2.0, 6.0]])
    sae.loss(x_nd, torch.zeros(3, dtype=torch.bool)).terms["penalty"].backward()
    torch.testing.assert_close(sae.b_enc.grad, torch.tensor([0.3, 0.15, 0.075]))
