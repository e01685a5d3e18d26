"""Refuse settings by which a library would run foreign code, or read a file elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_csv
from support.planted_defects import reconfigure, rewrite, save, wrapped
from support.tiny import save_tiny, tiny_tokenizer
from transformers import AutoTokenizer

import hftl
from hftl.config.section import Source
from hftl.errors import HftlError, RecipeError, RunFolderError
from hftl.inference.compare import compare_models
from hftl.models import foreign_code
from hftl.models.foreign_code import find_foreign_setting
from hftl.models.heads import build_model
from hftl.models.source import find_source, load_tokenizer

LORA = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
SETTINGS: list[tuple[str, Any, str | None]] = [
    ("adapter_config.json", {"megatron_config": {"a": 1}, "megatron_core": "megatron.evil"},
     "megatron_config"),
    ("adapter_config.json", {"megatron_core": "evil"}, "megatron_core"),
    ("adapter_config.json", {"auto_mapping": {"parent_library": "__main__"}}, None),
    ("adapter_config.json", {"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs"),
    ("adapter_config.json", {"megatron_config": None, "megatron_core": "megatron.core"}, None),
    ("config.json", {"attn_implementation": "evil/kernel"}, "evil/kernel"),
    ("config.json", {"text_config": {"_attn_implementation": "evil/kernel"}}, "evil/kernel"),
    ("config.json", {"_experts_implementation": "evil/kernel"}, "evil/kernel"),
    ("config.json", {"attn_implementation": "sdpa", "model_args": {"depth": 2}}, None),
    ("config.json", {"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
    ("config.json", {"model_args": {"pretrained_cfg": {"file": "x"}}}, "pretrained_cfg"),
    ("config.json", {"vision_config": {"model_args": {"checkpoint_path": "x"}}}, "checkpoint_path"),
    ("tokenizer_config.json", {"vocab_file": "../../.env"}, "vocab_file"),
    ("tokenizer_config.json", {"special_tokens_map_file": "/home/me/map.json"}, None),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.4.json"]}, "../tokenizer.4"),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.json"]}, None),
    ("tokenizer_config.json", {"vocab": ".env"}, "vocab"),
    ("tokenizer_config.json", {"merges": ["a b"]}, None),
    ("special_tokens_map.json", {"tokenizer_file": "x.json"}, "tokenizer_file"),
    ("special_tokens_map.json", {"vocab": ".env"}, "vocab"),
    ("special_tokens_map.json", {"cls_token": "[CLS]"}, None),
    ("tokenizer_config.json", {"chat_template": [{"name": "../x", "template": ""}]}, "../x"),
    ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, None),
    ("model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}, "../x.safetensors"),
    ("processor_config.json", [], None),
]  # fmt: skip


@pytest.mark.parametrize(("file", "settings", "words"), SETTINGS)
def test_setting_that_loads_something_foreign_is_found(
    file: str, settings: Any, words: str | None, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(json.dumps(settings))
    fault = find_foreign_setting(tmp_path)
    assert fault is None if words is None else fault and file in fault and words in fault


def test_settings_too_large_to_be_looked_through_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"attn_implementation": "evil/kernel"}))
    monkeypatch.setattr(foreign_code, "MAX_SETTINGS_BYTES", 20)
    assert find_foreign_setting(tmp_path) == "config.json is larger than 20 bytes"


def test_vocabulary_that_the_map_of_special_tokens_names_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers puts the keys of this file in the place of the tokenizer's own arguments."""
    base = save_tiny("bert", tmp_path / "base")
    words = sorted(load_tokenizer(find_source(Source(model=str(base)))).get_vocab())
    (base / "vocab.txt").write_text("\n".join(words))
    (tmp_path / ".env").write_text("\n".join([*words, "secret"]))
    monkeypatch.chdir(tmp_path)
    (base / "tokenizer.json").unlink()
    rewrite(base / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    rewrite(base / "special_tokens_map.json", vocab=".env")
    assert "secret" in AutoTokenizer.from_pretrained(base).get_vocab()
    with pytest.raises(RecipeError, match=r"special_tokens_map\.json: vocab names a file"):
        find_source(Source(model=str(base)))


@pytest.mark.parametrize("name", ["vocab.txt", "additional_chat_templates/x.jinja"])
def test_link_out_of_the_folder_is_found_but_for_the_cache_of_a_hub(
    name: str, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    folder, cached = tmp_path / "model", tmp_path / "models--a--b" / "snapshots" / "c"
    for place, target in ((folder, secret), (cached, cached.parent.parent / "blobs" / "d")):
        (place / name).parent.mkdir(parents=True)
        target.parent.mkdir(exist_ok=True)
        target.write_text("{}")
        (place / name).symlink_to(target)
    why = f"{name} is a link that leads out of the folder, and no file of it"
    assert find_foreign_setting(folder) == why
    assert find_foreign_setting(cached) is None
    (cached / name).unlink()
    (cached / name).symlink_to(secret)
    assert find_foreign_setting(cached) is not None


def test_module_that_an_adapter_names_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny("bert", tmp_path / "base")
    adapter = save(wrapped(base, "bert", LORA), tmp_path / "adapter")
    reconfigure(adapter, base_model_name_or_path=str(base), revision=None)
    hftl.load(adapter)
    (tmp_path / "megatron").mkdir()
    mark = tmp_path / "mark"
    (tmp_path / "megatron" / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    reconfigure(adapter, megatron_config={"a": 1}, megatron_core="megatron.evil")
    table = write_csv(tmp_path / "rows.csv", ["text", "label"], [("a", "x")])
    for use in (lambda: hftl.load(adapter), lambda: compare_models([str(adapter)], table, None)):
        with pytest.raises(RunFolderError, match=r"megatron_config .* hftl doctor"):
            use()
    assert not mark.exists()


def test_source_or_base_that_names_foreign_code_is_refused(tmp_path: Path) -> None:
    base = save_tiny("bert", tmp_path / "base")
    adapter = save(wrapped(base, "bert", LORA), tmp_path / "adapter")
    reconfigure(adapter, base_model_name_or_path=str(base), revision=None)
    rewrite(base / "config.json", attn_implementation="evil/kernel")
    for use in (lambda: find_source(Source(model=str(base))), lambda: hftl.load(adapter)):
        with pytest.raises(RecipeError, match="evil/kernel"):
            use()


@pytest.mark.parametrize("changes", [
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"attn_implementation": "flash_attention_2"},
])  # fmt: skip
def test_source_that_needs_a_missing_package_is_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny("bert", tmp_path)
    rewrite(tmp_path / "config.json", **changes)
    source = find_source(Source(model=str(tmp_path)))
    with pytest.raises(RecipeError, match=r"does not load: .*(optimum|FlashAttention2)"):
        build_model(source, "classification", "mean", 2, ["a", "b"], 0)


def test_source_with_an_adapter_beside_its_weights_is_refused(tmp_path: Path) -> None:
    """transformers would load the adapter, too, and no hash would tell of it."""
    base = save_tiny("bert", tmp_path / "base")
    wrapped(base, "bert", LORA).save_pretrained(base)
    with pytest.raises(RecipeError, match=r"adapter_config\.json"):
        find_source(Source(model=str(base)))


def test_code_of_a_repository_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("it asks"))
    base = save_tiny("bert", tmp_path / "base")
    mark = tmp_path / "mark"
    (base / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    codes = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", None]}
    for file in ("config.json", "tokenizer_config.json"):
        rewrite(base / file, auto_map=codes)
    load_tokenizer(find_source(Source(model=str(base))))  # transformers' own class reads it
    whole = tmp_path / "whole"
    wrapped(base, "bert", LORA).merge_and_unload().save_pretrained(whole)
    tiny_tokenizer(whole)
    rewrite(base / "config.json", model_type="evil")
    (base / "evil.py").rename(whole / "evil.py")
    rewrite(whole / "config.json", model_type="evil", auto_map=codes)
    for use in (lambda: find_source(Source(model=str(base))), lambda: hftl.load(whole)):
        with pytest.raises(HftlError, match="custom code|evil") as caught:
            use()
        assert caught.value.exit_code in (2, 4)
    assert not mark.exists()
