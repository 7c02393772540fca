"""Says whose a class is: of which plugin, in which version, in which file."""

import ast
import gc
import importlib.util
import sys
from functools import lru_cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from threading import Lock

GROUP = "saefw"
"""The entry-point group in which every plugin is found, built-in or not."""

_PARSING = Lock()
"""Who holds it decides whether garbage is collected."""


def source(point: metadata.EntryPoint) -> str:
    """Return the distribution and version of an entry point and, of a foreign one, the file, which is not imported."""
    if not point.dist:
        return point.value
    named = f"{point.dist.metadata['Name']} {point.dist.version}"
    if point.dist.metadata["Name"] == GROUP or "." in point.module:  # to find it would import its package
        return named
    spec = importlib.util.find_spec(point.module)
    return f"{named} ({spec.origin})" if spec and spec.origin else named


def code(file: Path) -> str:
    """Return the first 8 hex digits of the SHA-256 of a file's code, whatever its comments, docstrings and layout.

    Of one that cannot be read any more, nothing.
    """
    try:
        told = file.stat()
        return _code(file, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns)
    except (OSError, SyntaxError, ValueError):
        return ""


@lru_cache(maxsize=256)
def _code(file: Path, *_version: int) -> str:
    """Return the hash of a file's code; once a version of it, as a page plans again and again."""
    tree = _parsed(file.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # a text alone in a line is for people
            node.body = [x for x in body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]  # type: ignore[attr-defined]
    return sha256(ast.dump(tree).encode()).hexdigest()[:8]


def _parsed(text: bytes) -> ast.Module:
    """Parse Python, also while another thread does.

    CPython 3.11 counts the depth of a tree for all threads at once. Two that take turns in the middle of their trees
    get a SystemError, and what lets them is the garbage collector. To import torch in a thread is to parse: it asks
    for the signatures of built-in functions.
    """
    with _PARSING:
        enabled = gc.isenabled()
        gc.disable()
        try:
            return ast.parse(text)
        finally:
            if enabled:
                gc.enable()


def whose(cls: type) -> str:
    """Return how a fault of a class begins: `plugin 'noise' of saefw-noise 0.2 (/…/noise.py)`, by the class's module.

    A plugin that is not installed is called by its module, and comes from a file.
    """
    module = cls.__module__
    root = module.partition(".")[0]
    points = [point for point in metadata.entry_points(group=GROUP) if point.module.partition(".")[0] == root]
    # Of a package, a module that is no entry point itself belongs to the first that is.
    for point in [point for point in points if point.module == module] or points:
        return f"plugin '{point.name}' of {source(point)}"
    return f"plugin '{module}' of {getattr(sys.modules.get(module), '__file__', None) or module}"
