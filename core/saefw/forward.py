"""Runs images through a backbone, as many at a time as the device takes.

Shapes: b batch, t n_tokens, d d_model; `tokens_btd` has shape [b, t, d].
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor

from saefw.blocks import outputs
from saefw.errors import UserError
from saefw.origin import whose
from saefw.plugin import Backbone

log = logging.getLogger("saefw")

ON_CPU = 64
"""Images at a time on a CPU, where more are no faster."""

FIRST, MOST = 32, 1024
"""The fewest and the most images at a time that are tried on a GPU, unless the fewest are too many for it."""

GAIN = 1.05
"""How much faster twice as many images must be to be worth their memory."""


class Forward:
    """A backbone on a device, watched after some blocks."""

    def __init__(
        self, backbone: Backbone, layers: Iterable[int], device: str, precision: str, batch_size: int | None
    ) -> None:
        """Find the batch size, if none is given.

        Args:
            backbone: in eval mode, on the device.
            layers: numbers of blocks, as `blocks.resolve` returns them.
            device: `cpu`, `cuda:1`, ...
            precision: of the matrix products: float32, or float16 or bfloat16 by autocast.
            batch_size: images at a time; None: as many as are fastest.

        Raises:
            UserError: not even one image fits, or a block puts out another shape than `describe` says.

        """
        from PIL.Image import new

        self.backbone, self.layers, self.device = backbone, list(layers), device
        self.dtype: torch.dtype = getattr(torch, precision)
        self.blank = backbone.prepare(new("RGB", (256, 256)))
        """A prepared image without anything on it, to stand for one that cannot be read."""
        try:
            self._try()
        except RuntimeError as error:
            _halved(1, error)
        self.batch_size = batch_size or (ON_CPU if device == "cpu" else fastest(self._seconds))

    def outputs(self, images: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
        """Yield the outputs [b, t, d] of the blocks by layer, for one batch of the images after the other.

        Where a batch is too large for the device's memory, this and later ones are halved.

        Args:
            images: prepared, each float32 [3, height, width].

        Raises:
            UserError: not even one image fits.

        """
        start = 0
        while start < len(images):
            try:
                found = self._run(images[start : start + self.batch_size])
            except RuntimeError as error:
                self.batch_size = _halved(self.batch_size, error)
                log.warning("%s is out of memory; going on with %d images at a time", self.device, self.batch_size)
                continue
            yield found
            start += self.batch_size

    def _run(self, images: Sequence[Tensor]) -> dict[int, Tensor]:
        with self._computing():
            found = outputs(self.backbone, torch.stack(list(images)).to(self.device), self.layers)
        for layer, tokens_btd in found.items():
            self._check(f"after block {layer} tokens are", tokens_btd, len(images))
        return found

    def _try(self) -> None:
        """Run the blank image block by block: where a block is wrong, a later one would fail without naming it."""
        blank = self.blank
        if not isinstance(blank, Tensor) or blank.dtype != torch.float32 or blank.ndim != 3 or len(blank) != 3:
            got = f"{blank.dtype} {list(blank.shape)}" if isinstance(blank, Tensor) else repr(blank)
            raise UserError(f"{whose(type(self.backbone))}: prepare() must give float32 [3, height, width] (got {got})")
        with self._computing():
            tokens_btd = self.backbone.embed(blank[None].to(self.device))
            self._check("before block 0 tokens are", tokens_btd, 1)
            for layer in range(max(self.layers, default=-1) + 1):
                try:
                    tokens_btd = self.backbone.tail(tokens_btd, layer, layer)
                except TypeError as error:
                    error.add_note(f"block {layer} of {whose(type(self.backbone))}: if it takes more, override tail()")
                    raise
                self._check(f"after block {layer} tokens are", tokens_btd, 1)

    def _check(self, what: str, tokens_btd: object, n: int) -> None:
        """Raise unless tokens of `n` images have the shape that `describe` says."""
        wanted = [n, self.backbone.info.n_tokens, self.backbone.info.d_model]
        got = list(tokens_btd.shape) if isinstance(tokens_btd, Tensor) else f"a {type(tokens_btd).__name__}"
        if got != wanted:
            raise UserError(
                f"{whose(type(self.backbone))}: {what} {got}, but by what describe() says [batch, token, d_model] is "
                f"{wanted}"
            )

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute in the precision asked for, without gradients."""
        kind, reduced = self.device.partition(":")[0], self.dtype != torch.float32
        with torch.inference_mode(), _without_tf32(), torch.autocast(kind, self.dtype, enabled=reduced):
            yield

    def _seconds(self, n: int) -> float:
        """Return how long `n` images take, with what comes out brought to the CPU."""
        start = math.nan
        for _ in range(2):  # the first time kernels are chosen
            start = perf_counter()
            for tokens_btd in self._run([self.blank] * n).values():
                tokens_btd.cpu()
        return perf_counter() - start


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Compute in float32 what is said to be in float32: on a GPU torch takes TF32, of 10 bits, for convolutions."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def fastest(seconds: Callable[[int], float]) -> int:
    """Return how many images at a time take the least time each.

    Doubles from FIRST until memory runs out, it gets no faster, or MOST is reached; where FIRST are too many, halves.

    Args:
        seconds: runs so many images and returns how long that took.

    Raises:
        UserError: not even one image fits.

    """
    best, least = 0, math.inf
    n = FIRST
    while n <= MOST:
        try:
            each = seconds(n) / n
        except RuntimeError as error:
            half = _halved(n, error)
            if best:
                break
            n = half
            continue
        if each * GAIN > least:
            break
        best, least = n, each
        if n < FIRST:  # twice as many did not fit
            break
        n *= 2
    return best


def _halved(n: int, error: RuntimeError) -> int:
    """Return half of a batch size that was too large; an error that says something else is raised again."""
    # On Apple's GPUs torch raises a plain RuntimeError.
    if not isinstance(error, torch.OutOfMemoryError) and "MPS backend out of memory" not in str(error):
        raise error
    if n == 1:
        raise UserError("not even one image fits into the memory of the device; try device: cpu") from error
    return n // 2
