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


def drop(folder: Path, word: str) -> None:
    retensor(folder, lambda key, tensor: None if word in key else (key, tensor))


def reconfigure(folder: Path, **changes: Any) -> None:
    rewrite(folder / "adapter_config.json", **changes)


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


def drop_and_forget(folder: Path, name: str, modules_to_save: list[str] | None) -> None:
    reconfigure(folder, modules_to_save=modules_to_save)
    drop(folder, name)


def reconfigure_tokenizer(folder: Path, **changes: Any) -> None:
    rewrite(folder / "tokenizer_config.json", **changes)


def add_token_beyond_the_embedding(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"].append(tree["added_tokens"][0] | {"id": 55, "content": "[NEW]"})
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def lose_recorded_labels(folder: Path) -> None:
    rewrite(folder / "config.json", id2label={"0": "LABEL_0", "1": "LABEL_1"})
    rewrite(folder / "hftl.json", data={"labels": NAMES})


def cut_weights_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def save_checkpoint_of_pickles(folder: Path) -> None:
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"\x80\x04.")


def link_out_of_the_folder(folder: Path) -> None:
    target = folder.parent / "outside.txt"
    target.write_text("outside")
    (folder / "notes.txt").symlink_to(target)


def remove_and_name_a_bare_base(folder: Path, file: str, base: str) -> None:
    (folder / file).unlink()
    reconfigure(folder, base_model_name_or_path=base)


def name_base(base: str | None) -> Callable[[Path], None]:
    return lambda folder: reconfigure(folder, base_model_name_or_path=base)


def settings(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: reconfigure(folder, **changes)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def lora_b(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda f: retensor(f, lambda key, t: (key, change(t) if "lora_B" in key else t))


PICKLE = b"\x80\x04."
AUTO_MAPPING = {
    "base_model_class": "ViTForImageClassification", "parent_library": "evil_library",
}  # fmt: skip
PLANTED: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "pooler neither trained nor saved": (
        "bert-mlm", "fresh", lambda f: drop_and_forget(f, "pooler", ["classifier"])),
    "pooler drawn anew by every load": (
        "bert-mlm", "reload", lambda f: drop_and_forget(f, "pooler", ["classifier"])),
    "head of images not saved": (
        "vit", "fresh", lambda f: drop_and_forget(f, "classifier", None)),
    "pre_classifier lost": (
        "distilbert", "fresh", lambda f: drop_and_forget(f, "pre_classifier", ["classifier"])),
    "head named but not in the file": ("bert", "fresh", lambda f: drop(f, "classifier")),
    "base is a local path": ("bert", "base", name_base("/home/somebody/out/bert")),
    "base not named": ("vit", "base", name_base(None)),
    "base with fewer layers": ("bert", "base-shape", name_base("tiny/bert-2")),
    "base with more layers": ("bert", "base-shape", name_base("tiny/bert-4")),
    "base of another width": ("vit", "base-shape", name_base("tiny/vit-wide")),
    "base of another family": ("bert", "base-shape", name_base("tiny/distilbert")),
    "base with other weights": ("bert", "base-weights", lambda f: rewrite(
        f / "hftl.json", source={"weights_sha256": "0" * 64})),
    "vit of transformers 4": (
        "vit", "stale-names", lambda f: as_in_transformers_4(f, "vit", "encoder.layer")),
    "old targets only": ("vit", "stale-names", settings(target_modules=["query", "value"])),
    "pickled weights": ("vit", "unsafe", write("adapter_model.bin", PICKLE)),
    "pickled arguments": ("bert", "unsafe", write("training_args.bin", PICKLE)),
    "pickle of a checkpoint": ("bert", "unsafe", save_checkpoint_of_pickles),
    "program code": ("vit", "unsafe", write("modeling_vit.py", b"raise SystemExit(99)\n")),
    "auto_map in the config": ("vit", "unsafe", lambda f: rewrite(
        f / "config.json", auto_map={"AutoModel": "modeling_vit.Model"})),
    "auto_map in the tokenizer": ("bert", "unsafe", lambda f: reconfigure_tokenizer(
        f, auto_map={"AutoTokenizer": ["t.T", None]})),
    "foreign parent library": ("vit", "unsafe", settings(auto_mapping=AUTO_MAPPING)),
    "megatron": ("bert", "unsafe", settings(megatron_config={"x": 1}, megatron_core="evil")),
    "remote code": ("bert", "unsafe", settings(tokenizer_kwargs={"trust_remote_code": True})),
    "vocabulary outside": (
        "bert", "unsafe", lambda f: reconfigure_tokenizer(f, vocab_file="../../.env")),
    "chat template outside": ("bert", "unsafe", lambda f: reconfigure_tokenizer(
        f, chat_template=[{"name": "../x", "template": ""}])),
    "attention kernel of the hub": ("vit", "unsafe", lambda f: rewrite(
        f / "config.json", _attn_implementation="somebody/kernel")),
    "link out of the folder": ("vit", "unsafe", link_out_of_the_folder),
    "recorded labels lost": ("bert", "labels", lose_recorded_labels),
    "labels in another order": ("bert", "labels", lambda f: rewrite(
        f / "hftl.json", data={"labels": NAMES[::-1]})),
    "more labels than outputs": ("bert", "labels", lambda f: rewrite(
        f / "config.json", id2label={"0": "a", "1": "b", "2": "c"})),
    "adapter of zeros": ("bert", "untrained", lora_b(torch.zeros_like)),
    "adapter's name in the keys": ("bert", "names", lambda f: retensor(
        f, lambda key, t: (key.replace("lora_A.", "lora_A.default."), t))),
    "dora lost": ("bert-dora", "config", settings(use_dora=False)),
    "dora never trained": ("bert", "config", settings(use_dora=True)),
    "config is no JSON": ("bert", "config", write("adapter_config.json", b'{"peft_type": "LORA",')),
    "config is a list": ("vit", "config", write("adapter_config.json", b"[1]")),
    "weights cut short": ("bert", "corrupt", cut_weights_short),
    "weights missing": (
        "vit", "corrupt", lambda f: (f / "adapter_model.safetensors").unlink()),
    "weights not a number": ("vit", "nan", lora_b(lambda t: t.fill_(float("nan")))),
    "rank not that of the tensors": ("bert", "rank", settings(r=8)),
    "alpha of zero": ("vit", "rank", settings(lora_alpha=0)),
    "rank pattern lost": ("bert-dora", "rank", settings(rank_pattern={})),
    "card that is no YAML": (
        "bert", "card", write("README.md", b"---\nbase_model: [a\n---\n# It\n")),
    "token beyond the embedding": ("bert", "tokenizer", add_token_beyond_the_embedding),
    "no tokenizer anywhere": ("roberta", "tokenizer", lambda f: remove_and_name_a_bare_base(
        f, "tokenizer.json", "tiny/roberta-bare")),
    "no processor anywhere": ("vit", "tokenizer", lambda f: remove_and_name_a_bare_base(
        f, "preprocessor_config.json", "tiny/vit-bare")),
}  # fmt: skip
"""By name: the sound adapter that it is planted in, the kind of the finding, and the change."""


def plant(name: str, folder: Path) -> None:
    """Plant a defect in a copy of its adapter."""
    PLANTED[name][2](folder)
