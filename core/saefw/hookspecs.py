"""The hooks: seven bring things, three watch."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pluggy

from saefw.plugin import (
    BackboneConfig,
    DatasetConfig,
    FigureConfig,
    Metric,
    ProbeConfig,
    SaeConfig,
    StageConfig,
    Unit,
)

hookspec = pluggy.HookspecMarker("saefw")


@hookspec
def saefw_backbones() -> Iterable[type[BackboneConfig]]:  # type: ignore[empty-body]
    """The vision transformers this plugin can load."""


@hookspec
def saefw_datasets() -> Iterable[type[DatasetConfig]]:  # type: ignore[empty-body]
    """The image sets this plugin can open."""


@hookspec
def saefw_saes() -> Iterable[type[SaeConfig]]:  # type: ignore[empty-body]
    """The SAE variants this plugin can train."""


@hookspec
def saefw_probes() -> Iterable[type[ProbeConfig]]:  # type: ignore[empty-body]
    """The probes this plugin can fit."""


@hookspec
def saefw_stages() -> Iterable[type[StageConfig]]:  # type: ignore[empty-body]
    """The pipeline stages this plugin adds."""


@hookspec
def saefw_figures() -> Iterable[type[FigureConfig]]:  # type: ignore[empty-body]
    """The figures this plugin can draw from the store."""


@hookspec
def saefw_metrics() -> Mapping[str, type[Metric]]:  # type: ignore[empty-body]
    """Numbers to compute for every SAE on held-out tokens, by name."""


@hookspec
def saefw_logged(unit: Unit, step: int, values: Mapping[str, float]) -> None:
    """A running stage measured something."""


@hookspec
def saefw_progressed(stage: str, done: int, total: int, what: str) -> None:
    """A running stage has done so many of its images, tokens or steps."""


@hookspec
def saefw_kept(unit: Unit, folder: Path, seconds: float) -> None:
    """A unit was made, or found already made (seconds 0)."""
