"""What the source's own heads still make of general rows, on an encoder that has been trained on.

The heads are the checkpoint's, as it has them: that of masked language, the decoder of masked
images, and the one of the classes that it was trained for. What it lacks is not asked.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTMAEConfig

from hftl import processes
from hftl.adapt.encoder import encoder_state
from hftl.adapt.mae import load_mae
from hftl.adapt.mlm import own_mlm
from hftl.adapt.patches import MaskedPictures
from hftl.adapt.patches import collate as collate_pictures
from hftl.data.general import General
from hftl.data.image import target_size
from hftl.data.masking import collate, corrupt, masking_of
from hftl.data.pixels import ImageInputs
from hftl.data.spelling import normalise_name
from hftl.data.split import content_key
from hftl.data.text import TextInputs
from hftl.errors import HftlError
from hftl.finetune.heads import HIDDEN
from hftl.finetune.workbench import Workbench
from hftl.model.cache import batches_of_like, logits
from hftl.model.head import Built, load_class
from hftl.model.parts import encoder_of, under
from hftl.model.source import SourceModel
from hftl.model.stock import stock_class
from hftl.retain.weights import WRAPPING
from hftl.sections.adapt import Decoder

SEED = 0
"""Of what is hidden: the same before and after, for every arm and seed."""
BATCH_TOKENS = 2048
BATCH_PICTURES = 64


def asked_again(bench: Workbench, built: Built) -> dict[str, np.ndarray]:
    """(rows, 2) float32 for each of the source's heads: of each measured general row a value, and
    how many it is a mean of.

    `mlm_loss`: in nats a hidden token; `mae_loss`: the squared error a value of a hidden patch;
    `backward`: 1 where the row's class is told right, else 0. Every process must come here.
    """
    general, source = bench.general, (bench.original or bench).source
    if general is None:
        return {}
    found = {
        "mlm_loss": _masked_words(bench, source, built),
        "mae_loss": _masked_patches(bench, source, built),
        "backward": _classes(bench, general, source, built),
    }
    return {name: told for name, told in found.items() if told is not None}


def own_classes(source: SourceModel, general: General) -> tuple[str, list[str]] | None:
    """The control whose values are all among the classes that the source tells, and those classes
    in the order of its outputs; None where there is none."""
    config = source.config
    if config.problem_type == "multi_label_classification":
        return None
    names = [normalise_name(config.id2label[i]) for i in range(config.num_labels)]
    for control in general.controls:
        if set(general.values(control)) <= set(names):
            return control, names
    return None


def _classes(
    bench: Workbench, general: General, source: SourceModel, built: Built
) -> np.ndarray | None:
    """Which rows the source's own classifier gets right."""
    known = own_classes(source, general)
    if known is None:
        return None
    control, names = known
    kind = stock_class(source.config, "classification")
    model, missing = load_class(source, kind, deepcopy(source.config), {})
    encoder, anatomy = encoder_of(model, source.anatomy), source.anatomy
    if any(not under(n.removeprefix(f"{anatomy.encoder}."), anatomy.unused) for n in missing):
        return None
    _fill(encoder, built, anatomy.pooler)
    inputs: Any = bench.inputs
    if bench.prepared.modality == "text":
        inputs = TextInputs(inputs.tokenizer, inputs.max_length)
    model.to(bench.device)
    told = logits(model, bench.encoded(general.measured), inputs, bench.device).argmax(1)
    right = np.array(names)[told] == general.values(control)
    return np.stack([right, np.ones(len(right))], 1).astype(np.float32)


def _masked_words(bench: Workbench, source: SourceModel, built: Built) -> np.ndarray | None:
    """The loss of the masked-language head at hidden tokens."""
    assert bench.general is not None
    tokenizer = getattr(bench.inputs, "tokenizer", None)
    if tokenizer is None or tokenizer.mask_token_id is None:
        return None
    model = own_mlm(source)
    if model is None:
        return None
    masking = masking_of(tokenizer, HIDDEN, False, bench.source.config.vocab_size)
    rows = []
    for number, encoded in enumerate(bench.encoded(bench.general.measured)):
        ids = np.array(encoded["input_ids"])
        draw = np.random.default_rng([SEED, number])
        shown, positions = corrupt(ids, np.zeros_like(ids), masking, draw)
        rows.append({"input_ids": shown, "positions": positions, "labels": ids[positions]})

    def losses(chosen: list[dict[str, Any]]) -> Tensor:
        batch = {k: v.to(bench.device) for k, v in collate(chosen, tokenizer.pad_token_id).items()}
        told = batch.pop("labels").reshape(-1)[batch["slots"]]
        each = F.cross_entropy(model(**batch).logits.float(), told, reduction="none")
        of_row = batch["flat"] // batch["input_ids"].shape[1]
        parts = torch.stack([each, torch.ones_like(each)], 1)
        return each.new_zeros(len(chosen), 2).index_add(0, of_row, parts)

    own, model.encoder = model.encoder, built.encoder
    model.to(bench.device).eval()
    lengths = [len(row["input_ids"]) for row in rows]
    found = _by_row(rows, batches_of_like(lengths, BATCH_TOKENS), losses)
    # The hook that picks places leaves the trained encoder with the head.
    model.encoder = own
    return found


def _masked_patches(bench: Workbench, source: SourceModel, built: Built) -> np.ndarray | None:
    """The loss of a ViTMAE checkpoint's decoder at hidden patches."""
    inputs, general = bench.inputs, bench.general
    assert general is not None
    if source.architecture != "vit_mae" or not isinstance(inputs, ImageInputs):
        return None
    config = ViTMAEConfig.from_pretrained(source.folder)
    side, ratio = target_size(inputs.processor), config.mask_ratio
    model, fresh = load_mae(source, side, ratio, Decoder().model_dump(), SEED)
    if fresh:
        return None
    _fill(model.encoder, built, "pooler")
    model.to(bench.device).eval()
    pictures = [row["pixel_values"] for row in bench.encoded(general.measured)]
    keys = [content_key(row) for row in general.measured]
    hidden = MaskedPictures(pictures, keys, inputs.patch, SEED, fixed=True)

    def losses(chosen: list[dict[str, Any]]) -> Tensor:
        batch = collate_pictures(chosen, inputs, ratio, config.norm_pix_loss)
        batch = {k: v.to(bench.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        told = batch.pop("labels").flatten(1)
        there = ~told.isnan()
        each = (model(**batch).logits.float().flatten(1) - told).square().where(there, 0.0)
        return torch.stack([each.sum(1), there.sum(1)], 1)

    numbers = list(range(len(hidden)))
    batches = [numbers[i : i + BATCH_PICTURES] for i in range(0, len(numbers), BATCH_PICTURES)]
    return _by_row(hidden, batches, losses)


def _by_row(rows: Any, batches: list[list[int]], sums: Callable[[list[Any]], Tensor]) -> np.ndarray:
    """(rows, 2) means and counts, from sums and counts of the rows of each batch; the batches are
    shared among the processes."""
    mine: dict[int, np.ndarray] = {}
    with torch.no_grad():
        for numbers in processes.mine(batches):
            told = sums([rows[n] for n in numbers]).double().cpu().numpy()
            mine.update(zip(numbers, told, strict=True))
    whole = {number: told for part in processes.gather(mine) for number, told in part.items()}
    found = np.stack([whole[number] for number in range(len(rows))])
    found[:, 0] /= np.maximum(found[:, 1], 1)
    return found.astype(np.float32)


def _fill(encoder: Any, built: Built, pooler: str | None) -> None:
    """Puts the trained weights into an encoder of the source, adapters merged; a pooler that the
    trained one does without stays."""
    state = {
        WRAPPING.sub("", name): tensor
        for name, tensor in encoder_state(built).items()
        if ".original_module." not in name
    }
    missing, _ = encoder.load_state_dict(state, strict=False)
    lost = [name for name in missing if pooler is None or not under(name, (pooler,))]
    if lost:
        raise HftlError(f"the trained encoder lacks {lost[0]!r} of the source's", "Report this")
