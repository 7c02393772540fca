"""What all tests share: nothing but silence at exit."""

import atexit
import os


@atexit.register
def _hush() -> None:
    """Close stderr when all is said.

    pytest holds fixtures, and with them classes of DuckDB, until the interpreter is gone; DuckDB's bindings then report
    them as leaked, sixty lines below the result, though no process that is not a test ever leaks them.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
