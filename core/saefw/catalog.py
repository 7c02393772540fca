"""Finds plugins and sorts what they bring."""

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Literal, get_args, get_origin

import pluggy

from saefw import hookspecs
from saefw.entry import KINDS, Entry, Knob, Late, Names
from saefw.errors import Faults, UserError, did_you_mean
from saefw.origin import GROUP, source
from saefw.plugin import (
    BackboneConfig,
    DatasetConfig,
    FigureConfig,
    Metric,
    ProbeConfig,
    SaeConfig,
    StageConfig,
)
from saefw.unit import WORD

BLOCK = "SAEFW_BLOCK"
"""The environment variable that leaves plugins out: their names, with commas between."""

WATCHED = ("saefw_logged", "saefw_progressed", "saefw_kept")
"""The hooks that tell what happens."""

BASES: Mapping[str, type[Entry]] = {
    "backbones": BackboneConfig,
    "datasets": DatasetConfig,
    "saes": SaeConfig,
    "probes": ProbeConfig,
    "figures": FigureConfig,
    "stages": StageConfig,
}
"""What the hook `saefw_<kind>` brings: subclasses of this."""


class Catalog:
    """Every plugin, and the config classes they bring, by kind and `use`."""

    def __init__(
        self,
        modules: Sequence[object] = (),
        entry_points: bool = True,
        trace: Callable[[str], object] | None = None,
    ) -> None:
        """Register installed plugins and `modules`, which tests pass.

        An installed plugin that is broken is left out, and `broken` says why: perhaps nobody needs it.

        Args:
            modules: modules or other objects whose attributes are hook implementations.
            entry_points: whether to look for installed plugins.
            trace: told a line for every call of a hook that a plugin answers, with the plugins.

        Raises:
            Faults: modules that break the contract, all of them.
            UserError: there is no plugin at all.

        """
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(hookspecs)
        if trace is not None:
            self.manager.add_hookcall_monitoring(partial(_traced, trace), lambda outcome, name, impls, arguments: None)
        self.broken: list[str] = []
        """What is wrong with installed plugins that are left out for it."""
        self.clashes: dict[tuple[str, str], str] = {}
        """By kind and name: what two plugins bring, so that it is nobody's."""
        self._origins: dict[str, str] = {}
        """By plugin name, the distribution and version, or the file, that it comes from."""
        self._blocked = {name.strip() for name in os.environ.get(BLOCK, "").split(",")} - {""}
        self._brought: dict[str, dict[str, type[Entry]]] = {kind: {} for kind in KINDS}
        self._metrics: dict[str, type[Metric]] = {}
        self._bringers: dict[tuple[str, str], str] = {}
        """By kind and name, the plugin that brought it."""
        found = list(metadata.entry_points(group=GROUP)) if entry_points else []
        if entry_points and not found and not modules:
            raise UserError("no plugins found: pip install -e .")
        faults: list[str] = []
        for point in found:
            if point.name not in self._blocked:
                self.broken += self._add(point.name, source(point), point.load)
        for module in modules:
            name = getattr(module, "__name__", None) or type(module).__name__
            if name not in self._blocked:
                faults += self._add(name, name, lambda given: given, module)
        if faults:
            raise Faults(faults)

    @property
    def hook(self) -> Any:
        """The relay through which hooks are called: `catalog.hook.saefw_kept(unit=…, folder=…, seconds=…)`."""
        return self.manager.hook

    @property
    def metrics(self) -> Mapping[str, type[Metric]]:
        """The metrics that plugins bring, by name."""
        return MappingProxyType(self._metrics)

    @property
    def watchers(self) -> Mapping[str, Sequence[str]]:
        """The hooks by which each plugin that watches is told, by the plugin's name."""
        heard: dict[str, list[str]] = {}
        for hook in WATCHED:
            for impl in getattr(self.hook, hook).get_hookimpls():
                heard.setdefault(impl.plugin_name, []).append(hook)
        return MappingProxyType(dict(sorted(heard.items())))

    def watcher(self, name: str) -> tuple[str, str]:
        """Return what a plugin that watches says of itself, and where it comes from."""
        return inspect.getdoc(self.manager.get_plugin(name)) or "", _shown(self._origins[name])

    def lookup(self, kind: str) -> Mapping[str, type[Entry]]:
        """Return the config classes of a kind (see `entry.KINDS`), by what `use` says, in order of names."""
        return MappingProxyType(dict(sorted(self._brought[kind].items())))

    def origin(self, cls: type) -> str:
        """Return where a config class or metric comes from: `saefw 0.1.0`, or the file of a drop-in."""
        for (kind, name), plugin in self._bringers.items():
            if (self._metrics if kind == "metrics" else self._brought[kind])[name] is cls:
                return _shown(self._origins[plugin])
        raise KeyError(cls)

    def add_files(self, paths: Sequence[Path]) -> None:
        """Register drop-ins: single-file plugins, imported by name from their folders; those already in are left alone.

        Raises:
            Faults: files that are missing, cannot be imported, or break the contract.

        """
        faults: list[str] = []
        for path in paths:
            path = path.resolve()
            if path.stem not in self._blocked:
                faults += self._add(path.stem, str(path), _import_file, path)
        if faults:
            raise Faults(faults)

    def _add(self, name: str, origin: str, load: Callable[..., object], *args: object) -> list[str]:
        """Import and register one plugin and sort what it brings; return what is wrong with it."""
        who = f"plugin '{name}' of {origin}"
        file = origin if Path(origin).is_absolute() else origin.partition(" (")[2].removesuffix(")")
        try:
            plugin = load(*args)
        except UserError as error:
            return [str(error)]
        except (Exception, SystemExit) as error:
            return [f"{who} cannot be imported: {_said(error)}{_line(error, file)} ({BLOCK}={name} leaves it out)"]
        if self.manager.is_registered(plugin):
            return []
        if self.manager.has_plugin(name):
            return [f"two plugins are called '{name}': one of {self._origins[name]}, one of {origin}"]
        try:
            self.manager.register(plugin, name=name)
        except pluggy.PluginValidationError as error:
            if self.manager.is_registered(plugin):  # pluggy before 1.7 keeps half of it
                self.manager.unregister(plugin)
            return [f"{who}: {text}" for text in _unheard(plugin)] or [f"{who}: {', '.join(str(error).splitlines())}"]
        self._origins[name] = origin
        faults = [f"{who}: {text}" for text in self._hook_faults(plugin)]
        faults += self._sort(name, plugin, who)
        if faults:
            # A catalog that lives on after a bad drop-in must not hold half of it.
            self.manager.unregister(plugin)
            for kind, word in [key for key, bringer in self._bringers.items() if bringer == name]:
                (self._metrics if kind == "metrics" else self._brought[kind]).pop(word)
                self._bringers.pop((kind, word))
        return faults

    def _hook_faults(self, plugin: object) -> list[str]:
        """Name the hooks that a plugin spelt wrong, and those it forgot to mark."""
        specs = [name for name in vars(hookspecs) if name.startswith("saefw_")]
        callers = {caller.name: caller for caller in self.manager.get_hookcallers(plugin) or []}
        faults = [
            f"unknown hook '{name}'{did_you_mean(name, specs) or f' (there are: {_listed(specs)})'}"
            for name, caller in callers.items()
            if not caller.has_spec()
            and not all(impl.optionalhook for impl in caller.get_hookimpls() if impl.plugin is plugin)
        ]
        forgotten = [name for name in specs if name not in callers and callable(getattr(plugin, name, None))]
        return faults + [f"{name} is not marked with @hookimpl" for name in forgotten]

    def _sort(self, name: str, plugin: object, who: str) -> list[str]:
        """Put what a plugin brings where it belongs; return what is wrong with it."""
        others = [other for other in self.manager.get_plugins() if other is not plugin]
        faults: list[str] = []
        for kind in (*KINDS, "metrics"):
            hook = f"saefw_{kind}"
            try:
                answers = self.manager.subset_hook_caller(hook, others)()
            except Exception as error:
                where = _line(error, getattr(plugin, "__file__", "") or "")
                faults.append(f"{who}: {hook} fails: {_said(error)}{where}")
                continue
            if not answers and any(impl.plugin is plugin for impl in getattr(self.hook, hook).get_hookimpls()):
                faults.append(f"{who}: {hook} returns nothing; is a `return` missing?")
            for answer in answers:
                if kind == "metrics":
                    faults += self._sort_metrics(name, answer, who)
                elif not isinstance(answer, Iterable) or isinstance(answer, str | Mapping):
                    faults.append(
                        f"{who}: {hook} must return a list of {BASES[kind].__name__} classes (got {answer!r})"
                    )
                else:
                    for cls in answer:
                        wrong = list(_class_faults(cls, kind))
                        faults += [f"{who}: {text}" for text in wrong]
                        if not wrong:
                            faults += self._bring(kind, cls.model_fields["use"].default, cls, name)
        return faults

    def _sort_metrics(self, name: str, answer: object, who: str) -> list[str]:
        """Put the metrics of a plugin where they belong; return what is wrong with them."""
        if not isinstance(answer, Mapping):
            return [f"{who}: saefw_metrics must return a mapping of names to classes (got {answer!r})"]
        faults: list[str] = []
        for word, cls in answer.items():
            if not isinstance(word, str) or not WORD.fullmatch(word):
                faults.append(f"{who}: the name of a metric is made of letters, digits, - and _ (got {word!r})")
            elif not all(callable(getattr(cls, method, None)) for method in ("add", "result")):
                faults.append(f"{who}: the metric '{word}' must be a class with `add` and `result` (got {cls!r})")
            else:
                faults += self._bring("metrics", word, cls, name)
        return faults

    def _bring(self, kind: str, word: str, cls: Any, plugin: str) -> list[str]:
        """Note that a plugin brings a class, unless the word is taken."""
        brought: dict[str, Any] = self._metrics if kind == "metrics" else self._brought[kind]
        if word in brought:
            bringers = sorted([self._module(self._bringers[kind, word]), self._module(plugin)])
            if bringers[0] == bringers[1]:
                return [f"{kind}: {bringers[0]} brings '{word}' twice"]
            text = f"{kind}: {' and '.join(bringers)} both bring '{word}'; rename one, or leave one out with {BLOCK}"
            self.clashes[kind, word] = text
            return [text]
        brought[word] = cls
        self._bringers[kind, word] = plugin
        return []

    def _module(self, plugin: str) -> str:
        """Return the module name of a plugin, or its own name where it is no module, and where it comes from."""
        module = self.manager.get_plugin(plugin)
        name = module.__name__ if isinstance(module, ModuleType) else plugin
        return name if self._origins[plugin] == name else f"{name} of {self._origins[plugin]}"


def _shown(origin: str) -> str:
    """Return an origin without the file of an installed plugin."""
    return origin if Path(origin).is_absolute() else origin.partition(" (")[0]


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


def _traced(
    tell: Callable[[str], object], name: str, impls: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]
) -> None:
    """Tell of a call of a hook: with what, and which plugins answer, in their order."""
    if impls:
        given = ", ".join(f"{key}={getattr(value, 'label', value)!r}" for key, value in arguments.items())
        tell(f"{name}({given}) -> {_listed(impl.plugin_name for impl in reversed(impls))}")


def _said(error: BaseException) -> str:
    """Return what kind of error it is and what it says; of a slip in the syntax, without the line it stands in."""
    return f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}".removesuffix(": ")


def _unheard(plugin: object) -> list[str]:
    """Name the arguments that hooks of a plugin ask for and no hook gives."""
    faults = []
    for name, spec in vars(hookspecs).items():
        function = getattr(plugin, name, None)
        if name.startswith("saefw_") and callable(function):
            given = list(inspect.signature(spec).parameters)
            for word in inspect.signature(function).parameters:
                if word not in given:
                    hint = did_you_mean(word, given) or f" (there are: {_listed(given)})"
                    faults.append(f"{name} is given no '{word}'{hint}")
    return faults


def _line(error: BaseException, file: str) -> str:
    """Return ` at file:line` for the last line of a file that an error passed through, or nothing."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines = [error.lineno]
    return f" at {Path(file).name}:{lines[-1]}" if lines else ""


def _import_file(path: Path) -> ModuleType:
    """Import a drop-in by its stem, so that workers can import it too and debuggers find it.

    Its folder goes to the end of the path: a drop-in must not shadow an installed module.

    Raises:
        UserError: there is no such file, or its name cannot be imported or means another module.

    """
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise UserError(f"a plugin file is called like a module: my_plugin.py (got '{path.name}')")
    folder = str(path.parent)
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
        importlib.invalidate_caches()
    try:
        loaded = sys.modules.get(path.stem)
        spec = getattr(loaded, "__spec__", None) if loaded else importlib.util.find_spec(path.stem)
        holder = (getattr(loaded, "__file__", None) if loaded else None) or (spec.origin if spec else None)
        if not holder or not Path(holder).exists():
            raise UserError(f"the name '{path.stem}' is taken by a module of Python: rename {path.name}")
        if not path.samefile(holder):
            raise UserError(f"the name '{path.stem}' is taken by {holder}: rename {path.name}")
        return importlib.import_module(path.stem)
    except BaseException:
        if added:
            sys.path.remove(folder)
        raise


def _class_faults(cls: Any, kind: str) -> Iterable[str]:
    """Say what is wrong with a class that `saefw_<kind>` brought."""
    base = BASES[kind]
    if not (isinstance(cls, type) and issubclass(cls, base)):
        yield f"saefw_{kind} must bring subclasses of {base.__name__} (got {cls!r})"
        return
    use = cls.model_fields.get("use")
    words = get_args(use.annotation) if use and get_origin(use.annotation) is Literal else ()
    if not use or len(words) != 1 or use.default != words[0] or not isinstance(words[0], str):
        yield f'{cls.__name__} says no name; write use: Literal["{cls.__name__.lower()}"] = "{cls.__name__.lower()}"'
    elif not WORD.fullmatch(words[0]):
        yield f"{cls.__name__}: a name is made of letters, digits, - and _ (got '{words[0]}')"
    # A setting called like what the base has would hide it: `revision` in the address, too.
    taken = {"vary", *(name for parent in base.__mro__ if issubclass(parent, Entry) for name in vars(parent))}
    for name in cls.model_fields:
        if name in taken:
            yield f"{cls.__name__}: no setting can be called '{name}'"
    for name, info in cls.model_fields.items():
        for mark in info.metadata:
            if isinstance(mark, Knob | Late):
                yield f"{cls.__name__}.{name}: write {type(mark).__name__}, not {type(mark).__name__}()"
            if isinstance(mark, Names) and mark.kind not in KINDS:
                yield f"{cls.__name__}.{name}: Names('{mark.kind}') is no kind (there are: {_listed(KINDS)})"
            if mark is Late and info.is_required():
                yield f"{cls.__name__}.{name}: a setting that is Late needs a default"
        if _hidden_marks(info.annotation):
            yield f"{cls.__name__}.{name}: put the marker outside, as in Annotated[str | None, Knob]"


def _hidden_marks(annotation: Any) -> bool:
    """Whether a marker lies inside a type, where pydantic and saefw do not see it."""
    inner = getattr(annotation, "__metadata__", ())
    if any(mark in (Knob, Late) or isinstance(mark, Knob | Late | Names) for mark in inner):
        return True
    return any(_hidden_marks(part) for part in get_args(annotation))
