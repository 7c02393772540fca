"""One test a hook, each with a tiny plugin; every hook has one, and every hook is in the docs as it is."""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from torch import Tensor

from saefw import hookspecs
from saefw.catalog import Catalog
from saefw.plugin import (
    Backbone,
    BackboneConfig,
    Codes,
    DatasetConfig,
    FigureConfig,
    ProbeConfig,
    SaeConfig,
    StageConfig,
    Unit,
    hookimpl,
)
from saefw.sae import Batch, Sae
from saefw.testing import CONTRACT

HOOKS = [name for name in vars(hookspecs) if name.startswith("saefw_")]

UNIT = Unit("train", {"k": 8})


class Vit(BackboneConfig):
    """A backbone."""

    use: Literal["vit"] = "vit"


class Set(DatasetConfig):
    """A dataset."""

    use: Literal["set"] = "set"


class Topk(SaeConfig):
    """An SAE variant."""

    use: Literal["topk"] = "topk"


class Linear(ProbeConfig):
    """A probe."""

    use: Literal["linear"] = "linear"


class Write(StageConfig):
    """A stage."""

    use: Literal["write"] = "write"


class Front(FigureConfig):
    """A figure."""

    use: Literal["front"] = "front"


class Tokens:
    """A metric: how many tokens there were."""

    def __init__(self) -> None:
        self.n = 0

    def add(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> None:
        self.n += len(x_nd)

    def result(self) -> float:
        return float(self.n)


def plugin(**hooks: Any) -> ModuleType:
    """Return a module with these functions, marked as hook implementations."""
    module = ModuleType("tiny_plugin")
    for name, function in hooks.items():
        setattr(module, name, hookimpl(function))
    return module


def catalog(**hooks: Any) -> Catalog:
    return Catalog([plugin(**hooks)], entry_points=False)


def test_saefw_backbones() -> None:
    assert catalog(saefw_backbones=lambda: [Vit]).lookup("backbones") == {"vit": Vit}


def test_saefw_datasets() -> None:
    assert catalog(saefw_datasets=lambda: [Set]).lookup("datasets") == {"set": Set}


def test_saefw_saes() -> None:
    assert catalog(saefw_saes=lambda: (cls for cls in [Topk])).lookup("saes") == {"topk": Topk}


def test_saefw_probes() -> None:
    assert catalog(saefw_probes=lambda: [Linear]).lookup("probes") == {"linear": Linear}


def test_saefw_stages() -> None:
    assert catalog(saefw_stages=lambda: [Write]).lookup("stages") == {"write": Write}


def test_saefw_figures() -> None:
    assert catalog(saefw_figures=lambda: (Front,)).lookup("figures") == {"front": Front}


def test_saefw_metrics() -> None:
    assert catalog(saefw_metrics=lambda: {"tokens": Tokens}).metrics == {"tokens": Tokens}


def test_saefw_logged() -> None:
    heard: list[object] = []

    def saefw_logged(unit: Unit, step: int, values: Mapping[str, float]) -> None:
        heard.append((unit, step, values))

    catalog(saefw_logged=saefw_logged).hook.saefw_logged(unit=UNIT, step=3, values={"mse": 0.5})
    assert heard == [(UNIT, 3, {"mse": 0.5})]


def test_saefw_progressed() -> None:
    heard: list[object] = []

    def saefw_progressed(done: int, total: int) -> None:
        """Take fewer arguments than there are."""
        heard.append((done, total))

    catalog(saefw_progressed=saefw_progressed).hook.saefw_progressed(stage="sweep", done=1, total=4, what="steps")
    assert heard == [(1, 4)]


def test_saefw_kept() -> None:
    heard: list[object] = []

    def saefw_kept(unit: Unit, folder: Path, seconds: float) -> None:
        heard.append((unit, folder, seconds))

    catalog(saefw_kept=saefw_kept).hook.saefw_kept(unit=UNIT, folder=Path("runs/train/abc"), seconds=0.0)
    assert heard == [(UNIT, Path("runs/train/abc"), 0.0)]


def test_an_object_can_be_a_plugin() -> None:
    """The command line registers its progress printer so."""
    heard: list[str] = []

    class Listener:
        """Hears what is kept."""

        @hookimpl
        def saefw_kept(self, unit: Unit) -> None:
            heard.append(unit.address)

    relay = Catalog([Listener()], entry_points=False).hook
    relay.saefw_kept(unit=UNIT, folder=Path(), seconds=1.0)
    assert heard == [UNIT.address]


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_test(name: str) -> None:
    assert f"test_{name}" in globals(), f"write test_{name}"


def table_in_docs(head: str) -> list[str]:
    """Return the rows of a table in the documentation, by its first line."""
    docs = (Path(__file__).parents[1] / "docs/plugin_reference.md").read_text()
    return docs.split(f"{head}\n|---|---|\n")[1].split("\n\n")[0].splitlines()


def test_the_hooks_in_the_docs_are_these() -> None:
    hooks = {name: getattr(hookspecs, name) for name in HOOKS}
    rows = [f"| `{name}{_signature(hook)}` | {inspect.getdoc(hook)} |" for name, hook in hooks.items()]
    assert table_in_docs("| hook | what it is for |") == rows


def test_the_contract_in_the_docs_is_this() -> None:
    rows = [f"| `{line}` | {text} |" for line, text in CONTRACT.items()]
    assert table_in_docs("| line | what it asks for |") == rows


def _about(cls: type, *names: str) -> list[str]:
    """Return the rows of a table: how a method or field is called, and the first paragraphs of its docstring."""
    rows = []
    for name in names:
        member = getattr(cls, name)
        call = (
            f"{name}{_signature(member).replace('(self, ', '(').replace('(self)', '()')}" if callable(member) else name
        )
        text = (inspect.getdoc(member) or "").partition("\n\nArgs:")[0].partition("\n\nRaises:")[0]
        rows.append(_row(call, " ".join(text.split())))
    return rows


def _row(code: str, text: str) -> str:
    """Return a row of a table; a bar in its first cell would be the end of it."""
    return "| `" + code.replace("|", r"\|") + f"` | {text} |"


def test_the_methods_in_the_docs_are_these() -> None:
    sae = ["edge", "select", "fire", "activate", "dictionary", "prefixes", "terms", "prepare", "settle"]
    assert table_in_docs("| `Sae` | what it is for |") == _about(Sae, *sae)
    backbone = ["blocks", "prepare", "view", "embed", "tail", "cls_after", "embedding", "text"]
    assert table_in_docs("| `Backbone` | what it is for |") == _about(Backbone, *backbone)


def test_the_fields_of_a_batch_in_the_docs_are_these() -> None:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(Batch))).body
    assert isinstance(tree, ast.ClassDef)
    rows = [
        _row(ast.unparse(field), ast.literal_eval(text.value))
        for field, text in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    ]
    assert table_in_docs("| `Batch`, of which `terms` are made | what it is |") == rows + _about(Batch, "per_token")


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_says_in_one_sentence_what_it_is(name: str) -> None:
    text = inspect.getdoc(getattr(hookspecs, name)) or ""
    assert text.endswith(".") and "\n" not in text


def _signature(function: Any) -> str:
    """Return a signature as it is written, without the modules of its types."""
    text = str(inspect.signature(function))
    text = text.replace("'", "")
    modules = (
        "torch.nn.modules.module.",
        "torch.",
        "saefw.sparse.",
        "collections.abc.",
        "pathlib.",
        "saefw.plugin.",
        "saefw.unit.",
        "saefw.sae.",
        "saefw.metric.",
        "typing.",
    )
    for module in modules:
        text = text.replace(module, "")
    return text
