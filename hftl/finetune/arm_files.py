"""Hold what an arm leaves, and write and read its folder: weights, metrics and predictions."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hftl.data.labels import decode_logits, encode_for_metrics
from hftl.data.prepare import PreparedData
from hftl.data.splits import MEASURED_SPLITS
from hftl.errors import RunFolderError
from hftl.measure.metrics import compute_all_metrics
from hftl.models.heads import LoadedModel
from hftl.runtime.run_folder import read_part, to_json
from hftl.train.checkpoint import iterate_trainable
from hftl.train.facts import ArmFile, SplitMetrics, TrainingFacts

METRICS_FILE = "metrics.json"
WEIGHTS = "weights.safetensors"
EMBEDDINGS = "embeddings.safetensors"
PREDICTIONS = "predictions.parquet"


@dataclass
class ArmOutput:
    """Hold the predictions, weights and facts of one arm and seed.

    `logits` are (rows, outputs) for each split, for tokens (words, outputs), NaN where a word was
    cut off; `weights` the tensors that training changed or drew; `facts` tells how training went;
    `embeddings` are those of `embed`, none where the encoder is not trained from the source;
    `note` is a line for the user.
    """

    logits: dict[str, np.ndarray]
    weights: dict[str, Tensor]
    trainable_parameters: int
    facts: TrainingFacts = field(default_factory=TrainingFacts)
    timings: dict[str, float] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
    note: str = ""


def collect_trained_tensors(built: LoadedModel) -> dict[str, Tensor]:
    """Return all that the source model lacks: trained tensors, and new ones even if frozen."""
    tensors = dict(iterate_trainable(built.model))
    tensors |= {
        name: tensor.detach()
        for name, tensor in built.model.named_parameters()
        if any(f"{module}." in name for module in built.fresh)
    }
    return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}


def load_trained_tensors(model: nn.Module, weights: Path) -> None:
    """Load what `collect_trained_tensors` returned into a model that is prepared in the same way.

    Raises:
        RunFolderError: if the weights are not those of this model.
    """
    trained, trains = load_file(weights), dict(iterate_trainable(model))
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()} | trains
    unexpected = sorted(set(trained) - set(tensors))
    missing = [name for name in trains if name not in trained]
    if unexpected or missing:
        raise RunFolderError(
            f"{weights} does not fit the model: {(unexpected or missing)[0]}",
            "Delete the arm's folder and run again",
        )
    for name, tensor in trained.items():
        tensors[name].copy_(tensor)


def write_arm(
    folder: Path, prepared: PreparedData, outcome: ArmOutput, arm: str, strategy: str, seed: int
) -> None:
    """Write weights, metrics.json, predictions.parquet and the logits that they come from."""
    columns: dict[str, list[Any]] = {k: [] for k in ("split", "row", "label", "prediction")}
    columns["scores"] = []
    metrics: dict[str, dict[str, float]] = {}
    task, names = prepared.task, prepared.names
    for split in MEASURED_SPLITS:
        rows = prepared.rows[split]
        values, scores = decode_logits(
            outcome.logits[split], task, names, prepared.count_words(rows)
        )
        predictions = encode_for_metrics(values, task, names)
        metrics[split] = compute_all_metrics(task, prepared.encode_for_metrics(rows), predictions)
        columns["split"] += [split] * len(rows)
        columns["row"] += [row.index for row in rows]
        columns["label"] += [row.label for row in rows]
        columns["prediction"] += values
        columns["scores"] += scores
    pq.write_table(pa.table(columns), folder / PREDICTIONS)
    save_file(outcome.weights, folder / WEIGHTS)
    logits = {
        split: torch.from_numpy(outcome.logits[split].astype(np.float32))
        for split in MEASURED_SPLITS
    }
    save_file({k: v.contiguous() for k, v in logits.items()}, folder / "logits.safetensors")
    if outcome.embeddings:
        write_embeddings(folder, outcome.embeddings)
    metrics_file = ArmFile(
        arm=arm,
        seed=seed,
        strategy=strategy,
        metrics=SplitMetrics(**metrics),
        trainable_parameters=outcome.trainable_parameters,
        training=outcome.facts,
        timings=outcome.timings,
    )
    (folder / METRICS_FILE).write_text(to_json(metrics_file.to_dict()), encoding="utf-8")


def read_predictions(folder: Path, prepared: PreparedData) -> dict[str, np.ndarray]:
    """Read the predictions that `write_arm` wrote by split, in the form that metrics compare."""
    table = pq.read_table(folder / PREDICTIONS, columns=["split", "prediction"])
    splits = np.array(table["split"].to_pylist())
    labels = [tuple(v) if isinstance(v, list) else v for v in table["prediction"].to_pylist()]
    predictions = encode_for_metrics(labels, prepared.task, prepared.names)
    return {split: predictions[splits == split] for split in MEASURED_SPLITS}


def read_metrics_file(folder: Path) -> ArmFile:
    """Read the metrics.json that `write_arm` wrote."""
    return read_part(folder / METRICS_FILE, ArmFile)


def read_logits(folder: Path, split: str) -> np.ndarray:
    """Read the logits of a split, float32, as in `ArmOutput`."""
    return load_file(folder / "logits.safetensors")[split].numpy()


def write_embeddings(folder: Path, embeddings: dict[str, np.ndarray]) -> None:
    """Write the embeddings of an arm, by name of the rows."""
    tensors = {name: torch.from_numpy(array) for name, array in embeddings.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / EMBEDDINGS)


def read_embeddings(folder: Path) -> dict[str, np.ndarray]:
    """Read what `write_embeddings` wrote; nothing where there is no such file."""
    if not (folder / EMBEDDINGS).exists():
        return {}
    return {name: tensor.numpy() for name, tensor in load_file(folder / EMBEDDINGS).items()}
