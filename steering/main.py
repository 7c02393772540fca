"""The page for `bokeh serve steering`; of another registry: `bokeh serve steering --args other.yaml`."""

import sys
from pathlib import Path

from bokeh.io import curdoc

from saefw_steering import page

page(curdoc(), Path(*sys.argv[1:2] or ["registry.yaml"]))
