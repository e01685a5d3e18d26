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
from support.tiny import is_image, tiny_config
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from hftl.errors import RecipeError
from hftl.models.lora_concat import (
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


def stage(model: Any, seed: int, **settings: Any) -> Any:
    """Return the model with an adapter, and draw all that the adapter saves at random."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(lora_dropout=0.1, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return adapted.eval()


def linears(model: nn.Module, within: str = "") -> list[str]:
    """Return the paths of all linear layers whose path contains `within`."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and within in n]


def auto_of(model_type: str) -> Any:
    images = is_image(model_type)
    return AutoModelForImageClassification if images else AutoModelForSequenceClassification


def inputs_of(model_type: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    if is_image(model_type):
        return {"pixel_values": torch.randn(4, 3, 32, 32)}
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[0, 7:] = 0
    return {"input_ids": torch.randint(5, 30, (4, 12)), "attention_mask": mask}


def adapted_in_turn(
    original: Path, folder: Path, stages: list[dict[str, Any]]
) -> list[dict[str, LoraFactors]]:
    """Adapt the encoder stage by stage, each merged before the next, and save it."""
    factors = []
    for number, settings in enumerate(stages):
        base = AutoModel.from_pretrained(original if number == 0 else folder)
        factors.append(extract_factors(stage(base, number, **settings)))
        plain = AutoModel.from_pretrained(original if number == 0 else folder)
        merge(plain, factors[-1])
        plain.save_pretrained(folder)
    return factors


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).logits


def differences(
    original: Path, tmp: Path, model_type: str, adapt: list[dict[str, Any]], task: dict[str, Any]
) -> tuple[float, float, PeftModel]:
    """Return the difference in logits of the joined adapter from the stages in turn.

    Also how far the task's adapter alone does, and the model with the joined adapter.
    """
    before = adapted_in_turn(original, tmp / "merged", adapt)
    auto = auto_of(model_type)
    kind = None if is_image(model_type) else TaskType.SEQ_CLS
    task = {"modules_to_save": HEAD.get(model_type, ["classifier"]), "task_type": kind} | task
    torch.manual_seed(5)
    last = stage(auto.from_pretrained(tmp / "merged", num_labels=3), 7, **task)
    prefix = f"{last.get_base_model().base_model_prefix}."
    own = extract_factors(last, prefix)
    inputs = inputs_of(model_type)
    expected = logits(last, inputs)
    reloaded = []
    for name, stages in (("joined", [*before, own]), ("alone", [own])):
        write_adapter(
            tmp / name, concat_factors(stages), prefix, get_saved_tensors(last), kind,
            task["modules_to_save"], "someone/base", "abc", type(last.get_base_model()),
        )  # fmt: skip
        torch.manual_seed(6)
        base = auto.from_pretrained(original, num_labels=3)
        reloaded.append(PeftModel.from_pretrained(base, tmp / name).eval())
    gaps = [float((logits(model, inputs) - expected).abs().max()) for model in reloaded]
    assert sorted(p.name for p in (tmp / "joined").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    return gaps[0], gaps[1], reloaded[0]


@pytest.mark.parametrize("model_type", list(QUERY))
def test_joined_adapters_equal_the_stages_in_turn(
    model_type: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    original = tiny_model(model_type)
    everywhere = linears(AutoModel.from_pretrained(original), "layer")
    adapt = {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": everywhere}
    task = {"r": 3, "lora_alpha": 12, "target_modules": QUERY[model_type]}
    exact, alone, model = differences(original, tmp_path, model_type, [adapt], task)
    assert exact < 1e-5 and alone > 1e-2
    ranks = {m.r["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert ranks == {5, 8}


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False)])
def test_ranks_alphas_and_scales_at_either_stage(
    first: bool, second: bool, tiny_model: Tiny, tmp_path: Path
) -> None:
    adapt = {
        "r": 4, "lora_alpha": 6, "use_rslora": first, "target_modules": ["query", "dense"],
        "rank_pattern": {"layer.1.attention.self.query": 2, "intermediate.dense": 7},
        "alpha_pattern": {"layer.2.attention.self.query": 20},
    }  # fmt: skip
    task = {
        "r": 2, "lora_alpha": 3, "use_rslora": second, "target_modules": ["key", "query"],
        "rank_pattern": {"query": 6}, "alpha_pattern": {"key": 9},
    }  # fmt: skip
    exact, alone, model = differences(tiny_model(), tmp_path, "bert", [adapt], task)
    assert exact < 1e-5 and alone > 1e-2
    layers = dict(model.get_base_model().named_modules())
    block = "bert.encoder.layer.1"
    for path, rank in (("attention.self.query", 8), ("attention.self.key", 2),
                       ("attention.output.dense", 4), ("intermediate.dense", 7)):  # fmt: skip
        layer: Any = layers[f"{block}.{path}"]
        assert layer.r["default"] == rank and layer.scaling["default"] == 1


def test_three_stages(tiny_model: Tiny, tmp_path: Path) -> None:
    adapt = [
        {"r": 2, "lora_alpha": 5, "target_modules": ["query"]},
        {"r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": ["query", "value"]},
    ]
    task = {"r": 4, "lora_alpha": 9, "target_modules": ["value", "key"]}
    exact, alone, model = differences(tiny_model(), tmp_path, "bert", adapt, task)
    assert exact < 1e-5 and alone > 1e-2
    ranks = {n: m.r["default"] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    by_kind = {name.rpartition(".")[2]: rank for name, rank in ranks.items()}
    assert by_kind == {"query": 5, "value": 7, "key": 4} and len(ranks) == 9


def test_layer_1_is_not_layer_11(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = tmp_path / "original"
    AutoModel.from_config(tiny_config("bert", num_hidden_layers=12)).save_pretrained(original)
    adapt = {
        "r": 2, "lora_alpha": 4, "target_modules": ["value"],
        "rank_pattern": {r"layer\.1\..*value": 3, r"layer\.11\..*value": 6},
    }  # fmt: skip
    task = {"r": 4, "lora_alpha": 4, "target_modules": ["value"], "layers_to_transform": [1, 10]}
    exact, alone, model = differences(original, tmp_path, "bert", [adapt], task)
    assert exact < 1e-5 and alone > 1e-2
    layers: Any = dict(model.get_base_model().named_modules())
    ranks = [layers[f"bert.encoder.layer.{i}.attention.self.value"].r["default"] for i in range(12)]
    assert ranks == [2, 7, 2, 2, 2, 2, 2, 2, 2, 2, 6, 6]


class Nested(nn.Module):
    """Hold layers whose paths end alike, or differ by a dot: `l.q`, `inner.l.q`, `lxq`, `n.l.q`."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.ModuleDict({"q": nn.Linear(6, 6)})
        self.lxq = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"l": nn.ModuleDict({"q": nn.Linear(6, 6)})})
        self.n = nn.ModuleDict({"l": nn.ModuleDict({"q": nn.Linear(6, 6)})})


def test_patterns_are_of_one_layer_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ranks = {"l.q": 1, "lxq": 2, "inner.l.q": 3, "n.l.q": 3}
    factors = {p: LoraFactors(torch.randn(r, 6), torch.randn(6, r)) for p, r in ranks.items()}
    write_adapter(tmp_path, factors, "", {}, None, None, None, None)
    adapted = PeftModel.from_pretrained(Nested(), tmp_path)
    again = extract_factors(adapted)
    assert {path: len(factors.a) for path, factors in again.items()} == ranks
    assert all(
        torch.equal(x, y) for p in factors for x, y in zip(again[p], factors[p], strict=True)
    )


def test_a_module_that_is_saved_whole_is_no_longer_adapted(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    adapt = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "pooler.dense"]}
    task = {"r": 2, "lora_alpha": 4, "target_modules": ["value"]}
    exact, _, model = differences(tiny_model(), tmp_path, "bert", [adapt], task)
    assert exact < 1e-5
    assert not any("pooler" in n for n, m in model.named_modules() if hasattr(m, "lora_A"))
    settings = json.loads((tmp_path / "joined/adapter_config.json").read_text())
    assert not any("pooler" in path for path in settings["target_modules"])
    with safe_open(tmp_path / "joined/adapter_model.safetensors", "pt") as held:
        names = [name for name in held.keys() if "pooler" in name]  # noqa: SIM118
    assert names == ["base_model.model.bert.pooler.dense." + part for part in ("bias", "weight")]


def test_an_adapter_of_features_without_a_head(tiny_model: Tiny, tmp_path: Path) -> None:
    before = adapted_in_turn(
        tiny_model(), tmp_path / "merged",
        [{"r": 3, "lora_alpha": 5, "target_modules": ["query", "dense"]}],
    )  # fmt: skip
    last = stage(
        AutoModel.from_pretrained(tmp_path / "merged"), 1, r=2, lora_alpha=8, use_rslora=True,
        target_modules=["value"], task_type=TaskType.FEATURE_EXTRACTION,
    )  # fmt: skip
    # As fine-tuning holds it: the wrapper inside another module.
    own = extract_factors(nn.ModuleDict({"encoder": last}))
    folder = tmp_path / "adapter"
    kind = TaskType.FEATURE_EXTRACTION
    write_adapter(
        folder, concat_factors([*before, own]), "", get_saved_tensors(last), kind, None, None, None
    )
    reloaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model()), folder).eval()
    inputs = inputs_of("bert")
    with torch.inference_mode():
        expected = last(**inputs).last_hidden_state
        assert (reloaded(**inputs).last_hidden_state - expected).abs().max() < 1e-5
    with safe_open(folder / "adapter_model.safetensors", "pt") as held:
        assert all(".lora_" in name for name in held.keys())  # noqa: SIM118


def test_the_folder_is_as_peft_writes_it(tiny_model: Tiny, tmp_path: Path) -> None:
    """Write one stage by both: the same names, and settings that differ by scale only."""
    model = auto_of("vit").from_pretrained(tiny_model("vit"), num_labels=3)
    adapted = stage(
        model, 0, r=4, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["classifier"]
    )
    adapted.save_pretrained(tmp_path / "theirs")
    write_adapter(
        tmp_path / "ours",
        extract_factors(adapted, "vit."),
        "vit.",
        get_saved_tensors(adapted),
        None,
        ["classifier"],
        str(tiny_model("vit")),
        None,
        type(model),
    )
    tensors = []
    for folder in ("ours", "theirs"):
        with safe_open(tmp_path / folder / "adapter_model.safetensors", "pt") as held:
            assert held.metadata() == {"format": "pt"}
            tensors.append({name: held.get_tensor(name) for name in held.keys()})  # noqa: SIM118
    assert set(tensors[0]) == set(tensors[1])
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    ours, theirs = (
        json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs")
    )
    assert {name for name in theirs if ours[name] != theirs[name]} == {
        "target_modules", "lora_dropout",
    }  # fmt: skip
    paths = ours["target_modules"]
    assert paths == sorted(paths) and all(path.startswith("vit.") for path in paths)
    reloaded = AutoPeftModel.from_pretrained(tmp_path / "ours", num_labels=3)
    inputs = inputs_of("vit")
    assert (logits(reloaded.eval(), inputs) - logits(adapted, inputs)).abs().max() < 1e-6


def test_joined_adapter_is_the_sum_of_the_updates() -> None:
    torch.manual_seed(0)
    draw = [LoraFactors(torch.randn(r, 6), torch.randn(5, r)) for r in (2, 3, 1)]
    joint = concat_factors([{"x": draw[0]}, {"x": draw[1], "y": draw[2]}])
    assert list(joint) == ["x", "y"] and torch.equal(joint["y"].a, draw[2].a)
    assert joint["x"].a.shape == (5, 6) and joint["x"].b.shape == (5, 5)
    expected = draw[0].b @ draw[0].a + draw[1].b @ draw[1].a
    assert (joint["x"].b @ joint["x"].a - expected).abs().max() < 1e-5


def test_merging_equals_pefts_own(tiny_model: Tiny) -> None:
    adapted = stage(
        AutoModel.from_pretrained(tiny_model()), 0, r=3, lora_alpha=5, use_rslora=True,
        target_modules=["query", "dense"],
    )  # fmt: skip
    plain = AutoModel.from_pretrained(tiny_model())
    merge(plain, extract_factors(adapted))
    theirs = adapted.merge_and_unload().state_dict()
    for name, tensor in plain.state_dict().items():
        assert (tensor - theirs[name]).abs().max() < 1e-6


def test_factors_survive_their_file(tmp_path: Path, tiny_model: Tiny) -> None:
    adapted = stage(AutoModel.from_pretrained(tiny_model()), 0, r=3, target_modules=["query"])
    factors = extract_factors(adapted)
    assert "encoder.layer.0.attention.self.query" in factors
    save_factors(factors, tmp_path / "f.safetensors")
    again = load_factors(tmp_path / "f.safetensors")
    assert sorted(again) == sorted(factors)
    assert all(
        torch.equal(x, y) for p in factors for x, y in zip(again[p], factors[p], strict=True)
    )


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


def test_trained_adapters_of_another_kind_are_refused(tiny_model: Tiny) -> None:
    def fresh() -> Any:
        return AutoModel.from_pretrained(tiny_model())

    with pytest.raises(RecipeError, match="use_dora=true"):
        extract_factors(
            get_peft_model(fresh(), LoraConfig(use_dora=True, target_modules=["query"]))
        )
    with pytest.raises(RecipeError, match=r"word_embeddings \(Embedding\) cannot be joined"):
        extract_factors(get_peft_model(fresh(), LoraConfig(target_modules=["word_embeddings"])))
    images = AutoModel.from_pretrained(tiny_model("vit"))
    with pytest.raises(RecipeError, match=r"\(Conv2d\) cannot be joined"):
        extract_factors(get_peft_model(images, LoraConfig(target_modules=["projection"])))
    with pytest.raises(RecipeError, match="type IA3 cannot be joined"):
        ia3 = IA3Config(target_modules=["query"], feedforward_modules=[])
        extract_factors(get_peft_model(fresh(), ia3))
    with pytest.raises(RecipeError, match="pooler.dense"):
        adapted = get_peft_model(fresh(), LoraConfig(target_modules=["pooler.dense"]))
        extract_factors(adapted, "encoder.")
    with pytest.raises(TypeError, match="no adapter"):
        extract_factors(fresh())
