"""Check the rules across the sections of a recipe: what one section needs of another.

Every rule that needs nothing but the recipe is here. Rules that need the source model or the data
are checked by `hftl check` and `hftl run`, before anything trains.
"""

from collections.abc import Sequence

from hftl.config.adapt import Adapt
from hftl.config.data import Data, Table
from hftl.config.finetune import Finetune
from hftl.config.measure import UNLABELLED_ANALYSES
from hftl.config.publish import Publish
from hftl.config.retain import Retain
from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.finetune.strategies import ZERO_SHOT_ARM


def check_sections(
    data: Data, stages: Sequence[Adapt], finetune: Finetune, retain: Retain | None,
    publish: Publish,
) -> None:  # fmt: skip
    """Check each section against the others; also the recipe of every arm.

    Raises:
        RecipeError: naming the key and what to do.
    """
    _check_pooling(data, finetune)
    _check_label_smoothing(data, finetune)
    _check_class_weight(data, finetune)
    _check_zero_shot(data, finetune)
    _check_something_to_do(data, stages)
    for stage in stages:
        _check_adaptation(stage, data)
    decoders = [stage.decoder for stage in stages if stage.objective == "mae"]
    if any(decoder != decoders[0] for decoder in decoders):
        raise RecipeError("adapt: the decoders of two adaptations differ", "Give both the same")
    if retain is not None:
        _check_retain_data(retain, data)
        _check_retain_head(retain, finetune)
    _check_benchmark(publish, data)


def check_corpus_is_read(data: Data, stages: Sequence[Adapt], analyses: Sequence[str]) -> None:
    """Refuse unlabeled data that nothing reads; an arm without adaptation may leave them out.

    Raises:
        RecipeError: naming `data.unlabeled`.
    """
    if data.unlabeled is not None and not stages and not {*analyses} & {*UNLABELLED_ANALYSES}:
        raise RecipeError(
            "data.unlabeled is read by adapt, which is null, and by "
            f"{' and '.join(UNLABELLED_ANALYSES)}, which measure.analyses does not name",
            f"Name one, such as measure.analyses: [{UNLABELLED_ANALYSES[-1]}], or remove "
            "data.unlabeled",
        )


def check_slices(data: Data, columns: Sequence[str]) -> None:
    """Refuse slices where nothing is measured, and slices by the label.

    Raises:
        RecipeError: naming `measure.slices`.
    """
    if not columns:
        return
    if data.task is None:
        raise RecipeError(
            "measure.slices cuts test rows, and data.task=null has none",
            "Remove it, or name a task",
        )
    table = data.test if isinstance(data.test, Table) else data.train
    label = next((column for column in columns if column in table.label_columns), None)
    if label is not None:
        raise RecipeError(
            f"measure.slices: {label!r} is the label, and the report compares every class already",
            "Leave it out; slices are made by columns that say more of a row",
        )


def check_thresholds(data: Data, metric: str | None) -> None:
    """Refuse thresholds where an input has not several labels.

    Raises:
        RecipeError: naming `measure.thresholds`.
    """
    if metric is not None and data.task != "multi-label":
        raise RecipeError(
            f"measure.thresholds={metric} decides each label for itself, and "
            f"data.task={data.task or 'null'} does not",
            "Remove it, or set data.task=multi-label",
        )


def check_quantized_source(
    source: Source, stages: Sequence[Adapt], finetune: Finetune, retain: Retain | None
) -> None:
    """Refuse what would train weights that are held in 4 bits, or read them whole; also in every
    arm.

    Raises:
        RecipeError: naming the key.
    """
    if source.quantization is None:
        return
    quantized = f"source.quantization={source.quantization} holds weights that cannot train"
    if finetune.spec.trains_encoder_weights:
        raise RecipeError(
            f"{quantized}, and finetune.strategy={finetune.strategy} trains them",
            "Use finetune.strategy=lora, or leave source.quantization out",
        )
    for key, section in (("adapt", stages), ("retain", retain)):
        if section:
            raise RecipeError(
                f"{quantized}, and {key} reads or changes them in fp32",
                f"Leave {key} or source.quantization out",
            )
    if finetune.pooling == "embedding":
        whole = "finetune.pooling=embedding"
    elif finetune.strategy == ZERO_SHOT_ARM:
        whole = "the arm zero_shot"
    elif finetune.head_init == ZERO_SHOT_ARM:
        whole = "finetune.head_init=zero_shot"
    else:
        return
    raise RecipeError(
        f"source.quantization={source.quantization}: {whole} reads weights in fp32 alone",
        f"Leave {whole} or source.quantization out",
    )


def check_quantized_strategy(source: Source, finetune: Finetune) -> None:
    """Refuse to publish a whole model with quantized weights.

    Raises:
        RecipeError: naming the strategy.
    """
    if source.quantization is not None and not finetune.spec.trains_adapter:
        raise RecipeError(
            f"source.quantization={source.quantization} is published as an adapter on the whole "
            f"weights, and finetune.strategy={finetune.strategy} makes none",
            "Use finetune.strategy=lora, or leave source.quantization out",
        )


def check_solved_strategy(finetune: Finetune, retain: Retain | None) -> None:
    """Refuse settings of training where the own arm is solved, as `head` is.

    Raises:
        RecipeError: naming the key.
    """
    if not finetune.spec.is_solved:
        return
    if retain is not None:
        raise RecipeError(
            f"retain keeps what trains near the original, and the strategy {finetune.strategy} "
            "trains nothing of the encoder",
            "Leave retain out, or choose another finetune.strategy",
        )
    if finetune.focal_gamma:
        raise RecipeError(
            "focal_gamma shapes a loss that is trained by steps, and the strategy "
            f"{finetune.strategy} is solved",
            "Leave it out, or choose another finetune.strategy",
        )
    if finetune.class_weight and not finetune.spec.reads_labels:
        raise RecipeError(
            f"class_weight weighs training rows, and the strategy {finetune.strategy} reads no "
            "label of train",
            "Leave it out, or choose another finetune.strategy",
        )
    if finetune.layer_decay or finetune.lr:
        raise RecipeError(
            "layer_decay and lr are learning rates, and the strategy "
            f"{finetune.strategy} is solved",
            "Leave them out, or choose another finetune.strategy",
        )


def _check_pooling(data: Data, finetune: Finetune) -> None:
    """Refuse pooling to one vector a text where words are classified."""
    if data.task == "token-classification" and finetune.pooling != "native":
        raise RecipeError(
            f"finetune.pooling={finetune.pooling} makes one vector a text, and "
            "token-classification needs one a word",
            "Set it to native",
        )


def _check_label_smoothing(data: Data, finetune: Finetune) -> None:
    """Refuse label smoothing where a row or word has not exactly one class."""
    factor = finetune.training.get("label_smoothing_factor", 0.0)
    if factor and data.task in ("multi-label", "regression"):
        raise RecipeError(
            f"finetune.training.label_smoothing_factor={factor:g} spreads the weight of one class, "
            f"and data.task={data.task} has none",
            "Remove it",
        )


def _check_class_weight(data: Data, finetune: Finetune) -> None:
    """Refuse class weights and focal loss where there are no classes."""
    if data.task != "regression":
        return
    for key in ("class_weight", "focal_gamma"):
        if value := getattr(finetune, key):
            raise RecipeError(
                f"finetune.{key}={value} weighs classes, and data.task=regression has none",
                "Remove it",
            )


def _check_zero_shot(data: Data, finetune: Finetune) -> None:
    """Refuse zero-shot classification where an input has not exactly one class."""
    is_arm = finetune.strategy == ZERO_SHOT_ARM
    if not is_arm and finetune.head_init != ZERO_SHOT_ARM:
        return
    fix = "Remove the arm zero_shot" if is_arm else "Set finetune.head_init=probe"
    if data.task == "multi-label" and not is_arm:
        raise RecipeError(
            "finetune.head_init=zero_shot is made of similarities to words, which do not say from "
            "where on a label of data.task=multi-label holds",
            fix,
        )
    if data.task not in ("classification", "multi-label"):
        raise RecipeError(
            "zero-shot classification compares each input with words for classes and names the "
            f"nearest, and data.task={data.task} asks for something else",
            fix,
        )
    if len(data.train.text_columns) > 1:
        raise RecipeError(
            "zero-shot classification compares one text with words for classes, and "
            "data.train.text names two columns",
            fix,
        )


def _check_something_to_do(data: Data, stages: Sequence[Adapt]) -> None:
    """Refuse a recipe without task and adaptation, and measured splits without a task."""
    if data.task is not None:
        return
    if not stages:
        raise RecipeError("data.task=null adapts only, and adapt is null", "Give one of them")
    for split in ("validation", "test"):
        if isinstance(getattr(data, split), Table):
            raise RecipeError(
                f"data.{split} is of no use where data.task is null", "Remove it, or name a task"
            )


def _check_adaptation(stage: Adapt, data: Data) -> None:
    """Refuse an adaptation without the data that its corpus or guard reads."""
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


def _check_retain_data(retain: Retain, data: Data) -> None:
    """Refuse retention without the task, the general data or the labels that it reads."""
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


def _check_retain_head(retain: Retain, finetune: Finetune) -> None:
    """Refuse terms that compare with the original's head where it starts at random."""
    if finetune.head_init == ZERO_SHOT_ARM:
        if any(section.reads_task_head for section in retain.regularizers):
            raise RecipeError(
                "retain.kl.on=probe is KL to the probe, and finetune.head_init=zero_shot starts "
                "from another head",
                "Set finetune.head_init=probe, or use retain.kl.on=relational",
            )
        return
    if finetune.head_init != "random":
        return
    if retain.interpolate is not None:
        raise RecipeError(
            "retain.interpolate goes from the original to the trained weights, and with "
            "finetune.head_init=random the original has no head",
            "Set finetune.head_init=probe",
        )
    if any(section.reads_task_head for section in retain.regularizers):
        raise RecipeError(
            "retain.kl.on=probe is KL to what the head says, and with "
            "finetune.head_init=random nobody has trained it",
            "Set finetune.head_init=probe, or use retain.kl.on=relational",
        )


def _check_benchmark(publish: Publish, data: Data) -> None:
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
