"""How plugins are found, what they bring, and what is said of those that break the contract."""

import re
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest

from saefw.catalog import Catalog
from saefw.entry import KINDS, Knob, Late, Names
from saefw.errors import Faults, UserError
from saefw.origin import whose
from saefw.plugin import SaeConfig, hookimpl
from saefw.registry import read

HEAD = "from typing import Literal\n\nfrom saefw.plugin import SaeConfig, hookimpl\n"

NOISE = (
    HEAD
    + '''

class Noise(SaeConfig):
    """Fires at random."""

    use: Literal["{use}"] = "{use}"


@hookimpl
def saefw_saes() -> list[type[SaeConfig]]:
    """One."""
    return [Noise]
'''
)


def module(name: str, **attributes: Any) -> ModuleType:
    """Return a module with these attributes; functions are marked as hook implementations."""
    made = ModuleType(name)
    for key, value in attributes.items():
        setattr(made, key, hookimpl(value) if key.startswith("saefw_") else value)
    return made


def sae(use: str, name: str = "Variant", **fields: Any) -> type[SaeConfig]:
    """Return a config class; fields are (type, default)."""
    annotations = {"use": Literal[use], **{key: kind for key, (kind, _) in fields.items()}}
    values = {"use": use, **{key: default for key, (_, default) in fields.items() if default is not ...}}
    made: type[SaeConfig] = types.new_class(
        name,
        (SaeConfig,),
        exec_body=lambda body: body.update({"__annotations__": annotations, "__module__": __name__, **values}),
    )
    return made


def faults(*modules: object) -> list[str]:
    with pytest.raises(Faults) as caught:
        Catalog(modules, entry_points=False)
    return caught.value.lines


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed distributions, in front of the path."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(site: Path, distribution: str, version: str, point: str, source: str) -> None:
    """Install a distribution with one module and one entry point."""
    name = f"{distribution.replace('-', '_')}_{site.parent.name.replace('-', '_')}_{site.name}"
    (site / f"{name}.py").write_text(source)
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[saefw]\n{point} = {name}\n")


# Entry points


def test_an_installed_plugin_is_found_and_its_origin_known(site: Path) -> None:
    install(site, "saefw-noise", "0.2", "noise", NOISE.format(use="noise-1"))
    catalog = Catalog()
    cls = catalog.lookup("saes")["noise-1"]
    assert catalog.origin(cls) == "saefw-noise 0.2"
    assert whose(cls) == f"plugin 'noise' of saefw-noise 0.2 ({file_of(site, 'saefw-noise')})"
    assert re.fullmatch(r"plugin 'topk' of saefw \S+", whose(catalog.lookup("saes")["topk"]))
    assert re.fullmatch(r"plugin 'record' of saefw \S+", whose(catalog.lookup("stages")["record"]))
    assert catalog.origin(catalog.lookup("saes")["topk"]).startswith("saefw ")


def file_of(site: Path, distribution: str) -> Path:
    (path,) = site.glob(f"{distribution.replace('-', '_')}_*.py")
    return path


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import not_a_module_at_all\n", "ModuleNotFoundError: No module named 'not_a_module_at_all'"),
        ("import sys\n\nsys.exit(3)\n", "SystemExit: 3"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named(site: Path, source: str, said: str) -> None:
    install(site, "saefw-noise", "0.2", "noise", source)
    path = file_of(site, "saefw-noise")
    line = source.rstrip().count("\n") + 1
    assert Catalog().broken == [
        f"plugin 'noise' of saefw-noise 0.2 ({path}) cannot be imported: {said} at {path.name}:{line}"
        " (SAEFW_BLOCK=noise leaves it out)"
    ]


def test_all_bad_plugins_are_named_at_once(site: Path) -> None:
    install(site, "saefw-noise", "0.2", "noise", "1 / 0\n")
    install(site, "saefw-calm", "1.0", "calm", NOISE.format(use="calm").replace("saefw_saes", "saefw_sae"))
    noise, calm = (file_of(site, name) for name in ("saefw-noise", "saefw-calm"))
    assert sorted(Catalog().broken) == [
        f"plugin 'calm' of saefw-calm 1.0 ({calm}): unknown hook 'saefw_sae'; did you mean 'saefw_saes'?",
        f"plugin 'noise' of saefw-noise 0.2 ({noise}) cannot be imported: ZeroDivisionError: division by zero"
        f" at {noise.name}:1 (SAEFW_BLOCK=noise leaves it out)",
    ]


def test_two_plugins_with_one_name(site: Path) -> None:
    install(site, "saefw-noise", "0.2", "topk", NOISE.format(use="noise-2"))
    (line,) = Catalog().broken
    assert line.startswith("two plugins are called 'topk': one of saefw")
    assert "one of saefw-noise 0.2" in line


def test_a_broken_plugin_matters_to_those_who_need_it(
    site: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(site, "saefw-noise", "0.2", "noise", "1 / 0\n")
    path = tmp_path / "registry.yaml"
    path.write_text("saefw: 1\nsaes: {a: {use: topk}}\n")
    catalog = Catalog()
    assert read(path, catalog).families["saes"]["a"]
    assert [record.getMessage() for record in caplog.records] == [f"{catalog.broken[0]}; nothing in {path} needs it"]
    path.write_text("saefw: 1\nsaes: {a: {use: noise}}\n")
    with pytest.raises(Faults) as caught:
        read(path, catalog)
    (line,) = caught.value.lines
    assert line.startswith(f"{path}:2:12: saes.a.use: no plugin brings 'noise'")
    assert line.endswith(f"; perhaps it would come from one that is broken: {catalog.broken[0]}")


def test_what_two_installed_plugins_bring_is_nobodys(site: Path, tmp_path: Path) -> None:
    install(site, "saefw-noise", "0.2", "noise", NOISE.format(use="topk"))
    module = file_of(site, "saefw-noise")
    path = tmp_path / "registry.yaml"
    path.write_text("saefw: 1\nsaes: {a: {use: relu}}\n")
    catalog = Catalog()
    assert read(path, catalog).families["saes"]["a"]
    (said,) = catalog.broken
    assert re.fullmatch(
        rf"saes: {module.stem} of saefw-noise 0\.2 \({re.escape(str(module))}\) and saefw_topk of saefw \S+"
        " both bring 'topk'; rename one, or leave one out with SAEFW_BLOCK",
        said,
    )
    path.write_text("saefw: 1\nsaes: {a: {use: topk}}\n")
    with pytest.raises(Faults) as caught:
        read(path, catalog)
    assert caught.value.lines == [f"{path}:2:12: saes.a.use: {said}"]


def test_a_blocked_plugin_is_not_even_imported(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "saefw-noise", "0.2", "noise", "1 / 0\n")
    monkeypatch.setenv("SAEFW_BLOCK", "other, noise,topk")
    catalog = Catalog()
    assert "relu" in catalog.lookup("saes")
    assert "topk" not in catalog.lookup("saes")


def test_without_an_install_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a checkout where nothing was installed."""
    monkeypatch.setattr(metadata, "entry_points", lambda group: ())
    with pytest.raises(UserError) as caught:
        Catalog()
    assert str(caught.value) == "no plugins found: pip install -e ."


# What plugins bring


def test_lookup_is_in_order_of_names_and_read_only() -> None:
    b, a = sae("b"), sae("a")
    catalog = Catalog([module("one", saefw_saes=lambda: [b]), module("two", saefw_saes=lambda: [a])], False)
    assert list(catalog.lookup("saes")) == ["a", "b"]
    assert all(catalog.lookup(kind) == {} for kind in KINDS if kind != "saes")
    with pytest.raises(TypeError):
        catalog.lookup("saes")["c"] = a  # type: ignore[index]
    assert catalog.origin(a) == "two"
    with pytest.raises(KeyError):
        catalog.origin(SaeConfig)


def test_a_plugin_may_bring_an_empty_list() -> None:
    assert Catalog([module("one", saefw_saes=lambda: [], saefw_metrics=lambda: {})], False).lookup("saes") == {}


REMEDY = "rename one, or leave one out with SAEFW_BLOCK"


def test_two_plugins_with_one_class_name() -> None:
    one = module("saefw_one", saefw_saes=lambda: [sae("same")])
    two = module("saefw_two", saefw_saes=lambda: [sae("other"), sae("same")])
    assert faults(two, one) == [f"saes: saefw_one and saefw_two both bring 'same'; {REMEDY}"]
    twice = module("saefw_twice", saefw_saes=lambda: [sae("other"), sae("other")])
    assert faults(twice) == ["saes: saefw_twice brings 'other' twice"]


class Metric:
    """Has all that a metric has."""

    def add(self, *args: object) -> None:
        """Take nothing in."""

    def result(self) -> float:
        return 0.0


def test_two_plugins_with_one_metric() -> None:
    one = module("saefw_one", saefw_metrics=lambda: {"mse": Metric})
    two = module("saefw_two", saefw_metrics=lambda: {"mse": Metric})
    assert faults(one, two) == [f"metrics: saefw_one and saefw_two both bring 'mse'; {REMEDY}"]


WHO = "plugin 'bad' of bad: "

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown hook": (
        {"saefw_backbone": lambda: []},
        "unknown hook 'saefw_backbone'; did you mean 'saefw_backbones'?",
    ),
    "a hook like no other": (
        {"saefw_xyzxyz": lambda: []},
        "unknown hook 'saefw_xyzxyz' (there are: saefw_backbones, saefw_datasets, saefw_saes, saefw_probes,"
        " saefw_stages, saefw_figures, saefw_metrics, saefw_logged, saefw_progressed, saefw_kept)",
    ),
    "a hook that fails": (
        {"saefw_saes": lambda: [1 / 0]},
        "saefw_saes fails: ZeroDivisionError: division by zero",
    ),
    "a forgotten return": (
        {"saefw_saes": lambda: None},
        "saefw_saes returns nothing; is a `return` missing?",
    ),
    "no list": (
        {"saefw_saes": lambda: Metric},
        f"saefw_saes must return a list of SaeConfig classes (got {Metric!r})",
    ),
    "another kind": (
        {"saefw_saes": lambda: [Metric]},
        f"saefw_saes must bring subclasses of SaeConfig (got {Metric!r})",
    ),
    "an instance": (
        {"saefw_probes": lambda: ["linear"]},
        "saefw_probes must bring subclasses of ProbeConfig (got 'linear')",
    ),
    "no name": (
        {"saefw_saes": lambda: [types.new_class("Noise", (SaeConfig,))]},
        'Noise says no name; write use: Literal["noise"] = "noise"',
    ),
    "a bad name": (
        {"saefw_saes": lambda: [sae("my noise")]},
        "Variant: a name is made of letters, digits, - and _ (got 'my noise')",
    ),
    "a setting called vary": (
        {"saefw_saes": lambda: [sae("a", vary=(int, 1))]},
        "Variant: no setting can be called 'vary'",
    ),
    "a marker that is called": (
        {"saefw_saes": lambda: [sae("a", n=(Annotated[int, Knob()], 1))]},
        "Variant.n: write Knob, not Knob()",
    ),
    "a late setting without a default": (
        {"saefw_saes": lambda: [sae("a", n=(Annotated[int, Late], ...))]},
        "Variant.n: a setting that is Late needs a default",
    ),
    "a marker inside": (
        {"saefw_saes": lambda: [sae("a", n=(Annotated[int, Knob] | None, None))]},
        "Variant.n: put the marker outside, as in Annotated[str | None, Knob]",
    ),
    "names of no kind": (
        {"saefw_saes": lambda: [sae("a", n=(Annotated[str, Names("stage")], ""))]},
        "Variant.n: Names('stage') is no kind (there are: backbones, datasets, saes, probes, figures, stages)",
    ),
    "metrics in a list": (
        {"saefw_metrics": lambda: [Metric]},
        f"saefw_metrics must return a mapping of names to classes (got [{Metric!r}])",
    ),
    "a metric's name": (
        {"saefw_metrics": lambda: {"my metric": Metric}},
        "the name of a metric is made of letters, digits, - and _ (got 'my metric')",
    ),
    "no metric": (
        {"saefw_metrics": lambda: {"mse": int}},
        f"the metric 'mse' must be a class with `add` and `result` (got {int!r})",
    ),
}


@pytest.mark.parametrize("name", ["revision", "content", "names", "build"])
@pytest.mark.filterwarnings("ignore:Field name .* shadows an attribute:UserWarning")
def test_a_setting_that_would_hide_what_its_class_has(name: str) -> None:
    fields: dict[str, Any] = {name: (int, 7)}
    cls = sae("a", **fields)
    assert faults(module("bad", saefw_saes=lambda: [cls])) == [f"{WHO}Variant: no setting can be called '{name}'"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_contract_is_told(name: str) -> None:
    hooks, message = BROKEN[name]
    assert faults(module("bad", **hooks)) == [WHO + message]


def test_an_argument_that_no_hook_has() -> None:
    def saefw_kept(unit: object, place: object) -> None:
        """Take what is not given."""

    def saefw_logged(units: object) -> None:
        """Misspell one."""

    assert faults(module("bad", saefw_kept=saefw_kept, saefw_logged=saefw_logged)) == [
        f"{WHO}saefw_logged is given no 'units'; did you mean 'unit'?",
        f"{WHO}saefw_kept is given no 'place' (there are: unit, folder, seconds)",
    ]


def test_a_hook_without_its_mark_is_not_passed_over() -> None:
    bad = ModuleType("bad")
    bad.saefw_saes = lambda: [sae("a")]  # type: ignore[attr-defined]
    assert faults(bad) == ["plugin 'bad' of bad: saefw_saes is not marked with @hookimpl"]


# Drop-ins. Their names stay in sys.modules, so each test has its own.


def test_a_drop_in_is_imported_by_name(tmp_path: Path) -> None:
    path = tmp_path / "drop_in_by_name.py"
    path.write_text(NOISE.format(use="by-name"))
    catalog = Catalog(entry_points=False)
    catalog.add_files([path])
    cls = catalog.lookup("saes")["by-name"]
    assert cls.__module__ == "drop_in_by_name"
    assert sys.modules["drop_in_by_name"].Noise is cls
    assert catalog.origin(cls) == str(path)
    catalog.add_files([path])  # once more, as a page does that reads the registry again
    assert str(tmp_path) == sys.path[-1]


def drop_in_faults(path: Path, catalog: Catalog | None = None) -> list[str]:
    with pytest.raises(Faults) as caught:
        (catalog or Catalog(entry_points=False)).add_files([path])
    return caught.value.lines


def test_a_drop_in_whose_name_is_taken(tmp_path: Path) -> None:
    import json

    import yaml

    before = list(sys.path)
    for name, holder in {"json": json.__file__, "yaml": yaml.__file__, "sys": "a module of Python"}.items():
        path = tmp_path / f"{name}.py"
        path.write_text(NOISE.format(use=name))
        assert drop_in_faults(path) == [f"the name '{name}' is taken by {holder}: rename {name}.py"]
    assert sys.path == before


def test_drop_ins_that_are_no_module(tmp_path: Path) -> None:
    assert drop_in_faults(tmp_path / "absent.py") == [f"no such file: {tmp_path / 'absent.py'}"]
    path = tmp_path / "my-noise.py"
    path.write_text("")
    assert drop_in_faults(path) == ["a plugin file is called like a module: my_plugin.py (got 'my-noise.py')"]
    path = tmp_path / "noise.txt"
    path.write_text("")
    assert drop_in_faults(path) == ["a plugin file is called like a module: my_plugin.py (got 'noise.txt')"]


def test_a_drop_in_with_a_slip_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "drop_in_syntax.py"
    path.write_text("x = 1\ndef f(:\n")
    (line,) = drop_in_faults(path)
    assert line.startswith(f"plugin 'drop_in_syntax' of {path} cannot be imported: SyntaxError: ")
    assert line.endswith(" at drop_in_syntax.py:2 (SAEFW_BLOCK=drop_in_syntax leaves it out)")


def test_a_bad_drop_in_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "drop_in_half.py"
    path.write_text(NOISE.format(use="half") + "\n\n@hookimpl\ndef saefw_probe():\n    return []\n")
    catalog = Catalog(entry_points=False)
    assert drop_in_faults(path, catalog) == [
        f"plugin 'drop_in_half' of {path}: unknown hook 'saefw_probe'; did you mean 'saefw_probes'?"
    ]
    assert catalog.lookup("saes") == {}
    assert catalog.manager.get_plugins() == set()


def test_the_file_of_an_installed_plugin_is_left_alone() -> None:
    catalog = Catalog()
    before = catalog.lookup("saes")
    catalog.add_files([Path(__file__).parents[1] / "plugins/saes/saefw_topk.py"])
    assert catalog.lookup("saes") == before


@pytest.mark.slow  # it imports torch twice
def test_a_spawned_worker_can_import_a_drop_in(tmp_path: Path) -> None:
    """Data-loader workers get `sys.path` and unpickle by the name of the module."""
    path = tmp_path / "drop_in_pickled.py"
    path.write_text(NOISE.format(use="pickled"))
    code = f"""
import multiprocessing, pathlib
from saefw.catalog import Catalog
if __name__ == "__main__":
    catalog = Catalog(entry_points=False)
    catalog.add_files([pathlib.Path({str(path)!r})])
    entry = catalog.lookup("saes")["pickled"]()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(type(entry).content, (entry,))["use"])
"""
    script = tmp_path / "main.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "pickled\n"


def test_no_plugin_may_say_that_it_is_blocked_and_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAEFW_BLOCK", "drop_in_blocked,fake")
    path = tmp_path / "drop_in_blocked.py"
    path.write_text("1 / 0")
    catalog = Catalog([module("fake", saefw_saes=lambda: [sae("fake")])], entry_points=False)
    catalog.add_files([path])
    assert catalog.lookup("saes") == {}
