"""What is checked of the settings of any plugin."""

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Literal, get_args, get_origin

from saefw.entry import Entry
from saefw.testing.contract import expect
from saefw.unit import canonical

HEAVY = (
    "bokeh", "cv2", "datasets", "h5py", "jax", "matplotlib", "open_clip", "pandas", "scipy", "sklearn", "tensorflow",
    "timm", "torchvision", "transformers",
)  # fmt: skip
"""Packages that a plugin imports inside its functions, so that `saefw check` stays fast."""

_light: set[str] = set()
"""Modules that `check_imports` found in order."""


def check_entry(config: Entry) -> None:
    """Check the settings of any plugin: a name, a sentence for each, content that is JSON, and a light module."""
    cls = type(config)
    use = cls.model_fields.get("use")
    words = get_args(use.annotation) if use and get_origin(use.annotation) is Literal else ()
    expect("entry.name", bool(use and words == (use.default,)), "it", "no such line", cls.__name__)
    expect("entry.docstring", bool(vars(cls).get("__doc__")), "one", "none", cls.__name__)
    for name, info in cls.model_fields.items():
        expect("entry.sentences", bool(info.description) or name == "use", "one", "none", f"{cls.__name__}.{name}")
    text = canonical(config.content())
    again = cls.model_validate(json.loads(config.model_dump_json()))
    expect("entry.json", again == config, repr(config), repr(again))
    expect("entry.json", canonical(again.content()) == text, text, canonical(again.content()), cls.__name__)
    expect("entry.frozen", bool(cls.model_config.get("frozen")), "frozen=True", "frozen=False", cls.__name__)
    check_imports([cls.__module__])


def check_imports(modules: Iterable[str]) -> None:
    """Check in a fresh Python that importing these modules brings in nothing heavier than torch and numpy."""
    wanted = [name for name in dict.fromkeys(modules) if name not in _light and name != "__main__"]
    if not wanted:
        return
    files = [getattr(sys.modules.get(name), "__file__", None) for name in wanted]
    given = json.dumps([sys.path, list(zip(wanted, files, strict=True)), HEAVY])
    done = subprocess.run([sys.executable, "-c", _IMPORTS], input=given, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1:] or [""]
    expect("entry.light", done.returncode == 0, "that it can be imported afresh", last[0], ", ".join(wanted))
    for name, heavy in json.loads(done.stdout).items():
        expect("entry.light", not heavy, "imports inside the functions that use them", ", ".join(heavy), name)
        _light.add(name)


_IMPORTS = """
import importlib.util, json, sys
path, modules, heavy = json.load(sys.stdin)
sys.path[:] = path
found = {}
for name, file in modules:
    before = set(sys.modules)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:  # a file that was loaded from elsewhere
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    found[name] = [package for package in heavy if package in set(sys.modules) - before]
print(json.dumps(found))
"""
