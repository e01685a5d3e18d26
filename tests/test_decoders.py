"""Classify with decoders: pooling on the last token, padding on either side, no bias."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.published_model import TOKENS, open_context, publish_model, write_data
from support.tiny import CAUSAL_MODELS, tiny_config
from support.training import perturb
from transformers import AutoModel, AutoTokenizer

from hftl.analysis.probe import fit_probe
from hftl.card.snippets import ModelFolder, render_plain_snippet
from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.finetune import trainable
from hftl.finetune.trainable import prepare
from hftl.inference.load_predictor import load
from hftl.models.encoders import get_task_class
from hftl.models.half_weights import HalfLinear
from hftl.models.heads import build_model
from hftl.models.pooling import find_last_tokens, pool_before_head
from hftl.models.source import find_source
from hftl.publish.checks import measure_reload_difference

Tiny = Callable[..., Path]
LINEARS = 7
POOLED = [*CAUSAL_MODELS, "eurobert"]


def pad(rows: list[list[int]], side: str, pad_id: int) -> dict[str, torch.Tensor]:
    """Return a batch of token ids padded on one side."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap, ones = [pad_id] * (longest - len(row)), [1] * len(row)
        zeros = [0] * len(gap)
        ids.append(row + gap if side == "right" else gap + row)
        mask.append(ones + zeros if side == "right" else zeros + ones)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("name", POOLED)
def test_logits_are_the_stock_class_s_under_padding_on_either_side(name: str) -> None:
    config = tiny_config(name, num_labels=3, problem_type="single_label_classification")
    kind = get_task_class(config, "classification")
    torch.manual_seed(0)
    stock = kind(config).eval()
    pooled = kind(config).eval()
    pooled.load_state_dict(stock.state_dict())
    pool_before_head(pooled)
    assert type(pooled).__name__ == kind.__name__ and isinstance(pooled, kind)
    rows = [[7, 9, 11, 13, 15, 8], [12, 6], [5, 0, 5, 9]]
    labels = torch.tensor([0, 2, 1])
    with torch.no_grad():
        expected = stock(**pad(rows, "right", 0), labels=labels)
        alone = torch.cat([stock(**pad([row], "right", 0)).logits for row in rows])
        for side in ("right", "left"):
            output = pooled(**pad(rows, side, 0), labels=labels)
            torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
            torch.testing.assert_close(output.logits, alone, atol=1e-4, rtol=0)
            torch.testing.assert_close(output.loss, expected.loss, atol=1e-4, rtol=0)
    assert np.ptp(expected.logits.numpy(), axis=0).max() > 1e-3


def test_last_tokens() -> None:
    ids = torch.tensor([[5, 6, 0, 0], [0, 0, 5, 6], [5, 0, 6, 0], [0, 0, 0, 0]])
    assert find_last_tokens(ids, 0).tolist() == [1, 3, 2, 0]
    assert find_last_tokens(ids[:1], None).tolist() == [3]
    with pytest.raises(RecipeError, match="no padding token, and a batch has 4 rows"):
        find_last_tokens(ids, None)


def test_a_missing_padding_token_is_the_end_of_a_text(tiny_model: Tiny, tmp_path: Path) -> None:
    """The published config and tokenizer name it, and the source's own config stays as it is."""
    context, recipe = open_context(tiny_model("llama"), tmp_path, "native", "full")
    assert context.inputs.tokenizer.pad_token == "[SEP]"  # pyright: ignore
    assert context.source.config.pad_token_id == 3
    sample = json.loads(publish_model(context, recipe, tmp_path).read_text())
    config = json.loads((tmp_path / "publish" / "config.json").read_text())
    assert config["pad_token_id"] == 3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "publish")
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("[SEP]", "right")
    kind = get_task_class(context.source.config, "classification")
    model = kind.from_pretrained(tmp_path / "publish").eval()
    texts = [text for (text,) in sample["texts"]]
    for side in ("left", "right"):
        batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        assert (batch["attention_mask"] == 0).any() or len(set(map(len, texts))) > 1
        with torch.no_grad():
            logits = model(**batch).logits
        np.testing.assert_allclose(logits, sample["logits"], atol=1e-5)


def publish_on_base(tiny_model: Tiny, folder: Path) -> tuple[Path, list[str], np.ndarray]:
    """Publish an adapter of a decoder whose base names no padding token.

    Returns:
        The folder, and texts with their logits.
    """
    base = tiny_model("llama")
    context, recipe = open_context(base, folder, "native", "lora")
    sample = json.loads(publish_model(context, recipe, folder).read_text())
    file = folder / "publish" / "adapter_config.json"
    named = json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}
    file.write_text(json.dumps(named))
    return folder / "publish", [text for (text,) in sample["texts"]], np.array(sample["logits"])


def test_the_card_s_code_runs_a_batch_on_a_base_without_a_padding_token(
    tiny_model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, texts, logits = publish_on_base(tiny_model, tmp_path)
    code = render_plain_snippet(
        ModelFolder(
            str(made), "org/base", None, "native", 2, True, "text", '"Good."', architecture="llama"
        )
    )
    space: dict[str, object] = {"__name__": "card"}
    exec(compile(code, "card", "exec"), space)  # noqa: S102
    assert "tensor" in capsys.readouterr().out
    batch = space["tokenizer"](texts, padding=True, return_tensors="pt")  # pyright: ignore
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        computed = space["model"](**batch).logits  # pyright: ignore
    np.testing.assert_allclose(computed, logits, atol=1e-5)


def test_an_adapter_that_peft_alone_wrote_is_padded_by_the_end_of_a_text(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    made, texts, logits = publish_on_base(tiny_model, tmp_path)
    for path in made.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    predicted = load(made, base=tiny_model("llama")).predict(texts)
    labels = ["LABEL_0", "LABEL_1"]
    assert [row["label"] for row in predicted] == [labels[n] for n in logits.argmax(1)]


def test_the_probe_of_a_head_without_a_bias_has_no_intercept() -> None:
    draw = np.random.default_rng(0)
    features = (draw.normal(size=(90, 8)) + 0.3).astype(np.float32)
    labels = (features @ draw.normal(size=(8, 3))).argmax(1)
    probe = fit_probe(features, labels, 3, None, intercept=False)
    assert not probe.bias.any() and not probe.exact[1].any()
    np.testing.assert_allclose(probe.logits(features), features @ probe.weight.T, atol=1e-5)
    assert (probe.logits(features).argmax(1) == labels).mean() > 0.9
    target = features[:, 0].astype(np.float64) * 2
    solved = fit_probe(features, target, 1, None, intercept=False)
    assert not solved.bias.any()
    np.testing.assert_allclose(solved.logits(features)[:, 0], target, atol=0.1)


def test_targets_need_a_bias(tiny_model: Tiny, tmp_path: Path) -> None:
    data = write_data("llama", "regression", tmp_path)
    context, _ = open_context(tiny_model("llama"), tmp_path, "mean", "lora", data)
    assert context.build_model("mean", 0).last_linear.bias is not None
    with pytest.raises(RecipeError, match="llama's classification class has no bias.*pooling=mean"):
        context.build_model("native", 0)


def test_the_first_token_of_a_decoder_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    context, _ = open_context(tiny_model("llama"), tmp_path, "native", "lora")
    with pytest.raises(RecipeError, match="finetune.pooling=cls reads the first token"):
        build_model(context.source, "classification", "cls", 2, ["a", "b"], 0)
    data = write_data("bert", TOKENS, tmp_path)
    context, _ = open_context(tiny_model("modernbert-decoder"), tmp_path, "native", "lora", data)
    with pytest.raises(RecipeError, match="has no class for token-classification"):
        context.build_model("native", 0)


@pytest.mark.parametrize("strategy", ["lora", "partial", "full"])
def test_frozen_weights_of_a_bf16_checkpoint_stay_bf16_and_outputs_exact(
    strategy: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    """Frozen linear layers take half the memory, and neither logits nor gradients change."""
    folder = tmp_path / "bf16"
    shutil.copytree(tiny_model("gemma2"), folder)
    AutoModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    source = find_source(Source(model=str(folder)))
    batch = pad([[7, 9, 11, 13, 15, 8], [12, 6]], "right", 0)
    results = []
    for held in (False, True):
        built = build_model(source, "classification", "native", 3, ["a", "b", "c"], 0)
        with pytest.MonkeyPatch.context() as patch:
            if not held:
                patch.setattr(trainable, "hold_in_half", lambda model: 0)
            model = prepare(built.model, strategy, blocks=1, fresh=built.fresh).eval()
        if strategy == "lora":
            perturb(model, 0.1)
        layers = [module for module in model.modules() if isinstance(module, HalfLinear)]
        expected = {"lora": 3, "partial": 2, "full": 0}[strategy] * LINEARS * held
        assert len(layers) == expected
        assert all(layer.weight.dtype == torch.bfloat16 for layer in layers)
        trains = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for _, p in trains)
        logits = model(**batch).logits
        logits.square().sum().backward()
        results.append((logits.detach(), {n: p.grad for n, p in trains}))
    torch.testing.assert_close(results[1][0], results[0][0], atol=0, rtol=0)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["lora", "partial"])
def test_a_bf16_decoder_is_published_in_full_precision(
    strategy: str, tiny_model: Tiny, tmp_path: Path, fast_reload: None
) -> None:
    folder = tmp_path / "bf16"
    shutil.copytree(tiny_model("llama"), folder)
    AutoModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    context, recipe = open_context(folder, tmp_path, "native", strategy)
    sample = publish_model(context, recipe, tmp_path)
    publish = tmp_path / "publish"
    assert measure_reload_difference(publish, folder, sample, "cpu") <= 1e-5
    if strategy == "partial":
        assert json.loads((publish / "config.json").read_text())["dtype"] == "float32"
