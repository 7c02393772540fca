"""Batches: their size is found by trying, and shrinks where memory runs out."""

from collections.abc import Callable, Iterator

import pytest
import tiny
import torch
from tiny import TinyVit
from torch import Tensor

from saefw.blocks import outputs
from saefw.errors import UserError
from saefw.forward import Forward, fastest
from saefw.plugin import Backbone

IMAGES = torch.rand(50, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5


def device(fits: int, seconds: Callable[[int], float], tried: list[int]) -> Callable[[int], float]:
    """Stand for a device that holds at most so many images."""

    def run(n: int) -> float:
        tried.append(n)
        if n > fits:
            raise torch.OutOfMemoryError(f"tried to allocate {n} images")
        return seconds(n)

    return run


@pytest.mark.parametrize(
    ("fits", "seconds", "found", "tried"),
    [
        pytest.param(9999, lambda n: 1.0, 1024, [32, 64, 128, 256, 512, 1024], id="more is always faster"),
        pytest.param(9999, lambda n: n / 100, 32, [32, 64], id="more is no faster"),
        pytest.param(9999, lambda n: max(1, n / 256), 256, [32, 64, 128, 256, 512], id="faster up to 256"),
        pytest.param(9999, lambda n: 1 + n / 10, 128, [32, 64, 128, 256], id="five per cent faster is not worth it"),
        pytest.param(200, lambda n: 1.0, 128, [32, 64, 128, 256], id="memory ends at 200"),
        pytest.param(9, lambda n: 1.0, 8, [32, 16, 8], id="memory ends at 9"),
        pytest.param(1, lambda n: 1.0, 1, [32, 16, 8, 4, 2, 1], id="one fits"),
    ],
)
def test_the_fastest_that_fits(fits: int, seconds: Callable[[int], float], found: int, tried: list[int]) -> None:
    seen: list[int] = []
    assert fastest(device(fits, seconds, seen)) == found
    assert seen == tried


def test_not_one_fits() -> None:
    with pytest.raises(UserError) as told:
        fastest(device(0, lambda n: 1.0, []))
    assert str(told.value) == "not even one image fits into the memory of the device; try device: cpu"


def test_another_error_is_no_lack_of_memory() -> None:
    def wrong(n: int) -> float:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        fastest(wrong)


def narrow(fits: int, error: RuntimeError) -> Backbone:
    """Return a backbone that says it lacks memory for more than so many images."""
    vit = TinyVit().build("cpu")

    def refuse(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > fits:
            raise error

    vit.model.get_submodule("patch_embed").register_forward_pre_hook(refuse)
    return vit


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("MPS backend out of memory (5 GB)")])
def test_out_of_memory_halves_the_batch_and_goes_on(error: RuntimeError, caplog: pytest.LogCaptureFixture) -> None:
    forward = Forward(narrow(6, error), [0, 2], "cpu", "float32", batch_size=25)
    found = list(forward.outputs(list(IMAGES)))
    assert [len(part[0]) for part in found] == [6] * 8 + [2] and forward.batch_size == 6
    for layer, expected in outputs(TinyVit().build("cpu"), IMAGES, [0, 2]).items():
        torch.testing.assert_close(torch.cat([part[layer] for part in found]), expected, rtol=1e-5, atol=1e-5)
    assert caplog.messages == [
        "cpu is out of memory; going on with 12 images at a time",
        "cpu is out of memory; going on with 6 images at a time",
    ]


def test_no_batch_is_small_enough() -> None:
    with pytest.raises(UserError) as told:
        Forward(narrow(0, torch.OutOfMemoryError()), [0], "cpu", "float32", batch_size=2)
    assert str(told.value) == "not even one image fits into the memory of the device; try device: cpu"


def test_a_size_is_found_by_running_the_backbone() -> None:
    forward = Forward(narrow(70, torch.OutOfMemoryError()), [2], "cpu", "float32", batch_size=None)
    assert forward.batch_size == 64, "on a CPU none is tried"
    assert fastest(forward._seconds) in (32, 64)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precision_is_autocast(precision: str) -> None:
    vit = TinyVit().build("cpu")
    (found,) = Forward(vit, [1], "cpu", precision, None).outputs(list(IMAGES))
    with torch.inference_mode(), torch.autocast("cpu", getattr(torch, precision)):
        expected = outputs(vit, IMAGES, [1])
    assert torch.equal(found[1], expected[1])
    assert not torch.equal(found[1], outputs(vit, IMAGES, [1])[1])


@pytest.fixture(params=[True, False])
def tf32(request: pytest.FixtureRequest) -> Iterator[bool]:
    """TF32 switched on or off for all that is computed on a GPU."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = request.param
    yield request.param
    cudnn.allow_tf32, matmul.allow_tf32 = before


def test_float32_is_no_tf32(tf32: bool) -> None:
    """Neither in convolutions nor in matrix products, even where it was switched on; after the pass it is as before."""
    vit, seen = TinyVit().build("cpu"), list[tuple[bool, bool]]()

    def look(*_: object) -> None:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))

    vit.model.get_submodule("patch_embed").register_forward_pre_hook(look)
    list(Forward(vit, [1], "cpu", "float32", None).outputs(list(IMAGES)))
    look()
    assert seen == [(False, False), (False, False), (tf32, tf32)]


def test_a_block_of_another_shape_is_told_with_its_file() -> None:
    backbone = TinyVit().build("cpu")
    backbone.info = backbone.info._replace(d_model=8)
    with pytest.raises(UserError) as told:
        next(Forward(backbone, [1], "cpu", "float32", 4).outputs(list(IMAGES[:4])))
    assert str(told.value) == (
        f"plugin 'tiny' of {tiny.__file__}: before block 0 tokens are [1, 17, 16], but by what describe() says "
        "[batch, token, d_model] is [1, 17, 8]"
    )
