"""The framework; plugin authors import saefw.plugin and, for SAE variants, saefw.sae."""

__version__ = "0.1.0"
