"""What is checked of a stage or a figure without a store."""

from saefw.plugin import FigureConfig, StageConfig
from saefw.testing.contract import expect
from saefw.testing.entry import check_entry


def check_stage(config: StageConfig) -> None:
    """Check what can be checked of a stage without a run: its settings, and that it lists and makes units."""
    check_entry(config)
    for method in ("units", "make"):
        own = getattr(type(config), method) is not getattr(StageConfig, method)
        expect("stage.methods", own, f"{method}()", "none")


def check_figure(config: FigureConfig) -> None:
    """Check what can be checked of a figure without a store: its settings, what it wants, and that it draws."""
    check_entry(config)
    wants = type(config).wants
    words = isinstance(wants, tuple) and all(isinstance(use, str) for use in wants)
    expect("figure.wants", words, "a tuple of names", repr(wants))
    expect("figure.draw", type(config).draw is not FigureConfig.draw, "draw()", "none")
