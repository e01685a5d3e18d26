"""Save adapters of plain peft, fill a hub's cache with their bases, and plant defects in them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_processor, tiny_tokenizer

from hftl.config.section import Source
from hftl.models.source import find_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ["bad", "good"]
BASES = {
    "bert": ("bert", False), "bert-mlm": ("bert", True), "distilbert": ("distilbert", False),
    "roberta": ("roberta", False), "vit": ("vit", False), "vit-mae": ("vit_mae", False),
    "dinov2": ("dinov2", False),
}  # fmt: skip
SOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    "bert-mlm": ("bert-mlm", {"task_type": "SEQ_CLS", "target_modules": ["query", "value"],
                              "modules_to_save": ["pooler", "classifier"]}),
    "bert-dora": ("bert", {"task_type": "SEQ_CLS", "target_modules": ["query"], "use_dora": True,
                           "rank_pattern": {"layer.1.attention.self.query": 2},
                           "layers_to_transform": [0, 1]}),
    "bert-tokens": ("bert", {"task_type": "TOKEN_CLS", "target_modules": ["key", "dense"],
                             "use_rslora": True}),
    "distilbert": ("distilbert", {"task_type": "SEQ_CLS", "target_modules": ["q_lin"],
                                  "bias": "lora_only",
                                  "modules_to_save": ["pre_classifier", "classifier"]}),
    "roberta": ("roberta", {"task_type": "SEQ_CLS", "target_modules": r".*attention\.self\.key"}),
    "vit": ("vit", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    "vit-mae": ("vit-mae", {"target_modules": ["fc1"], "modules_to_save": ["classifier"]}),
    "dinov2": ("dinov2", {"target_modules": ["q_proj", "o_proj", "fc2"],
                          "modules_to_save": ["classifier"]}),
}  # fmt: skip
"""Made with plain peft; one that the Trainer trained and one that hftl wrote come beside them."""


def into_cache(cache: Path, name: str, folder: Path) -> None:
    place = cache / f"models--tiny--{name}"
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)


def snapshot(hub: Path, name: str) -> Path:
    return hub / f"models--tiny--{name}" / "snapshots" / COMMIT


def wrapped(base: Path, name: str, settings: dict[str, Any], seed: int = 3) -> Any:
    """Return a stock class with two labels under a LoRA adapter that is not zero."""
    import transformers
    from peft import LoraConfig, get_peft_model

    tokens = settings.get("task_type") == "TOKEN_CLS"
    kind = "Image" if (base / "preprocessor_config.json").exists() else (
        "Token" if tokens else "Sequence")  # fmt: skip
    torch.manual_seed(seed)
    if name == "vit-mae":
        source = find_source(Source(model=str(base)))
        model = transformers.ViTForImageClassification.from_pretrained(base, config=source.config)
    else:
        model = getattr(transformers, f"AutoModelFor{kind}Classification").from_pretrained(base)
    model.config.update(
        {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    )
    model.name_or_path = model.config._name_or_path = f"tiny/{name}"
    adapted = get_peft_model(model, LoraConfig(r=4, revision=COMMIT, **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return adapted


def save(adapted: Any, folder: Path) -> Path:
    """Save the adapter, the config with the labels, and the tokenizer or processor."""
    adapted.save_pretrained(folder)
    adapted.get_base_model().config.save_pretrained(folder)
    images = adapted.get_base_model().main_input_name == "pixel_values"
    (tiny_processor if images else tiny_tokenizer)(folder)
    return folder


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; an ellipsis removes one."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    settings |= changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))


def retensor(
    folder: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]
) -> None:
    """Change, rename or drop tensors of the adapter."""
    path = folder / "adapter_model.safetensors"
    tensors = [change(key, tensor) for key, tensor in load_file(path).items()]
    save_file({pair[0]: pair[1].contiguous() for pair in tensors if pair}, path, {"format": "pt"})


PLANTED: dict[str, tuple[str, str, Callable[[Path, Path], None]]] = {}
"""By name: the sound adapter it is planted in, the kind, and how."""


Planting = Callable[[Path, Path], None]


def plant(adapter: str, kind: str) -> Callable[[Planting], Planting]:
    def register(function: Planting) -> Planting:
        PLANTED[function.__name__] = (adapter, kind, function)
        return function

    return register


def drop(folder: Path, word: str) -> None:
    retensor(folder, lambda key, tensor: None if word in key else (key, tensor))


def reconfigure(folder: Path, **changes: Any) -> None:
    rewrite(folder / "adapter_config.json", **changes)


@plant("bert-mlm", "fresh")
def pooler_neither_trained_nor_saved(folder: Path, hub: Path) -> None:
    reconfigure(folder, modules_to_save=["classifier"])
    drop(folder, "pooler")


@plant("bert-mlm", "reload")
def pooler_drawn_anew_by_every_load(folder: Path, hub: Path) -> None:
    reconfigure(folder, modules_to_save=["classifier"])
    drop(folder, "pooler")


@plant("vit", "fresh")
def head_of_images_not_saved(folder: Path, hub: Path) -> None:
    reconfigure(folder, modules_to_save=None)
    drop(folder, "classifier")


@plant("distilbert", "fresh")
def pre_classifier_lost(folder: Path, hub: Path) -> None:
    reconfigure(folder, modules_to_save=["classifier"])
    drop(folder, "pre_classifier")


@plant("bert", "fresh")
def head_named_but_not_in_the_file(folder: Path, hub: Path) -> None:
    drop(folder, "classifier")


@plant("bert", "base")
def base_is_a_local_path(folder: Path, hub: Path) -> None:
    reconfigure(folder, base_model_name_or_path="/home/somebody/out/bert")


@plant("vit", "base")
def base_not_named(folder: Path, hub: Path) -> None:
    reconfigure(folder, base_model_name_or_path=None)


@plant("bert", "base-shape")
def base_with_fewer_layers(folder: Path, hub: Path) -> None:
    reconfigure(folder, base_model_name_or_path="tiny/bert-2")


@plant("bert", "base-shape")
def base_with_more_layers(folder: Path, hub: Path) -> None:
    reconfigure(folder, base_model_name_or_path="tiny/bert-4")


@plant("vit", "base-shape")
def base_of_another_width(folder: Path, hub: Path) -> None:
    reconfigure(folder, base_model_name_or_path="tiny/vit-wide")


@plant("bert", "base-shape")
def base_of_another_family(folder: Path, hub: Path) -> None:
    reconfigure(folder, base_model_name_or_path="tiny/distilbert")


@plant("bert", "base-weights")
def base_with_other_weights(folder: Path, hub: Path) -> None:
    rewrite(folder / "hftl.json", source={"weights_sha256": "0" * 64})


def as_in_transformers_4(folder: Path, model: str, lists: str) -> None:
    old = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value",
           "o_proj": "output.dense"}  # fmt: skip

    def name(key: str) -> str:
        for new, word in old.items():
            key = key.replace(f"attention.{new}", f"attention.{word}")
        key = key.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        return key.replace(f"{model}.layers.", f"{model}.{lists}.")

    retensor(folder, lambda key, tensor: (name(key), tensor))
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    words = {"q_proj": "query", "v_proj": "value", "o_proj": "attention.output.dense",
             "fc2": "output.dense"}  # fmt: skip
    reconfigure(folder, target_modules=[words[target] for target in targets])


@plant("vit", "stale-names")
def vit_of_transformers_4(folder: Path, hub: Path) -> None:
    as_in_transformers_4(folder, "vit", "encoder.layer")


@plant("vit", "stale-names")
def vit_with_old_targets_only(folder: Path, hub: Path) -> None:
    reconfigure(folder, target_modules=["query", "value"])


@plant("vit", "unsafe")
def pickled_weights(folder: Path, hub: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")


@plant("bert", "unsafe")
def pickled_arguments(folder: Path, hub: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")


@plant("bert", "unsafe")
def pickle_of_a_checkpoint(folder: Path, hub: Path) -> None:
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"\x80\x04.")


@plant("vit", "unsafe")
def program_code(folder: Path, hub: Path) -> None:
    (folder / "modeling_vit.py").write_text("raise SystemExit(99)\n")


@plant("vit", "unsafe")
def auto_map_in_the_config(folder: Path, hub: Path) -> None:
    rewrite(folder / "config.json", auto_map={"AutoModel": "modeling_vit.Model"})


@plant("bert", "unsafe")
def auto_map_in_the_tokenizer(folder: Path, hub: Path) -> None:
    rewrite(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]})


@plant("vit", "unsafe")
def foreign_parent_library(folder: Path, hub: Path) -> None:
    reconfigure(folder, auto_mapping={"base_model_class": "ViTForImageClassification",
                                  "parent_library": "evil_library"})  # fmt: skip


@plant("bert", "unsafe")
def megatron(folder: Path, hub: Path) -> None:
    reconfigure(folder, megatron_config={"x": 1}, megatron_core="evil_library")


@plant("bert", "unsafe")
def remote_code_asked_for(folder: Path, hub: Path) -> None:
    reconfigure(folder, tokenizer_kwargs={"trust_remote_code": True})


@plant("bert", "unsafe")
def vocabulary_outside(folder: Path, hub: Path) -> None:
    rewrite(folder / "tokenizer_config.json", vocab_file="../../.env")


@plant("bert", "unsafe")
def chat_template_outside(folder: Path, hub: Path) -> None:
    rewrite(folder / "tokenizer_config.json", chat_template=[{"name": "../x", "template": ""}])


@plant("vit", "unsafe")
def attention_kernel_of_the_hub(folder: Path, hub: Path) -> None:
    rewrite(folder / "config.json", _attn_implementation="somebody/kernel")


@plant("vit", "unsafe")
def link_out_of_the_folder(folder: Path, hub: Path) -> None:
    (folder / "notes.txt").symlink_to(hub / "models--tiny--vit" / "refs" / "main")


@plant("bert", "labels")
def labels_lost_that_are_recorded(folder: Path, hub: Path) -> None:
    rewrite(folder / "config.json", id2label={"0": "LABEL_0", "1": "LABEL_1"})
    rewrite(folder / "hftl.json", data={"labels": NAMES})


@plant("bert", "untrained")
def adapter_of_zeros(folder: Path, hub: Path) -> None:
    retensor(folder, lambda key, t: (key, t.zero_() if "lora_B" in key else t))


@plant("bert", "names")
def names_with_the_adapters_own(folder: Path, hub: Path) -> None:
    retensor(folder, lambda key, t: (key.replace("lora_A.", "lora_A.default."), t))


@plant("bert-dora", "config")
def dora_lost(folder: Path, hub: Path) -> None:
    reconfigure(folder, use_dora=False)


@plant("bert", "config")
def dora_never_trained(folder: Path, hub: Path) -> None:
    reconfigure(folder, use_dora=True)


@plant("bert", "tokenizer")
def tokenizer_beyond_the_embedding(folder: Path, hub: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"].append(tree["added_tokens"][0] | {"id": 55, "content": "[NEW]"})
    (folder / "tokenizer.json").write_text(json.dumps(tree))


@plant("bert", "labels")
def labels_in_another_order(folder: Path, hub: Path) -> None:
    rewrite(folder / "hftl.json", data={"labels": NAMES[::-1]})


@plant("bert", "labels")
def more_labels_than_outputs(folder: Path, hub: Path) -> None:
    rewrite(folder / "config.json", id2label={"0": "a", "1": "b", "2": "c"})


@plant("bert", "corrupt")
def weights_cut_short(folder: Path, hub: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


@plant("vit", "corrupt")
def weights_missing(folder: Path, hub: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


@plant("bert", "config")
def config_is_no_json(folder: Path, hub: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA",')


@plant("vit", "config")
def config_is_a_list(folder: Path, hub: Path) -> None:
    (folder / "adapter_config.json").write_text("[1]")


@plant("vit", "nan")
def weights_not_a_number(folder: Path, hub: Path) -> None:
    retensor(folder, lambda key, t: (key, t.fill_(float("nan")) if "lora_B" in key else t))


@plant("bert", "rank")
def rank_not_that_of_the_tensors(folder: Path, hub: Path) -> None:
    reconfigure(folder, r=8)


@plant("vit", "rank")
def alpha_of_nothing(folder: Path, hub: Path) -> None:
    reconfigure(folder, lora_alpha=0)


@plant("bert-dora", "rank")
def rank_pattern_lost(folder: Path, hub: Path) -> None:
    reconfigure(folder, rank_pattern={})


@plant("bert", "card")
def card_that_is_no_yaml(folder: Path, hub: Path) -> None:
    (folder / "README.md").write_text("---\nbase_model: [a\n---\n# It\n")


@plant("roberta", "tokenizer")
def no_tokenizer_anywhere(folder: Path, hub: Path) -> None:
    (folder / "tokenizer.json").unlink()
    reconfigure(folder, base_model_name_or_path="tiny/roberta-bare")


@plant("vit", "tokenizer")
def no_processor_anywhere(folder: Path, hub: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    reconfigure(folder, base_model_name_or_path="tiny/vit-bare")
