"""Score baselines before any training: `hftl check --baseline`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import sentences, write_csv

from hftl import Recipe
from hftl.console import format_baselines
from hftl.finetune.classical import solve_classical
from hftl.pipeline.baselines import measure_baselines
from hftl.pipeline.pipeline import open_recipe

pytestmark = pytest.mark.usefixtures("fast_reload")


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_baselines_are_scored_on_validation_alone(
    task: str, recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    rows = sentences(200)
    if task == "regression":
        rows = [(text, str(len(text) + i % 3)) for i, (text, _) in enumerate(rows)]
    path = write_csv(tmp_path / "t.csv", ["text", "label"], rows)
    recipe_tree["data"] |= {"train": {"path": str(path)}, "task": task}
    recipe_tree["measure"] = {"seeds": [0]}
    recipe = Recipe.parse(recipe_tree)
    context = open_recipe(recipe)
    check = measure_baselines(recipe, context)
    scores = {row.arm: row for row in check.scores}
    assert list(scores) == ["majority", "classical", "head"] and check.validation_rows == 40
    own = context.prepared.rows["validation"]
    logits = solve_classical(context, 0).logits["validation"]
    if task == "classification":
        hits = context.prepared.encode_targets(own) == logits.argmax(1)
        assert scores["classical"].score == pytest.approx(hits.mean())
        assert scores["majority"].score == pytest.approx(0.5, abs=0.03)
        low, high = scores["head"].ci95 or (0, 0)
        assert low < scores["head"].score <= high
        better = max(scores["majority"].score, scores["classical"].score)
        assert check.gain == pytest.approx(scores["head"].score - better)
    assert np.isfinite(check.gain) and check.over in ("majority", "classical")
    text = format_baselines(check)
    assert f"head over {check.over}: {check.gain:+.3f}" in text and check.metric in text
    if task == "classification":
        # A random encoder is worse than words alone.
        assert text.endswith("the source is worse than no pretraining")
