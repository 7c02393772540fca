"""Writes a plugin to begin with: the example of its kind under a name of one's own, with its test and a registry."""

import keyword
import re
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import saefw
from saefw.catalog import Catalog
from saefw.errors import UserError, did_you_mean

EXAMPLES = ("backbone", "dataset", "sae", "probe", "stage", "figure", "metric", "watcher")
"""The kinds of plugins of which there is an example."""

NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*")

N_IMAGES = 120
"""So many of the embedded digits become files, for a dataset to begin with."""

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "0.1.0"
description = "A plugin of saefw: {use}."
requires-python = ">=3.11"
dependencies = ["saefw"]

[project.entry-points.saefw]
{point} = "{module}"

[tool.hatch.build.targets.wheel]
only-include = ["{module}.py"]

[tool.pytest.ini_options]
pythonpath = ["."]
"""


def shipped(name: str) -> Path:
    """Return where a file or folder is that comes with saefw: in the package, or in a checkout at its top."""
    inside = Path(saefw.__file__).parent / name
    return inside if inside.exists() else Path(saefw.__file__).parents[2] / name


def new(kind: str, name: str, package: bool, catalog: Catalog) -> list[Path]:
    """Write a plugin file, its test and its registry into this folder, or as a package into a new one.

    Args:
        kind: one of EXAMPLES.
        name: `soft-threshold` or `SoftThreshold`; made into the name in registry.yaml, that of the class and the file.
        package: whether to write an installable one.
        catalog: all plugins, whose names are taken.

    Returns:
        The files: plugin, test, registry; of a package the last is pyproject.toml.

    Raises:
        UserError: there is no such kind, the name cannot be used, or something is there already.

    """
    if kind not in EXAMPLES:
        raise UserError(f"no such kind of plugin: '{kind}'{did_you_mean(kind, EXAMPLES)} ({', '.join(EXAMPLES)})")
    use, camel = _names(name)
    module = f"{'saefw_' if package else ''}{use.replace('-', '_')}"
    _check_free(kind, use, module, catalog)
    words = {f"my_{kind}": module, f"my-{kind}": use, f"My{kind.capitalize()}": camel}
    source = shipped("examples/plugins")
    texts = {part: (source / part.format(f"my_{kind}")).read_text() for part in ("{}.py", "test_{}.py", "{}.yaml")}
    if re.search(rf"\b{camel}\b", texts["{}.py"]):
        raise UserError(f"the plugin that would be written uses the name '{camel}' itself; take another, as my-{use}")
    plugin, test, registry = (_renamed(text, words) for text in texts.values())
    top, tests = Path(), Path()
    files = {Path(f"{module}.py"): plugin, Path(f"test_{module}.py"): test, Path(f"{module}.yaml"): registry}
    if package:
        top = Path(f"saefw-{use}")
        tests = top / "tests"
        # Installed, it is found by its entry point; the pictures of a dataset lie beside its test.
        registry = re.sub(r"plugins: .*\n", "", registry).replace(f"run {module}.yaml", "run registry.yaml")
        registry = registry.replace(f"root: {module}", f"root: tests/{module}")
        point = use.replace("-", "_")
        files = {
            top / f"{module}.py": plugin,
            tests / f"test_{module}.py": test,
            top / "registry.yaml": registry,
            top / "pyproject.toml": PYPROJECT.format(distribution=top.name, use=use, point=point, module=module),
        }
    images = tests / f"{module}_images" if kind == "dataset" else None
    for path in [top, images] if package else [*files, images]:
        if path is not None and path.exists():
            raise UserError(f"{path}: is there already; nothing was written")
    _write(files, images, catalog, top if package else None)
    return list(files)


def _names(name: str) -> tuple[str, str]:
    """Return a name as it stands in registry.yaml, and as that of a class."""
    if not NAME.fullmatch(name):
        raise UserError(f"a name is made of words of letters and digits, as soft-threshold (got {name!r})")
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+|[0-9]+", name)
    return "-".join(word.lower() for word in words), "".join(word[0].upper() + word[1:] for word in words)


def _check_free(kind: str, use: str, module: str, catalog: Catalog) -> None:
    """Raise where a name is taken by a plugin, by a module, or by Python."""
    kinds = f"{kind}s"
    brought: Mapping[str, type] = {}
    if kind == "metric":
        brought = catalog.metrics
    elif kind != "watcher":
        brought = catalog.lookup(kinds)
    if use in brought:
        raise UserError(f"{kinds}: '{use}' is brought by {catalog.origin(brought[use])}; take another name")
    if keyword.iskeyword(module):
        raise UserError(f"'{module}' is a word of Python; take another name, as my-{use}")
    spec = find_spec(module)
    # A file of that name in this folder is said to be there already.
    if spec and not (spec.origin and Path(spec.origin).parent == Path.cwd()):
        held = "Python's own" if module in sys.stdlib_module_names else f"that of {spec.origin or 'a folder'}"
        raise UserError(f"a module '{module}' is there, {held}; take another name, as my-{use}")


def _renamed(text: str, words: Mapping[str, str]) -> str:
    """Return the text of an example with its names replaced."""
    for old, word in words.items():
        text = text.replace(old, word)
    return text


def _write(files: Mapping[Path, str], images: Path | None, catalog: Catalog, top: Path | None) -> None:
    """Write all, or nothing."""
    written: list[Path] = []
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x") as file:
                written.append(path)
                file.write(text)
        if images is not None:
            _write_images(images, catalog)
    except BaseException as error:
        for path in written:
            path.unlink(missing_ok=True)
        for folder in (images, top):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{error.filename}: cannot be written ({error.strerror}); nothing was written") from error
        raise


def _write_images(folder: Path, catalog: Catalog) -> None:
    """Write some of the embedded digits as PNG files, in folders named by class."""
    dataset = catalog.lookup("datasets")["digits"].model_validate({"limit": N_IMAGES}).open(folder)  # type: ignore[attr-defined]
    for i in range(len(dataset)):
        key, label, _, load = dataset[i]
        path = folder / dataset.classes[label] / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        load().save(path)
