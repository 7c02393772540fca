"""Reads classes off image embeddings by what they are called; nothing is fitted.

The logit of a class is the cosine of the image's embedding and the class's, times the scale that the model was trained
with (Radford et al. 2021, arXiv:2103.00020).

Shapes: n images, d width of an embedding, c classes, p prompts.
"""

from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import normalize

from saefw.plugin import BackboneConfig, Place, Probe, ProbeConfig, Task, UserError, hookimpl

NAME = "embeddings"
"""The one tensor of a file of class embeddings."""


class ZeroShot(ProbeConfig):
    """Class embeddings, of prompts through the backbone's own text tower or from a file, as a probe."""

    use: Literal["zero-shot"] = "zero-shot"

    templates: list[str] = Field(["a photo of a {}."], min_length=1)
    """Prompts in which {} stands for the name of a class, its underscores written as spaces. With several, a class is
    the mean of their embeddings, each of norm 1."""

    embeddings: Place | None = None
    """A safetensors file with a tensor `embeddings` [class, width], in the order of the dataset's classes, in place of
    prompts; null: none."""

    logit_scale: float | None = Field(None, gt=0)
    """What cosines are multiplied by; null: what the backbone was trained with."""

    @field_validator("templates")
    @classmethod
    def _one_place(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"a template has one {{}}, for the name of the class (got {template!r})")
        return templates

    def content(self) -> dict[str, Any]:
        """Return the settings with what the file of embeddings holds, wherever it lies."""
        content = super().content()
        if self.embeddings is not None and (path := self.embeddings.open()).is_file():
            told = path.stat()
            content["embeddings"] = _digest(path, told.st_mtime_ns, told.st_size)
        return content

    def check(self, task: Task, backbone: BackboneConfig, token: str | int) -> None:
        """See that there is a text tower and an image embedding, or a file that fits.

        Raises:
            UserError: there is not.

        """
        if self.embeddings is not None:
            self._stored(task)
        elif not backbone.has_text:
            use = backbone.content()["use"]
            raise UserError(f"zero-shot: a backbone of '{use}' has no text tower; name a file of class embeddings")
        elif token != "embedding":
            raise UserError(f"zero-shot: texts are compared with image embeddings; say token: embedding (got {token})")

    def build(self, task: Task) -> "ZeroShotProbe":
        """Return one whose classes are all alike."""
        return ZeroShotProbe(task.d_model, len(task.classes))

    def fit(self, task: Task, x_nd: Tensor, y_n: Tensor) -> Probe:
        """Return one with the embeddings of the classes; inputs and labels are not looked at.

        Raises:
            UserError: there are no embeddings, or they do not fit.

        """
        probe = self.build(task).to(x_nd.device)
        backbone = None
        if self.embeddings is None or self.logit_scale is None:
            if task.backbone is None:
                raise UserError("zero-shot: there is no backbone at hand")
            backbone = task.backbone()
        if self.embeddings is not None:
            classes_cd = normalize(self._stored(task), dim=1)
        else:
            assert backbone is not None
            names = [name.replace("_", " ") for name in task.classes]
            prompts = [template.replace("{}", name) for name in names for template in self.templates]
            with torch.no_grad():
                prompts_pd = normalize(backbone.text(prompts).float(), dim=1)
            if prompts_pd.shape[1] != task.d_model:
                raise UserError(
                    f"zero-shot: texts have embeddings of {prompts_pd.shape[1]} numbers, images of {task.d_model}"
                )
            classes_cd = normalize(prompts_pd.view(len(names), len(self.templates), -1).mean(dim=1), dim=1)
        scale = self.logit_scale or (backbone.logit_scale if backbone else 1.0)
        with torch.no_grad():
            probe.weight.copy_(classes_cd.T)
            probe.logit_scale.fill_(scale)
            probe.logit_bias.fill_(backbone.logit_bias if backbone and self.logit_scale is None else 0.0)
        return probe.eval().requires_grad_(False)

    def _stored(self, task: Task) -> Tensor:
        """Return the embeddings of the file, float32 [c, d].

        Raises:
            UserError: it cannot be read, or holds something else.

        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        assert self.embeddings is not None
        path = self.embeddings.open()
        if not path.is_file():
            raise UserError(f"{path}: no such file of class embeddings")
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        if list(tensors) != [NAME]:
            raise UserError(f"{path}: holds one tensor, called {NAME} (got {', '.join(sorted(tensors)) or 'none'})")
        found, wanted = tensors[NAME], (len(task.classes), task.d_model)
        if not found.is_floating_point() or tuple(found.shape) != wanted:
            kind = str(found.dtype).removeprefix("torch.")
            raise UserError(
                f"{path}: {NAME} are numbers [class, width], {list(wanted)} here (got {kind} {list(found.shape)})"
            )
        if not bool(found.isfinite().all()) or not bool(found.any(dim=1).all()):
            raise UserError(f"{path}: {NAME} holds rows that are zero or not finite")
        return found.float()


@lru_cache(maxsize=64)
def _digest(path: Path, mtime_ns: int, size: int) -> str:
    """Return the beginning of the SHA-256 of a file; it is read again once it has changed.

    Raises:
        UserError: it cannot be read.

    """
    try:
        return sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


class ZeroShotProbe(Probe):
    """Cosines with the class embeddings, times the scale."""

    logit_scale: Tensor
    logit_bias: Tensor

    def __init__(self, d_model: int, n_classes: int) -> None:
        """Start with embeddings of zero."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model, n_classes))
        self.register_buffer("logit_scale", torch.ones(()))
        self.register_buffer("logit_bias", torch.zeros(()))

    def forward(self, x_nd: Tensor) -> Tensor:
        """Return the logits, float32 [n, c]."""
        return self.logit_scale * (normalize(x_nd, dim=1) @ self.weight) + self.logit_bias


@hookimpl
def saefw_probes() -> list[type[ProbeConfig]]:
    """One: zero-shot."""
    return [ZeroShot]
