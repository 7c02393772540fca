"""Lists what the steering page can open: an SAE, a probe and a dataset of one registry, by what is made."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from saefw import pipeline, registry
from saefw.catalog import Catalog
from saefw.errors import NotYet
from saefw.plugin import Run, Unit, UserError
from saefw.stages.steer import Steer


@dataclass(frozen=True)
class Choice:
    """An SAE and a probe that fit together; what is opened for them is shared by all sessions."""

    registry: Path
    """The registry that it was planned from."""

    store: Path
    """Where it is kept."""

    unit: Unit
    """What the steer stage makes of the two; it need not be made."""

    run: Run = field(compare=False)
    """The desk from which it is read."""

    stage: Steer = field(compare=False)
    """The stage that puts the two together."""

    name: str = field(compare=False)
    """What the stage is called in the registry."""

    @property
    def sae(self) -> Unit:
        """The SAE."""
        return self.unit.needs[0]

    @property
    def probe(self) -> Unit:
        """The probe."""
        return self.unit.needs[1]

    @property
    def dataset(self) -> Unit:
        """The recording that the probe reads: a dataset on a backbone."""
        return self.probe.needs[0]

    @property
    def steered(self) -> bool:
        """Whether the steer stage made it."""
        return self.run.store.has(self.unit)

    def saes(self) -> list[Unit]:
        """Return the SAEs of the stage that are made."""
        return [unit for unit in self.run.made_by(self.stage.saes) if self.run.store.has(unit)]

    def probes(self) -> list[Unit]:
        """Return the probes of the stage that are made."""
        return [unit for unit in self.run.made_by(self.stage.probes) if self.run.store.has(unit)]

    def other(self, sae: str, probe: str) -> "Choice":
        """Return the choice of another SAE and another probe of the stage, by address.

        Raises:
            UserError: there is no such one, they do not fit together, or nobody looked at the SAE's features.

        """
        units = [_named("SAE", self.saes(), sae), _named("probe", self.probes(), probe)]
        try:
            unit = self.stage.pair(self.run, *units)
        except NotYet as error:
            raise UserError(f"{units[0].label}, read by {units[1].label}: {error}") from error
        for need in unit.needs:
            if not self.run.store.has(need):
                raise UserError(f"{need.label} is not made yet: run `saefw run {self.registry}`")
        return Choice(self.registry, self.store, unit, self.run, self.stage, self.name)


def choices(path: Path) -> list[Choice]:
    """List what the steer stages of a registry edit: what is made first, then what only lacks its measurements.

    Raises:
        UserError: the registry cannot be read, or there is none; the text says what to do.

    """
    catalog = Catalog()
    read = registry.read(path, catalog)
    stages = [
        (name, member.entry)
        for name, members in read.families["stages"].items()
        for member in members
        if isinstance(member.entry, Steer)
    ]
    if not stages:
        raise UserError(
            f"{path} has no stage with use: steer, which this page shows; add one and run `saefw run {path}`."
        )
    run = pipeline.desk(read, catalog)
    pipeline.plan(read, catalog, only=stages[-1][0], run=run)
    found = [
        Choice(path.resolve(), read.store, unit, run, stage, name)
        for name, stage in stages
        for unit in _units(stage, run)
        if all(map(run.store.has, unit.needs))
    ]
    if not found:
        raise UserError(f"Nothing is made yet that could be steered: run `saefw run {path}` first.")
    return sorted(dict.fromkeys(found), key=lambda choice: not choice.steered)


def _units(stage: Steer, run: Run) -> list[Unit]:
    try:
        return list(stage.units(run))
    except NotYet:
        return []


def _named(what: str, units: Sequence[Unit], address: str) -> Unit:
    for unit in units:
        if unit.address == address:
            return unit
    raise UserError(f"there is no {what} {address!r} any more; choose another")
