"""A plugin of each kind that builds nothing, for tests of registry.yaml alone."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from saefw.plugin import (
    BackboneConfig,
    DatasetConfig,
    FigureConfig,
    Knob,
    Names,
    Pick,
    ProbeConfig,
    SaeConfig,
    StageConfig,
    UserError,
    hookimpl,
)


class Clip(BackboneConfig):
    """Two settings, one of them required."""

    use: Literal["open-clip"] = "open-clip"

    arch: str = "ViT-B-16"
    """Its name."""

    pretrained: str
    """Its weights."""


class TinyVit(BackboneConfig):
    """No settings."""

    use: Literal["tiny-vit"] = "tiny-vit"


class Folder(DatasetConfig):
    """One setting."""

    use: Literal["folder"] = "folder"

    root: str = "."
    """Where it lies."""


class Relu(SaeConfig):
    """Bounded numbers."""

    use: Literal["relu"] = "relu"

    l1: float = Field(1e-3, ge=0)
    """How much of the L1 norm."""


class TopK(SaeConfig):
    """Settings that must fit together."""

    use: Literal["topk"] = "topk"

    k: int = Field(32, gt=0)
    """Features that may fire."""

    most: int = 64
    """The largest k."""

    @model_validator(mode="after")
    def fits(self) -> "TopK":
        """Check k against its bound."""
        if self.k == 1013:
            raise UserError("k is not 1013")
        if self.k > self.most:
            raise ValueError(f"k {self.k} is over {self.most}")
        return self


class Linear(ProbeConfig):
    """A list, a flag, a word that may be missing."""

    use: Literal["linear"] = "linear"

    widths: tuple[int, ...] = ()
    """Of hidden layers."""

    bias: bool = True
    """Whether there is one."""

    note: str | None = None
    """Anything."""


class Pareto(FigureConfig):
    """Nothing to set."""

    use: Literal["pareto"] = "pareto"


class Record(StageConfig):
    """Names entries of two kinds."""

    use: Literal["record"] = "record"

    backbone: Annotated[str, Names("backbones")]
    """What is recorded."""

    datasets: Annotated[list[str], Names("datasets")]
    """Of what."""

    layers: tuple[int, ...] = (-1,)
    """Which."""

    batch_size: Annotated[int, Knob] = 64
    """Images at a time."""


class Train(StageConfig):
    """Names a stage above it."""

    use: Literal["train"] = "train"

    acts: Annotated[str, Names("stages")]
    """The recording."""

    saes: Annotated[list[str], Names("saes")]
    """The sweep."""

    tokens: Literal["patches", "cls"] = "patches"
    """Which tokens."""


class LayerPick(Pick):
    """A pick that also says which layer."""

    layer: int = -1
    """Of the SAE."""


class Steer(StageConfig):
    """A nested model, in a union, and a name that has a default."""

    use: Literal["steer"] = "steer"

    saes: Annotated[str, Names("stages")] = "sweep"
    """The sweep."""

    sae: LayerPick | None = None
    """Which of them."""

    amounts: int | list[float] = 1
    """How much."""


@hookimpl
def saefw_backbones() -> list[type[BackboneConfig]]:
    return [Clip, TinyVit]


@hookimpl
def saefw_datasets() -> list[type[DatasetConfig]]:
    return [Folder]


@hookimpl
def saefw_saes() -> list[type[SaeConfig]]:
    return [Relu, TopK]


@hookimpl
def saefw_probes() -> list[type[ProbeConfig]]:
    return [Linear]


@hookimpl
def saefw_figures() -> list[type[FigureConfig]]:
    return [Pareto]


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    return [Record, Train, Steer]
