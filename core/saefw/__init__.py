"""The framework; plugin authors import saefw.plugin and, for SAE variants, saefw.sae."""

import os

# Torch then keeps what is large in large pages of memory: of small ones, a training step would wait for 100,000.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# OpenMP's threads otherwise go on turning for milliseconds after each product, on the cores that selecting needs then.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
