"""Check that private members of other libraries are used in hftl/train/hf_compat.py alone."""

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hftl.train import hf_compat

ROOT = Path(__file__).parent.parent / "hftl"
COMPAT = ROOT / "train" / "hf_compat.py"
LIBRARIES = ("transformers", "peft", "accelerate", "datasets", "huggingface_hub", "torch")
NAMED_TUPLE = {"_asdict", "_replace", "_fields"}
STANDARD_LIBRARY = {"_exit"}  # of os, documented
WRITTEN = {
    "_name_or_path", "_attn_implementation", "_attn_implementation_internal",  # keys of a config
    "_file", "_CLASSIFICATION_MAPPING",  # ends of names
}  # fmt: skip
PRIVATE = {
    "_n_gpu": TrainingArguments,
    "_is_avx512_bf16_supported": torch.cpu,
    "_is_amx_tile_supported": torch.cpu,
    "_version": torch.Tensor,
    "_attn_implementation": PreTrainedConfig,
    **dict.fromkeys(
        ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
        torch.nn.Linear(1, 1)),
    "_tokenizer": PreTrainedTokenizerFast,
    "_loss_function": PreTrainedModel,
    "_original_forward": None,
    "_is_accelerate_prepared": None,
    "_internal_call": None,
    **dict.fromkeys(
        ("_prepare_inputs", "_train_batch_size", "_remove_unused_columns", "_save",
         "_get_collator_with_removed_columns", "_get_num_items_in_batch", "_load_from_checkpoint",
         "_get_train_sampler", "_get_grad_norm", "_clip_grad_norm",
         "_load_optimizer_and_scheduler", "_load_rng_state",
         "_maybe_log_save_evaluate"), Trainer),
    **dict.fromkeys(("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")),
}  # fmt: skip
"""Every private member that hftl uses, and what has it; None: an argument, or set by accelerate."""


def is_private(name: str | None) -> bool:
    return bool(name) and name.startswith("_") and name[1:2] != "_" and name.strip("_") != ""


def list_private_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the private names that a module reads, sets, imports, takes or quotes."""
    for node in ast.walk(tree):
        names: list[str | None] = []
        match node:
            case ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=name):
                names = [name]
            case ast.Import():
                names = [part for alias in node.names for part in alias.name.split(".")]
            case ast.ImportFrom():
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            case ast.Constant(value=str(text)) if text.isidentifier():
                names = [text]
        yield from ((name, node.lineno) for name in names if is_private(name))  # pyright: ignore


def list_definitions(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that a module defines: functions, methods, fields, attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names = [name]
            case ast.Name(id=name, ctx=ast.Store()):
                names = [name]
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names = [name]
            case _:
                names = []
        yield from filter(is_private, names)


def list_members(cls: type) -> set[str]:
    """Return the names of a class's members, with what its methods assign to self."""
    try:
        source = dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # A class that is written in C has no source.
        return set(vars(cls))
    return {*vars(cls), *list_definitions(ast.parse(source))}


Trees = dict[Path, ast.Module]


@pytest.fixture(scope="module")
def trees() -> Trees:
    """Return every module of hftl, parsed; not at import, which every worker does."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}


def test_hf_compat_uses_the_private_members_that_are_listed_here(trees: Trees) -> None:
    assert {name for name, _ in list_private_names(trees[COMPAT])} == set(PRIVATE)


def test_no_other_module_uses_a_private_member_of_a_library(trees: Trees) -> None:
    own = {n for path, tree in trees.items() if path != COMPAT for n in list_definitions(tree)}
    allowed = own | NAMED_TUPLE | STANDARD_LIBRARY | WRITTEN
    outside = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in trees.items()
        if path != COMPAT
        for name, line in list_private_names(tree)
        if name not in allowed
    ]
    assert not outside, outside


def test_no_class_overrides_a_private_member_of_its_base_in_a_library(trees: Trees) -> None:
    """Forbid accidents too: an attribute of the same name changes how the base works."""
    overridden = []
    for path, tree in trees.items():
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        names = {node.name: set(list_definitions(node)) for node in classes}
        if path == COMPAT or not any(names.values()):
            continue
        module = import_module(".".join(path.relative_to(ROOT.parent).with_suffix("").parts))
        for name, members in names.items():
            for base in getattr(module, name).__mro__:
                if members and base.__module__.split(".")[0] in LIBRARIES:
                    overridden += [f"{name}.{member}" for member in members & list_members(base)]
    assert not overridden, overridden


def test_libraries_still_have_the_members() -> None:
    for name, owner in PRIVATE.items():
        if owner is not None and not hasattr(owner, name):
            assert inspect.isclass(owner) and f"self.{name}" in inspect.getsource(owner), name


@pytest.mark.parametrize(
    "member",
    [m for m in vars(hf_compat).values() if getattr(m, "__module__", "") == hf_compat.__name__],
)
def test_each_docstring_names_the_missing_public_api(member: object) -> None:
    assert "Missing: " in (inspect.getdoc(member) or "")
