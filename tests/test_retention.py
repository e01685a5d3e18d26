"""Check retention from the recipe to the record, the card and the published folder."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import bench_of, sentences, write_csv

from hftl.config.recipe import Recipe
from hftl.config.retain import KL, Retain
from hftl.data.general import load_general
from hftl.data.rows import InputSpec, Row
from hftl.data.splits import hash_row
from hftl.errors import HftlError, RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.pipeline import weight_grid
from hftl.pipeline.kl_weight import choose_kl_weight, select_kl_weight
from hftl.pipeline.pipeline import check_recipe, run
from hftl.pipeline.run import Run
from hftl.pipeline.weight_grid import WEIGHT_GRID, set_kl_weight

pytestmark = pytest.mark.usefixtures("fast_reload")

slow = pytest.mark.slow


@pytest.fixture
def tree(recipe_tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return a small recipe with general data: a document every four rows."""
    rows = [(text, label, str(i // 4)) for i, (text, label) in enumerate(sentences(80, seed=9))]
    general = write_csv(tmp_path / "general.csv", ["text", "label", "document"], rows)
    recipe_tree["data"] |= {
        "shots": 12, "general": {"path": str(general), "label": "document"},
    }  # fmt: skip
    recipe_tree["finetune"]["strategy"] = "full"
    recipe_tree["measure"] |= {"arms": [{"plain": {"retain": None}}], "seeds": [0]}
    return recipe_tree


RETAIN: dict[str, dict[str, Any]] = {
    "two terms": {
        "kl": [{"weight": 0.3, "inputs": "general"}, {"on": "probe", "weight": 0.5}],
        "replay": {"ratio": 0.3},
    },
    "weights": {"l2sp": {"weight": 0.1, "head": 0.01}, "ewc": {"weight": 0.1, "samples": 8}},
    "interpolated": {"interpolate": [0.0, 0.5, 1.0]},
}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("two terms", "lora"),
        ("weights", "full"),
        pytest.param("interpolated", "lora", marks=slow),
    ],
)
def test_run_reports_retention_in_record_and_card(
    tree: dict[str, Any], tmp_path: Path, name: str, strategy: str
) -> None:
    tree["finetune"]["strategy"] = strategy
    tree["retain"] = RETAIN[name]
    record = run(Recipe.parse(tree), tmp_path / "run")
    assert record is not None and record["reload_difference"] <= 1e-5
    arms = {arm["arm"]: arm for arm in record["arms"]}
    assert set(arms) == {strategy, "plain"}
    own = record["forgetting"]["arms"][0]
    assert own["arm"] == strategy and own["against"]["arm"] == "plain"
    card = (tmp_path / "run/publish/README.md").read_text(encoding="utf-8")
    if name == "interpolated":
        interpolation = arms[strategy]["training"]["interpolation"]
        assert interpolation["alpha"] in (0.0, 0.5, 1.0) and len(interpolation["tried"]) == 3
        assert "interpolated with the original" in card
    else:
        assert "kept near the original by" in card
    if "ewc" in RETAIN[name]:
        fisher = arms[strategy]["training"]["fisher"]
        assert (fisher["kind"], fisher["rows"], fisher["mean"]) == ("features", 8, 1.0)
        assert fisher["draws"] == 2 and fisher["scale"] > 0
        assert "the features Fisher information of 8 general rows" in card
        assert len(list((tmp_path / "run/phases").glob("fisher-*/fisher.safetensors"))) == 1
    if name == "two terms":
        assert_second_run_trains_nothing(tree, tmp_path / "run")


def assert_second_run_trains_nothing(tree: dict[str, Any], folder: Path) -> None:
    """Check that the same recipe reuses its arm, and that a changed term is refused."""
    metrics = folder / "arms/lora-seed0/metrics.json"
    before = metrics.stat().st_mtime_ns
    run(Recipe.parse(tree), folder)
    assert metrics.stat().st_mtime_ns == before
    tree["retain"]["replay"]["ratio"] = 0.5
    with pytest.raises(HftlError, match=r"retain\.replay\.ratio: 0\.3 -> 0\.5"):
        run(Recipe.parse(tree), folder)


def test_weight_is_chosen_once_for_all_seeds(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_grid, "WEIGHT_GRID", (0.1, 1.0))
    tree["retain"] = {"kl": {"weight": "auto", "inputs": "general"}}
    tree["measure"] |= {"arms": [], "seeds": [0, 1]}
    lines: list[str] = []
    record = run(Recipe.parse(tree), tmp_path / "run", say=lines.append)
    assert record is not None
    choice = json.loads((tmp_path / "run/phases/weight-full/weight.json").read_text("utf-8"))
    assert [tried["weight"] for tried in choice["tried"]] == [0.1, 1.0]
    assert all(0 <= tried["forgotten"] <= 1 and tried["error"] >= 0 for tried in choice["tried"])
    assert [arm["training"]["kl_weight"] for arm in record["arms"]] == [choice, choice]
    assert any("forgets least within one standard error" in line for line in lines)
    card = (tmp_path / "run/publish/README.md").read_text(encoding="utf-8")
    assert f"weight {choice['weight']:g}" in card


def test_choice_of_a_weight_reads_no_test_row(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_grid, "WEIGHT_GRID", (0.1,))
    tree["retain"] = {"kl": {"weight": "auto", "inputs": "general"}}
    recipe = Recipe.parse(tree)
    context, arm = bench_of(recipe), recipe.arms[0]
    context.general = load_general(recipe.data, context.prepared, InputSpec())
    encoded: set[bytes] = set()
    encode = ExperimentContext.encode_rows

    def watch_rows(self: ExperimentContext, rows: list[Row]) -> Any:
        encoded.update(map(hash_row, rows))
        return encode(self, rows)

    monkeypatch.setattr(ExperimentContext, "encode_rows", watch_rows)
    choose_kl_weight(Run(recipe, tmp_path, lambda line: None), context, arm, {})
    splits = {name: set(map(hash_row, rows)) for name, rows in context.prepared.rows.items()}
    assert splits["validation"] <= encoded
    assert not splits["test"] & encoded, "test rows may not take part in a choice"


@pytest.mark.parametrize(
    ("scores", "forgotten", "weight"),
    [
        ((0.80, 0.80, 0.79, 0.70), (0.4, 0.3, 0.2, 0.1), 0.3),
        ((0.80, 0.70, 0.70, 0.70), (0.4, 0.3, 0.2, 0.1), 0.03),
        ((0.80, 0.80, 0.80, 0.80), (0.4, 0.4, 0.4, 0.4), 0.03),
    ],
)
def test_weight_is_chosen_within_one_standard_error(
    scores: tuple[float, ...], forgotten: tuple[float, ...], weight: float
) -> None:
    results = {w: (s, 0.02, f) for w, s, f in zip(WEIGHT_GRID, scores, forgotten, strict=True)}
    choice = select_kl_weight(lambda w: results[w])
    assert choice["weight"] == weight
    assert [tried["forgotten"] for tried in choice["tried"]] == list(forgotten)


def test_only_auto_weights_are_set() -> None:
    retain = Retain(kl=[KL(weight="auto"), KL(weight=0.7)])
    assert retain.has_auto_weight
    filled = set_kl_weight(retain, 0.3)
    assert [kl.weight for kl in filled.kl_terms] == [0.3, 0.7] and not filled.has_auto_weight


def test_weak_probe_is_reported_and_stops_no_run(tree: dict[str, Any], tmp_path: Path) -> None:
    """Solve a probe of random labels, which knows only their frequencies."""
    draw = random.Random(0)
    rows = [(text, draw.choice(("negative", "positive"))) for text, _ in sentences(160)]
    write_csv(Path(tree["data"]["train"]["path"]), ["text", "label"], rows)
    tree["measure"]["arms"] = []
    tree["retain"] = {"kl": {"on": "probe"}}
    lines: list[str] = []
    record = run(Recipe.parse(tree), tmp_path / "run", until="measure", say=lines.append)
    assert record is not None
    quality = record["arms"][0]["training"]["head_opinion"]
    assert quality["weak"] and quality["loss"] >= 0.95 * quality["shares"] > 0
    assert any("hardly predicts the labels" in line and "full seed 0" in line for line in lines)


@pytest.mark.slow
def test_reference_may_be_the_source_before_adaptation(
    tree: dict[str, Any], tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    tree["source"]["model"] = str(tiny_model("bert", True))
    tree["adapt"] = {
        "objective": "mlm", "guard": "off",
        "training": {"num_train_epochs": 1, "learning_rate": 1e-2, "bf16": False},
    }  # fmt: skip
    tree["measure"]["arms"] = [{"start": {"retain.reference": "start"}}]
    tree["retain"] = {
        "reference": "source", "kl": [{"weight": 20.0, "on": "features"}, {"on": "mlm"}],
    }  # fmt: skip
    record = run(Recipe.parse(tree), tmp_path / "run", until="measure")
    assert record is not None
    arms = record["forgetting"]["arms"]
    cosine = {entry["arm"]: entry["figures"]["cosine"]["after"] for entry in arms}
    assert cosine["full"] > cosine["start"], "nearer to the source than from where it started"


def test_refuses_an_untrained_head_before_anything_trains(tree: dict[str, Any]) -> None:
    tree["retain"] = {"kl": {"on": "probe"}}
    tree["measure"]["arms"] = [{"raw": {"finetune.head_init": "random"}}]
    with pytest.raises(RecipeError, match=r"measure\.arms\.raw.*nobody has trained it"):
        Recipe.parse(tree)


def test_error_names_the_arm_that_inherits_the_section(tree: dict[str, Any]) -> None:
    tree["retain"] = {"l2sp": {"decoupled": True}}
    tree["measure"]["arms"] = ["lora"]
    with pytest.raises(RecipeError, match=r"^measure\.arms\.lora: retain\.l2sp\.decoupled moves"):
        check_recipe(Recipe.parse(tree))


def test_warning_of_several_arms_is_printed_once(tree: dict[str, Any]) -> None:
    tree["retain"] = {"l2sp": {}}
    warnings = check_recipe(Recipe.parse(tree))[1]["warnings"]
    assert len(warnings) == len(set(warnings))
    assert sum("is high for full" in line for line in warnings) == 1


@pytest.mark.parametrize(
    ("retain", "finetune", "message"),
    [
        ({"kl": {"on": "mlm"}}, {}, "no trained masked-language head"),
        ({"kl": {"on": "zero_shot"}}, {}, "no pair of an image"),
        ({"replay": {}}, {}, "no KL is taken on them"),
        ({"ewc": {"fisher": "empirical"}}, {}, "the task's labels in a column 'label'"),
        ({"kl": {}}, {"strategy": "lora", "lora": {"init_lora_weights": "olora"}}, "base.s own"),
        ({"kl": {}}, {"strategy": "lora", "lora": {"bias": "all"}}, "adapter off"),
        ({"l2sp": {}}, {"strategy": "lora", "lora": {"use_dora": True}}, "use_dora=True"),
        ({"l2sp": {"decoupled": True}}, {"strategy": "lora"}, "the base does not move"),
    ],
)
def test_refuses_before_a_row_is_read(
    tree: dict[str, Any], retain: Any, finetune: Any, message: str
) -> None:
    tree["retain"] = retain
    tree["finetune"] |= finetune
    with pytest.raises(RecipeError, match=message):
        check_recipe(Recipe.parse(tree))
