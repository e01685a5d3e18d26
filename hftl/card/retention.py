"""What kept the model near the original, in words."""

from typing import Any

KINDS = {
    "relational": "how similar rows are to others",
    "probe": "the probe's classes",
    "features": "the embeddings",
    "mlm": "the masked-language head",
    "zero_shot": "the classes told by their names",
}
INPUTS = {
    "target": "the task's rows",
    "general": "general rows",
    "both": "the task's rows and general ones",
}


def retention_words(record: dict[str, Any]) -> list[str]:
    """A clause for each term of the own arm; none where nothing kept it near the original."""
    retain = record["recipe"]["retain"]
    if retain is None:
        return []
    kls = retain["kl"] if isinstance(retain["kl"], list) else [retain["kl"]]
    words = [_kl(kl, record) for kl in kls if kl]
    if retain["l2sp"]:
        words.append(f"the distance of the weights (L2-SP), weight {retain['l2sp']['weight']:g}")
    if retain["ewc"]:
        ewc = retain["ewc"]
        words.append(f"EWC by {_information(record)}, weight {ewc['weight']:g}")
    # Records of before there was labelled replay, or a word on the information, tell none.
    if (retain["replay"] or {}).get("labelled"):
        words.append(_replay(retain["replay"]))
    told = [f"kept near the original by {' and '.join(words)}"] if words else []
    if retain["interpolate"]:
        told.append(f"interpolated with the original, {_shares(record)} of the way")
    return told


def _kl(kl: dict[str, Any], record: dict[str, Any]) -> str:
    weight = kl["weight"]
    if weight == "auto":
        # The same for all seeds: it is chosen once.
        weight = _own(record)[0]["kl_weight"]["weight"]
    direction = "" if kl["direction"] == "forward" else "reverse "
    return (
        f"{direction}KL of {KINDS[kl['on']]} on {INPUTS[kl['inputs']]}, weight {weight:g}, "
        f"temperature {kl['temperature']:g}"
    )


def _replay(replay: dict[str, Any]) -> str:
    return (
        f"replay of labelled general rows, {replay['ratio']:g} for each of the task's, weight "
        f"{replay['weight']:g}"
    )


def _information(record: dict[str, Any]) -> str:
    """Of which kind, and of how many rows; the same for all seeds."""
    fisher = _own(record)[0].get("fisher")
    if fisher is None:
        return "the Fisher information of general rows"
    return f"the {fisher['kind']} Fisher information of {fisher['rows']:,} general rows"


def _shares(record: dict[str, Any]) -> str:
    return ", ".join(f"{told['interpolation']['alpha']:g}" for told in _own(record))


def _own(record: dict[str, Any]) -> list[dict[str, Any]]:
    """How each seed of the own arm was trained."""
    return [arm["training"] for arm in record["arms"] if arm["arm"] == record["own_arm"]]
