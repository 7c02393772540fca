"""The page for `bokeh serve steering`; of another registry: `bokeh serve steering --args other.yaml`.

`bokeh serve` listens on all addresses of the machine; clients from elsewhere are refused, unless `--args --public` is
said.
"""

import sys
from pathlib import Path

from bokeh.io import curdoc

from saefw_steering import page

names = [arg for arg in sys.argv[1:] if arg != "--public"]
page(curdoc(), Path(*names[:1] or ["registry.yaml"]), public="--public" in sys.argv[1:])
