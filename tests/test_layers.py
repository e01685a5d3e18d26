"""Check that data flow one way: a module imports only modules above it in one list.

The list is the layout of the package, in the order in which data flow, inside folders too.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ORDER = [
    "errors", "plurals", "train.hf_compat",
    "finetune.strategies",  # a table without imports, which the recipe's schema is made from
    "config.section", "config.overrides", "config.secrets", "config.upstream_ranges",
    "config.refusals", "config.upstream_args",
    "config.data", "config.adapt", "config.finetune",
    "config.retain", "config.measure", "config.publish", "config.validation", "config.recipe",
    "runtime.distributed", "runtime.imports", "runtime.interruption",
    "runtime.hardware", "runtime.run_folder", "runtime.finished_files", "runtime.row_store",
    "runtime.restart", "runtime.paths", "runtime.progress", "runtime.claims", "runtime.workers",
    "runtime.watchdog",
    "data.facts", "analysis.facts", "analysis.sweep_facts", "analysis.advice_facts", "train.facts",
    "adapt.facts",
    "measure.metrics",
    "measure.facts", "measure.forgetting_facts", "measure.record",
    "measure.statistics", "measure.calibration", "measure.label_calibration", "measure.conformal",
    "measure.shift", "measure.verdict",
    "data.encodings", "data.file_kinds", "data.rows", "data.normalization", "data.csv_reader",
    "data.tables",
    "data.columns", "data.duplicates", "data.images",
    "data.label_parsing", "data.load",
    "data.guessed_table", "data.labels",
    "data.class_weights", "data.splits", "data.slices", "data.near_copies", "data.prepare",
    "data.text_inputs", "data.image_processing", "data.image_inputs", "data.patched_inputs",
    "data.prompted_inputs", "data.corpus", "data.masking", "data.next_tokens", "data.general",
    "models.architecture_spec", "models.timm_architecture", "models.text_architectures",
    "models.image_architectures",
    "models.vision_language_architectures", "models.architectures", "models.known_sources",
    "models.quantization", "models.half_weights", "models.lora_kernels", "models.dropout",
    "models.packed_attention", "models.packing",
    "models.linear_products", "models.fused_block",
    "models.encoders", "models.prefix_cache", "models.pooling", "models.pooled_model",
    "models.timm_processor", "models.config_limits", "models.foreign_code", "models.weight_files",
    "models.source",
    "models.prompt_processor",
    "models.model_parts", "models.heads", "models.lora", "models.lora_concat", "models.features",
    "models.likelihood", "models.pairs",
    "models.used_embedding", "models.layer_features",
    "analysis.logistic", "analysis.probe", "analysis.neighbours", "analysis.drift",
    "analysis.row_faults", "analysis.fingerprints", "train.steps", "analysis.check",
    "analysis.nearest", "analysis.out_of_fold", "analysis.transferability",
    "analysis.rank_intervals",
    "retain.regularizer", "retain.original", "retain.kl", "retain.pretraining_kl", "retain.weights",
    "retain.fisher",
    "train.checkpoint", "train.random_state",
    "train.step_checkpoint", "train.callbacks", "train.weighted_loss", "train.weight_arguments",
    "train.loss", "train.objective",
    "train.samplers", "train.optimizer", "train.arguments", "train.numbers",
    "train.memory", "train.step_costs",
    "train.trainer",
    "adapt.encoder_io", "adapt.language_model", "adapt.mae", "adapt.guard",
    "adapt.adaptation",
    "finetune.arm_files", "finetune.trainable", "finetune.context",
    "finetune.build_context",
    "finetune.pretraining_heads", "analysis.feature_store", "finetune.zero_shot",
    "finetune.gradual", "finetune.frozen_prefix", "finetune.used_tokens", "finetune.guard_metrics",
    "finetune.interpolate", "finetune.classical", "finetune.solved_arms", "finetune.arm",
    "finetune.baselines",
    "measure.scores", "measure.gain", "measure.slices", "measure.thresholds", "measure.coverage",
    "measure.abstention", "measure.error_analysis", "measure.forgetting",
    "analysis.power_law", "analysis.curve_figures", "analysis.estimates", "analysis.rank",
    "analysis.layer_probe", "analysis.curve", "analysis.distance", "analysis.word_distance",
    "analysis.domains",
    "analysis.two_sample", "analysis.shift", "analysis.label_maps",
    "analysis.layer_rates", "analysis.sweep", "analysis.readings",
    "analysis.source_faults", "analysis.tokenizer_faults", "analysis.own_labels",
    "analysis.label_faults",
    "analysis.forecast", "analysis.advice", "measure.advice_outcome",
    "card.validation", "card.markdown", "card.wording", "card.advice", "card.slices",
    "card.scores", "card.evidence", "card.metadata",
    "card.sections", "card.snippets", "card.card", "card.plots",
    "card.analysis_plots",
    "card.report",
    "publish.sanitize", "publish.http_retry", "publish.settings_files",
    "publish.base_reference", "publish.published_metadata", "publish.reload_process",
    "publish.checks",
    "publish.push", "publish.reload_check", "publish.prediction_check",
    "publish.export",
    "doctor.load_process", "doctor.adapter_folder", "doctor.examination", "doctor.renamed_modules",
    "doctor.adapter_tensors",
    "doctor.file_checks", "doctor.load_once", "doctor.load_check",
    "doctor.checks", "doctor.fix", "doctor.report",
    "console", "analysis.tables",
    "inference.find_model", "inference.load", "inference.published_scores", "inference.predict",
    "inference.load_predictor", "inference.multi_adapter",
    "inference.prior", "inference.arguments",
    "inference.output_table", "inference.input_table",
    "inference.predict_table",
    "inference.eval_data", "inference.compare",
    "sources",
    "init",
    "pipeline.run", "pipeline.cache_keys", "pipeline.changed_inputs", "pipeline.trained_layers",
    "pipeline.analysis_folder", "pipeline.analyses",
    "pipeline.sweep", "pipeline.fisher_stage", "pipeline.retention", "pipeline.weight_grid",
    "pipeline.kl_weight", "pipeline.schedule", "pipeline.estimate", "pipeline.placement",
    "pipeline.header", "pipeline.deal_files", "pipeline.deal", "pipeline.arms", "pipeline.corpora",
    "pipeline.objectives", "pipeline.corpus_checks", "pipeline.model_checks", "pipeline.faults",
    "pipeline.baselines", "pipeline.advice",
    "pipeline.adaptation", "pipeline.forgetting",
    "pipeline.record_sections", "pipeline.score_sections", "pipeline.publish_folder",
    "pipeline.slices",
    "pipeline.evaluate",
    "pipeline.evaluate_adaptation", "pipeline.amend", "pipeline.push", "pipeline.dry_run",
    "pipeline.pipeline", "pipeline.advise", "pipeline.arm_worker",
    "cli_errors", "cli_output", "cli_options", "cli_analyses", "cli", "__main__",
]  # fmt: skip
ROOT = Path(__file__).parent.parent / "hftl"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py"
}
LONGEST_CHAIN = 17


@dataclass(frozen=True)
class Module:
    """Hold what a module imports of hftl, and its functions that call a collective."""

    imports: set[str]
    collective_functions: list[str]


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    """Return every module by name, each parsed once."""
    read: dict[str, Module] = {}
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        read[name] = Module(set(imported_modules(path, tree)) - {name}, list_callers(tree))
    return read


def imported_modules(path: Path, tree: ast.Module) -> Iterator[str]:
    """Yield the modules of hftl that a file imports, at its top and inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: use an absolute import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            inner = name.removeprefix("hftl.")
            yield from (m for m in (inner, inner.rpartition(".")[0]) if m in MODULES)


COLLECTIVES = ("broadcast_from_main", "run_main_first", "gather_values")
GETTERS = ("get", "is", "has", "read", "load", "find", "list", "count", "format", "select")


def list_callers(tree: ast.Module) -> list[str]:
    """Return the names of the functions that call a collective."""
    return [
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        and any(
            isinstance(call, ast.Attribute | ast.Name)
            and (call.attr if isinstance(call, ast.Attribute) else call.id) in COLLECTIVES
            for call in ast.walk(function)
        )
    ]


def test_the_list_names_every_module_once() -> None:
    assert sorted(ORDER) == sorted(MODULES)


def test_modules_import_only_what_is_above_them(modules: dict[str, Module]) -> None:
    places = {name: place for place, name in enumerate(ORDER)}
    below = [
        f"{name} imports {other}, which stands below it"
        for name in ORDER
        for other in sorted(modules[name].imports)
        if places[other] > places[name]
    ]
    assert not below, "; ".join(below)


def test_the_longest_import_chain(modules: dict[str, Module]) -> None:
    depth: dict[str, int] = {}
    for name in ORDER:
        depth[name] = 1 + max((depth[module] for module in modules[name].imports), default=0)
    longest = max(depth, key=depth.__getitem__)
    assert depth[longest] <= LONGEST_CHAIN, (longest, depth[longest])


def test_no_function_named_like_a_getter_calls_a_collective(modules: dict[str, Module]) -> None:
    callers = [
        f"{name}.{function}"
        for name, module in modules.items()
        for function in module.collective_functions
    ]
    assert len(callers) > 20
    getters = [name for name in callers if name.split(".")[-1].strip("_").split("_")[0] in GETTERS]
    assert not getters, f"name what they do, for they wait for other processes: {getters}"


ANALYSES_ONLY = (
    "sklearn", "scipy.stats", "scipy.optimize", "scipy.integrate", "datasketch", "matplotlib",
    "evaluate", "pandas", "torchvision", "timm",
)  # fmt: skip
"""Libraries that a cheap command does not need; they are imported where they are used."""
TRAINING_ONLY = ("datasets", "accelerate", "jinja2", "pyarrow", "transformers.Trainer")
LATE_LIBRARIES = [
    ("pipeline.pipeline", ANALYSES_ONLY),
    ("inference.predict_table", (*ANALYSES_ONLY, *TRAINING_ONLY)),
    ("cli", ("torch", "transformers", "numpy", "huggingface_hub")),
    ("doctor.adapter_folder", ("torch", "transformers", "numpy", "huggingface_hub")),
]


def imported_at_once(body: list[ast.stmt]) -> Iterator[str]:
    """Yield what a module imports when it is imported itself, with the names of its members."""
    for node in body:
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Try):
            yield from imported_at_once(node.body)
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from imported_at_once(node.body)


@pytest.mark.parametrize(("start", "late"), LATE_LIBRARIES)
def test_a_library_is_imported_where_it_is_used(start: str, late: tuple[str, ...]) -> None:
    pending, reached = [start], {start}
    while pending:
        name = pending.pop()
        for whole in imported_at_once(ast.parse(MODULES[name].read_text("utf-8")).body):
            assert not any(f"{whole}.".startswith(f"{library}.") for library in late), (
                f"{name} imports {whole}, which {start} loads with it"
            )
            inner = whole.removeprefix("hftl.")
            new = {m for m in (inner, inner.rpartition(".")[0]) if m in MODULES} - reached
            pending += new
            reached |= new
    assert len(reached) > 10


def list_names(path: Path) -> set[str]:
    """Return the names that a module defines or imports, and those of a folder's modules."""
    names = {child.stem for child in path.parent.iterdir()} if path.name == "__init__.py" else set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_benchmarks_import_what_hftl_has() -> None:
    missing, known = [], {}
    for path in sorted((ROOT.parent / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("hftl"):
                continue
            place = ROOT.parent.joinpath(*str(node.module).split("."))
            home = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            if home not in known:
                known[home] = list_names(home)
            missing += [
                f"{path.name}: {node.module}.{alias.name}"
                for alias in node.names if alias.name not in known[home]
            ]  # fmt: skip
    assert missing == [] and len(known) > 50
