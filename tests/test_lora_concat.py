"""Compare adapters trained in turn with their concatenation on the original base, in plain peft."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    IA3Config,
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
)
from safetensors import safe_open
from safetensors.torch import load_file
from support.tiny import is_image, tiny_config
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from hftl.errors import RecipeError
from hftl.models.lora_concat import (
    AdapterSettings,
    LoraFactors,
    check_concatenable,
    concat_factors,
    extract_factors,
    get_saved_tensors,
    load_factors,
    save_factors,
    write_adapter,
)

Tiny = Callable[..., Path]

QUERY = {
    "bert": ["query", "value"], "roberta": ["query", "value"], "distilbert": ["q_lin", "v_lin"],
    "vit": ["q_proj", "v_proj"], "dinov2": ["q_proj", "v_proj"],
}  # fmt: skip
HEAD = {
    "bert": ["pooler", "classifier"], "distilbert": ["pre_classifier", "classifier"],
}  # fmt: skip


def merge(encoder: nn.Module, factors: dict[str, LoraFactors]) -> None:
    """Add every update to its weight."""
    with torch.no_grad():
        for path, (a, b) in factors.items():
            encoder.get_submodule(path).weight += b @ a  # pyright: ignore


def adapt(model: Any, seed: int, **settings: Any) -> Any:
    """Return the model with an adapter, and draw all that the adapter saves at random."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(lora_dropout=0.1, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return adapted.eval()


def draw_inputs(model_type: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    if is_image(model_type):
        return {"pixel_values": torch.randn(4, 3, 32, 32)}
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[0, 7:] = 0
    return {"input_ids": torch.randint(5, 30, (4, 12)), "attention_mask": mask}


def adapt_in_turn(
    original: Path, folder: Path, stages: list[dict[str, Any]]
) -> list[dict[str, LoraFactors]]:
    """Adapt the encoder stage by stage, each merged before the next, and save it."""
    factors = []
    for number, settings in enumerate(stages):
        base, plain = (
            AutoModel.from_pretrained(original if number == 0 else folder) for _ in range(2)
        )
        factors.append(extract_factors(adapt(base, number, **settings)))
        merge(plain, factors[-1])
        plain.save_pretrained(folder)
    return factors


def compute_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).logits


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def read_settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def list_ranks(model: Any) -> dict[str, int]:
    layers = model.get_base_model().named_modules()
    return {name: m.r["default"] for name, m in layers if hasattr(m, "lora_A")}


def join(
    original: Path, folder: Path, model_type: str, stages: list[dict[str, Any]],
    task: dict[str, Any], least_gap: float = 1e-2,
) -> PeftModel:  # fmt: skip
    """Return the model with the joined adapter, which answers as the stages in turn do.

    The task's adapter alone answers otherwise, by `least_gap` in logits.
    """
    before = adapt_in_turn(original, folder / "merged", stages)
    images = is_image(model_type)
    auto: Any = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    kind = None if images else TaskType.SEQ_CLS
    task = {"modules_to_save": HEAD.get(model_type, ["classifier"]), "task_type": kind} | task
    torch.manual_seed(5)
    last = adapt(auto.from_pretrained(folder / "merged", num_labels=3), 7, **task)
    prefix = f"{last.get_base_model().base_model_prefix}."
    own, inputs = extract_factors(last, prefix), draw_inputs(model_type)
    expected = compute_logits(last, inputs)
    models, gaps = [], []
    for name, parts in (("joined", [*before, own]), ("alone", [own])):
        write_adapter(
            folder / name, concat_factors(parts), prefix, get_saved_tensors(last),
            AdapterSettings(kind, task["modules_to_save"], "someone/base", "abc",
                            type(last.get_base_model())),
        )  # fmt: skip
        torch.manual_seed(6)
        base = auto.from_pretrained(original, num_labels=3)
        models.append(PeftModel.from_pretrained(base, folder / name).eval())
        gaps.append(float((compute_logits(models[-1], inputs) - expected).abs().max()))
    assert gaps[0] < 1e-5 and gaps[1] > least_gap
    assert sorted(p.name for p in (folder / "joined").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    return models[0]


@pytest.mark.parametrize("model_type", list(QUERY))
def test_joined_adapter_equals_the_stages_in_turn(
    model_type: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    original = tiny_model(model_type)
    modules = AutoModel.from_pretrained(original).named_modules()
    everywhere = [n for n, m in modules if isinstance(m, nn.Linear) and "layer" in n]
    stage = {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": everywhere}
    task = {"r": 3, "lora_alpha": 12, "target_modules": QUERY[model_type]}
    model = join(original, tmp_path, model_type, [stage], task)
    assert set(list_ranks(model).values()) == {5, 8}


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False)])
def test_ranks_alphas_and_scales_at_either_stage(
    first: bool, second: bool, tiny_model: Tiny, tmp_path: Path
) -> None:
    stage = {
        "r": 4, "lora_alpha": 6, "use_rslora": first, "target_modules": ["query", "dense"],
        "rank_pattern": {"layer.1.attention.self.query": 2, "intermediate.dense": 7},
        "alpha_pattern": {"layer.2.attention.self.query": 20},
    }  # fmt: skip
    task = {
        "r": 2, "lora_alpha": 3, "use_rslora": second, "target_modules": ["key", "query"],
        "rank_pattern": {"query": 6}, "alpha_pattern": {"key": 9},
    }  # fmt: skip
    model = join(tiny_model(), tmp_path, "bert", [stage], task)
    layers = dict(model.get_base_model().named_modules())
    for path, rank in (("attention.self.query", 8), ("attention.self.key", 2),
                       ("attention.output.dense", 4), ("intermediate.dense", 7)):  # fmt: skip
        layer: Any = layers[f"bert.encoder.layer.1.{path}"]
        assert layer.r["default"] == rank and layer.scaling["default"] == 1


def test_three_stages_are_joined(tiny_model: Tiny, tmp_path: Path) -> None:
    stages = [
        {"r": 2, "lora_alpha": 5, "target_modules": ["query"]},
        {"r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": ["query", "value"]},
    ]
    task = {"r": 4, "lora_alpha": 9, "target_modules": ["value", "key"]}
    ranks = list_ranks(join(tiny_model(), tmp_path, "bert", stages, task))
    by_kind = {name.rpartition(".")[2]: rank for name, rank in ranks.items()}
    assert by_kind == {"query": 5, "value": 7, "key": 4} and len(ranks) == 9


def test_layer_1_is_not_layer_11(tmp_path: Path) -> None:
    original = tmp_path / "original"
    AutoModel.from_config(tiny_config("bert", num_hidden_layers=12)).save_pretrained(original)
    stage = {
        "r": 2, "lora_alpha": 4, "target_modules": ["value"],
        "rank_pattern": {r"layer\.1\..*value": 3, r"layer\.11\..*value": 6},
    }  # fmt: skip
    task = {"r": 4, "lora_alpha": 4, "target_modules": ["value"], "layers_to_transform": [1, 10]}
    ranks = list_ranks(join(original, tmp_path, "bert", [stage], task))
    assert list(ranks.values()) == [2, 7, 2, 2, 2, 2, 2, 2, 2, 2, 6, 6]


class Nested(nn.Module):
    """Hold layers whose paths end alike, or differ by a dot: `l.q`, `inner.l.q`, `lxq`, `n.l.q`."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.ModuleDict({"q": nn.Linear(6, 6)})
        self.lxq = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"l": nn.ModuleDict({"q": nn.Linear(6, 6)})})
        self.n = nn.ModuleDict({"l": nn.ModuleDict({"q": nn.Linear(6, 6)})})


def test_each_pattern_matches_one_layer(tmp_path: Path) -> None:
    ranks = {"l.q": 1, "lxq": 2, "inner.l.q": 3, "n.l.q": 3}
    factors = {p: LoraFactors(torch.randn(r, 6), torch.randn(6, r)) for p, r in ranks.items()}
    write_adapter(tmp_path, factors, "", {}, AdapterSettings())
    again = extract_factors(PeftModel.from_pretrained(Nested(), tmp_path))
    assert {path: len(factors.a) for path, factors in again.items()} == ranks
    assert_same_factors(again, factors)


def assert_same_factors(one: dict[str, LoraFactors], other: dict[str, LoraFactors]) -> None:
    assert sorted(one) == sorted(other)
    assert all(torch.equal(x, y) for p in one for x, y in zip(one[p], other[p], strict=True))


def test_module_that_is_saved_whole_is_no_longer_adapted(tiny_model: Tiny, tmp_path: Path) -> None:
    stage = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "pooler.dense"]}
    task = {"r": 2, "lora_alpha": 4, "target_modules": ["value"]}
    model = join(tiny_model(), tmp_path, "bert", [stage], task, least_gap=0)
    assert not any("pooler" in name for name in list_ranks(model))
    targets = read_settings(tmp_path / "joined")["target_modules"]
    assert not any("pooler" in path for path in targets)
    names = sorted(name for name in read_tensors(tmp_path / "joined") if "pooler" in name)
    assert names == ["base_model.model.bert.pooler.dense." + part for part in ("bias", "weight")]


def test_adapter_of_features_has_no_head(tiny_model: Tiny, tmp_path: Path) -> None:
    stage = {"r": 3, "lora_alpha": 5, "target_modules": ["query", "dense"]}
    before = adapt_in_turn(tiny_model(), tmp_path / "merged", [stage])
    kind, folder = TaskType.FEATURE_EXTRACTION, tmp_path / "adapter"
    last = adapt(
        AutoModel.from_pretrained(tmp_path / "merged"), 1, r=2, lora_alpha=8, use_rslora=True,
        target_modules=["value"], task_type=kind,
    )  # fmt: skip
    # As fine-tuning holds it: the wrapper inside another module.
    own = extract_factors(nn.ModuleDict({"encoder": last}))
    joined = concat_factors([*before, own])
    write_adapter(folder, joined, "", get_saved_tensors(last), AdapterSettings(kind))
    reloaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model()), folder).eval()
    inputs = draw_inputs("bert")
    with torch.inference_mode():
        hidden, expected = (model(**inputs).last_hidden_state for model in (reloaded, last))
    assert (hidden - expected).abs().max() < 1e-5
    assert all(".lora_" in name for name in read_tensors(folder))


def test_folder_is_as_peft_writes_it(tiny_model: Tiny, tmp_path: Path) -> None:
    """Write one stage by both: the same names, and settings that differ by scale only."""
    source = tiny_model("vit")
    model = AutoModelForImageClassification.from_pretrained(source, num_labels=3)
    adapted = adapt(
        model, 0, r=4, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["classifier"]
    )
    adapted.save_pretrained(tmp_path / "theirs")
    write_adapter(
        tmp_path / "ours", extract_factors(adapted, "vit."), "vit.", get_saved_tensors(adapted),
        AdapterSettings(None, ["classifier"], str(source), None, type(model)),
    )  # fmt: skip
    ours, theirs = (read_tensors(tmp_path / folder) for folder in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with safe_open(tmp_path / "ours" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    settings, stock = (read_settings(tmp_path / folder) for folder in ("ours", "theirs"))
    differing = {name for name in stock if settings[name] != stock[name]}
    assert differing == {"target_modules", "lora_dropout"}
    paths = settings["target_modules"]
    assert paths == sorted(paths) and all(path.startswith("vit.") for path in paths)
    reloaded = AutoPeftModel.from_pretrained(tmp_path / "ours", num_labels=3).eval()
    inputs = draw_inputs("vit")
    gap = compute_logits(reloaded, inputs) - compute_logits(adapted, inputs)
    assert gap.abs().max() < 1e-6


def test_joined_factors_are_the_sum_of_the_updates() -> None:
    draw = [LoraFactors(torch.randn(r, 6), torch.randn(5, r)) for r in (2, 3, 1)]
    joint = concat_factors([{"x": draw[0]}, {"x": draw[1], "y": draw[2]}])
    assert list(joint) == ["x", "y"] and torch.equal(joint["y"].a, draw[2].a)
    assert joint["x"].a.shape == (5, 6) and joint["x"].b.shape == (5, 5)
    expected = draw[0].b @ draw[0].a + draw[1].b @ draw[1].a
    assert (joint["x"].b @ joint["x"].a - expected).abs().max() < 1e-5


def test_factors_merge_as_in_peft_and_survive_their_file(tiny_model: Tiny, tmp_path: Path) -> None:
    settings = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["query", "dense"]}
    adapted = adapt(AutoModel.from_pretrained(tiny_model()), 0, **settings)
    factors, plain = extract_factors(adapted), AutoModel.from_pretrained(tiny_model())
    assert "encoder.layer.0.attention.self.query" in factors
    save_factors(factors, tmp_path / "f.safetensors")
    assert_same_factors(load_factors(tmp_path / "f.safetensors"), factors)
    merge(plain, factors)
    theirs = adapted.merge_and_unload().state_dict()
    for name, tensor in plain.state_dict().items():
        assert (tensor - theirs[name]).abs().max() < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True},
        {"modules_to_save": ["pooler"]}, {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"}, {"init_lora_weights": "mica"}, {"use_qalora": True},
        {"init_lora_weights": "pissa_niter_4"}, {"trainable_token_indices": [1]},
        {"target_parameters": ["weight"]}, {"layer_replication": [[0, 2]]},
        {"fan_in_fan_out": True}, {"alora_invocation_tokens": [3]}, {"kasa_config": {"beta": 1.0}},
        {"monteclora_config": {"num_samples": 2}}, {"use_bdlora": {"nblocks": 2}},
        {"unheard_of": 1},
    ],
    ids=str,
)  # fmt: skip
def test_adapters_other_than_b_a_are_refused(settings: dict[str, Any]) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(RecipeError) as raised:
        check_concatenable({"r": 8, **settings}, "adapt.lora")
    shown = "true" if value is True else value
    assert f"adapt.lora.{name}={shown} cannot be joined" in str(raised.value)


def test_adapters_of_b_a_are_not_refused() -> None:
    check_concatenable(
        {
            "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "use_rslora": True, "bias": "none",
            "use_dora": False, "init_lora_weights": "gaussian", "rank_pattern": {"query": 2},
            "target_modules": "all-linear", "layers_to_transform": [0],
        },
        "finetune.lora",
    )  # fmt: skip
    check_concatenable(LoraConfig().to_dict(), "finetune.lora")
    check_concatenable({"modules_to_save": ["classifier"]}, "finetune.lora", last=True)


@pytest.mark.parametrize(
    ("model_type", "config", "prefix", "message"),
    [
        ("bert", LoraConfig(use_dora=True, target_modules=["query"]), "", "use_dora=true"),
        ("bert", LoraConfig(target_modules=["word_embeddings"]), "",
         r"word_embeddings \(Embedding\) cannot be joined"),
        ("vit", LoraConfig(target_modules=["projection"]), "", r"\(Conv2d\) cannot be joined"),
        ("bert", IA3Config(target_modules=["query"], feedforward_modules=[]), "",
         "type IA3 cannot be joined"),
        ("bert", LoraConfig(target_modules=["pooler.dense"]), "encoder.", "pooler.dense"),
    ],
)  # fmt: skip
def test_trained_adapters_of_another_kind_are_refused(
    model_type: str, config: Any, prefix: str, message: str, tiny_model: Tiny
) -> None:
    model = AutoModel.from_pretrained(tiny_model(model_type))
    with pytest.raises(TypeError, match="no adapter"):
        extract_factors(model)
    with pytest.raises(RecipeError, match=message):
        extract_factors(get_peft_model(model, config), prefix)
