"""What the command line prints and how it exits."""

import csv
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import duckdb
import fakes
import pytest
from annotated_types import Ge
from pydantic import Field
from typer.testing import CliRunner

from saefw import __version__
from saefw.catalog import BASES, Catalog
from saefw.cli import app
from saefw.places import load
from saefw.plugin import Pick, SaeConfig
from saefw.registry import json_schema
from saefw.stages.steer import SaePick
from saefw.store import Store
from saefw.tables import _kind

FILE = f"""
saefw: 1
plugins: [{fakes.__file__}]
figures: {{dots: {{use: dots}}}}
stages:
  numbers: {{use: numbers}}
  best: {{use: sums, of: numbers, pick: {{lowest: nmse}}}}
  figures: {{use: draw, figures: [dots]}}
"""


class Saefw:
    """The command line, called in a folder."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def __call__(self, *args: str, exit_code: int = 0) -> str:
        """Return what a call prints; its errors, if it is to fail."""
        result = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).invoke(app, args)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == exit_code, result.output
        text = result.stderr if exit_code else result.stdout
        assert "\x1b" not in text
        return "\n".join(line.rstrip() for line in text.splitlines())

    def write(self, text: str = FILE) -> None:
        (self.base / "registry.yaml").write_text(text)

    def address(self, stage: str) -> str:
        return min(path.name for path in (self.base / "runs" / stage).iterdir())


@pytest.fixture
def saefw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saefw:
    monkeypatch.chdir(tmp_path)
    # The draw of the tests takes the place of the real one.
    monkeypatch.setenv("SAEFW_BLOCK", "figures")
    called = Saefw(tmp_path)
    called.write()
    return called


def seconds_as_s(text: str) -> str:
    return re.sub(r"\d+\.\d s", "S s", text)


def test_help_imports_next_to_nothing() -> None:
    code = """if True:
        import sys
        from saefw.cli import main
        sys.argv = ["saefw", "--help"]
        try:
            main()
        except SystemExit as end:
            assert not end.code
        heavy = {"torch", "numpy", "duckdb", "pydantic", "yaml", "pluggy", "saefw_steering"} & set(sys.modules)
        assert not heavy, heavy
    """
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for word in (
        "run",
        "check",
        "plugins",
        "schema",
        "init",
        "new",
        "sql",
        "index",
        "verify",
        "gc",
        "serve",
        "Examples:",
        "Exit codes:",
    ):
        assert f" {word} " in f"{out} ".replace("\n", " ")
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out


def test_version(saefw: Saefw) -> None:
    assert saefw("--version") == f"saefw {__version__}"


def test_run_twice(saefw: Saefw) -> None:
    first = saefw("run")
    assert (
        seconds_as_s(first)
        == f"""\
stage     units   kept   to make
───────────────────────────────────────────────────────────────
numbers       3      0         3
best                               decided once numbers is made
figures       1      0         1
numbers: 3 units to make, 0 kept
  number 1                              nmse 0.5, l0 8
  number 2                              nmse 0.333, l0 8
  number 3                              nmse 0.25, l0 8
numbers  3 made, 0 kept, S s
best: 1 unit to make, 0 kept
  sum of numbers
best     1 made, 0 kept, S s
figures: 1 unit to make, 0 kept
  dots
figures  1 made, 0 kept, S s

Made 5 units in S s; 0 were there.
pictures  runs/draw/{saefw.address("draw")}/dots.png
tables    saefw sql "FROM pareto\""""
    )
    assert (
        saefw("run")
        == """\
Nothing to make: 5 units kept in runs.
Pictures: runs/draw. Tables: saefw sql "FROM pareto\""""
    )


def test_run_of_another_file(saefw: Saefw) -> None:
    (saefw.base / "registry.yaml").rename(saefw.base / "other.yaml")
    assert saefw("run", "other.yaml", "--stage", "numbers").endswith(
        """
tables  saefw sql "FROM pareto" --registry other.yaml"""
    )
    assert saefw("run", exit_code=1) == "registry.yaml: no such file"


def test_dry(saefw: Saefw) -> None:
    saefw.write(FILE + "device: cpu\n")
    assert (
        saefw("run", "--dry")
        == """\
stage     unit           what                    disk
─────────────────────────────────────────────────────
numbers   faae90296342   number 1   one number   1 MB
          3548c2f3ea9f   number 2   one number   2 MB
          a6e71fee52b1   number 3   one number   3 MB
figures   ff9597ad216b   dots       to make

stage     to make   disk   time
──────────────────────────────────────────────────────────────
numbers         3   6 MB    3 h
best            1                 decided once numbers is made
figures         1
5 units to make, about 6 MB, about 3 h on cpu without best and figures; 0 kept."""
    )
    assert not (saefw.base / "runs").exists()


def test_dry_for_another_machine(saefw: Saefw) -> None:
    saefw.write(FILE + "device: cuda:99\n")
    *_, numbers, _, _, said, why = saefw("run", "--dry").splitlines()
    assert numbers == "numbers         3   6 MB"
    assert said == "5 units to make, about 6 MB; 0 kept."
    assert why == (
        "How long it takes is not known here: device: cuda:99: this machine, or this build of torch, has none; "
        "try auto or cpu"
    )


def test_trace(saefw: Saefw) -> None:
    result = CliRunner().invoke(app, ["run", "--trace", "--stage", "numbers"])
    assert result.exit_code == 0 and "saefw_kept" not in result.stdout
    lines = result.stderr.splitlines()
    assert "saefw_stages() -> fakes" in lines and "saefw_saes() -> topk" in lines
    assert lines[-1] == "saefw_progressed(stage='numbers', done=3, total=3, what='numbers') -> printer"
    assert any(line.startswith("saefw_logged(unit='number 1', step=1, values={") for line in lines)


def test_check(saefw: Saefw) -> None:
    assert saefw("check").splitlines()[-1] == "registry.yaml: fine; 1 figure, 3 stages"
    assert not (saefw.base / "runs").exists()
    saefw.write(FILE.replace("lowest: nmse", "lowst: nmse").replace("figures: [dots]", "figures: [dts]"))
    assert saefw("check", exit_code=1).splitlines() == [
        "registry.yaml:7:41: stages.best.pick.lowst: no such setting; did you mean 'lowest'?",
        "registry.yaml:8:34: stages.figures.figures.0: 'dts' is not one of the figures; did you mean 'dots'?",
    ]
    saefw.write(FILE.replace("{use: numbers}", "{use: numbers, fault: units}"))
    assert saefw("check", exit_code=1) == "registry.yaml:6:3: stages.numbers: these numbers do not fit"


def test_faults_of_a_run(saefw: Saefw) -> None:
    saefw.write(FILE.replace("{use: numbers}", "{use: numbers, fault: make}"))
    assert saefw("run", exit_code=1).splitlines() == [
        "registry.yaml:6:3: stages.numbers: the second is too large",
        "registry.yaml:6:3: stages.numbers: and too blue",
    ]
    assert saefw("run", "--stage", "numbrs", exit_code=1) == (
        "registry.yaml: there is no stage 'numbrs'; did you mean 'numbers'?"
    )
    saefw.write(FILE.replace("{use: numbers}", "{use: numbers, fault: bug}"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        saefw("run")


def test_wrong_usage(saefw: Saefw) -> None:
    assert "No such option" in saefw("run", "--drie", exit_code=2)
    assert "No such command" in saefw("rnu", exit_code=2)


def test_plugins(saefw: Saefw) -> None:
    lines = saefw("plugins").splitlines()
    assert max(map(len, lines)) <= 80
    assert any(re.search(r"^dots +Dots on a line\. +fakes\.py$", line) for line in lines)
    assert [line.split()[0] for line in lines if line.endswith(" from") and "what it is" in line] == [
        "backbones", "datasets", "saes", "probes", "figures", "stages", "metrics", "watchers",
    ]  # fmt: skip
    assert any(re.match(r"tensorboard +\S.* +saefw \S+$", line) for line in lines)


def test_the_settings_of_a_plugin(saefw: Saefw) -> None:
    assert (
        saefw("plugins", "dots")
        == f"""\
dots, one of the figures, of {fakes.__file__}
Dots on a line.

setting   type         default   what it is
───────────────────────────────────────────
size      float        1.5       In points.
colour    red | blue   red       Of the dots.

In registry.yaml:

figures:
  my-dots:
    use: dots
    size: 1.5
    colour: red
""".rstrip("\n")
        or "\n"
    )
    assert saefw("plugins", "dts", exit_code=1) == "no plugin brings 'dts'; did you mean 'dots'?"


def test_every_example_is_an_entry(saefw: Saefw) -> None:
    import yaml

    from saefw.catalog import Catalog
    from saefw.entry import KINDS
    from saefw.tables import example

    catalog = Catalog()
    for kind in KINDS:
        for use, cls in catalog.lookup(kind).items():
            ((name, settings),) = yaml.safe_load(example(kind, cls))[kind].items()
            assert name == f"my-{use}"
            extra = set(cls.model_fields) - set(BASES[kind].model_fields)
            assert extra <= set(settings)
            if "..." not in settings.values():
                assert cls.model_validate(settings).content() == cls.model_validate({}).content()


def test_schema(saefw: Saefw) -> None:
    schema = json.loads(saefw("schema"))
    assert "numbers" in schema["properties"]["stages"]["additionalProperties"]["properties"]["use"]["enum"]


def checked(path: Path, schema: Any) -> list[str]:
    """Return what a schema validator says of a registry."""
    from jsonschema import Draft202012Validator

    return [error.message for error in Draft202012Validator(schema).iter_errors(load(path)[0].value)]


def test_every_registry_fits_the_schema() -> None:
    """With its own plugin files, `vary` included; what the schema refuses is refused."""
    from jsonschema import Draft202012Validator

    top = Path(__file__).parents[1]
    paths = [
        top / "registry.yaml",
        *(path for kind in ("examples", "benchmarks") for path in (top / kind).rglob("*.yaml")),
    ]
    assert len(paths) > 10
    for path in paths:
        catalog = Catalog()
        catalog.add_files([path.parent / file for file in load(path)[0].value.get("plugins", [])])
        schema = json_schema(catalog)
        Draft202012Validator.check_schema(schema)
        assert checked(path, schema) == [], path
        sys.path[:] = [folder for folder in sys.path if folder != str(path.parent)]


def test_what_has_no_settings_is_shown_too(saefw: Saefw) -> None:
    text = " ".join(saefw("plugins", "nmse").split())
    assert text.startswith(f"nmse, one of the metrics, of saefw {__version__} Normalised mean square error:")
    lines = saefw("plugins", "tensorboard").splitlines()
    assert lines[0] == f"tensorboard, one of the watchers, of saefw {__version__}"
    assert lines[-1].startswith("Is told: saefw_logged")
    assert saefw("plugins", "nmsee", exit_code=1) == "no plugin brings 'nmsee'; did you mean 'nmse'?"


def test_below_a_mapping_stand_its_keys(saefw: Saefw) -> None:
    lines = saefw("plugins", "steer").splitlines()
    (at,) = [i for i, line in enumerate(lines) if re.match(r"sae +mapping +{} ", line)]
    keys = [line.split()[0] for line in lines[at + 1 :] if re.match(r"  \w", line)]
    assert keys[:9] == [*SaePick.model_fields, *Pick.model_fields]
    assert "    sae: {}" in lines


def test_own_settings_come_first_and_items_have_bounds(saefw: Saefw) -> None:
    rows = [line.split()[0] for line in saefw("plugins", "topk").splitlines() if line[:1].strip()]
    assert rows.index("k") < rows.index("expansion")
    found: dict[str, str] = {}

    class Lists(SaeConfig):
        use: Literal["lists"] = "lists"
        shares: list[Annotated[float, Field(gt=0, lt=1)]]
        counts: tuple[Annotated[int, Ge(2)], ...] | None = None

    for name, info in Lists.model_fields.items():
        found[name] = _kind(info)
    assert found["shares"] == "list[float > 0 and < 1]"
    assert found["counts"] == "tuple[int >= 2, ...] | null"


@pytest.mark.parametrize(
    "settings",
    [
        "{use: topk, k: 0}",
        "{use: topk, vary: {k: [8, 0]}}",
        "{use: topk, vary: {k: []}}",
        "{use: topk, vary: {kk: [8]}}",
        "{use: topk, kk: 8}",
        "{use: tokp}",
        "{k: 8}",
    ],
)
def test_the_schema_refuses_what_a_registry_does(settings: str, tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text(f"saefw: 1\nsaes: {{a: {settings}}}\n")
    assert checked(path, json_schema(Catalog()))
    path.write_text("saefw: 1\nsaes: {a: {use: topk, vary: {k: [8, 16]}}}\n")
    assert not checked(path, json_schema(Catalog()))


def test_the_schema_says_what_is_wrong_of_the_entry_that_use_names(tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text("saefw: 1\nsaes: {a: {use: topk, k: 0}, b: {use: tokp}}\n")
    of_use, of_k = sorted(checked(path, json_schema(Catalog())))
    assert of_k == "0 is less than or equal to the minimum of 0" and of_use.startswith("'tokp' is not one of [")


def test_init(saefw: Saefw) -> None:
    assert saefw("init", exit_code=1) == "registry.yaml: is there already; nothing was written"
    assert saefw("init", "new/study") == "new/study/registry.yaml: written. Next: cd new/study; saefw run"
    top = Path(__file__).parents[1] / "registry.yaml"
    assert (saefw.base / "new/study/registry.yaml").read_text() == top.read_text()
    assert saefw("init", "registry.yaml/x", exit_code=1) == (
        "registry.yaml/x/registry.yaml: cannot be written (Not a directory)"
    )


def test_sql(saefw: Saefw) -> None:
    assert saefw("sql", "FROM unit", exit_code=1) == (
        "runs/saefw.duckdb: there is no index yet; `saefw run` makes one, `saefw index` rebuilds it"
    )
    saefw("run", "--stage", "numbers")
    assert (
        saefw("sql", "SELECT label, name, step, value FROM metric JOIN unit USING (unit) ORDER BY ALL LIMIT 2")
        == """\
label      name   step   value
──────────────────────────────
number 1   l0        1       8
number 1   nmse      1     0.5"""
    )
    assert saefw("sql", "FROM acts").endswith("no rows")
    assert saefw("sql", "FROM unti", exit_code=1).startswith("Catalog Error: Table with name unti does not exist!")
    assert "read-only" in saefw("sql", "DELETE FROM unit", exit_code=1)


def test_wide_rows_become_records(saefw: Saefw) -> None:
    saefw("run", "--stage", "numbers")
    columns = ", ".join(f"'{'x' * 30}' AS column_{i}" for i in range(8))
    out = saefw("sql", f"SELECT {columns}")
    assert max(map(len, out.splitlines())) <= 80 and out.count("x" * 30) == 8
    long = saefw("sql", f"SELECT '{'y' * 200}' AS long, 1 AS short")
    assert long.splitlines()[-1] == "y" * 71 + "…" + "       1"


def test_sql_for_scripts(saefw: Saefw) -> None:
    saefw("run", "--stage", "numbers")
    query = (
        "SELECT label, content, value, 'nan'::DOUBLE AS x, NULL AS y FROM metric JOIN unit USING (unit)"
        " WHERE name = 'nmse' ORDER BY ALL LIMIT 2"
    )
    rows = json.loads(saefw("sql", "--json", query))
    assert rows == [
        {"label": "number 1", "content": {"n": 1}, "value": 0.5, "x": None, "y": None},
        {"label": "number 2", "content": {"n": 2}, "value": 1 / 3, "x": None, "y": None},
    ]
    assert list(csv.reader(io.StringIO(saefw("sql", "--csv", query)))) == [
        ["label", "content", "value", "x", "y"],
        ["number 1", '{"n":1}', "0.5", "nan", ""],
        ["number 2", '{"n":2}', str(1 / 3), "nan", ""],
    ]
    assert len(json.loads(saefw("sql", "--json", "SELECT range AS n FROM range(30000)"))) == 30_000
    assert json.loads(saefw("sql", "--json", "SELECT 1 WHERE false")) == []
    assert "not several" in saefw("sql", "--csv", "--json", query, exit_code=2)


def test_sql_into_parquet(saefw: Saefw) -> None:
    saefw("run", "--stage", "numbers")
    query = "FROM metric WHERE name = 'nmse' ORDER BY value DESC LIMIT 2; -- that is all"
    for _ in range(2):  # a file that is there is replaced
        assert saefw("sql", query, "--parquet", "found.parquet") == ""
    with duckdb.connect() as db:
        found = db.execute(f"SELECT value, typeof(step) FROM '{saefw.base / 'found.parquet'}'").fetchall()
    assert found == [(0.5, "BIGINT"), (1 / 3, "BIGINT")]
    assert saefw("sql", "SHOW TABLES", "--parquet", "names.parquet") == ""
    assert saefw("sql", query, "--parquet", "no/found.parquet", exit_code=1) == (
        "no/found.parquet: there is no folder no"
    )
    for nothing in ("-- nothing", "SELECT 1; SELECT 2"):
        assert saefw("sql", nothing, "--parquet", "none.parquet", exit_code=1) == (
            "none.parquet: not written: that takes one query that gives rows, as SELECT and FROM do"
        )
    assert "not several" in saefw("sql", query, "--json", "--parquet", "none.parquet", exit_code=2)
    assert sorted(path.name for path in saefw.base.glob("*.parquet*")) == ["found.parquet", "names.parquet"]


def test_many_rows(saefw: Saefw) -> None:
    saefw("run", "--stage", "numbers")
    lines = saefw("sql", "FROM range(1000)").splitlines()
    assert lines[-2:] == ["  199", "the first 200 rows; --csv and --json give all"]


def test_index(saefw: Saefw) -> None:
    for command in ("index", "verify"):
        assert saefw(command, exit_code=1) == "runs: there is no such folder; `saefw run` makes it"
    saefw("run", "--stage", "numbers")
    (saefw.base / "runs/saefw.duckdb").unlink()
    assert saefw("index") == "runs/saefw.duckdb: 3 units"
    path = min((saefw.base / "runs/numbers").glob("*/metric.parquet"))
    path.write_bytes(b"")
    assert saefw("index", exit_code=1) == (
        f"{path.relative_to(saefw.base)}: damaged (0 bytes, not 686); its unit is left out; "
        "`saefw verify --mend` sets it back"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped(saefw: Saefw, number: int) -> None:
    saefw.write(FILE.replace("{use: numbers}", "{use: numbers, seconds: 0.5}"))
    command = [sys.executable, "-c", "from saefw.cli import main; main()", "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not Store(saefw.base / "runs").kept() and run.poll() is None:
            time.sleep(0.01)
        time.sleep(0.1)
        run.send_signal(number)
        _, err = run.communicate()
    assert (err, run.returncode) == ("stopped; what is kept stays, and the next run goes on from there\n", 130)
    store = Store(saefw.base / "runs")
    store.sync()  # stopped in the midst of an import, a run leaves that to the next one
    with store.db() as db:
        assert db.execute("SELECT label FROM unit").fetchall() == [("number 1",)]


def test_stopped_before_anything(saefw: Saefw) -> None:
    """While the command line is still being imported."""
    for number in (signal.SIGINT, signal.SIGTERM):
        slow = (
            "import os, sys\n"
            "class Slow:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name == 'typer': os.kill(os.getpid(), {int(number)})\n"
            "sys.meta_path.insert(0, Slow())\n"
            "from saefw.__main__ import main; main()\n"
        )
        done = subprocess.run([sys.executable, "-c", slow, "run"], capture_output=True, text=True)
        assert (done.stdout, done.stderr, done.returncode) == ("", "stopped\n", 130)


def test_stopped_in_an_import_that_catches_everything(saefw: Saefw) -> None:
    (saefw.base / "deaf.py").write_text(
        "import time\nprint('deaf', flush=True)\ntry:\n    time.sleep(60)\nexcept:\n    time.sleep(60)\n"
    )
    saefw.write(FILE.replace("plugins: [", "plugins: [deaf.py, "))
    with subprocess.Popen(
        [sys.executable, "-m", "saefw", "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout and run.stdout.readline() == "deaf\n"
        time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=30)
    assert (err, run.returncode) == ("stopped; what is kept stays, and the next run goes on from there\n", 130)


def test_stopped_in_a_long_query(saefw: Saefw) -> None:
    """No Python code runs then, so no handler of a signal does."""
    saefw("run", "--stage", "numbers")
    code = "import saefw.cli as c, saefw.commands as d; d.GRACE = 0.1; print('go', flush=True); c.main()"
    query = "SELECT sum(a.range * b.range) FROM range(1000000) a, range(100000) b"
    with subprocess.Popen(
        [sys.executable, "-c", code, "sql", query], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout and run.stdout.readline() == "go\n"
        time.sleep(3)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=30)
    assert (err, run.returncode) == ("stopped\n", 130)
