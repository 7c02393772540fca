"""Finds fitted probes, and SAEs whose edits reach them, for stages that read edited tokens."""

from collections.abc import Sequence

from saefw import inputs
from saefw.acts import Acts
from saefw.plugin import BackboneInfo, Pick, Probe, Run, Task, Unit, UserError
from saefw.stages.probe import open_probe
from saefw.unit import canonical


def opened(unit: Unit, run: Run) -> Probe:
    """Return the probe of a unit that is made, in eval mode and frozen.

    Raises:
        UserError: its file cannot be read, or does not hold such a probe.

    """
    (acts,) = unit.needs
    width = inputs.width(acts.given["backbone"].describe(), unit.content["token"])
    task = Task(width, tuple(Acts(run.folder(acts)).classes))
    return open_probe(unit.given["probe"], run.folder(unit), task, run.device)


def picked(run: Run, stage: str, pick: Pick, acts: Unit) -> Unit:
    """Return the probe that `pick` chooses of those of a stage on a recording.

    Where it names no metric, of those of highest valid accuracy the one of lowest valid loss: few valid images make
    many of a sweep equally accurate.

    Raises:
        NotYet: not all of them are made.
        UserError: none fits.

    """

    def among(unit: Unit) -> bool:
        return unit.needs[0] == acts

    if pick.lowest or pick.highest:
        return run.best(stage, pick, among)
    most = run.best(stage, pick.model_copy(update={"highest": "valid_accuracy"}), among)
    if not run.store.has(most):  # guessed
        return most
    with run.db() as db:
        told = db.execute("SELECT value FROM final WHERE unit = ? AND name = 'valid_accuracy'", [most.address])
        ((accuracy,),) = told.fetchall()
    above = {**pick.above, "valid_accuracy": accuracy}
    return run.best(stage, pick.model_copy(update={"lowest": "valid_loss", "above": above}), among)


def reaching(
    stage: str, saes: Sequence[Unit], probes: Sequence[Unit], place: str | None = None
) -> list[tuple[Unit, Unit]]:
    """Return the pairs of an SAE and a probe, on one backbone, in which an edit reaches the probe.

    Args:
        stage: which asks, for the text.
        saes: their units, made or not.
        probes: likewise.
        place: the tokens that are edited, `patches` or `cls`; null: those that the SAE is of.

    Raises:
        UserError: an edit reaches none of the probes; the text says what would do.

    """
    infos: dict[str, BackboneInfo] = {}
    found, refusal = [], None
    for sae in saes:
        acts = sae.needs[0]
        key = canonical(acts.content["backbone"])
        for probe in probes:
            read = probe.needs[0]
            if read.content["backbone"] != acts.content["backbone"]:
                continue
            if key not in infos:
                infos[key] = acts.given["backbone"].describe()
            where = acts.content["layer"], read.content["layer"], place or sae.content["tokens"]
            try:
                inputs.check_reach(stage, infos[key], *where, probe.content["token"])
            except UserError as error:
                refusal = refusal or error
            else:
                found.append((sae, probe))
    if refusal and not found:
        raise refusal
    return found
