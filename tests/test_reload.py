"""The published folder loads in a fresh process with plain peft and transformers."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sentences, write_csv
from safetensors.torch import save_file

from hftl.card.snippets import plain_snippet
from hftl.data.prepare import prepare as prepare_data
from hftl.finetune.arm import learnt, train_arm
from hftl.finetune.strategy import prepare
from hftl.finetune.workbench import Workbench
from hftl.model import adapters
from hftl.model.cache import logits
from hftl.model.head import Built
from hftl.model.source import find_source, load_tokenizer
from hftl.publish.folder import rebuild, write_model, write_sample
from hftl.publish.gates import reload_difference
from hftl.recipe import Recipe

CASES = [
    (name, masked_lm, pooling, strategy)
    for name in ("bert", "roberta", "distilbert")
    for masked_lm in (False, True)
    for pooling in ("native", "mean")
    if not (name == "roberta" and pooling == "mean")
    for strategy in ("head", "partial", "lora", "full")
]
IN_CI = [
    ("bert", True, "native", "lora"),
    ("bert", True, "native", "head"),
    ("roberta", False, "native", "lora"),
    ("distilbert", True, "native", "partial"),
    ("bert", False, "mean", "lora"),
    ("distilbert", False, "mean", "full"),
]


def bench_of(folder: Path, tmp_path: Path, pooling: str, strategy: str) -> tuple[Workbench, Recipe]:
    table = write_csv(tmp_path / "t.csv", ["text", "label"], sentences(60))
    recipe = Recipe.parse(
        {
            "source": {"model": str(folder)},
            "data": {"train": {"path": str(table)}, "max_length": 16},
            "finetune": {"pooling": pooling, "strategy": strategy},
        }
    )
    source = find_source(recipe.source)
    prepared = prepare_data(recipe.data)
    tokenizer = load_tokenizer(source)
    return Workbench(source, "", tokenizer, prepared, None, 16, "cpu"), recipe


def difference(folder: Path, tmp_path: Path, pooling: str, strategy: str) -> float:
    """Trains nothing, but moves every trainable weight as training would, then publishes."""
    bench, recipe = bench_of(folder, tmp_path, pooling, strategy)
    finetune = recipe.finetune
    built = bench.build(pooling, seed=0)
    model = prepare(built.model, strategy, finetune.blocks, finetune.lora, built.fresh)
    generator = torch.Generator().manual_seed(1)
    # The tiny encoders have small features; one layer alone must move far to be seen.
    far = 30.0 if strategy == "head" else 0.3
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += far * torch.randn(parameter.shape, generator=generator)
    trained = Built(model, built.anatomy, pooling, built.fresh)
    rows = bench.encoded(bench.prepared.rows["test"])
    expected = logits(model, rows, bench.pad, "cpu")
    assert np.ptp(expected) > 0.1, "the logits must differ for the comparison to mean anything"
    save_file(learnt(trained), tmp_path / "weights.safetensors")
    published = tmp_path / "publish"
    again = rebuild(bench, finetune, 0, tmp_path / "weights.safetensors")
    write_model(bench, again, finetune, published)
    sample = write_sample(bench, expected, tmp_path)
    return reload_difference(published, bench.source, sample, "cpu")


@pytest.mark.parametrize(("name", "masked_lm", "pooling", "strategy"), IN_CI)
def test_reloads_to_the_same_logits(
    name: str, masked_lm: bool, pooling: str, strategy: str,
    tiny_model: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    assert difference(tiny_model(name, masked_lm), tmp_path, pooling, strategy) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "masked_lm", "pooling", "strategy"), [case for case in CASES if case not in IN_CI]
)
def test_every_combination_reloads(
    name: str, masked_lm: bool, pooling: str, strategy: str,
    tiny_model: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    assert difference(tiny_model(name, masked_lm), tmp_path, pooling, strategy) <= 1e-5


def test_a_fresh_pooler_left_out_is_noticed(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stock peft does with a masked-LM checkpoint: the new pooler is not saved."""
    add_lora = adapters.add_lora
    monkeypatch.setattr(
        "hftl.finetune.strategy.add_lora",
        lambda model, anatomy, lora, fresh: add_lora(
            model, anatomy, lora, [name for name in fresh if "pooler" not in name]
        ),
    )
    assert difference(tiny_model("bert", True), tmp_path, "native", "lora") > 1e-2


def test_no_local_name_in_the_configs(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    difference(tiny_model("bert"), tmp_path, "native", "lora")
    for path in (tmp_path / "publish").glob("*.json"):
        assert str(tmp_path.parent) not in path.read_text(encoding="utf-8"), path.name
        assert str(tiny_model("bert")) not in path.read_text(encoding="utf-8"), path.name


def test_an_arm_trained_in_bf16_predicts_in_fp32(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The logits that are measured are those of the weights that are published."""
    bench, recipe = bench_of(tiny_model(), tmp_path, "mean", "lora")
    training = recipe.finetune.training | {"bf16": True, "num_train_epochs": 1}
    finetune = recipe.finetune.model_copy(update={"training": training})
    outcome = train_arm(bench, finetune, 0, progress=False)
    save_file(outcome.weights, tmp_path / "weights.safetensors")
    model = rebuild(bench, finetune, 0, tmp_path / "weights.safetensors")
    again = logits(model, bench.encoded(bench.prepared.rows["test"]), bench.pad, "cpu")
    np.testing.assert_allclose(outcome.logits["test"], again, atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "strategy"), [("mean", "lora"), ("native", "lora"), ("native", "full")]
)
def test_the_cards_plain_snippet_gives_the_logits(
    pooling: str, strategy: str, tiny_model: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bench, recipe = bench_of(tiny_model("bert", True), tmp_path, pooling, strategy)
    outcome = train_arm(bench, recipe.finetune, 0, progress=False)
    save_file(outcome.weights, tmp_path / "weights.safetensors")
    model = rebuild(bench, recipe.finetune, 0, tmp_path / "weights.safetensors")
    write_model(bench, model, recipe.finetune, tmp_path / "publish")
    (text,) = bench.prepared.rows["test"][0].texts
    base = str(bench.source.folder)
    code = plain_snippet(
        str(tmp_path / "publish"), base, None, pooling, 2, strategy == "lora", f'"{text}"'
    )
    torch.manual_seed(5)
    exec(compile(code, "card", "exec"), {"__name__": "card"})  # noqa: S102
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", printed)]
    np.testing.assert_allclose(numbers, outcome.logits["test"][0], atol=2e-4)


def test_native_loads_with_auto_peft(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The contract: native is what `AutoPeftModelFor...` loads, the number of labels passed."""
    from peft import AutoPeftModelForSequenceClassification

    bench, recipe = bench_of(tiny_model("bert", True), tmp_path, "native", "lora")
    outcome = train_arm(bench, recipe.finetune, 0, progress=False)
    save_file(outcome.weights, tmp_path / "weights.safetensors")
    published = tmp_path / "publish"
    model = rebuild(bench, recipe.finetune, 0, tmp_path / "weights.safetensors")
    write_model(bench, model, recipe.finetune, published)
    settings = json.loads((published / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(bench.source.folder)
    (published / "adapter_config.json").write_text(json.dumps(settings))
    torch.manual_seed(5)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(published, num_labels=2)
    rows = bench.encoded(bench.prepared.rows["test"])
    found = logits(loaded, rows, bench.pad, "cpu")
    np.testing.assert_allclose(found, outcome.logits["test"], atol=1e-5)
