"""Tiny random models, tokenizers and tables, made in memory: no network, no accelerator."""

import csv
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import yaml

GOOD = "good fine great lovely warm bright clever fresh happy sweet".split()
BAD = "bad dull poor awful cold grim silly stale sad bitter".split()
FILLER = "the a film plot story actor scene music was is and very with of it this".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def sentences(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct sentences with the label that their words say."""
    draw = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < rows:
        label = ("negative", "positive")[len(found) % 2]
        words = draw.sample(FILLER, 5) + draw.sample(GOOD if label == "positive" else BAD, 2)
        draw.shuffle(words)
        found[" ".join(words)] = label
    return list(found.items())


def write_csv(path: Path, header: list[str], rows: list[Any]) -> Path:
    """A CSV file of the rows."""
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """160 labelled sentences."""
    return write_csv(tmp_path / "reviews.csv", ["text", "label"], sentences(160))


def tiny_tokenizer(folder: Path) -> None:
    """Saves a lower-casing WordPiece tokenizer of the test words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = SPECIAL + sorted({*GOOD, *BAD, *FILLER})
    core = Tokenizer(WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = Lowercase()  # pyright: ignore
    core.pre_tokenizer = Whitespace()  # pyright: ignore
    core.post_processor = TemplateProcessing(  # pyright: ignore
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """A three-block config of the architecture."""
    from transformers import BertConfig, DistilBertConfig, RobertaConfig

    vocab = len(SPECIAL) + len({*GOOD, *BAD, *FILLER})
    if model_type == "distilbert":
        return DistilBertConfig(
            vocab_size=vocab, dim=16, n_layers=3, n_heads=2, hidden_dim=32,
            max_position_embeddings=40, pad_token_id=0,
        )  # fmt: skip
    kind = {"bert": BertConfig, "roberta": RobertaConfig}[model_type]
    return kind(
        vocab_size=vocab, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(architecture, masked_lm)`: a saved random checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModel, AutoModelForMaskedLM

    made: dict[tuple[str, bool], Path] = {}

    def make(model_type: str = "bert", masked_lm: bool = False) -> Path:
        if (model_type, masked_lm) not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{model_type}-{'mlm' if masked_lm else 'base'}")
            torch.manual_seed(0)
            auto = AutoModelForMaskedLM if masked_lm else AutoModel
            auto.from_config(tiny_config(model_type)).save_pretrained(folder)
            tiny_tokenizer(folder)
            made[model_type, masked_lm] = folder
        return made[model_type, masked_lm]

    return make


@pytest.fixture
def recipe_tree(table: Path, tiny_model: Callable[..., Path]) -> dict[str, Any]:
    """A small recipe of the tiny BERT and the 160 sentences."""
    return {
        "source": {"model": str(tiny_model())},
        "data": {"train": {"path": str(table)}, "max_length": 16},
        "finetune": {
            "pooling": "mean",
            "training": {"num_train_epochs": 2, "learning_rate": 5e-3, "bf16": False},
        },
        "measure": {
            "seeds": [0, 1],
            "scratch": {"learning_rates": [1e-3, 3e-3], "epochs_factor": 1},
        },
    }


@pytest.fixture
def recipe_file(recipe_tree: dict[str, Any], tmp_path: Path) -> Path:
    """The same as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_tree), encoding="utf-8")
    return path
