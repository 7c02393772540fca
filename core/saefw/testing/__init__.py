"""The contract of each plugin kind, as checks that an author can run.

A test of a plugin is a few lines: `check_sae(MyVariant(k=4))`. Each check raises AssertionError with one sentence that
says which line of the contract is broken, what it asks for and what came; `CONTRACT` holds all lines.
"""

from saefw.testing.backbone import check_backbone
from saefw.testing.contract import CONTRACT
from saefw.testing.dataset import check_dataset
from saefw.testing.entry import HEAVY, check_entry, check_imports
from saefw.testing.metric import check_metric
from saefw.testing.planted import check_planted
from saefw.testing.probe import check_probe
from saefw.testing.sae import check_sae
from saefw.testing.store import check_figure, check_stage

__all__ = [
    "CONTRACT",
    "HEAVY",
    "check_backbone",
    "check_dataset",
    "check_entry",
    "check_figure",
    "check_imports",
    "check_metric",
    "check_planted",
    "check_probe",
    "check_sae",
    "check_stage",
]
