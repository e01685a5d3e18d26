"""Modules that the base has no weights for: every load draws them anew unless they are saved."""

from typing import Any

from safetensors import SafetensorError

from hftl.errors import RecipeError, message_line
from hftl.model.head import load_class
from hftl.model.parts import under
from hftl.model.sizes import contradicted, shapes_in
from hftl.model.source import SourceModel
from hftl.model.stock import empty
from hftl.publish.doctor.finding import Finding, defect, several, warning
from hftl.publish.doctor.fit import CANNOT
from hftl.publish.doctor.patient import ADAPTER, WEIGHTS, Patient
from hftl.publish.doctor.stale import PREFIX

WHERE_READ = ("logits", "last_hidden_state")


def fresh(patient: Patient, source: SourceModel, kind: Any, config: Any) -> list[Finding]:
    """Compares what the loader reports as missing with what the adapter saves.

    Raises:
        RecipeError: if the base does not load.
    """
    try:
        _need_size(source, kind, config)
        _, missing = load_class(source, kind, config, {})
    except (*CANNOT, SafetensorError) as error:
        if isinstance(error, RecipeError):
            raise
        what = f"{source.spec} does not load: {message_line(error)}"
        raise RecipeError(what, "Correct its config.json") from error
    saved = {key.removeprefix(PREFIX) for key in patient.shapes} if patient.is_adapter else set()
    lost = sorted({key.rsplit(".", 1)[0] for key in missing - saved})
    anatomy = source.anatomy
    encoder = f"{anatomy.encoder}."
    lost = [name for name in lost if not under(name.removeprefix(encoder), anatomy.unused)]
    beside = [name for name in lost if _beside(name, kind, anatomy.pooler)]
    found = []
    if set(lost) - set(beside):
        names = [name for name in lost if name not in beside]
        where = ADAPTER if patient.is_adapter else "model.safetensors"
        found.append(defect(
            "fresh", f"{several(names)}: not in the {'base' if patient.is_adapter else 'weights'}, "
            "and not saved: drawn at random on every load", where,
            "Train and save it: name it in modules_to_save, then train again",
        ))  # fmt: skip
    if beside and not patient.pooled:
        found.append(warning(
            "fresh", f"{beside[0]} is drawn at random: pooler_output means nothing", WEIGHTS,
            "Use last_hidden_state",
        ))  # fmt: skip
    return found


def _need_size(source: SourceModel, kind: Any, config: Any) -> None:
    """Refuses to fill a model that its file says nothing of: it may be larger than the memory."""
    why = contradicted(empty(kind, config), shapes_in(source.folder))
    if why is not None:
        raise RecipeError(f"{source.spec} does not load: {why}", "Correct its config.json")


def _beside(name: str, kind: Any, pooler: str | None) -> bool:
    """The pooler of a bare encoder: its hidden states do not depend on it."""
    bare = not kind.__name__.endswith("Classification")
    return bare and pooler is not None and under(name, (pooler,))
