"""The config of a published model, also where only peft saved it, and where its inputs' files are.

A folder that peft alone has written holds no config.json: the class follows from its settings and
the base, the number of outputs and of tokens from the tensors that were saved.
"""

import logging
from pathlib import Path
from typing import Any

from hftl import places
from hftl.errors import RecipeError
from hftl.model.source import find_source
from hftl.publish.doctor.company import PROCESSOR, TOKENIZER, UNNAMED
from hftl.publish.doctor.fit import model_class, with_labels
from hftl.publish.doctor.patient import opened
from hftl.sections.source import Source
from hftl.use.locate import loading


def read_config(folder: Path, base: Path | None) -> Any:
    """Return the config of a published model, `architectures` naming its class.

    Args:
        folder: of the adapter or whole model.
        base: the folder of the adapter's base.

    Raises:
        RecipeError: if it is no adapter of a model with a trained head.
        RunFolderError: if its files do not load.
    """
    from transformers import AutoConfig

    with loading(folder):
        if base is None or (folder / "config.json").exists():
            return AutoConfig.from_pretrained(folder)
        return _config_of_peft(folder, base)


def _config_of_peft(folder: Path, base: Path) -> Any:
    patient, _ = opened(folder)
    source = find_source(Source(model=str(base)))
    kind = model_class(patient, source)
    if kind is None or not kind.__name__.endswith("Classification"):
        task = patient.settings.get("task_type")
        made_for = f"is an adapter for {task}" if task else "does not say which class it is for"
        raise RecipeError(
            f"{places.called(folder)} {made_for}, and has no trained head to predict with",
            "Give an adapter of a model that classifies sequences, tokens or images",
        )
    config = with_labels(patient, source, kind)
    config.architectures = [kind.__name__]
    names = [str(name) for name in config.id2label.values()]
    if len(names) > 1 and all(map(UNNAMED.fullmatch, names)):
        logging.getLogger("hftl").warning(
            "%s names no labels: %s to %s are the outputs of its head in their order",
            places.called(folder), names[0], names[-1],
        )  # fmt: skip
    return config


def inputs_folder(folder: Path, base: Path | None, images: bool) -> Path:
    """Return the folder of the tokenizer or image processor: the adapter's, or else the base's."""
    names = PROCESSOR if images else TOKENIZER
    has_own = any((folder / name).exists() for name in names)
    return folder if has_own or base is None else base
