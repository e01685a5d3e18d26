"""What keeps an arm near its original, made ready: what is found once is kept as a phase."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hftl.config.recipe import Arm, Recipe, arms
from hftl.config.retain import Retain
from hftl.data.general import check_labels
from hftl.errors import RecipeError
from hftl.finetune.arm import set_probe, train_arm
from hftl.finetune.context import Workbench
from hftl.finetune.retention import (
    ANSWERS,
    Fisher,
    Kept,
    check_retention,
    choose_weight,
    forgotten,
    general_examples,
    head_opinion,
    is_open,
    kept_near,
    looked_at,
    validation_score,
    with_weight,
)
from hftl.finetune.targets import target_scale
from hftl.models.heads import Built
from hftl.models.source import SourceModel
from hftl.pipeline.cache_keys import SEMANTICS
from hftl.retain.fisher import fisher_information, load_fisher, provenance, save_fisher
from hftl.runtime import distributed, run_folder
from hftl.runtime.fingerprints import fingerprint, to_json
from hftl.runtime.progress import working

FISHER = "fisher.safetensors"


def kept_of(
    bench: Workbench, arm: Arm, seed: int, seeds: list[int], folder: Path, reads: dict[str, Any],
    say: Callable[[str], None],
) -> Kept:  # fmt: skip
    """What keeps one training of an arm near its original.

    Args:
        bench: what the arm works with.
        arm: with its `retain`.
        seed: of this training.
        seeds: of all; a weight that is to be chosen is chosen on the first.
        folder: of the run.
        reads: what the arm reads, which the choice depends on.
        say: receives a line about a choice.
    """
    if arm.retain is None:
        return Kept()
    retain = arm.retain
    facts = _head_facts(bench, arm, seed, say)
    if is_open(retain):
        facts["kl_weight"] = _chosen(bench, arm, seeds[0], folder, reads, say)
        retain = with_weight(retain, facts["kl_weight"]["weight"])
    kept = _kept(bench, arm, retain, seed, folder)
    return replace(kept, facts=kept.facts | facts)


def check_kept(recipe: Recipe, source: SourceModel) -> None:
    """Refuses what cannot keep an arm near its original, before a row is read.

    Raises:
        RecipeError: see `check_retention`; of an arm that is not the recipe's own, naming it.
    """
    for number, arm in enumerate(arms(recipe)):
        try:
            check_retention(arm, source, str(recipe.data.task))
        except RecipeError as error:
            if number == 0:
                raise
            # What stands in the recipe may be right for its own arm.
            raise RecipeError(f"measure.arms.{arm.name}: {error.what}", error.fix) from None


def reads_labels(recipe: Recipe) -> bool:
    """Whether an arm learns from labels of general data."""
    return any(arm.retain is not None and arm.retain.reads_labels for arm in arms(recipe))


def check_labelled(recipe: Recipe, bench: Workbench) -> None:
    """Refuses general data that an arm learns from by labels which the task has not.

    Raises:
        DataError: see `check_labels`.
    """
    if reads_labels(recipe):
        assert bench.general is not None
        check_labels(bench.general, bench.label, bench.prepared.names)


def _head_facts(
    bench: Workbench, arm: Arm, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """What the record tells of the head that KL is taken on; a weak one is told at once."""
    assert arm.retain is not None
    found = head_opinion(bench, arm.retain, arm.finetune, seed)
    if found is None:
        return {}
    if found.is_weak:
        say(
            f"  warning: {arm.name} seed {seed}: kl.on=probe holds on to a head that says little "
            f"of the labels (loss {found.loss:.3f} on train, {found.shares:.3f} by their shares "
            "alone); consider retain.kl.on=relational"
        )
    return {"head_opinion": asdict(found) | {"weak": found.is_weak}}


def _kept(
    bench: Workbench, arm: Arm, retain: Retain, seed: int, folder: Path,
    look: Callable[[Built], float] | None = None,
) -> Kept:  # fmt: skip
    def original(before: Workbench) -> nn.Module:
        return _start(before, arm, seed).model

    found = kept_near(
        bench, retain, arm.finetune, seed, lambda: _fisher(bench, arm, retain, seed, folder),
        original,
    )  # fmt: skip
    return replace(found, look=look)


def _start(bench: Workbench, arm: Arm, seed: int) -> Built:
    """The model that training starts from, with the probe as its head."""
    built = bench.build(arm.finetune.pooling, seed)
    set_probe(bench, built, arm.finetune.pooling, seed)
    return built


def _chosen(
    bench: Workbench, arm: Arm, seed: int, folder: Path, reads: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The weight of KL, chosen once for all seeds, and what it was chosen from."""
    assert arm.retain is not None
    retain, place = arm.retain, folder / "phases" / f"weight-{arm.name}"
    before = looked_at(bench, _start(bench, arm, seed))

    def tried(weight: float) -> tuple[float, float, float]:
        kept = _kept(
            bench, arm, with_weight(retain, weight), seed, folder,
            lambda built: forgotten(bench, before, built),
        )  # fmt: skip
        with working(f"KL weight {weight:g}"):
            outcome = train_arm(bench, arm.finetune, seed, kept)
        score, error = validation_score(bench, outcome.logits["validation"])
        return score, error, outcome.facts["forgotten"]

    stands = distributed.share(lambda: run_folder.reads(place))
    if stands != reads:
        found = choose_weight(tried)

        def keep() -> None:
            with run_folder.commit(place, reads) as aside:
                run_folder.write_text(aside / "weight.json", to_json(found))

        distributed.share(keep)
        say(f"  {arm.name}: KL weight {found['weight']:g} forgets least within one standard error")
    return json.loads((place / "weight.json").read_text("utf-8"))


def _fisher(bench: Workbench, arm: Arm, retain: Retain, seed: int, folder: Path) -> Fisher:
    """The Fisher information at the original, on general rows, kept for all arms that read it; and
    where it comes from."""
    ewc, general = retain.ewc, bench.general
    assert ewc is not None and general is not None
    rows = general.used[: ewc.samples]
    reads = {
        "semantics": SEMANTICS,
        "weights": bench.weights,
        "general": general.facts["fingerprint"],
        "kind": ewc.fisher,
        "rows": len(rows),
        # The head that the classes are told by is the seed's; features have none.
        "head": None if ewc.fisher == "features" else [arm.finetune.pooling, seed],
        "pooling": arm.finetune.pooling,
        "max_length": getattr(bench.inputs, "max_length", None),
    }
    place = folder / "phases" / f"fisher-{fingerprint(reads)[:8]}"
    if distributed.share(lambda: run_folder.reads(place)) != reads:
        built = _start(bench, arm, seed)
        if (targets := target_scale(bench, seed)) is not None:
            # The Gaussian of variance 1 is around a standardised target.
            targets.enter(built.model)
        built.model.to(bench.device)
        # A label is looked at by the empirical information alone.
        examples = general_examples(bench, ewc.fisher == "empirical")
        found, scale = fisher_information(
            built.model, dict(built.encoder.named_parameters()), len(rows),
            lambda number: _batch(bench, examples[number]), ewc.fisher, 0,
            ANSWERS.get(bench.prepared.task, "classes"),
        )  # fmt: skip

        def keep() -> None:
            told = {"kind": ewc.fisher, "rows": len(rows), "scale": scale}
            with run_folder.commit(place, reads) as aside:
                save_fisher(found, aside / FISHER, told)

        distributed.share(keep)
    information, told = load_fisher(place / FISHER)
    return information, provenance(told)


def _batch(bench: Workbench, row: Any) -> dict[str, Any]:
    """A batch of one row, on the device."""
    batch = bench.inputs.collate([dict(row)])
    return {k: v.to(bench.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
