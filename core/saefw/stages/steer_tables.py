"""Writes down what the steer stage found: tables, metrics, the example to show first.

Shapes: e images, r roles, w ways, k kinds (ROLES, WAYS, KINDS), a amounts, f features of an edit, l logits kept,
c classes.
"""

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saefw.acts import Acts
from saefw.care import write_atomically
from saefw.facts import Name, names
from saefw.originals import again
from saefw.outcome import KINDS, MEASURES, ROLES, Found, Readout, agreement, first, found, summary
from saefw.plugin import Run, Unit
from saefw.stages.steer_plan import Plan

Made = Mapping[str, NDArray[Any]]
LIKE = KINDS.index("like features")


def write(unit: Unit, run: Run, plan: Plan, acts: Acts, made: Made) -> None:
    """Write all of a unit; `made` is what `steer_edits.edited` gave of all images of the plan."""
    # A control without a norm where the edit has one is none.
    there = np.ones(made["norm"].shape, dtype=bool)
    there[:, :, :, LIKE] = (made["norm"][:, :, :, LIKE] > 0) | (made["norm"][:, :, :, 0] == 0)
    _write_edits(unit, run, plan, made, there)
    _write_features(unit, run, plan, made, there)
    _write_logits(unit, run, made, there)
    _write_choice(unit, run, plan)
    read = Readout(made["label"], made["before"], made["after"], plan.target_er)
    rows = _write_outcome(unit, run, plan, made, read, there)
    counts = {"n_images": len(plan.examples), "n_edits": int(there.sum()), "n_controls_left_out": int((~there).sum())}
    run.log(unit, 0, **summary(rows, max(plan.amounts)), **_agreements(plan, rows), **counts)
    _write_first(unit, run, plan, acts, read)


def _write_edits(unit: Unit, run: Run, plan: Plan, made: Made, there: NDArray[np.bool_]) -> None:
    sae, probe, _, _, recording = unit.needs
    index_e, index_r, index_w, index_k, index_a = np.nonzero(there)
    way = np.array(plan.ways)[index_w]
    target_er = plan.target_er
    run.put(
        unit,
        "edit",
        sae=sae.address,
        probe=probe.address,
        acts=recording.address,
        edit=np.flatnonzero(there),
        example=plan.examples[index_e],
        place=unit.content["place"],
        role=np.array(ROLES)[index_r],
        way=way,
        chosen_by=np.where(index_k == 0, way, np.array(KINDS)[index_k]),
        mode=plan.mode,
        dose=np.array(plan.amounts)[index_a],
        target=target_er[index_e, index_r],
        norm=made["norm"][there],
        before=made["sure_before"][index_e, index_r],
        after=made["sure"][there],
        others=made["others"][there],
        spread=made["spread"][there],
    )


def _write_features(unit: Unit, run: Run, plan: Plan, made: Made, there: NDArray[np.bool_]) -> None:
    edit, start = np.arange(there.size).reshape(there.shape), 0
    columns: dict[str, list[NDArray[Any]]] = {"edit": [], "feature": [], "amount": []}
    for w, chosen_cf in enumerate(plan.chosen.values()):
        f = chosen_cf.shape[1]
        feature_erkf = np.stack([chosen_cf[plan.target_er], made["like"][:, :, start : start + f]], axis=2)
        start += f
        with_features = there[:, :, w, :2]
        shape = *with_features.shape, f
        for name, values in (
            ("edit", edit[:, :, w, :2, :, None]),
            ("feature", feature_erkf[:, :, :, None]),
            ("amount", np.array(plan.amounts)[:, None]),
        ):
            columns[name].append(np.broadcast_to(values, shape)[with_features].ravel())
    run.put(unit, "edit_feature", **{name: np.concatenate(parts) for name, parts in columns.items()})


def _write_logits(unit: Unit, run: Run, made: Made, there: NDArray[np.bool_]) -> None:
    kept = (made["label"] >= 0) & there[..., None]
    edit = np.arange(there.size, dtype=np.int32).reshape(*there.shape, 1)
    run.put(
        unit,
        "edit_logit",
        edit=np.broadcast_to(edit, kept.shape)[kept],
        **{name: made[name][kept] for name in ("label", "before", "after")},
    )


def _write_choice(unit: Unit, run: Run, plan: Plan) -> None:
    columns: dict[str, list[NDArray[Any]]] = {}
    for way, best in plan.ranked.items():
        label, rank = (index.ravel() for index in np.indices(best.shape))
        feature = best.ravel()
        for name, values in {
            "way": np.full(len(label), way),
            "label": label,
            "rank": rank,
            "feature": feature,
            "score": plan.score[way][feature, label],
            "predicted": plan.effect_sc[feature, label],
        }.items():
            columns.setdefault(name, []).append(values)
    run.put(unit, "choice", **{name: np.concatenate(parts) for name, parts in columns.items()})


def _write_outcome(
    unit: Unit, run: Run, plan: Plan, made: Made, read: Readout, there: NDArray[np.bool_]
) -> list[Found]:
    before = made["sure_before"].astype(np.float64)[:, :, None, None, None]
    measured = {
        "logit": read.shift_erwka,
        "probability": made["sure"] - before,
        "flip": read.flips(),
        "others": made["others"],
        "spread": made["spread"],
    }
    values = np.stack([measured[name].astype(np.float64) for name in MEASURES], axis=-1)
    values[~there] = np.nan
    rows = found(values, plan.target_er, plan.ways, plan.amounts)
    columns = zip(*rows, strict=True)
    run.put(unit, "outcome", **{name: list(column) for name, column in zip(Found._fields, columns, strict=True)})
    return rows


def _agreements(plan: Plan, rows: list[Found]) -> dict[str, float]:
    """Return how well what was predicted of each class's features agrees with what they did, by way and in all.

    `rank_correlation_<way>`: over the classes, between the predicted effect of its features, summed, and the mean
    change of its logit at the largest amount; `rank_correlation`: over the classes of all ways together.
    """
    pairs: dict[str, list[tuple[float, float]]] = {way: [] for way in plan.ways}
    unit_s = plan.p99_s.cpu().double().numpy() if plan.raw else np.ones(len(plan.effect_sc))
    for row in rows:
        if row[:5] == (ROLES[1], row.way, row.way, None, max(plan.amounts)) and row.measure == "logit":
            if row.target is not None:
                features = plan.chosen[row.way][row.target]
                predicted = plan.effect_sc[features, row.target] / unit_s[features]
                pairs[row.way].append((float(predicted.sum()), row.mean))
    together = [pair for of_way in pairs.values() for pair in of_way]
    return {
        **{f"rank_correlation_{way}": agreement(*np.array(of_way).T) for way, of_way in pairs.items()},
        "rank_correlation": agreement(*np.array(together).T),
    }


# The example to show first


def _write_first(unit: Unit, run: Run, plan: Plan, acts: Acts, read: Readout) -> None:
    classes, recording = unit.needs[3], unit.needs[4]
    with run.db() as db:
        named = names(db, classes.address, classes.content["top"], acts.grid)
    nowhere, chosen_cf = Name(0.0, 0.0), plan.chosen[plan.ways[0]]
    rank_c = np.array([min(max(named.get(int(f), nowhere)) for f in features) for features in chosen_cf])
    if (place := first(read, rank_c, np.array(plan.amounts))) is not None:
        told = _told(read, plan, acts, named, place)
        write_atomically(run.folder(unit) / "first.json", json.dumps(told, indent=1).encode())
        write_atomically(run.folder(unit) / "first.png", _picture(recording, run, told["example"], told["key"]))


def _told(
    read: Readout, plan: Plan, acts: Acts, named: Mapping[int, Name], place: tuple[int, int, int, int, int]
) -> dict[str, Any]:
    """Return what first.json says of an edit; before and after are probabilities (with many classes, shares)."""
    (e, r, w, _, a), example = place, int(plan.examples[place[0]])
    features = plan.chosen[plan.ways[w]][plan.target_er[e, r]].tolist()
    before, after = ({acts.classes[i]: round(p, 6) for i, p in told.items()} for told in read.probabilities(place))
    return {
        "edit": int(np.ravel_multi_index(place, read.shift_erwka.shape)),
        "example": example,
        "key": acts.keys[example],
        "from": acts.classes[plan.target_er[e, 0]],
        "to": acts.classes[plan.target_er[e, r]],
        "features": features,
        "purity": [named[feature].purity for feature in features],
        "place": [named[feature].place for feature in features],
        "amount": plan.amounts[a],
        "before": before,
        "after": after,
    }


def _picture(recording: Unit, run: Run, example: int, key: str) -> bytes:
    """Return what the model sees of an image, as PNG."""
    image = again(run.dataset(recording.given["dataset"]), example, key)
    file = BytesIO()
    recording.given["backbone"].fresh("cpu").view(image).save(file, "PNG")
    return file.getvalue()
