"""The floors of the house: an import only goes down, and the core knows no plugin."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]

FLOORS = (
    ("bench", "saefw", "errors"),
    (
        "calibration",
        "care",
        "chance",
        "heap",
        "histogram",
        "images",
        "largest",
        "moments",
        "monosemantic",
        "origin",
        "rows",
        "splits",
        "tensors",
        "unit",
        "vision",
    ),
    (
        "archives",
        "commands",
        "entry",
        "fetch",
        "imagesets",
        "notes",
        "pictures",
        "places",
        "sealed",
        "sparse",
        "spill",
        "stream",
        "style",
        "sums",
        "wording",
    ),
    ("near", "threshold"),
    ("detection", "index", "sae", "shards", "sweep"),
    ("store",),
    ("acts", "firing", "metric", "pace", "run"),
    ("choice", "plugin", "ranking"),
    ("blocks", "hookspecs", "inputs", "metrics", "originals", "start", "tally", "trained"),
    (
        "catalog",
        "controls",
        "duplicates",
        "facts",
        "forward",
        "get",
        "outcome",
        "peers",
        "steering",
        "testing.contract",
        "training",
        "views",
    ),
    ("abreast", "new", "recording", "testing.entry"),
    (
        "live",
        "samples",
        "testing.backbone",
        "testing.dataset",
        "testing.metric",
        "testing.planted",
        "testing.probe",
        "testing.store",
    ),
    (
        "registry",
        "testing.sae",
        "stages",
        "stages.gallery_data",
        "stages.probe",
        "stages.record",
        "stages.train",
    ),
    (
        "pipeline",
        "testing",
        "stages.charts",
        "stages.drawings",
        "stages.feature_charts",
        "stages.figures",
        "stages.probe_charts",
        "stages.readers",
        "stages.steer_charts",
        "stages.steer_plan",
        "stages.visuals",
    ),
    (
        "gc",
        "stages.faithfulness",
        "stages.gallery",
        "stages.sheets",
        "stages.steer_edits",
        "stages.steer_tables",
        "tables",
    ),
    ("stages.steer",),
    ("experiment.choices", "experiment.tables", "printer"),
    ("bench.frame", "experiment.opened", "verify"),
    (
        "bench.features",
        "bench.pictures",
        "bench.probe",
        "bench.read",
        "bench.record",
        "bench.steer",
        "bench.tables",
        "bench.train",
        "experiment.notebook",
    ),
    ("bench.command", "experiment"),
    ("cli",),
    ("__main__",),
)
"""What stands on the ground comes first; a module imports from the floors below its own, never beside or above."""

FLOOR = {name if name == "saefw" else f"saefw.{name}": floor for floor, names in enumerate(FLOORS) for name in names}


def imported(source: str) -> Iterator[str]:
    """Yield every module of this project that a source imports, at its top, in a function or for types alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "no relative imports: a reader should see where a name comes from"
            whole = f"{node.module}."
            inner = [whole + alias.name for alias in node.names if whole + alias.name in FLOOR]
            names = inner or [str(node.module)]
        else:
            continue
        yield from (name for name in names if name == "saefw" or name.startswith(("saefw.", "saefw_")))


def faults_of_core(module: str, source: str) -> list[str]:
    """Say which imports of a module of the core are forbidden."""
    faults = []
    for name in imported(source):
        if name.startswith("saefw_"):
            faults.append(f"{module} imports the plugin {name}")
        elif name.startswith("saefw.stages.") and not module.startswith(
            ("saefw.stages.", "saefw.bench.", "saefw.experiment.")
        ):
            faults.append(f"{module} imports the stage {name}")
        elif FLOOR[name] >= FLOOR[module]:
            faults.append(f"{module} (floor {FLOOR[module]}) imports {name} (floor {FLOOR[name]})")
    return faults


def faults_of_plugin(file: str, source: str) -> list[str]:
    """Say which imports of a plugin are no part of its contract."""
    allowed = {"saefw.plugin", "saefw.sae"} if file.startswith("saes/") else {"saefw.plugin"}
    own = file.split("/")[1].removesuffix(".py")
    return [
        f"{file} imports {name}"
        for name in imported(source)
        if name not in allowed and name != own and not name.startswith(f"{own}.")
    ]


def core_files() -> dict[str, Path]:
    root = TOP / "core"
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in root.rglob("*.py")
    }


def test_every_module_has_a_floor() -> None:
    assert set(core_files()) == set(FLOOR)


@pytest.mark.parametrize("module", core_files())
def test_core_imports_go_down(module: str) -> None:
    assert faults_of_core(module, core_files()[module].read_text()) == []


def test_plugins_import_the_contract_alone() -> None:
    root = TOP / "plugins"
    files = sorted(root.rglob("*.py"))
    assert files
    assert [fault for path in files for fault in faults_of_plugin(str(path.relative_to(root)), path.read_text())] == []


def test_the_page_imports_no_plugin() -> None:
    """It learns of plugins as everybody does, from the catalog."""
    own = {path.stem for path in (TOP / "steering").glob("*.py")}
    for path in (TOP / "steering").glob("*.py"):
        names = {name.split(".")[0] for name in imported(path.read_text())}
        assert names <= own | {"saefw"}, path


def test_a_forbidden_import_is_named_with_both_its_ends() -> None:
    assert faults_of_core("saefw.store", "def f():\n    from saefw.plugin import Run") == [
        "saefw.store (floor 5) imports saefw.plugin (floor 7)"
    ]
    assert faults_of_core("saefw.index", "from saefw import shards") == [
        "saefw.index (floor 4) imports saefw.shards (floor 4)"
    ]
    assert faults_of_core("saefw.cli", "import saefw_topk") == ["saefw.cli imports the plugin saefw_topk"]
    assert faults_of_core("saefw.cli", "from saefw.stages import train") == [
        "saefw.cli imports the stage saefw.stages.train"
    ]
    assert faults_of_core("saefw.store", "from saefw.errors import UserError\nimport saefw, json") == []
    assert faults_of_plugin("probes/saefw_linear.py", "from saefw.plugin import Probe\nfrom saefw.sae import Sae") == [
        "probes/saefw_linear.py imports saefw.sae"
    ]
    assert faults_of_plugin("saes/saefw_relu.py", "from saefw.sae import Sae\nimport saefw_topk") == [
        "saes/saefw_relu.py imports saefw_topk"
    ]
    assert faults_of_plugin("models/saefw_vit/__init__.py", "from saefw_vit.blocks import Block") == []
