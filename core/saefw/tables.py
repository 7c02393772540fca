"""Tables for the terminal: of plugins and their settings, and of what a query found."""

import csv
import inspect
import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from saefw.care import PART, writing
from saefw.catalog import BASES
from saefw.errors import UNPRINTED, UserError, escaped
from saefw.wording import models

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from pydantic.fields import FieldInfo

    from saefw.catalog import Catalog
    from saefw.entry import Entry
    from saefw.plugin import DatasetConfig

ROWS = 200
"""Rows of a query that are shown; a script takes all with --csv or --json."""

NARROW = 12
"""Rows with a column that would be cut shorter than this are shown as records, one value a line."""

GAP = 3
"""Characters between two columns."""


def console(stderr: bool = False) -> Console:
    """Return a console that prints text as it is: brackets are no markup, numbers are not coloured.

    Where no terminal says how wide it is, 80 columns.
    """
    return Console(markup=False, highlight=False, emoji=False, stderr=stderr)


def table(*columns: str) -> Table:
    """Return an empty table; a column whose title ends in `>` is set to the right."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1))
    for title in columns:
        right = title.endswith(">")
        made.add_column(title.removesuffix(">"), justify="right" if right else "left", no_wrap=right)
    return made


def grid(columns: int, ratios: Sequence[int] = ()) -> Table:
    """Return an empty table without lines; with `ratios` as wide as the terminal."""
    made = Table.grid(padding=(0, 2), expand=bool(ratios))
    for i in range(columns):
        made.add_column(ratio=ratios[i] if ratios else None)
    return made


# Plugins


def plugins(catalog: "Catalog") -> Group:
    """Return all that plugins bring, a table a kind: name, first line of the docstring, origin."""
    found: dict[str, dict[str, tuple[str, str]]] = {
        kind: {name: (inspect.getdoc(cls) or "", catalog.origin(cls)) for name, cls in brought.items()}
        for kind, brought in ((kind, catalog.lookup(kind)) for kind in BASES)
    }
    found["metrics"] = {
        name: (inspect.getdoc(metric) or "", catalog.origin(metric)) for name, metric in catalog.metrics.items()
    }
    found["watchers"] = {name: catalog.watcher(name) for name in catalog.watchers}
    parts: list[Table | str] = []
    for kind, brought in found.items():
        shown = table(kind, "what it is", "from")
        for name, (doc, origin) in brought.items():
            shown.add_row(Text(name, style="bold"), doc.split("\n")[0], _tail(origin))
        parts += [shown, ""] if brought else []
    return Group(*parts[:-1])


def sources(datasets: "Mapping[str, type[DatasetConfig]]") -> Table:
    """Return the datasets that can be downloaded: name, images, size, terms."""
    shown = table("dataset", "images>", "download>", "where it comes from")
    for use, cls in datasets.items():
        size = sum(source.bytes for source in cls.sources)
        images = f"{cls.n_images:,}" if cls.n_images else ""
        shown.add_row(Text(use, style="bold"), images, f"{size / 1e6:,.0f} MB", cls.terms)
    return shown


def settings(cls: "type[Entry]") -> Table:
    """Return the settings of a config class: name, type, default, docstring; its own before those of its bases.

    Below a setting that is a mapping stand the keys that it may have.
    """
    shown = table("setting", "type", "default", "what it is")
    own = [name for parent in cls.__mro__ for name in vars(parent).get("__annotations__", {})]
    for name in dict.fromkeys(own):
        if name != "use" and (info := cls.model_fields.get(name)):
            shown.add_row(Text(name, style="bold"), _kind(info), _default(info), _words(info))
            for model in dict.fromkeys(models(info.annotation)):
                for key, inner in model.model_fields.items():
                    shown.add_row(f"  {key}", _kind(inner), _default(inner), _words(inner))
    return shown


def example(kind: str, cls: "type[Entry]") -> str:
    """Return an entry as it is written in registry.yaml: required settings, and those that not all of its kind have."""
    use = cls.model_fields["use"].default
    lines = [f"{kind}:", f"  my-{use.removeprefix('my-')}:", f"    use: {use}"]
    for name, info in cls.model_fields.items():
        if info.is_required():
            lines.append(f"    {name}: ...  # {_kind(info)}")
        elif name not in BASES[kind].model_fields and name != "use":
            lines.append(f"    {name}: {_default(info)}")
    return "\n".join(lines)


def _kind(info: "FieldInfo") -> str:
    """Write the type of a setting, with its bounds: `int > 0`, `list[float > 0]`, `names of saes`."""
    for mark in info.metadata:
        if type(mark).__name__ == "Names":
            many = "list" in _type(info.annotation)
            return f"names of {mark.kind}" if many else f"one of the {mark.kind}"
    return " ".join([_type(info.annotation), _bounds(info.metadata)]).strip()


def _bounds(marks: Iterable[Any]) -> str:
    """Write the bounds among the marks of a type: `> 0 and <= 1`."""
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    flat = [inner for mark in marks for inner in getattr(mark, "metadata", [mark])]  # a Field holds others
    return " and ".join(f"{sign} {getattr(mark, key):g}" for mark in flat for key, sign in signs if hasattr(mark, key))


def _type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return " | ".join(json.dumps(part) if not isinstance(part, str) else part for part in parts)
    if origin in (Union, types.UnionType):
        return " | ".join(map(_type, parts))
    if origin is not None and hasattr(annotation, "__metadata__"):
        return " ".join([_type(parts[0]), _bounds(annotation.__metadata__)]).strip()
    if origin is not None:
        name = getattr(origin, "__name__", str(origin))
        return f"{name}[{', '.join('...' if part is Ellipsis else _type(part) for part in parts)}]"
    if models(annotation):
        return "mapping"
    return {"Place": "path", "Any": "anything", "dict": "mapping"}.get(
        getattr(annotation, "__name__", ""), ""
    ) or getattr(annotation, "__name__", str(annotation))


def _default(info: "FieldInfo") -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    dump = getattr(value, "model_dump", None)
    value = dump(mode="json", exclude_defaults=True) if dump else value
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def _words(info: "FieldInfo") -> str:
    marks = {mark.__name__ for mark in info.metadata if isinstance(mark, type)}
    knob = " Changes speed, never the result." if "Knob" in marks else ""
    return " ".join((info.description or "").split()) + knob


def _tail(origin: str) -> str:
    """Write where something comes from; of a file its name."""
    return origin.rsplit("/", 1)[-1]


# Queries


def found(db: "DuckDBPyConnection", width: int) -> Iterator[Table | str]:
    """Yield what a query found, as tables at most `width` wide; wide rows as records."""
    names = [escaped(column[0]) for column in db.description or []]
    rows = db.fetchmany(ROWS)
    cells = [[_cell(value) for value in row] for row in rows]
    natural = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    widths = _shared(natural, width - GAP * (len(names) - 1))
    if any(given < min(wanted, NARROW) for given, wanted in zip(widths, natural, strict=True)):
        yield from _records(names, cells)
    elif names:
        shown = table(*names)
        for i, column in enumerate(shown.columns):
            right = any(row[i] is not None for row in rows) and all(_number(row[i]) for row in rows)
            column.justify, column.width = "right" if right else "left", widths[i]
            column.no_wrap, column.overflow = True, "ellipsis"
        for row in cells:
            shown.add_row(*row)
        yield shown
    if db.fetchone():
        yield f"the first {ROWS} rows; --csv and --json give all"
    elif not rows:
        yield "no rows"


def _shared(wanted: Sequence[int], width: int) -> list[int]:
    """Cut the widest columns to one width, so that all fit."""
    cap = max(wanted, default=0)
    while cap > 0 and sum(min(want, cap) for want in wanted) > width:
        cap -= 1
    return [min(want, cap) for want in wanted]


def _records(names: Sequence[str], cells: Sequence[Sequence[str]]) -> Iterator[Table]:
    for row in cells:
        record = table("column", "value")
        for name, cell in zip(names, row, strict=True):
            record.add_row(name, Text(cell, overflow="ellipsis", no_wrap=True))
        yield record


def write_csv(db: "DuckDBPyConnection", file: IO[str]) -> None:
    """Write all that a query found as CSV, with a header; NULL is empty.

    A file or a program gets names as they are, a terminal without what it would obey.
    """
    writer = csv.writer(file, lineterminator="\n")

    def shown(value: Any) -> Any:
        return escaped(value) if isinstance(value, str) and file.isatty() else value

    writer.writerow([shown(column[0]) for column in db.description or []])
    while rows := db.fetchmany(10_000):
        writer.writerows([shown(value) for value in row] for row in rows)


def write_json(db: "DuckDBPyConnection", file: IO[str]) -> None:
    """Write all that a query found as a JSON array of objects; a number that is none is null."""
    columns = [(column[0], str(column[1]) == "JSON") for column in db.description or []]
    file.write("[")
    first = True
    while rows := db.fetchmany(10_000):
        for row in rows:
            record = {name: _plain(value, parse) for (name, parse), value in zip(columns, row, strict=True)}
            text = json.dumps(record, ensure_ascii=False, default=str)
            # All of these stand inside of strings, where JSON has an escape for them.
            text = UNPRINTED.sub(lambda found: f"\\u{ord(found.group()):04x}", text)
            file.write(("\n" if first else ",\n") + text)
            first = False
    file.write("\n]\n")


def write_parquet(db: "DuckDBPyConnection", query: str, path: Path) -> None:
    """Write all that a query finds as a parquet file, which is there whole or not at all.

    Raises:
        UserError: there is no folder for it, or the query gives no rows.
        OSError: the file cannot be written.

    """
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    kinds = [statement.type.name for statement in db.extract_statements(query)]
    if kinds != ["SELECT"]:
        raise UserError(f"{path}: not written: that takes one query that gives rows, as SELECT and FROM do")
    part = path.with_name(f"{path.name}{PART}")
    target = str(part.absolute()).replace("'", "''")
    try:
        with writing(path):
            # At its end a query may have a semicolon and a comment, which COPY (...) would not take.
            db.execute(f"CREATE TEMP TABLE found AS\n{query}")
            db.execute(f"COPY found TO '{target}' (FORMAT parquet, COMPRESSION zstd)")
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _plain(value: Any, parse: bool) -> Any:
    if parse and isinstance(value, str):
        return json.loads(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item, False) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, False) for item in value]
    return value.isoformat() if isinstance(value, datetime) else value


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return escaped(" ".join(value.split()) if isinstance(value, str) else str(value))
