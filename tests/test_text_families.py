"""Train families of text encoders that fewer tests name: what moves, and what is published."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.published_model import TOKENS, open_context, publish_model, write_data

from hftl.config.section import Source
from hftl.finetune.trainable import prepare
from hftl.models.heads import build_model
from hftl.models.lora import list_adapted_layers
from hftl.models.source import find_source
from hftl.publish.checks import measure_reload_difference

Tiny = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("fast_reload")

FAMILIES = {
    "deberta": ("deberta.encoder.layer.2. pooler. classifier.", 18, "pooler classifier"),
    "esm": (
        "esm.encoder.layer.2. esm.encoder.emb_layer_norm_after. classifier.", 18, "classifier",
    ),
    "eurobert": ("model.layers.2. model.norm. dense. classifier.", 21, "dense classifier"),
    "gte": ("gte.layers.2. gte.pooler. classifier.", 21, "gte.pooler.dense classifier"),
    "jina_embeddings_v3": ("roberta.layers.2. classifier.", 18, "classifier"),
    "nomic_bert": (
        "nomic_bert.layers.2. nomic_bert.pooler. classifier.", 21,
        "nomic_bert.pooler.dense classifier",
    ),
}  # fmt: skip
"""What `partial` trains of one block, by the start of its name; under LoRA how many layers it
wraps, and the modules that are saved whole."""


@pytest.mark.parametrize("strategy", ["head", "partial", "lora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_intended_trains_and_the_rest_does_not_move(
    name: str, strategy: str, tiny_model: Tiny
) -> None:
    top, layers, whole = FAMILIES[name]
    source = find_source(Source(model=str(tiny_model(name))))
    built = build_model(source, "classification", "native", 2, ["a", "b"], 0)
    unused = "esm.contact_head."
    last = built.architecture.head.last_linear
    starts = {
        "head": (f"{last}.",), "partial": tuple(top.split()), "lora": (), "full": ("",),
    }[strategy]  # fmt: skip
    model = prepare(built.model, strategy, blocks=1, fresh=built.fresh)
    for path, parameter in model.named_parameters():
        expected = path.startswith(starts) and not path.startswith(unused)
        if strategy == "lora":
            expected = ".lora_" in path or ".modules_to_save." in path
        assert parameter.requires_grad == expected, path
    if strategy == "lora":
        assert len(list_adapted_layers(model)) == layers
        saved = {path.split(".modules_to_save.")[0] for path, _ in model.named_parameters()
                 if ".modules_to_save." in path}  # fmt: skip
        assert saved == {f"base_model.model.{path}" for path in whole.split()}
    before = {path: tensor.detach().clone() for path, tensor in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 30, (4, 7), generator=draw)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {path for path, p in model.named_parameters() if not torch.equal(p, before[path])}
    assert moved <= {path for path, p in model.named_parameters() if p.requires_grad}
    assert all(any(path.startswith(start) for path in moved) for start in starts) and moved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "pooling", "strategy"),
    [
        ("classification", "native", "lora"), ("classification", "native", "partial"),
        ("classification", "mean", "lora"), ("classification", "cls", "full"),
        (TOKENS, "native", "lora"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", FAMILIES)
def test_published_folder_reloads(
    name: str, task: str, pooling: str, strategy: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    data = write_data(name, task, tmp_path)
    context, recipe = open_context(tiny_model(name), tmp_path, pooling, strategy, data)
    sample = publish_model(context, recipe, tmp_path)
    folder = tmp_path / "publish"
    assert measure_reload_difference(folder, context.source.folder, sample, "cpu") <= 1e-5
