"""An SAE and a probe opened to steer by hand, for notebooks, scripts and the page."""

from saefw.experiment.notebook import Notebook, open_experiment

__all__ = ["Notebook", "open_experiment"]
