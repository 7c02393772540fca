"""The contract of each plugin kind, as checks that an author can run.

A test of a plugin is one line: `check_sae(MyVariant(k=4))`. Each check raises AssertionError with one sentence that
says what the contract asks for and what was found.

Shapes: b batch, t n_tokens, n tokens or inputs, d d_model, s d_sae, c classes.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from saefw.blocks import edited_tail, outputs, tokens_after
from saefw.entry import Entry
from saefw.plugin import (
    Backbone,
    BackboneConfig,
    DatasetConfig,
    FigureConfig,
    Metric,
    Prefix,
    Probe,
    ProbeConfig,
    SaeConfig,
    Split,
    StageConfig,
    Task,
)
from saefw.sae import Codes, Sae
from saefw.unit import canonical

HEAVY = (
    "bokeh", "cv2", "datasets", "h5py", "jax", "matplotlib", "open_clip", "pandas", "scipy", "sklearn", "tensorflow",
    "timm", "torchvision", "transformers",
)  # fmt: skip
"""Packages that a plugin imports inside its functions, so that `saefw check` stays fast."""

_light: set[str] = set()
"""Modules that `check_imports` found in order."""


def check_backbone(config: BackboneConfig, device: str = "cpu") -> None:
    """Check a backbone: shapes, preprocessing, and that its blocks one by one are the whole pass."""
    check_entry(config)
    info = config.describe()
    expect(min(info.d_model, info.n_blocks, *info.grid) > 0 <= info.d_embed, f"describe() gives sizes (got {info})")
    named = set(info.prefix) <= set(get_args(Prefix)) and "cls" not in info.prefix[1:]
    expect(named, f"prefix tokens are some of {get_args(Prefix)}, cls first (got {info.prefix})")
    backbone = config.build(device)
    expect(isinstance(backbone, Backbone), f"build() returns a Backbone (got {type(backbone).__name__})")
    expect(backbone.info == info, f"info is what describe() says: {info} (got {backbone.info})")
    expect(len(backbone.blocks) == info.n_blocks, f"there are {info.n_blocks} blocks (got {len(backbone.blocks)})")
    expect(not any(module.training for module in backbone.modules()), "build() returns it in eval mode")
    expect(not any(p.requires_grad for p in backbone.parameters()), "build() freezes the weights")

    images = _check_images(backbone).to(device)
    embedded_btd = backbone.embed(images)
    shape = (len(images), info.n_tokens, info.d_model)
    expect(embedded_btd.shape == shape, f"embed() gives [batch, token, d_model], {shape} (got {embedded_btd.shape})")
    whole_btd = backbone(images)
    every = outputs(backbone, images, range(info.n_blocks))
    expect(_near(every[info.n_blocks - 1], whole_btd), "the blocks one by one give what the whole pass gives")
    for layer, tokens_btd in every.items():
        where = f"after block {layer}"
        expect(tokens_btd.shape == shape, f"{where} tokens are {shape} (got {tuple(tokens_btd.shape)})")
        expect(bool(torch.isfinite(tokens_btd).all()), f"{where} tokens are finite")
        expect(_near(tokens_after(backbone, images, layer), tokens_btd), f"{where} two passes give the same")
        before_btd = tokens_btd.clone()
        expect(_near(edited_tail(backbone, tokens_btd, layer), whole_btd), f"{where} tail() gives the whole pass")
        expect(torch.equal(before_btd, tokens_btd), f"{where} tail() leaves its input as it was")
    if info.d_embed:
        embedding_be, wanted = backbone.embedding(whole_btd), (len(images), info.d_embed)
        expect(embedding_be.shape == wanted, f"embedding() gives {wanted} (got {tuple(embedding_be.shape)})")
    alone_btd = backbone(images[:1])
    expect(_near(alone_btd, whole_btd[:1]), "an image's tokens do not depend on the others of its batch")
    edited_btd = every[0].clone().requires_grad_()
    (gradient_btd,) = torch.autograd.grad(backbone.tail(edited_btd, 1).square().sum(), edited_btd)
    expect(bool(gradient_btd.isfinite().all() and gradient_btd.any()), "gradients flow through tail()")


def check_dataset(config: DatasetConfig, base: Path) -> None:
    """Check a dataset, opened from the folder `base`: keys, labels, splits, order, and some of its images."""
    from PIL.Image import Image

    check_entry(config)
    dataset, again = config.open(base), config.open(base)
    n = len(dataset)
    expect(n > 0, "it has images")
    classes = list(dataset.classes)
    expect(len(set(classes)) == len(classes), "no two classes have one name")
    expect(all(isinstance(name, str) for name in classes), f"classes are names (got {classes[:3]})")
    examples = [dataset[i] for i in range(n)]
    key, times = Counter(example.key for example in examples).most_common(1)[0]
    expect(times == 1, f"keys are unique ('{key}' occurs {times} times)")
    for example in examples:
        who = f"image '{example.key}'"
        good = isinstance(example.label, int) and -1 <= example.label < len(classes)
        expect(good, f"{who}: its label is -1 or the index of one of {len(classes)} classes (got {example.label!r})")
        expect(
            example.split in get_args(Split), f"{who}: its split is one of {get_args(Split)} (got {example.split!r})"
        )
    expect(
        [tuple(example[:3]) for example in examples] == [tuple(again[i][:3]) for i in range(len(again))],
        "opened again, it has the same images with the same labels and splits in the same order",
    )
    for i in sorted({0, n // 3, n // 2, n - 1}):
        image = examples[i].load()
        expect(isinstance(image, Image), f"image '{examples[i].key}': load() gives a PIL image (got {type(image)})")
        same = np.array_equal(np.asarray(image), np.asarray(again[i].load()))
        expect(same, f"image '{examples[i].key}': loaded again, it is the same")


def check_sae(config: SaeConfig, d_model: int = 16) -> None:
    """Check an SAE variant on made-up tokens: its codes, its loss, and that it can be stored."""
    check_entry(config)
    sae, again = _fresh(config, d_model), _fresh(config, d_model)
    expect(isinstance(sae, Sae), f"build() returns a Sae (got {type(sae).__name__})")
    d, s = sae.d_model, sae.d_sae
    for name, shape in {
        "W_enc": (d, s),
        "b_enc": (s,),
        "W_dec": (s, d),
        "b_dec": (d,),
        "mean": (d,),
        "scale": (),
    }.items():
        found = tuple(sae.state_dict()[name].shape) if name in sae.state_dict() else None
        expect(found == shape, f"its state holds {name} of shape {shape} (got {found})")
    expect(_same(sae.state_dict(), again.state_dict()), "built after the same seed, it is the same")

    x_nd = _tokens(d)
    _check_loss(sae, sae.normalise(x_nd))
    # A few steps, so that the codes are checked away from the start, where all biases are zero.
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(10):
        optimiser.zero_grad()
        torch.stack(list(sae.loss(sae.normalise(x_nd), _no(s)).terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        sae.settle()
    sae.eval().requires_grad_(False)
    _check_codes(sae, x_nd)

    before = {name: x.clone() for name, x in sae.state_dict().items()}
    again.load_state_dict(_stored(before))
    again.eval().requires_grad_(False)
    expect(torch.equal(again.dense(x_nd), sae.dense(x_nd)), "stored and loaded, it gives the same codes")
    expect(torch.equal(again(x_nd), sae(x_nd)), "stored and loaded, it gives the same reconstruction")
    expect(_same(sae.state_dict(), before), "in eval mode nothing changes its state")


def check_metric(metric: Callable[[], Metric]) -> None:
    """Check a metric: a number that does not depend on how the tokens were cut into batches."""
    generator = torch.Generator().manual_seed(0)
    x_nd = torch.randn(60, 8, generator=generator)
    x_hat_nd = x_nd + 0.3 * torch.randn(60, 8, generator=generator)
    indices = torch.stack([torch.randperm(12, generator=generator)[:3] for _ in range(60)])
    values = torch.rand(60, 3, generator=generator)
    found = []
    for cuts in ([0, 60], [0, 1, 30, 60]):
        one = metric()
        for start, stop in pairwise(cuts):
            one.add(x_nd[start:stop], x_hat_nd[start:stop], Codes(indices[start:stop], values[start:stop], 12))
        found.append(one.result())
    expect(all(isinstance(value, float) for value in found), f"result() gives a float (got {found[0]!r})")
    near = bool(np.isclose(found[0], found[1], rtol=1e-6, equal_nan=True))
    expect(near, f"another cut into batches gives the same: {found[0]} (got {found[1]})")


def check_probe(config: ProbeConfig) -> None:
    """Check a probe on three well separated clouds: it learns them, its state is all of it, a sweep changes nothing."""
    check_entry(config)
    task = Task(8, ("red", "green", "blue"))
    generator = torch.Generator().manual_seed(0)
    y_n = torch.arange(240) % 3
    x_nd = 5 + torch.randn(240, 8, generator=generator) + 6 * torch.eye(8)[y_n]
    given_nd = x_nd[:180].clone()
    probe = _probe(config, task, given_nd, y_n[:180])
    expect(torch.equal(given_nd, x_nd[:180]), "fit() leaves its tokens as they were")
    logits_nc = probe(x_nd[180:])
    expect(logits_nc.shape == (60, 3), f"it gives logits [n, class], (60, 3) (got {tuple(logits_nc.shape)})")
    expect(logits_nc.dtype == torch.float32, f"logits are float32 (got {logits_nc.dtype})")
    right = float((logits_nc.argmax(1) == y_n[180:]).double().mean())
    expect(right >= 0.9, f"of three clouds six standard deviations apart it reads 90 % right (got {right:.0%})")
    expect(torch.equal(_probe(config, task, given_nd, y_n[:180])(x_nd), probe(x_nd)), "fitted again, it is the same")

    empty = config.build(task)
    empty.load_state_dict(_stored(probe.state_dict()))
    expect(torch.equal(empty.eval()(x_nd), probe(x_nd)), "its state, stored and loaded, gives the same logits")
    told: list[tuple[int, int]] = []
    sweep = type(config).fit_many([config, config], task, given_nd, y_n[:180], lambda done, of: told.append((done, of)))
    expect(len(sweep) == 2, f"fit_many() returns one probe a member (got {len(sweep)} of 2)")
    for one in sweep:
        expect(_near(one(x_nd), probe(x_nd)), "fitted in a sweep, it is the one fitted alone")
    steps = [done for done, _ in told]
    ends = bool(told) and told[-1][0] == told[-1][1]
    expect(ends and steps == sorted(steps), f"fit_many() reports its steps up to the last (got {told[-3:]})")


def check_stage(config: StageConfig) -> None:
    """Check what can be checked of a stage without a run: its settings, and that it lists and makes units."""
    check_entry(config)
    for method in ("units", "make"):
        expect(getattr(type(config), method) is not getattr(StageConfig, method), f"it has a method {method}()")


def check_figure(config: FigureConfig) -> None:
    """Check what can be checked of a figure without a store: its settings, what it wants, and that it draws."""
    check_entry(config)
    wants = type(config).wants
    expect(isinstance(wants, tuple) and all(isinstance(use, str) for use in wants), f"wants is a tuple (got {wants!r})")
    expect(type(config).draw is not FigureConfig.draw, "it has a method draw()")


def check_entry(config: Entry) -> None:
    """Check the settings of any plugin: a name, a sentence for each, content that is JSON, and a light module."""
    cls = type(config)
    use = cls.model_fields.get("use")
    words = get_args(use.annotation) if use and get_origin(use.annotation) is Literal else ()
    expect(bool(use and words == (use.default,)), f'{cls.__name__} says its name: use: Literal["name"] = "name"')
    expect(bool(vars(cls).get("__doc__")), f"{cls.__name__} has a docstring")
    for name, info in cls.model_fields.items():
        expect(bool(info.description) or name == "use", f"{cls.__name__}.{name} has a sentence below it")
    text = canonical(config.content())
    again = cls.model_validate(json.loads(config.model_dump_json()))
    expect(again == config, f"{cls.__name__}: dumped and read again, the settings are the same")
    expect(canonical(again.content()) == text, f"{cls.__name__}: dumped and read again, the content is the same")
    expect(bool(cls.model_config.get("frozen")), f"{cls.__name__} is frozen, as Entry is")
    check_imports([cls.__module__])


def check_imports(modules: Iterable[str]) -> None:
    """Check in a fresh Python that importing these modules brings in nothing heavier than torch and numpy."""
    wanted = [name for name in dict.fromkeys(modules) if name not in _light and name != "__main__"]
    if not wanted:
        return
    files = [getattr(sys.modules.get(name), "__file__", None) for name in wanted]
    given = json.dumps([sys.path, list(zip(wanted, files, strict=True)), HEAVY])
    done = subprocess.run([sys.executable, "-c", _IMPORTS], input=given, capture_output=True, text=True)
    expect(done.returncode == 0, f"the modules can be imported afresh ({done.stderr.strip().splitlines()[-1:]})")
    for name, heavy in json.loads(done.stdout).items():
        expect(
            not heavy, f"importing {name} brings in {', '.join(heavy)}; import that inside the functions that use it"
        )
        _light.add(name)


_IMPORTS = """
import importlib.util, json, sys
path, modules, heavy = json.load(sys.stdin)
sys.path[:] = path
found = {}
for name, file in modules:
    before = set(sys.modules)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:  # a file that was loaded from elsewhere
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    found[name] = [package for package in heavy if package in set(sys.modules) - before]
print(json.dumps(found))
"""


def expect(holds: bool, promise: str) -> None:
    """Raise AssertionError with the promise that was broken, also under `python -O`."""
    if not holds:
        raise AssertionError(f"the contract asks: {promise}")


def _check_images(backbone: Backbone) -> Tensor:
    """Prepare images of several sizes and modes; return them, float32 [b, 3, height, width]."""
    from PIL import Image

    rng = np.random.default_rng(0)
    photos = [
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        for shape in ((61, 83, 3), (90, 47, 3), (40, 40), (33, 70, 4))
    ]
    rows, columns = backbone.info.grid
    prepared = []
    for photo in photos:
        what = f"an image of mode {photo.mode}, {photo.width} x {photo.height}"
        x = backbone.prepare(photo)
        fits = x.dtype == torch.float32 and x.ndim == 3 and len(x) == 3
        expect(fits, f"{what}: prepare() gives float32 [3, height, width] (got {x.dtype} {tuple(x.shape)})")
        expect(bool(x.isfinite().all()), f"{what}: prepare() gives finite numbers")
        expect(torch.equal(x, backbone.prepare(photo)), f"{what}: prepared again, it is the same")
        view = backbone.view(photo)
        expect(view.mode == "RGB", f"{what}: view() is RGB (got {view.mode})")
        off = view.width / view.height / (columns / rows)
        expect(0.98 < off < 1.02, f"{what}: view() has the aspect of the grid {rows} x {columns} (got {view.size})")
        prepared.append(x)
    shapes = {tuple(x.shape) for x in prepared}
    expect(len(shapes) == 1, f"all images are prepared to one shape (got {sorted(shapes)})")
    return torch.stack(prepared)


def _check_loss(sae: Sae, z_nd: Tensor) -> None:
    """Check the loss on normalised tokens, with no feature dead and with all."""
    for dead_s in (_no(sae.d_sae), ~_no(sae.d_sae)):
        sae.zero_grad()
        loss = sae.loss(z_nd, dead_s)
        for name, term in loss.terms.items():
            good = term.shape == () and bool(term.isfinite())
            expect(good, f"loss(): the term '{name}' is one finite number (got {term})")
        fired = loss.fired_s
        counts = fired.shape == (sae.d_sae,) and not fired.is_floating_point() and not fired.requires_grad
        expect(counts, "loss(): fired_s counts tokens, an integer for each feature")
        expect(
            0 <= int(fired.min()) <= int(fired.max()) <= len(z_nd),
            "loss(): no feature fires on more tokens than there are",
        )
        torch.stack(list(loss.terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
        expect(any(bool(g.any()) for g in gradients.values()), "the loss has a gradient")
        for name, gradient in gradients.items():
            expect(bool(gradient.isfinite().all()), f"the gradient of {name} is finite")


def _check_codes(sae: Sae, x_nd: Tensor) -> None:
    """Check the codes of recorded tokens, sparse against dense, many against one."""
    pre_ns = sae.pre(sae.normalise(x_nd))
    dense_ns = sae.activate(pre_ns)
    codes = sae.encode(x_nd)
    n, k = codes.indices.shape
    expect(codes.values.shape == (n, k), f"indices and values have one shape (got {tuple(codes.values.shape)})")
    expect(codes.indices.dtype == torch.int64, f"indices are int64 (got {codes.indices.dtype})")
    inside = not k or 0 <= int(codes.indices.min()) <= int(codes.indices.max()) < sae.d_sae
    expect(bool(inside), f"indices lie in 0..{sae.d_sae - 1}")
    expect(bool((codes.values >= 0).all() and (dense_ns >= 0).all()), "codes are zero or larger")
    expect(bool((codes.values > 0).any()), "some feature fires")
    summed_ns = torch.zeros_like(dense_ns).scatter_add(1, codes.indices, codes.values)
    expect(torch.equal(summed_ns, dense_ns), "encode() scattered is activate(), each feature once")
    if type(sae).activate is Sae.activate:
        at = sae.select(pre_ns)
        inside_ns = at.dense(torch.ones(len(at.features_e)), sae.d_sae) > 0
        expect(not bool(dense_ns[~inside_ns].any()), "fire() gives 0 where select() selects none")
    expect(torch.equal(sae.dense(x_nd), dense_ns), "dense() is activate() of the pre-activations")
    expect(_near(sae.decode(codes), sae(x_nd)), "decode(encode(x)) is what the SAE gives for x")
    expect(_near(sae.reconstruct(dense_ns) * sae.scale + sae.mean, sae(x_nd)), "sparse and dense decoding agree")
    for i in (0, n - 1):
        alone = sae.dense(x_nd[i : i + 1])
        expect(_near(alone, dense_ns[i : i + 1]), "in eval mode a token's codes do not depend on its batch")
    expect(len(sae.encode(x_nd[:0]).values) == 0, "no tokens have no codes")


def _fresh(config: SaeConfig, d_model: int) -> Sae:
    """Build an SAE as the trainer does, with mean and scale unlike their defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sae = config.fresh(d_model)
    if isinstance(sae, Sae):
        sae.mean.copy_(torch.linspace(-1, 2, d_model))
        sae.scale.fill_(1.7)
    return sae


def _tokens(d_model: int) -> Tensor:
    """Make up tokens as an SAE sees them: few directions each, off the origin, [200, d]."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_model, d_model, generator=generator)
    codes = torch.rand(200, 4 * d_model, generator=generator) * (
        torch.rand(200, 4 * d_model, generator=generator) < 0.05
    )
    return 1.7 * codes @ directions + torch.linspace(-1, 2, d_model)


def _probe(config: ProbeConfig, task: Task, x_nd: Tensor, y_n: Tensor) -> Probe:
    probe = config.fit(task, x_nd, y_n)
    expect(isinstance(probe, Probe), f"fit() returns a Probe (got {type(probe).__name__})")
    return probe.eval()


def _no(s: int) -> Tensor:
    return torch.zeros(s, dtype=torch.bool)


def _near(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors agree up to the rounding of float32 sums."""
    return x.shape == y.shape and float((x - y).abs().max()) <= 1e-4 * max(1.0, float(y.abs().max()))


def _same(state: dict[str, Any], other: dict[str, Any]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in state.items())


def _stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state as safetensors brings it back."""
    from safetensors.torch import load, save

    return load(save({name: x.contiguous() for name, x in state.items()}))
