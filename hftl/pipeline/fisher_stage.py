"""Compute the Fisher information that EWC reads: a stage, shared by all arms that read the same."""

from pathlib import Path

import torch
from torch import Tensor

from hftl.config.finetune import Finetune
from hftl.config.recipe import Arm
from hftl.config.retain import EWC
from hftl.finetune.context import ExperimentContext
from hftl.retain.fisher import compute_fisher, describe_fisher, load_fisher, save_fisher
from hftl.retain.original import LOGIT_KIND_OF_TASK, move_batch
from hftl.retain.regularizer import Batch, FisherResult
from hftl.runtime import distributed, run_folder
from hftl.runtime.run_folder import SEMANTICS, fingerprint

FISHER_FILE = "fisher.safetensors"


def prepare_fisher(
    context: ExperimentContext, arm: Arm, config: EWC, seed: int, folder: Path
) -> FisherResult:
    """Return the Fisher information at the start of training, and its facts. Collective.

    EWC pulls weights to where they started, whatever `retain.reference` is.

    Args:
        context: the arm's.
        arm: whose pooling the model has.
        config: the recipe's section.
        seed: of the training.
        folder: of the run.
    """
    general = context.general
    assert general is not None
    rows = general.train_rows[: config.samples]
    reads = {
        "semantics": SEMANTICS,
        "weights": context.weights_hash,
        "config": context.config_hash,
        "preprocessing": context.preprocessing_hash,
        "general": general.facts.fingerprint,
        "kind": config.fisher,
        "rows": len(rows),
        # The head is the probe of the seed's rows; features need none.
        "head": None
        if config.fisher == "features"
        else [arm.finetune.pooling, seed, context.shots, context.prepared.facts.fingerprint]
        + ([arm.finetune.class_weight] if arm.finetune.class_weight else []),
        "pooling": arm.finetune.pooling,
        "max_length": getattr(context.inputs, "max_length", None),
    }
    stage = folder / "phases" / f"fisher-{fingerprint(reads)[:8]}"
    with run_folder.lock_stage(stage):
        if distributed.broadcast_from_main(lambda: run_folder.read_stage_inputs(stage)) != reads:
            fisher, scale = _compute_fisher(context, arm.finetune, config, seed, len(rows))

            def commit() -> None:
                metadata = {"kind": config.fisher, "rows": len(rows), "scale": scale}
                with run_folder.commit_stage(stage, reads) as aside:
                    save_fisher(fisher, aside / FISHER_FILE, metadata)

            distributed.broadcast_from_main(commit)
    fisher, metadata = load_fisher(stage / FISHER_FILE)
    return fisher, describe_fisher(metadata)


def _compute_fisher(
    context: ExperimentContext, finetune: Finetune, config: EWC, seed: int, rows: int
) -> tuple[dict[str, Tensor], float]:
    """Return the information of the start under its probe on general rows, and its scale.

    The head is the probe whatever the training's starts as: under an untrained head it would say
    nothing of what the weights are for.
    """
    loaded = context.build_probed_model(finetune.pooling, seed, class_weight=finetune.class_weight)
    scale = context.compute_target_scale(seed)
    if scale is not None:
        # The Gaussian of variance 1 is around a standardized target.
        scale.standardize_head(loaded.model)
    loaded.model.to(context.device)
    # The empirical information alone reads labels.
    dataset = context.build_general_dataset(config.fisher == "empirical")

    def get_batch(number: int) -> Batch:
        batch = context.inputs.collate([dict(dataset[number])])
        return move_batch(batch, torch.device(context.device))

    return compute_fisher(
        loaded.model, dict(loaded.encoder.named_parameters()), rows, get_batch, config.fisher, 0,
        LOGIT_KIND_OF_TASK[context.prepared.task],
    )  # fmt: skip
