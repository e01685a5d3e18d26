"""The published folder loads in a fresh process with plain peft and transformers."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, pictures, sentences
from safetensors.torch import save_file

from hftl.card.sections import render_plain_snippet
from hftl.config.recipe import Recipe
from hftl.finetune.arm import train_arm
from hftl.finetune.arm_files import collect_trained_tensors
from hftl.finetune.context import ExperimentContext
from hftl.finetune.trainable import prepare
from hftl.models import lora as adapters
from hftl.models.features import predict_logits
from hftl.models.heads import LoadedModel
from hftl.publish import checks
from hftl.publish.checks import measure_reload_difference
from hftl.publish.export import export_model, rebuild_model, write_reload_sample

TOKENS = "token-classification"
STRATEGIES = ("head", "partial", "lora", "full")
TEXTS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "albert", "electra", "mpnet",
         "deberta-v2", "modernbert", "nomic_bert")  # fmt: skip
IMAGES = ("vit", "vit_mae", "deit", "beit", "dinov2", "dinov2_with_registers", "swin", "clip",
          "siglip")  # fmt: skip
MASKED = ("bert", "albert", "distilbert", "electra", "modernbert", "deberta-v2", "beit", "swin")
GRID = [
    *((name, False, "classification", "native", s) for name in TEXTS + IMAGES for s in STRATEGIES),
    *((name, True, "classification", "native", s) for name in MASKED for s in STRATEGIES),
    *((name, False, TOKENS, "native", s) for name in TEXTS for s in ("head", "lora", "full")),
    *((name, True, "classification", "mean", "lora") for name in TEXTS if name in MASKED),
    *((name, False, "classification", "mean", "full") for name in ("roberta", "mpnet")),
    ("bert", False, "multi-label", "native", "lora"),
    ("vit", False, "multi-label", "native", "lora"),
    ("vit", False, "regression", "native", "lora"),
    ("dinov2", False, "interpolated", "native", "lora"),
    ("vit", False, "interpolated", "native", "full"),
    ("beit", False, "interpolated", "native", "partial"),
]
"""Architecture, whether from masked pre-training, task, pooling, strategy."""
THROUGH_THE_GATE = [
    ("bert", True, "classification", "native", "lora"),
    ("bert", False, "classification", "mean", "lora"),
    ("vit_mae", False, "classification", "native", "lora"),
]
ONE_AFTER_ANOTHER = """
import importlib.util, json, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("reload", sys.argv[1])
reload = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reload)
for job in json.loads(Path(sys.argv[2]).read_text()):
    reload.main(*map(Path, job), "cpu")
"""
Case = tuple[str, bool, str, str, str]


def section(name: str, task: str, folder: Path) -> dict[str, Any]:
    """The data of a case: texts, tagged words, or pictures."""
    if name in IMAGES:
        train: dict[str, Any] = {"path": str(pictures(folder / "pictures", 14))}
        if task in ("multi-label", "regression"):
            cell = {"multi-label": lambda n: ["a", "b"][: n % 3], "regression": float}[task]
            files = sorted((folder / "pictures").rglob("*.png"))
            rows = [{"image": str(file), "label": cell(n)} for n, file in enumerate(files)]
            train = {"path": str(jsonl(folder / "t.jsonl", rows))}
        size = 48 if task == "interpolated" else None
        task = "classification" if task == "interpolated" else task
        return {"task": task, "train": train, "image_size": size}
    if task == TOKENS:
        rows = [{"text": text.split(), "label": [w[:1] for w in text.split()]}
                for text, _ in sentences(60)]  # fmt: skip
    else:
        several = task == "multi-label"
        rows = [{"text": text, "label": [label] if several else label}
                for text, label in sentences(60)]  # fmt: skip
    return {"task": task, "train": {"path": str(jsonl(folder / "t.jsonl", rows))}, "max_length": 16}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def opened(
    model: Path, folder: Path, pooling: str, strategy: str, data: dict[str, Any] | None = None
) -> tuple[ExperimentContext, Recipe]:
    folder.mkdir(exist_ok=True)
    blocks = 1 if "albert" in model.name else 2
    finetune = {"pooling": pooling, "strategy": strategy, "blocks": blocks}
    recipe = Recipe.parse(
        {
            "source": {"model": str(model)},
            "data": data or section("bert", "classification", folder),
            "finetune": finetune | {"head_init": "random"},
        }
    )
    return bench_of(recipe), recipe


def published(bench: ExperimentContext, recipe: Recipe, folder: Path) -> Path:
    """Trains nothing, but moves every trainable weight as training would, then publishes.

    Returns:
        The sample, beside the folder `publish`.
    """
    finetune = recipe.finetune
    built = bench.build_model(finetune.pooling, seed=0)
    model = prepare(built.model, finetune.strategy, finetune.blocks, finetune.lora, built.fresh)
    generator = torch.Generator().manual_seed(1)
    # The tiny encoders have small features; one layer alone must move far to be seen.
    far = 30.0 if finetune.strategy == "head" else 0.3
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += far * torch.randn(parameter.shape, generator=generator)
    trained = LoadedModel(model, built.architecture, finetune.pooling, built.fresh)
    rows = bench.encode_rows(bench.prepared.rows["test"])
    expected = predict_logits(model, rows, bench.inputs, "cpu")
    spread = np.ptp(expected, axis=0).max()
    assert spread > 1e-3, "the logits must differ for the comparison to mean anything"
    save_file(collect_trained_tensors(trained), folder / "weights.safetensors")
    again = rebuild_model(bench, finetune, 0, folder / "weights.safetensors")
    (folder / "publish").mkdir()
    export_model(bench, again, finetune, folder / "publish")
    return write_reload_sample(bench, expected, folder)


def difference(model: Path, folder: Path, pooling: str, strategy: str) -> float:
    bench, recipe = opened(model, folder, pooling, strategy)
    sample = published(bench, recipe, folder)
    return measure_reload_difference(folder / "publish", bench.source.folder, sample, "cpu")


@pytest.fixture(scope="session")
def reloaded(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[Case, dict[str, Any]]:
    """What one fresh process, without hftl, finds of every case."""
    work = tmp_path_factory.mktemp("grid")
    jobs = []
    for number, (name, masked, task, pooling, strategy) in enumerate(GRID):
        folder = work / str(number)
        folder.mkdir()
        model = tiny_model(name, masked)
        data = section(name, task, folder)
        bench, recipe = opened(model, folder, pooling, strategy, data)
        sample = published(bench, recipe, folder)
        jobs.append([str(folder / "publish"), str(bench.source.folder), str(sample)])
    (work / "jobs.json").write_text(json.dumps(jobs))
    script = Path(checks.__file__).with_name("reload_check.py")
    found = subprocess.run(
        [sys.executable, "-P", "-c", ONE_AFTER_ANOTHER, str(script), str(work / "jobs.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    assert len(told) == len(GRID), (GRID[len(told)], found.stderr[-2000:])
    return dict(zip(GRID, told, strict=True))


@pytest.mark.parametrize("case", GRID, ids=lambda case: "-".join(map(str, case)))
def test_every_architecture_reloads_to_the_same_logits(
    case: Case, reloaded: dict[Case, dict[str, Any]]
) -> None:
    found = reloaded[case]
    assert not found["hftl_imported"]
    assert found["difference"] <= 1e-5 * max(1.0, found["largest"])


@pytest.mark.parametrize("case", THROUGH_THE_GATE, ids=lambda case: "-".join(map(str, case)))
def test_the_gate_proves_it_in_a_process_of_its_own(
    case: Case, tiny_model: Callable[..., Path], tmp_path: Path, own_process: None
) -> None:
    name, masked, task, pooling, strategy = case
    data = section(name, task, tmp_path)
    bench, recipe = opened(tiny_model(name, masked), tmp_path, pooling, strategy, data)
    sample = published(bench, recipe, tmp_path)
    assert (
        measure_reload_difference(tmp_path / "publish", bench.source.folder, sample, "cpu") <= 1e-5
    )


def test_a_fresh_pooler_left_out_is_noticed(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stock peft does with a masked-LM checkpoint: the new pooler is not saved."""
    add_lora = adapters.add_lora
    monkeypatch.setattr(
        "hftl.finetune.trainable.add_lora",
        lambda model, architecture, lora, fresh: add_lora(
            model, architecture, lora, [name for name in fresh if "pooler" not in name]
        ),
    )
    assert difference(tiny_model("bert", True), tmp_path, "native", "lora") > 1e-2


def test_no_local_name_in_the_configs(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    difference(tiny_model("bert"), tmp_path, "native", "lora")
    for path in (tmp_path / "publish").glob("*.json"):
        assert str(tmp_path.parent) not in path.read_text(encoding="utf-8"), path.name
        assert str(tiny_model("bert")) not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize("pooling", ["mean", "native"])
def test_an_adapter_names_its_modules_in_one_order(
    pooling: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """peft holds them as a set, whose order is another in each process."""
    difference(tiny_model("bert"), tmp_path, pooling, "lora")
    settings = json.loads((tmp_path / "publish" / "adapter_config.json").read_text("utf-8"))
    targets = settings["target_modules"]
    # Of a pooled model it is a pattern of whole paths.
    names = targets.split(".(")[-1].rstrip(")").split("|") if isinstance(targets, str) else targets
    assert len(names) > 2 and names == sorted(names)


def test_an_arm_trained_in_bf16_predicts_in_fp32(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The logits that are measured are those of the weights that are published."""
    bench, recipe = opened(tiny_model(), tmp_path, "mean", "lora")
    training = recipe.finetune.training | {"bf16": True, "num_train_epochs": 1}
    finetune = recipe.finetune.model_copy(update={"training": training})
    outcome = train_arm(bench, finetune, 0)
    save_file(outcome.weights, tmp_path / "weights.safetensors")
    model = rebuild_model(bench, finetune, 0, tmp_path / "weights.safetensors")
    again = predict_logits(
        model, bench.encode_rows(bench.prepared.rows["test"]), bench.inputs, "cpu"
    )
    np.testing.assert_allclose(outcome.logits["test"], again, atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "strategy"), [("mean", "lora"), ("native", "lora"), ("native", "full")]
)
def test_the_cards_plain_snippet_gives_the_logits(
    pooling: str, strategy: str, tiny_model: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bench, recipe = opened(tiny_model("bert", True), tmp_path, pooling, strategy)
    outcome = train_arm(bench, recipe.finetune, 0)
    save_file(outcome.weights, tmp_path / "weights.safetensors")
    model = rebuild_model(bench, recipe.finetune, 0, tmp_path / "weights.safetensors")
    export_model(bench, model, recipe.finetune, tmp_path / "publish")
    (text,) = bench.prepared.rows["test"][0].content
    base = str(bench.source.folder)
    code = render_plain_snippet(
        str(tmp_path / "publish"), base, None, pooling, 2, strategy == "lora", "text", f'"{text}"'
    )
    torch.manual_seed(5)
    exec(compile(code, "card", "exec"), {"__name__": "card"})  # noqa: S102
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", printed)]
    np.testing.assert_allclose(numbers, outcome.logits["test"][0], atol=2e-4)


def test_native_loads_with_auto_peft(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The contract: native is what `AutoPeftModelFor...` loads, the number of labels passed; and so
    does the card's snippet."""
    from peft import AutoPeftModelForSequenceClassification

    bench, recipe = opened(tiny_model("bert", True), tmp_path, "native", "lora")
    outcome = train_arm(bench, recipe.finetune, 0)
    save_file(outcome.weights, tmp_path / "weights.safetensors")
    published = tmp_path / "publish"
    model = rebuild_model(bench, recipe.finetune, 0, tmp_path / "weights.safetensors")
    export_model(bench, model, recipe.finetune, published)
    settings = json.loads((published / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(bench.source.folder)
    (published / "adapter_config.json").write_text(json.dumps(settings))
    torch.manual_seed(5)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(published, num_labels=2)
    rows = bench.encode_rows(bench.prepared.rows["test"])
    found = predict_logits(loaded, rows, bench.inputs, "cpu")
    np.testing.assert_allclose(found, outcome.logits["test"], atol=1e-5)
    (text,) = bench.prepared.rows["test"][0].content
    code = render_plain_snippet(
        str(published), "org/base", None, "native", 2, True, "text", f'"{text}"'
    )
    exec(compile(code, "card", "exec"), {"__name__": "card"})  # noqa: S102
    printed = re.findall(r"-?\d+\.\d+(?:e-?\d+)?", capsys.readouterr().out.splitlines()[-1])
    np.testing.assert_allclose([float(n) for n in printed], outcome.logits["test"][0], atol=2e-4)
