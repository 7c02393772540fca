"""The command `saefw bench`.

Imports what it needs inside: `saefw --help` lists it without torch.
"""

from pathlib import Path
from typing import Annotated

import typer

from saefw.errors import UserError, did_you_mean

BENCHES = {
    "record": "recording, from memory and from files, and the dry run of a large image set",
    "read": "recordings, in random order and in their own",
    "train": "a training step, beside the product with W_enc",
    "features": "the pass over features, beside the encoder alone",
    "pictures": "contact sheets, by the lit tile",
    "tables": "queries on tables as large as those of ImageNet-1K",
    "probe": "a sweep of linear probes, beside its members one by one",
    "steer": "edits of features, beside the blocks that they run",
}
"""What each module of this package measures, beside the frame."""


def bench(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="What to measure; without it they are listed.")
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", min=1, metavar="MB", help="How much data to work on.", show_default=False)
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the rows to this file.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds whose median counts.")] = 5,
) -> None:
    """Measure how near saefw is to the hardware, beside plain references.

    Files go to the folder for temporary files ($TMPDIR) and are deleted at the end.
    """
    if name is None:
        for known, what in BENCHES.items():
            print(f"{known:<9} {what}")
        return
    if name not in BENCHES:
        near = did_you_mean(name, BENCHES) or f" (there are: {', '.join(BENCHES)})"
        raise UserError(f"bench: there is no '{name}'{near}")
    if json is not None and not json.absolute().parent.is_dir():
        raise UserError(f"{json}: there is no folder {json.parent}; nothing was measured")

    from saefw.bench.frame import measured

    measured(name, size, rounds, json)
