"""Build TrainingArguments from a recipe, and refuse before training what would fail in it."""

import inspect
import traceback
from collections.abc import Mapping
from copy import copy
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from hftl.errors import RecipeError, format_error_line, join_names, suggest_closest
from hftl.measure.metrics import METRICS, SELECTION_METRICS
from hftl.runtime.hardware import choose_precision
from hftl.train.hf_compat import use_one_device

EVAL_BATCH_SIZE = 64
LAUNCH_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
PARAMETER_SETTINGS = {"params", "model", "optimizer_dict"}
"""Settings of an optimizer that stand for the parameters, as of GaLore and LOMO."""
OPTIMIZER_ERRORS = (
    ValueError, TypeError, AttributeError, ImportError, RuntimeError, AssertionError,
)  # fmt: skip
"""What transformers and the constructors of optimizers raise on settings that do not fit, or where
a package or a GPU is missing."""


def build_training_arguments(
    section: str, training: Mapping[str, object], defaults: Mapping[str, object], folder: str,
    seed: int, device: str,
) -> TrainingArguments:  # fmt: skip
    """Return TrainingArguments of a recipe's `training`.

    Args:
        section: where it stands in the recipe: `finetune` or `adapt`.
        training: what the recipe says; it goes before `defaults`.
        defaults: what this kind of training does where the recipe says nothing.
        folder: where checkpoints go.
        seed: of the order of rows, and of all that is drawn.
        device: cuda, mps or cpu.

    Raises:
        RecipeError: if transformers refuses the values.
    """
    decided = {
        "output_dir": folder,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": device == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        **choose_precision(training),
    }
    common = {
        "per_device_eval_batch_size": EVAL_BATCH_SIZE,
        "dataloader_pin_memory": device == "cuda",
        # All that trains is on the path to the loss, so the search for what is not would only cost.
        "ddp_find_unused_parameters": False,
    }
    try:
        fields: Any = {**common, **defaults, **training, **decided}
        args = TrainingArguments(**fields)
    except (ValueError, TypeError, ImportError, OSError) as error:
        # ImportError where an argument needs a package that is not installed, OSError where it
        # names a file that cannot be read.
        raise _build_refusal(section, error) from error
    # transformers would split a batch over all visible devices by itself (DataParallel).
    use_one_device(args)
    _check_compiler(section, args)
    _check_reporting(section, args)
    _check_kernels(section, args)
    _check_scheduler(section, args)
    _check_optimizer(section, args)
    return args


def build_finetune_arguments(
    training: Mapping[str, object], task: str, folder: str, seed: int, device: str
) -> TrainingArguments:
    """Build the TrainingArguments of `finetune.training`.

    Raises:
        RecipeError: if transformers refuses the values, or nothing measures the chosen metric.
    """
    defaults = {
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "metric_for_best_model": SELECTION_METRICS[task],
    }
    args = build_training_arguments("finetune", training, defaults, folder, seed, device)
    measured = ["loss", *METRICS[task]]
    if str(args.metric_for_best_model).removeprefix("eval_") not in measured:
        raise RecipeError(
            f"finetune.training.metric_for_best_model={args.metric_for_best_model} is not measured",
            f"Use one of {', '.join(measured)}",
        )
    name = str(args.metric_for_best_model).removeprefix("eval_")
    # transformers takes all but a loss for a score: of an error it would keep the worst.
    args.greater_is_better = name != "loss" and METRICS[task][name].sign > 0
    if training.get("greater_is_better", args.greater_is_better) != args.greater_is_better:
        better = "more" if args.greater_is_better else "less"
        raise RecipeError(
            f"finetune.training.greater_is_better={training['greater_is_better']}: of {name} "
            f"{better} is better",
            "Leave it out",
        )
    return args


def _build_refusal(section: str, error: Exception) -> RecipeError:
    """Return the error of arguments that transformers refuses, or of a launcher's variables: it
    starts the process group with the arguments."""
    if any(module.startswith("torch.distributed") for module in _list_raising_modules(error)):
        return RecipeError(
            f"the processes of the launcher do not find each other: {format_error_line(error)}",
            f"Launch them by torchrun or accelerate, or unset {join_names(LAUNCH_VARIABLES)}",
        )
    message = f"{section}.training: transformers refuses it: {format_error_line(error)}"
    return RecipeError(message, "Correct the section")


def _list_raising_modules(error: Exception) -> list[str]:
    """Return the names of the modules whose functions an error came through."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [str(frame.f_globals.get("__name__")) for frame in frames]


def describe_missing_fp16(section: str, training: Mapping[str, object], device: str) -> str | None:
    """Return what is wrong with training in fp16 on a CPU; None of other trainings.

    accelerate would train in fp32 without a word.
    """
    if device != "cpu" or not training.get("fp16"):
        return None
    return f"{section}.training.fp16=true needs an accelerator, and the device is a CPU"


def _check_kernels(section: str, args: TrainingArguments) -> None:
    """Refuse the kernels of a package that is not installed."""
    if args.use_liger_kernel and find_spec("liger_kernel") is None:
        raise RecipeError(
            f"{section}.training.use_liger_kernel=true: its package is not installed",
            "Install it (pip install liger-kernel), or leave it out",
        )


def _check_compiler(section: str, args: TrainingArguments) -> None:
    """Refuse a compiler that accelerate does not know, or torch does not have here."""
    backend = args.torch_compile_backend
    if backend is None or backend == "inductor":
        return
    present = torch.compiler.list_backends(exclude_tags=())
    known = [kind.value.lower() for kind in DynamoBackend if kind.value.lower() in present]
    if backend not in known:
        raise RecipeError(
            f"{section}.training.torch_compile_backend={backend} is not here"
            f"{suggest_closest(backend, known)}",
            f"Use one of {', '.join(known)}, or leave it out",
        )


def _check_reporting(section: str, args: TrainingArguments) -> None:
    """Refuse to report to a service whose package is missing, before anything trains."""
    services: Any = args.report_to
    missing = set(services) - set(get_available_reporting_integrations())
    if missing:
        name = min(missing)
        raise RecipeError(
            f"{section}.training.report_to={name}: its package is not installed",
            f"Install it (pip install {name}), or set report_to to none",
        )


def _check_scheduler(section: str, args: TrainingArguments) -> None:
    """Refuse a schedule that lacks its own settings, by making one of a parameter."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    kind, settings = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs
    try:
        get_scheduler(kind, optimizer, 1, 10, settings)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"{section}.training.lr_scheduler_type={kind.value} does not work: "
            f"{format_error_line(error)}",
            f"Give {section}.training.lr_scheduler_kwargs what it needs, or use linear",
        ) from error


def _check_optimizer(section: str, args: TrainingArguments) -> None:
    """Refuse an optimizer whose package is missing or that needs other settings."""
    pairs = args.optim_args.split(",") if args.optim_args else []
    names = [pair.partition("=")[0].strip() for pair in pairs]
    if not all(pair.count("=") == 1 for pair in pairs) or len(set(names)) < len(names):
        raise RecipeError(
            f"{section}.training.optim_args={args.optim_args} is no list of name=value",
            "Write it as name=value,name=value, each name once",
        )
    name = f"{section}.training.optim={OptimizerNames(args.optim).value}"
    try:
        kind, settings = _build_optimizer_settings(args)
    except OPTIMIZER_ERRORS as error:
        fix = "Install what it needs, or leave optim out"
        if pairs and not isinstance(error, ImportError):
            name, fix = f"{name} with optim_args={args.optim_args}", "Correct optim_args"
        raise RecipeError(f"{name} does not work here: {format_error_line(error)}", fix) from error
    for given in names:
        if not _is_read(args, given):
            known = [p for p in inspect.signature(kind).parameters if _is_read(args, p)]
            raise RecipeError(
                f"{section}.training.optim_args: {OptimizerNames(args.optim).value} takes no "
                f"{given!r} from it{suggest_closest(given, known)}",
                f"It takes {', '.join(known) or 'none'}; others are keys of {section}.training",
            )


def _is_read(args: TrainingArguments, name: str) -> bool:
    """Return whether the optimizer's settings depend on this name of `optim_args`.

    transformers ignores names that it does not know, and converts the values of others.
    """
    results: set[str] = set()
    for value in ("", "0", "1"):
        try:
            results.add(repr(_build_optimizer_settings(args, f"{name}={value}")[1]))
        except OPTIMIZER_ERRORS:
            return True
    return len(results) > 1


def _build_optimizer_settings(
    args: TrainingArguments, optim_args: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Return the class of the optimizer, and its settings with these arguments or its own.

    Raises:
        OPTIMIZER_ERRORS: where a value or a package is missing or wrong.
    """
    chosen = copy(args)
    chosen.optim_args = args.optim_args if optim_args is None else optim_args
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(chosen, nn.Linear(1, 1))  # pyright: ignore
    if optim_args is None and isinstance(kind, type) and not settings.keys() & PARAMETER_SETTINGS:
        kind([nn.Parameter(torch.zeros(1))], **settings)
    return kind, settings
