"""What plugins hand over that is wrong, and the sentence that a run says of it: stage, plugin, file, what is right."""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from saefw.cli import app

PLUGINS = Path(__file__).parents[1] / "examples/plugins"

SPLIT = "the split of '0/a.png' must be train, valid or test (got 'training')"
KEY = "two images have the key '0/a.png'; each needs one of its own"

SLIPS = {
    "an SAE that is none": (
        "sae",
        "        return MySaeModel(",
        "        MySaeModel(",
        "build() must return a Sae (got None)",
    ),
    "an SAE of another width": (
        "sae",
        "super().__init__(d_model, d_sae)",
        "super().__init__(d_sae, d_model)",
        "build(64) returns an SAE whose d_model is 256",
    ),
    "codes of another shape": (
        "sae",
        "    def select(",
        "    def activate(self, pre_ns: Tensor) -> Tensor:\n        return pre_ns[:, :5]\n\n    def select(",
        "activate() must give codes [n, s], here [1024, 256] (got [1024, 5])",
    ),
    "a mask in place of entries": (
        "sae",
        "        return where(",
        "        return (",
        "select() must return Entries, as where(mask) and largest() do (got a Tensor)",
    ),
    "a term that is no number": (
        "sae",
        "    def select(",
        "    def terms(self, batch):\n        return {'l1': batch.x_nd.abs().mean(dim=0)}\n\n    def select(",
        "the term 'l1' must be a scalar (got [64])",
    ),
    "terms without names": (
        "sae",
        "    def select(",
        "    def terms(self, batch):\n        return 7\n\n    def select(",
        "terms() must return a dict of scalars by name (got 7)",
    ),
    "a dataset that is none": (
        "dataset",
        "return ImageFiles(files, labels, splits, classes)",
        "return 7",
        "what build() returns must have classes (got 7)",
    ),
    "a label of no class": (
        "dataset",
        "labels = [",
        "labels = [9 + ",
        "the label of '0/a.png' must be -1 or a number of a class, at most 1 (got 9)",
    ),
    "a split that is none": ("dataset", '"train"] * len(names)', '"training"] * len(names)', SPLIT),
    "a key for all": ("dataset", "(files, labels", "(files._replace(keys=[files.keys[0]] * 4), labels", KEY),
    "a backbone that is none": (
        "backbone",
        "        return made.to",
        "        made.to",
        "build() must return a Backbone (got None)",
    ),
    "fewer blocks": (
        "backbone",
        "layer, info.n_blocks",
        "layer, info.n_blocks - 1",
        "there are 2 blocks, but describe() says n_blocks=3",
    ),
    "a prefix of no kind": (
        "backbone",
        "prefix=()",
        "prefix=('reg',)",
        "prefix is made of cls, dist, register (got ('reg',))",
    ),
    "pixels of another type": (
        "backbone",
        "dtype=np.float32",
        "dtype=np.float64",
        "prepare() must give float32 [3, height, width] (got torch.float64 [3, 32, 32])",
    ),
    "a block of another shape": (
        "backbone",
        "    def view(",
        "    def tail(self, tokens, first, last=None):\n        return tokens[:, 1:]\n\n    def view(",
        "after block 0 tokens are [1, 63, 64], but by what describe() says [batch, token, d_model] is [1, 64, 64]",
    ),
    "a probe that is none": (
        "probe",
        "        return probe\n",
        "        probe\n",
        "fit() must return a Probe, fit_many() a list of them (got [None])",
    ),
    "logits of other classes": (
        "probe",
        "self.mean_cd)",
        "self.mean_cd[:3])",
        "forward() must give logits [n, class], here [2, 10] (got [2, 3])",
    ),
    "a mean instead of tokens": (
        "metric",
        "amax(dim=1)",
        "mean()",
        "of() must give a number for each token, here [8192] (got [])",
    ),
    "a figure that is none": (
        "figure",
        "        return figure",
        "        figure",
        "draw() must return a figure of matplotlib (got None)",
    ),
    "units that are none": (
        "stage",
        'Unit("my-stage", self.content(), needs=(acts,), label=label)',
        "label",
        "units() must return units (got ['splits of vit on digits, layer 2'])",
    ),
}
"""By what is wrong: the kind, what stands in its example, what in its place, and what is said."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, so that what is right is made once; with four pictures of two classes."""
    made = tmp_path_factory.mktemp("slips")
    for name in ("0/a.png", "0/b.png", "1/a.png", "1/b.png"):
        path = made / "my_dataset_images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return made


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_told_in_a_sentence(name: str, folder: Path) -> None:
    kind, right, wrong, said = SLIPS[name]
    stem = f"slip_{list(SLIPS).index(name)}"
    text = (PLUGINS / f"my_{kind}.py").read_text()
    assert right in text
    (folder / f"{stem}.py").write_text(text.replace(right, wrong))
    registry = (PLUGINS / f"my_{kind}.yaml").read_text().replace(f"my_{kind}.py", f"{stem}.py")
    path = folder / f"{stem}.yaml"
    path.write_text(registry.replace("30_000", "5_000").replace("limit: 300", "limit: 100"))
    result = CliRunner().invoke(app, ["run", str(path)])
    assert result.exit_code == 1
    who = rf"plugin '{stem}' of {re.escape(str(folder / stem))}\.py"
    where = rf"{re.escape(str(path))}:\d+:3: stages\.\w+: (mine: |figure 'mine' cannot be drawn: )?"
    assert re.fullmatch(rf"{where}{who}: {re.escape(said)}\n", result.stderr), result.stderr


def test_what_a_plugin_raises_keeps_its_traceback_and_says_where(folder: Path) -> None:
    text = (
        (PLUGINS / "my_sae.py")
        .read_text()
        .replace("        return MySaeModel(", "        1 / 0\n        return MySaeModel(")
    )
    (folder / "slip_raises.py").write_text(text)
    path = folder / "slip_raises.yaml"
    path.write_text((PLUGINS / "my_sae.yaml").read_text().replace("my_sae.py", "slip_raises.py"))
    result = CliRunner().invoke(app, ["run", str(path)])
    assert isinstance(result.exception, ZeroDivisionError)
    (note,) = result.exception.__notes__
    assert re.fullmatch(rf"{re.escape(str(path))}:\d+:3: stages\.sweep", note)


def test_code_that_has_changed_since(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Comments and docstrings apart; with a higher revision it is made anew."""
    path, plugin = tmp_path / "changing.yaml", tmp_path / "my_changing.py"
    source = (PLUGINS / "my_stage.py").read_text()
    path.write_text((PLUGINS / "my_stage.yaml").read_text().replace("my_stage.py", "my_changing.py"))

    def told(text: str) -> list[str]:
        plugin.write_text(text)
        sys.modules.pop("my_changing", None)
        caplog.clear()
        result = CliRunner().invoke(app, ["run", str(path)])
        assert result.exit_code == 0, result.output
        return caplog.messages

    assert told(source) == []
    assert told(source.replace('"""Measure each', '"""Take each') + "# more\n") == []
    other = source.replace("n_{split}", "images_{split}")
    assert told(other) == [
        "the code of my_changing.py has changed since it made 1 unit, which is kept; if results change, raise "
        "`revision` of 'my-stage', and it is made anew"
    ]
    anew = other.replace("import Annotated", "import Annotated, ClassVar").replace(
        "    acts:", "    revision: ClassVar[int] = 2\n    acts:"
    )
    assert told(anew) == [] and told(anew) == []
