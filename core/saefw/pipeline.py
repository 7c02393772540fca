"""Runs the stages in the order of the file.

A stage lists its units when its turn comes, so it may choose by what those above it measured. Of these only the
missing ones are made, each under its lock: of two runs at once one makes a unit and the other waits for it.
"""

import json
import logging
import resource
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import saefw
from saefw import heap
from saefw.care import Damage, said
from saefw.catalog import Catalog
from saefw.entry import KINDS
from saefw.errors import NotYet, UserError, did_you_mean
from saefw.origin import code, whose
from saefw.pace import Pace
from saefw.plugin import StageConfig
from saefw.registry import Registry
from saefw.run import Run, Watcher
from saefw.store import Store
from saefw.unit import Unit, canonical
from saefw.wording import got

log = logging.getLogger("saefw")


@dataclass(frozen=True)
class StagePlan:
    """What a stage is to make."""

    name: str
    """Its name in registry.yaml."""

    units: list[Unit]
    """All it stands for, in its own order; none twice."""

    kept: list[Unit]
    """Those that were made before."""

    missing: list[Unit]
    """Those to make."""

    reason: str = ""
    """Why its units cannot be listed yet; empty if they are."""

    likely: tuple[Unit, ...] = ()
    """Then, units like those that it will make."""


class Observer:
    """What the pipeline tells, besides the hooks, to the one who asked for a run. By default it tells nobody."""

    def entered(self, plan: StagePlan) -> None:
        """A stage begins; its units are listed."""

    def waiting(self, unit: Unit, holder: str) -> None:
        """Another run is making a unit; this one waits for it."""

    def left(self, plan: StagePlan, made: Sequence[Unit]) -> None:
        """All units of a stage are kept; these were made now."""


class HookWatcher(Watcher):
    """Passes on to the hooks what happens in a run."""

    def __init__(self, catalog: Catalog) -> None:
        """Tell the plugins of a catalog."""
        self.hook = catalog.hook

    def logged(self, unit: Unit, step: int, values: Mapping[str, float]) -> None:
        """Call saefw_logged."""
        self.hook.saefw_logged(unit=unit, step=step, values=values)

    def progressed(self, stage: str, done: int, total: int, what: str) -> None:
        """Call saefw_progressed."""
        self.hook.saefw_progressed(stage=stage, done=done, total=total, what=what)

    def kept(self, unit: Unit, folder: Path, seconds: float) -> None:
        """Call saefw_kept."""
        self.hook.saefw_kept(unit=unit, folder=folder, seconds=seconds)


def desk(registry: Registry, catalog: Catalog, watcher: Watcher | None = None, mend: bool = False) -> Run:
    """Set the desk on which the stages of a registry work; by default the hooks are told what happens.

    With `mend`, damage that is met is put right, as far as a run does that; or else it is only said.
    """
    return Run(
        Store(registry.store),
        registry.base,
        registry.families,
        catalog.metrics,
        registry.device,
        _made_with(registry, catalog),
        watcher or HookWatcher(catalog),
        mend,
    )


def plan(registry: Registry, catalog: Catalog, only: str | None = None, run: Run | None = None) -> list[StagePlan]:
    """List what each stage makes, as far as it can be known now; nothing is made.

    Args:
        registry: what to plan.
        catalog: the plugins.
        only: the last stage to plan, or all.
        run: a fresh desk; what it is told about the stages stays in it.

    Raises:
        UserError: settings of a stage do not fit together, with its place; or there is no stage `only`.

    """
    run = run or desk(registry, catalog)
    run.store.sync()
    plans: list[StagePlan] = []
    for name in _names(registry, only):
        try:
            planned, _ = _list(registry, name, run)
        except NotYet as error:
            planned = StagePlan(name, [], [], [], str(error), _guess(registry, name, run))
        else:
            run.listed(name, planned.units)
        plans.append(planned)
    return plans


class Cost(NamedTuple):
    """What a unit is about to cost."""

    disk: int
    """Bytes, about; 0 where the stage cannot say."""

    work: str
    """How many images or tokens; empty where the stage cannot say."""


def costs(registry: Registry, run: Run, planned: StagePlan) -> dict[Unit, Cost]:
    """Return what each missing or likely unit of a planned stage is about to cost.

    Raises:
        UserError: images that are to be counted are not there, with the place of the stage.

    """
    try:
        return {
            unit: Cost(stage.disk(unit, run), stage.work(unit, run))
            for stage, units in _missing(registry, run, planned)
            for unit in units
        }
    except UserError as error:
        raise _placed(registry, planned.name, error) from error


def seconds(registry: Registry, run: Run, planned: StagePlan, pace: Pace) -> float:
    """Return about how long the missing or likely units of a planned stage take; nan where the stage cannot say.

    Raises:
        UserError: images that are to be counted are not there, with the place of the stage.

    """
    try:
        return sum((stage.duration(units, run, pace) for stage, units in _missing(registry, run, planned)), 0.0)
    except UserError as error:
        raise _placed(registry, planned.name, error) from error


def _missing(registry: Registry, run: Run, planned: StagePlan) -> list[tuple[StageConfig, list[Unit]]]:
    """Return the missing or likely units of a planned stage, by the member that makes them."""
    missing = {*planned.missing, *planned.likely}
    if not missing:
        return []
    with run.guessing() if planned.reason else nullcontext():
        listed = _list(registry, planned.name, run)[1]
    members = [(stage, [unit for unit in units if unit in missing]) for stage, units in listed]
    return [(stage, units) for stage, units in members if units]


def _guess(registry: Registry, name: str, run: Run) -> tuple[Unit, ...]:
    """Return units like those that a stage will make: as if any of what it chooses among were the best."""
    with run.guessing():
        try:
            planned, _ = _list(registry, name, run)
        except UserError:  # which the best might not meet
            return ()
        run.listed(name, planned.units)
    return tuple(planned.missing)


def run(
    registry: Registry,
    catalog: Catalog,
    only: str | None = None,
    observer: Observer | None = None,
    watcher: Watcher | None = None,
) -> list[StagePlan]:
    """Make all that is missing, stage by stage; return what each stage stands for, everything kept.

    Args:
        registry: what to make.
        catalog: the plugins.
        only: the last stage to make, or all; those above it are made as well, where something is missing.
        observer: who is told about stages and waiting.
        watcher: who is told what happens inside a stage; by default the hooks.

    Raises:
        UserError: the user's to mend, with the place of the stage. What was kept before stays, and is indexed.
        RuntimeError: a stage did not keep what it said it makes.

    """
    observer = observer or Observer()
    work, made_with = desk(registry, catalog, watcher, mend=True), _made_with(registry, catalog)
    done: list[StagePlan] = []
    try:
        for name in _names(registry, only):
            work.enter(name)
            # Another run may have kept units since; what is chosen by their metrics must find these.
            work.store.sync()
            try:
                planned, members = _list(registry, name, work)
            except NotYet as error:
                raise _placed(registry, name, error) from error
            observer.entered(planned)
            work.found(*planned.kept)
            for text in _outdated(work, made_with, planned.kept):
                log.warning("%s", text)
            made = [unit for stage, units in members for unit in _make(registry, name, stage, units, work, observer)]
            work.listed(name, planned.units)
            done.append(StagePlan(name, planned.units, planned.units, []))
            observer.left(planned, made)
        for folder, damage in work.store.broken().items():
            log.warning("%s; its unit is left out of the index; %s", said(damage), cure(folder, damage))
    except BaseException:
        # A fault or Ctrl-C: what the stage kept until then is in the index for those who look.
        with suppress(Exception):
            work.publish()
        raise
    return done


def cure(folder: Path, damage: Sequence[Damage]) -> str:
    """Say what to do about a damaged unit that nobody asked for."""
    if damage[0].as_made:
        return f"its checksums are right; delete {folder} to make it again"
    return "`saefw verify --mend` sets it back"


def _names(registry: Registry, only: str | None) -> list[str]:
    """Return the stages to go through: all, or those up to one."""
    names = list(registry.families["stages"])
    if only is None:
        return names
    if only not in names:
        near = did_you_mean(only, names) or f" (there are: {', '.join(names)})"
        raise UserError(f"{registry.path}: there is no stage '{only}'{near}")
    return names[: names.index(only) + 1]


def _list(registry: Registry, name: str, run: Run) -> tuple[StagePlan, list[tuple[StageConfig, list[Unit]]]]:
    """List the units of a stage, and of each of its members; a unit that several members list is the first one's.

    Raises:
        NotYet: they depend on what is not made.
        UserError: with the place of the stage.

    """
    has: dict[Unit, bool] = {}
    members: list[tuple[StageConfig, list[Unit]]] = []
    run.stage = name
    try:
        for member in registry.families["stages"][name]:
            assert isinstance(member.entry, StageConfig)
            told: object = member.entry.units(run)
            told = list(told) if isinstance(told, Iterable) else [told]
            listed = [unit for unit in told if isinstance(unit, Unit)]
            if len(listed) < len(told):
                raise UserError(f"{whose(type(member.entry))}: units() must return units{got(told)}")
            units = [unit for unit in dict.fromkeys(listed) if unit not in has]
            has |= {unit: run.store.has(unit) for unit in units}
            members.append((member.entry, units))
    except NotYet:
        raise
    except UserError as error:
        raise _placed(registry, name, error) from error
    except Exception as error:
        error.add_note(_where(registry, name))
        raise
    kept, missing = ([unit for unit in has if has[unit] is there] for there in (True, False))
    return StagePlan(name, list(has), kept, missing), members


def _make(
    registry: Registry, name: str, stage: StageConfig, units: Sequence[Unit], run: Run, observer: Observer
) -> list[Unit]:
    """Make those of a member's units that are missing; return them."""
    store = run.store
    missing = [unit for unit in units if not store.has(unit)]
    if not missing:
        return []
    with ExitStack() as locks:
        _allow_files(len(missing))
        # In one order everywhere, so that two runs never wait for each other.
        for unit in sorted(missing, key=lambda unit: unit.address):
            locks.enter_context(store.lock(unit, partial(observer.waiting, unit)))
            try:
                _set_back(store, unit)
            except UserError as error:
                raise _placed(registry, name, error) from error
        late = [unit for unit in missing if store.settled(unit)]
        if late:
            store.sync()
            run.found(*late)
            missing = [unit for unit in missing if unit not in set(late)]
        if not missing:
            return []
        run.enter(name)
        try:
            # From now on `saefw gc` sees what these are made from.
            for unit in missing:
                store.begin(unit)
            run.check(*(need for unit in missing for need in unit.needs))
            with heap.kept():
                stage.make(missing, run)
        except UserError as error:
            raise _placed(registry, name, error) from error
        except Exception as error:
            error.add_note(_where(registry, name))
            raise
        left = [unit for unit in missing if not store.has(unit)]
        if left:
            raise RuntimeError(
                f"stage '{name}' ({type(stage).__name__}) is done but did not keep {len(left)} of {len(missing)} units,"
                f" the first of them '{left[0].label}'"
            )
        # Before the locks go: a run that waits for these units finds them in the index.
        run.publish()
    return missing


def _set_back(store: Store, unit: Unit) -> None:
    """Turn a unit that was found damaged, and whose lock is held, into one to make.

    Raises:
        UserError: it cannot be set back, or its checksums say that it is as it was made.

    """
    folder = store.folder(unit)
    if not (damage := store.damage(folder)):
        return
    delete = f"delete {folder}, and the next run makes it again"
    try:
        again = store.unkeep(folder, damage)
    except OSError as error:
        raise UserError(f"{said(damage)}, and '{unit.label}' cannot be set back; {delete}") from error
    if again:
        log.warning("%s; '%s' is made again", said(damage), unit.label)
        # Its rows go from the index now: killed before the new ones are in it, nobody would miss those.
        store.sync()
    elif damage[0].as_made:
        raise UserError(f"{said(damage)}, by what the index says, though not by its checksum; {delete}")
    else:  # somebody put the file back meanwhile
        store.forgive(folder)


def _placed(registry: Registry, name: str, error: UserError) -> UserError:
    """Put the place of a stage in front of each line of an error."""
    return UserError("\n".join(f"{_where(registry, name)}: {line}" for line in str(error).splitlines()))


def _where(registry: Registry, name: str) -> str:
    return f"{registry.place('stages', name)}: stages.{name}"


def _made_with(registry: Registry, catalog: Catalog) -> dict[str, str]:
    """Return the versions of saefw and torch, and the origin of each plugin in use that is not saefw's own.

    Of a plugin file its name and the hash of its code, no folder: a store may be moved, and shown to others.
    """
    own = f"saefw {saefw.__version__}"
    made_with = {"saefw": saefw.__version__}
    if torch := sys.modules.get("torch"):
        made_with["torch"] = str(torch.__version__)
    for kind in KINDS:
        for members in registry.families.get(kind, {}).values():
            for cls in {type(member.entry) for member in members}:
                origin = catalog.origin(cls)
                if origin != own:
                    path = Path(origin)
                    name = f"{path.name} {code(path)}".strip() if path.is_absolute() else origin
                    made_with[f"{kind}.{cls.model_fields['use'].default}"] = name
    return made_with


def _outdated(work: Run, made_with: Mapping[str, str], kept: Sequence[Unit]) -> Iterator[str]:
    """Say of which plugin files the code has changed since units that are kept were made with it."""
    files = {key: name for key, name in made_with.items() if ".py " in name}
    if not files or not kept:
        return
    with work.db() as db:
        query = "SELECT made_with, content FROM unit WHERE list_contains(?, unit)"
        rows = db.execute(query, [[unit.address for unit in kept]]).fetchall()
    n_changed = Counter[str]()
    for then, content in ((json.loads(one), other) for one, other in rows):
        for key, name in files.items():
            use = canonical({"use": key.partition(".")[2]})[1:-1]
            # Of a unit that was made from another entry of the registry, the code does not count.
            if then.get(key, name) != name and ".py " in then[key] and use in canonical(json.loads(content)):
                n_changed[key] += 1
    for key, n in n_changed.items():
        what = f"{n} unit{'' if n == 1 else 's'}, which {'is' if n == 1 else 'are'} kept"
        yield (
            f"the code of {files[key].partition(' ')[0]} has changed since it made {what}; if results change, raise "
            f"`revision` of '{key.partition('.')[2]}', and {'it is' if n == 1 else 'they are'} made anew"
        )


def _allow_files(n: int) -> None:
    """Let the process hold `n` locks open besides its other files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, top), hard))
