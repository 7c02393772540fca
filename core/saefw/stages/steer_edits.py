"""Edits a batch of images for the steer stage: in every role and way, with both controls, by every amount.

Shapes: e images, r roles, w ways, k kinds (ROLES, WAYS, KINDS), a amounts, f features of an edit, d d_model, s d_sae,
c classes, l logits kept.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from saefw.acts import Acts
from saefw.outcome import KINDS, ROLES
from saefw.stages.steer_plan import Plan
from saefw.steering import FACTORS, Reading, Steering, along, like_norm
from saefw.tensors import Form

ALL_LOGITS = 20
"""With so many classes or fewer every logit is stored; with more, the TOP before and after, the own and the target."""

TOP = 5

SUMS = ("norm", "sure", "others", "spread")
"""float32 [e, r, w, k, a] each: columns norm, after, others and spread of the table `edit`."""


def form(n: int, n_classes: int, plan: Plan) -> Form:
    """Return what `edited` gives of n images."""
    grid = n, len(ROLES), len(plan.ways), len(KINDS), len(plan.amounts)
    some = *grid, n_classes if n_classes <= ALL_LOGITS else 2 * TOP + 2
    n_features = sum(chosen_cf.shape[1] for chosen_cf in plan.chosen.values())
    return {
        **dict.fromkeys(SUMS, (torch.float32, grid)),
        **dict.fromkeys(("before", "after"), (torch.float32, some)),
        "label": (torch.int16, some),
        "like": (torch.int64, (n, len(ROLES), n_features)),
        "sure_before": (torch.float32, (n, len(ROLES))),
    }


def edited(steering: Steering, plan: Plan, acts: Acts, part: slice, device: str) -> dict[str, Tensor]:
    """Edit some images of the plan; the names are those of `form`, `like` the features of the control, way by way."""
    examples, target_er = plan.examples[part], torch.from_numpy(plan.target_er[part])
    ((_, tokens_etd),) = acts.read("all", examples, len(examples))
    before = steering.reading(tokens_etd.to(device))
    before_ec = before.logits_bc.cpu()
    like, after, norms = [], [], []
    for way in plan.ways:
        like_erf, direction_erd = _controls(steering, plan, before, way, part)
        like.append(like_erf)
        for r in range(len(ROLES)):
            features_ef = torch.from_numpy(plan.chosen[way])[target_er[:, r]].to(device)
            for amount in plan.amounts:
                edit, control = (
                    steering.delta(before, some_ef, _amounts(plan, some_ef, amount), plan.mode)
                    for some_ef in (features_ef, like_erf[:, r].to(device))
                )
                # A negative amount goes the other way, so that the control has a dose of its own.
                direction_ed = direction_erd[:, r].to(device) * (-1 if amount < 0 else 1)
                for delta in (edit, like_norm(control, edit), along(direction_ed, edit)):
                    norms.append(delta.flatten(1).norm(dim=1).cpu())
                    after.append(steering.after(before, delta).cpu())

    def by_role(found: Sequence[Tensor]) -> Tensor:
        """Return [e, r, w, k, a, ...] of what was found in the order w, r, a, k."""
        grid = len(plan.ways), len(ROLES), len(plan.amounts), len(KINDS)
        stacked = torch.stack(list(found), dim=1)
        return stacked.view(len(examples), *grid, *stacked.shape[2:]).transpose(1, 2).transpose(3, 4)

    after_c = by_role(after)  # [e, r, w, k, a, c]
    label_l = kept(before_ec, after_c, target_er)
    return {
        "norm": by_role(norms).contiguous(),
        **_measured(before_ec, after_c, target_er),
        "label": label_l.short(),
        "before": _picked(before_ec[:, None, None, None, None].expand_as(after_c), label_l),
        "after": _picked(after_c, label_l),
        "like": torch.cat(like, dim=2),
    }


def _amounts(plan: Plan, features_ef: Tensor, amount: float) -> Tensor:
    """Return an amount for each feature, in the units of codes or as a factor."""
    p99_ef = plan.p99_s[features_ef]
    return amount * (torch.ones_like(p99_ef) if plan.raw or plan.mode in FACTORS else p99_ef)


def _controls(steering: Steering, plan: Plan, before: Reading, way: str, part: slice) -> tuple[Tensor, Tensor]:
    """Return the features [e, r, f] and the unit directions [e, r, d] that stand beside the edits of a way."""
    examples, target_er, drawn = plan.examples[part], plan.target_er[part], plan.drawn[way]
    found = [[drawn(int(e), int(c)) for c in targets] for e, targets in zip(examples, target_er, strict=True)]
    like_erf = np.array([[like for like, _ in row] for row in found])
    if plan.mode in FACTORS or (plan.mode == "set" and 0 in plan.amounts):
        fires_es = steering.fires(before).cpu().numpy()
        for e, r in np.ndindex(target_er.shape):
            if not fires_es[e, like_erf[e, r]].any():
                like_erf[e, r] = drawn.firing(int(examples[e]), int(target_er[e, r]), fires_es[e])
    direction_erd = np.array([[direction for _, direction in row] for row in found], dtype=np.float32)
    return torch.from_numpy(like_erf), torch.from_numpy(direction_erd)


def _measured(before_ec: Tensor, after_c: Tensor, target_er: Tensor) -> dict[str, Tensor]:
    """Return the target's probability before and after, and what became of the logits of all other classes."""
    target_1 = target_er[:, :, None, None, None, None].expand(*after_c.shape[:-1], 1)
    change_c = after_c - before_ec[:, None, None, None, None]
    others = max(1, after_c.shape[-1] - 1)
    own = change_c.gather(-1, target_1)[..., 0]
    return {
        "sure_before": before_ec.softmax(dim=-1).gather(-1, target_er).contiguous(),
        "sure": after_c.softmax(dim=-1).gather(-1, target_1)[..., 0].contiguous(),
        "others": ((change_c.sum(dim=-1) - own) / others).contiguous(),
        "spread": ((change_c.abs().sum(dim=-1) - own.abs()) / others).contiguous(),
    }


def kept(before_ec: Tensor, after_c: Tensor, target_er: Tensor) -> Tensor:
    """Return the labels whose logits are stored, int64 [e, r, w, k, a, l] ascending; -1: none."""
    c = after_c.shape[-1]
    if c <= ALL_LOGITS:
        return torch.arange(c).expand_as(after_c).contiguous()
    shape = after_c.shape[:-1]
    own_e1, wanted = target_er[:, :1], target_er[:, :, None, None, None, None]
    label = torch.cat(
        [
            before_ec.topk(TOP).indices[:, None, None, None, None].expand(*shape, TOP),
            after_c.topk(TOP).indices,
            wanted.expand(*shape, 1),
            own_e1[:, None, None, None, None].expand(*shape, 1),
        ],
        dim=-1,
    ).sort(dim=-1)[0]
    label[..., 1:][label[..., 1:] == label[..., :-1]] = -1
    return label


def _picked(logits: Tensor, label: Tensor) -> Tensor:
    return logits.gather(-1, label.clamp_min(0)).contiguous()
