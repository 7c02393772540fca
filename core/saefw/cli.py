"""The saefw command line.

Imports what a command needs inside it: `saefw --help` loads neither torch nor a plugin.
"""

import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import saefw
from saefw.bench.command import bench
from saefw.commands import Commands
from saefw.errors import UserError, did_you_mean, escaped

if TYPE_CHECKING:
    from saefw.catalog import Catalog
    from saefw.printer import Printer
    from saefw.registry import Registry
    from saefw.store import Store

REGISTRY = Path("registry.yaml")

EXAMPLES = """Examples:

  saefw init study         a folder with an experiment that runs anywhere
  saefw run                make all that ./registry.yaml asks for
  saefw run --dry          only list what would be made
  saefw plugins topk       the settings of a plugin
  saefw new sae NAME       a plugin of your own to begin with
  saefw sql "FROM pareto"  look at the results
  saefw gc                 delete what registry.yaml no longer needs

Exit codes: 0 fine, 1 yours to mend, 2 wrong usage, 130 stopped.
"""


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

File = Annotated[Path, typer.Argument(metavar="[FILE]", show_default=False, help="Default: registry.yaml.")]
Of = Annotated[Path, typer.Option("--registry", metavar="FILE", help="The registry whose store it is.")]
With = Annotated[Path, typer.Option("--registry", metavar="FILE", help="The registry whose plugin files count, too.")]


def main() -> None:
    """Run the command line."""
    # Threads that wait for work by spinning take the cores from decoding workers and from everybody else: without this
    # the embedded experiment takes half as long again. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


def _version(asked: bool) -> None:
    if asked:
        print(f"saefw {saefw.__version__}")
        raise typer.Exit


@app.callback(epilog=EXAMPLES)
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Sparse autoencoders that explain and control vision transformers.

    One file, registry.yaml, says what to make; `saefw run` makes what is missing.
    """


@app.command()
def run(
    file: File = REGISTRY,
    stage: Annotated[str | None, typer.Option(metavar="NAME", help="Stop after this stage.")] = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="Only list what would be made, with the disk and the time.")
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Print every call of a hook to stderr, and which plugins it calls.")
    ] = False,
) -> None:
    """Make all that a registry asks for and that is not there yet.

    Stop it at any time: what is kept stays, and the next run goes on.
    """
    from saefw import pipeline
    from saefw.catalog import Catalog
    from saefw.pace import Pace
    from saefw.printer import Printer
    from saefw.registry import read
    from saefw.tables import console

    catalog = Catalog(trace=partial(print, file=sys.stderr) if trace else None)
    registry = read(file, catalog)
    desk = pipeline.desk(registry, catalog, mend=not dry)
    plans = pipeline.plan(registry, catalog, stage, desk)
    printer = Printer(console())
    if dry:
        _damaged(desk.store)
        costs = {unit: cost for plan in plans for unit, cost in pipeline.costs(registry, desk, plan).items()}
        try:
            device = desk.device
        except UserError as error:  # planned here for another machine
            printer.dry(plans, costs)
            print(f"How long it takes is not known here: {error}")
            return
        pace = Pace()
        seconds = {
            plan.name: pipeline.seconds(registry, desk, plan, pace) for plan in plans if plan.missing or plan.likely
        }
        printer.dry(plans, costs, seconds, device)
        return
    if any(plan.missing or plan.reason for plan in plans):
        printer.planned(plans)
    catalog.manager.register(printer, "printer")
    try:
        done = pipeline.run(registry, catalog, stage, printer)
    finally:
        printer.close()
    printer.summary(done, desk.store, file)


@app.command()
def check(
    file: File = REGISTRY,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="Also open every image, and find those that are in two splits.")
    ] = False,
) -> None:
    """Read a registry and list its units; say all that is wrong with it."""
    from saefw import pipeline
    from saefw.catalog import Catalog
    from saefw.printer import Printer
    from saefw.registry import read
    from saefw.tables import console

    catalog = Catalog()
    registry = read(file, catalog)
    desk = pipeline.desk(registry, catalog)
    plans = pipeline.plan(registry, catalog, run=desk)
    _damaged(desk.store)
    for line in registry.absent():
        print(escaped(line), file=sys.stderr)
    if registry.device not in ("auto", "cpu"):  # torch is imported to ask for others
        try:
            _ = desk.device
        except UserError as error:
            spot = registry.root.items["device"]
            print(f"{file}:{spot.line}:{spot.column}: {error}", file=sys.stderr)
    counts = [
        f"{sum(map(len, block.values()))} {kind if sum(map(len, block.values())) != 1 else kind[:-1]}"
        for kind, block in registry.families.items()
        if block
    ]
    printer = Printer(console())
    printer.planned(plans)
    print(f"{file}: fine; {', '.join(counts)}")
    if duplicates and _duplicates(registry, printer):
        raise typer.Exit(1)


def _duplicates(registry: "Registry", printer: "Printer") -> int:
    """Print the pictures that are in two splits of a dataset; return how many."""
    from contextlib import closing
    from typing import cast

    from saefw.duplicates import Duplicates
    from saefw.plugin import DatasetConfig

    total = 0
    members = [(name, member) for name, family in registry.families["datasets"].items() for member in family]
    for name, member in members:
        try:
            dataset, seen = cast(DatasetConfig, member.entry).open(registry.base), Duplicates()
        except UserError as error:
            raise UserError(f"{registry.place('datasets', name)}: datasets.{name}: {error}") from error
        try:
            with closing(seen.watch(dataset)) as steps:
                for done in steps:
                    printer.saefw_progressed(member.label, done, len(dataset), "images")
        finally:
            printer.close()
        found = seen.across()
        for copies in found:
            same = ", ".join(f"{copy.key} ({copy.split})" for copy in copies)
            print(escaped(f"{member.label}: one picture in {same}"))
        for text in seen.unread:
            print(escaped(f"{member.label}: {text}"))
        print(f"{member.label}: {len(dataset):,} images, {len(found):,} in more than one split")
        total += len(found)
    return total


@app.command()
def plugins(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one and its settings.")] = None,
    registry: With = REGISTRY,
) -> None:
    """List what plugins bring or, with a name, the settings of one."""
    from saefw import tables
    from saefw.entry import KINDS

    catalog, console = _catalog(registry), tables.console()
    if name is None:
        console.print(tables.plugins(catalog))
        return
    brought = [(kind, catalog.lookup(kind)[name]) for kind in KINDS if name in catalog.lookup(kind)]
    if not brought and name not in catalog.metrics and name not in catalog.watchers:
        every = [use for kind in KINDS for use in catalog.lookup(kind)] + [*catalog.metrics, *catalog.watchers]
        near = did_you_mean(name, every) or f" (there are: {', '.join(every)})"
        raise UserError(f"no plugin brings '{name}'{near}")
    for kind, cls in brought:
        console.print(f"{name}, one of the {kind}, of {catalog.origin(cls)}", style="bold")
        console.print(f"{_doc(cls)}\n")
        console.print(tables.settings(cls))
        console.print(f"\nIn registry.yaml:\n\n{tables.example(kind, cls)}\n", soft_wrap=True)
    if metric := catalog.metrics.get(name):
        console.print(f"{name}, one of the metrics, of {catalog.origin(metric)}", style="bold")
        console.print(f"{_doc(metric)}\n\nMeasured of every SAE that is trained; no registry names it.")
    if hooks := catalog.watchers.get(name):
        text, origin = catalog.watcher(name)
        console.print(f"{name}, one of the watchers, of {origin}", style="bold")
        console.print(f"{text}\n\nIs told: {', '.join(hooks)}.")


@app.command()
def schema(registry: With = REGISTRY) -> None:
    """Print the JSON Schema of registry.yaml, for editors that complete and check."""
    import json

    from saefw.registry import json_schema

    print(json.dumps(json_schema(_catalog(registry)), indent=1))


@app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", show_default=False, help="Made if it is not there. Default: this one.")
    ] = Path(),
) -> None:
    """Write registry.yaml, an experiment that runs anywhere in minutes, into a folder."""
    from saefw.new import shipped

    target = folder / "registry.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with target.open("x") as file:
            file.write(shipped("registry.yaml").read_text())
    except FileExistsError as error:
        raise UserError(f"{error.filename}: is there already; nothing was written") from error
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error
    print(f"{target}: written. Next: {'' if folder == Path() else f'cd {folder}; '}saefw run")


@app.command()
def new(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="backbone, dataset, sae, probe, stage, figure, ...")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="As soft-threshold.")],
    package: Annotated[bool, typer.Option("--package", help="Write an installable package.")] = False,
) -> None:
    """Write a plugin that works at once, its test, and a registry that runs it on the embedded data.

    The kinds: backbone, dataset, sae, probe, stage, figure, metric, watcher.
    """
    from saefw.catalog import Catalog
    from saefw.new import new as write

    plugin, test, registry, *_ = write(kind, name, package, Catalog())
    print(f"{plugin}: the plugin; change it as you like")
    if package:
        folder = plugin.parent
        print(f"{folder}: the package; install it with: pip install -e {folder}")
        print(f"{test}: its test; run it with: cd {folder}; python -m pytest")
        print(f"{registry}: runs it; run it with: saefw run {registry}")
        return
    print(f"{test}: its test; run it with: python -m pytest {test}")
    print(f"{registry}: runs it; run it with: saefw run {registry}")


@app.command()
def get(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The dataset; without it they are listed.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="A new or empty folder. Default: data/NAME.")
    ] = None,
    registry: With = REGISTRY,
) -> None:
    """Download a public dataset; one that broke off goes on from there.

    Files are checked against published checksums where there are any.
    """
    from saefw import tables
    from saefw.get import get as bring
    from saefw.get import public
    from saefw.printer import Printer

    datasets, console = _catalog(registry).lookup("datasets"), tables.console()
    if name is None:
        console.print(tables.sources(public(datasets)))
        return
    folder, printer = to or Path("data", name), Printer(console)
    try:
        n = bring(name, datasets, folder, lambda what, done, of: printer.saefw_progressed(name, done, of, what))
    finally:
        printer.close()
    print(f"{folder}: {n:,} images. In registry.yaml:\n\ndatasets:\n  {name}: {{use: {name}, root: {folder}}}")


@app.command(context_settings={"ignore_unknown_options": True})  # a query may start with a comment, as an option does
def sql(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="In DuckDB's SQL: FROM pareto ORDER BY l0")],
    csv: Annotated[bool, typer.Option("--csv", help="Print all rows as CSV.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print all rows as JSON.")] = False,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", help="Write all rows to a parquet file.")
    ] = None,
    registry: Of = REGISTRY,
) -> None:
    """Ask the results; `saefw sql "SHOW TABLES"` lists the tables and views.

    A run may be under way: what it published last is read.
    """
    import duckdb

    from saefw import tables

    if csv + json + (parquet is not None) > 1:
        raise typer.BadParameter("one of --csv, --json and --parquet, not several")
    try:
        with _store(registry).db() as db:
            if parquet is not None:
                tables.write_parquet(db, query, parquet)
                return
            db.execute(query)
            if csv:
                tables.write_csv(db, sys.stdout)
            elif json:
                tables.write_json(db, sys.stdout)
            else:
                console = tables.console()
                for part in tables.found(db, console.width):
                    console.print(part)
    except duckdb.Error as error:
        # What follows names our files: DuckDB adds it where a value needs a module that is missing.
        raise UserError(str(error).split("\nTraceback")[0]) from error


@app.command()
def index(registry: Of = REGISTRY) -> None:
    """Make saefw.duckdb anew from the parquet in the folders of the units."""
    from saefw.care import said
    from saefw.index import INDEX
    from saefw.pipeline import cure

    store = _store(registry)
    if not store.root.is_dir():
        raise UserError(f"{store.root}: there is no such folder; `saefw run` makes it")
    n = store.rebuild()
    print(f"{store.root / INDEX}: {n} unit{'' if n == 1 else 's'}")
    broken = store.broken().items()
    left_out = [f"{said(damage)}; its unit is left out; {cure(folder, damage)}" for folder, damage in broken]
    if left_out:
        raise UserError("\n".join(left_out))


@app.command()
def verify(
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="Only units of this `use`: record.")] = None,
    mend: Annotated[bool, typer.Option("--mend", help="Set damaged units back; a run makes them again.")] = False,
    registry: Of = REGISTRY,
) -> None:
    """Check every file of the store against its checksum.

    Says what is damaged, file by file, and exits with 1 if anything is. Without --mend nothing changes.
    """
    from saefw import verify
    from saefw.printer import Printer
    from saefw.tables import console

    printer = Printer(console())
    try:
        verify.verify(_store(registry), stage, mend, printer, _other(registry))
    finally:
        printer.close()


def _damaged(store: "Store") -> None:
    """Say what is damaged of units that therefore count as missing, or are left out of the index."""
    from saefw.care import said

    for damage in store.broken().values():
        print(escaped(f"{said(damage)}; its unit counts as missing"), file=sys.stderr)


def _other(registry: Path) -> str:
    return "" if registry == REGISTRY else f" --registry {registry}"


@app.command()
def gc(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...", show_default=False, help="Registries of the store. Default: registry.yaml."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    dry: Annotated[bool, typer.Option("--dry", help="Only list what can go.")] = False,
) -> None:
    """Delete the units that no named registry needs, after asking.

    Name every registry of the store that you still want; by default that is registry.yaml alone.
    """
    from saefw.gc import delete, find
    from saefw.printer import Printer, short, size
    from saefw.tables import console

    files = files or [REGISTRY]
    found, needed = find(files), f"kept and needed by {', '.join(escaped(str(file)) for file in files)}"
    for reason, n in found.held.items():
        print(f"{n} unit{'' if n == 1 else 's'} stay{'s' if n == 1 else ''}: {reason}")
    if not found.spare:
        print(f"Nothing to delete in {short(found.store.root)}: {found.kept} {needed}.")
        return
    Printer(console()).spare(found.spare)
    n, total = len(found.spare), size(sum(spare.bytes for spare in found.spare)) or "nothing on disk"
    what = f"{n} unit{'' if n == 1 else 's'}, {total}"
    if dry:
        print(f"{what}, can go; {found.kept} {needed}.")
        return
    if not yes and not sys.stdin.isatty():
        raise UserError(f"{what}, can go; nothing was deleted, since nobody is there to be asked (--yes: do not ask)")
    if not yes and not typer.confirm(f"Delete {what}?"):
        print("Nothing was deleted.")
        return
    gone, stay = [], []
    try:
        for spare, why in delete(found):
            if isinstance(why, UserError):
                stay.append(str(why))
            elif why:
                print(f"{spare.address} stays: {why} is making it")
            else:
                gone.append(spare.bytes)
    except UserError as error:  # of the index
        stay.append(str(error))
    print(f"Deleted {len(gone)} unit{'' if len(gone) == 1 else 's'}, {size(sum(gone)) or 'nothing on disk'}.")
    if stay:
        raise UserError("\n".join(stay))


app.command()(bench)


def _header(registry: Path) -> dict[str, Any]:
    """Return what a registry says, unchecked; to find its store or plugin files takes no plugin."""
    from saefw.places import load

    value = load(registry)[0].value
    return value if isinstance(value, dict) else {}


def _store(registry: Path) -> "Store":
    from saefw.entry import Place
    from saefw.store import Store

    text = _header(registry).get("store", "runs")
    if not isinstance(text, str) or not text:
        raise UserError(f"{registry}: store: must be the path of a folder (got {text!r})")
    return Store(Place(text).open(registry.parent))


def _catalog(registry: Path) -> "Catalog":
    """Return all plugins, with the plugin files of a registry if there is one."""
    from saefw.catalog import Catalog
    from saefw.entry import Place

    catalog = Catalog()
    for text in catalog.broken:
        print(f"{escaped(text)}; it is left out", file=sys.stderr)
    if registry != REGISTRY or registry.exists():
        files = _header(registry).get("plugins") or []
        catalog.add_files([Place(file).open(registry.parent) for file in files if isinstance(file, str)])
    return catalog


def _doc(cls: type) -> str:
    import inspect

    # A line of a paragraph ends where the terminal does.
    return re.sub(r"(?<=\S)\n(?=[^\s-])", " ", inspect.getdoc(cls) or "")
