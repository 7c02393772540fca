"""The way in: `saefw`, or `python -m saefw`."""

import os
import signal


def main() -> None:
    """Run the command line; told to stop before it is there, or when it is done, end with a word and no traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    # Only now, since it takes a while.
    from saefw import heap

    heap.shared()
    from saefw import cli

    cli.main()


def _stop(number: int, frame: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(130)


if __name__ == "__main__":
    main()
