"""What one section of a recipe needs of another."""

from collections.abc import Sequence

from hftl.config.adapt import Adapt
from hftl.config.data import Data, Table
from hftl.config.finetune import Finetune
from hftl.config.publish import Publish
from hftl.config.retain import Retain
from hftl.errors import RecipeError


def check_pooling(data: Data, finetune: Finetune) -> None:
    """Refuses one vector a text for words.

    Raises:
        RecipeError: naming the pooling.
    """
    if data.task == "token-classification" and finetune.pooling != "native":
        raise RecipeError(
            f"finetune.pooling={finetune.pooling} makes one vector a text, and "
            "token-classification needs one a word",
            "Set it to native",
        )


def check_label_smoothing(data: Data, finetune: Finetune) -> None:
    """Refuse label smoothing where there is no one class a row or word.

    Raises:
        RecipeError: naming the task.
    """
    factor = finetune.training.get("label_smoothing_factor", 0.0)
    if factor and data.task in ("multi-label", "regression"):
        raise RecipeError(
            f"finetune.training.label_smoothing_factor={factor:g} spreads the weight of one class, "
            f"and data.task={data.task} has none",
            "Remove it",
        )


def check_adaptation(stages: Sequence[Adapt], data: Data) -> None:
    """Refuses adaptations without the data that they read, and a recipe that does nothing.

    Raises:
        RecipeError: naming the key.
    """
    if data.task is None and not stages:
        raise RecipeError("data.task=null adapts only, and adapt is null", "Give one of them")
    for split in ("validation", "test"):
        if data.task is None and isinstance(getattr(data, split), Table):
            raise RecipeError(
                f"data.{split} is of no use where data.task is null", "Remove it, or name a task"
            )
    for stage in stages:
        if stage.objective == "mae" and stage.training.get("label_smoothing_factor"):
            raise RecipeError(
                "adapt.training.label_smoothing_factor spreads the weight of one class, and mae "
                "learns pixels",
                "Remove it",
            )
        if stage.corpus == "unlabeled" and data.unlabeled is None:
            raise RecipeError("adapt.corpus=unlabeled, but data.unlabeled is null", "Give it")
        if stage.guard == "probe" and data.task is None:
            raise RecipeError(
                "adapt.guard=probe needs labels, and data.task is null",
                "Use general, neighbours or off",
            )
        if stage.guard == "general" and data.general is None:
            raise RecipeError("adapt.guard=general, but data.general is null", "Give it")


def check_retain(retain: Retain, data: Data, finetune: Finetune) -> None:
    """Refuses retention without the data or the head that it looks at.

    Raises:
        RecipeError: naming the key.
    """
    if data.task is None:
        raise RecipeError(
            "retain holds fine-tuning near the original, and data.task=null adapts only",
            "Leave retain out, or name a task",
        )
    if retain.reads_general_data and data.general is None:
        raise RecipeError(
            "retain reads general data (replay, ewc, or kl.inputs), but data.general is null",
            "Give data.general, or leave that part of retain out",
        )
    if retain.reads_general_labels and not data.has_labelled_general:
        raise RecipeError(
            "retain.replay.labelled and retain.ewc.fisher=empirical need classification, and "
            f"general data with the task's labels in a column {data.train.label!r}",
            "Name it in data.general.label, or use neither",
        )
    if retain.interpolate is not None and finetune.head_init == "random":
        raise RecipeError(
            "retain.interpolate goes from the original to the trained weights, and with "
            "finetune.head_init=random the original has no head",
            "Set finetune.head_init=probe",
        )
    if any(kl.on == "probe" for kl in retain.kl_terms) and finetune.head_init == "random":
        raise RecipeError(
            "retain.kl.on=probe is KL to what the head says, and with "
            "finetune.head_init=random nobody has trained it",
            "Set finetune.head_init=probe, or use retain.kl.on=relational",
        )


def check_benchmark(publish: Publish, data: Data) -> None:
    """Refuse a benchmark whose test set is not what the run is measured on."""
    if publish.benchmark is None:
        return
    path = data.test.path if isinstance(data.test, Table) else None
    if path != publish.benchmark.dataset or data.task is None:
        raise RecipeError(
            f"'publish.benchmark' is {publish.benchmark.dataset}, and the test set is "
            f"{path or 'a part of data.train'}",
            "Give the benchmark's dataset as data.test, or leave publish.benchmark out",
        )
