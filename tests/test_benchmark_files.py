"""Build results for leaderboards, widget examples and emissions as the Hub documents them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from support.records import make_record, render, validate_own_card
from test_card import front_matter

from hftl.card.metadata import EVERY_EVAL_EVER_FILE, build_benchmark_files
from hftl.card.report import build_widget_examples
from hftl.card.sections import format_environment
from hftl.config.recipe import Recipe
from hftl.errors import RecipeError
from hftl.measure.record import Environment, Record
from hftl.publish.checks import check_files, is_publishable
from hftl.runtime.hardware import compute_emissions

BENCHMARK = {"dataset": "org/reviews", "task_id": "default"}
REQUIRED: dict[str, type] = {
    "schema_version": str, "evaluation_id": str, "retrieved_timestamp": str,
    "source_metadata": dict, "model_info": dict, "eval_library": dict, "evaluation_results": list,
}  # fmt: skip
"""The keys that Every Eval Ever 0.3.0 requires, and all that hftl writes of its top level."""


def measured(case: str = "positive", task: str = "classification") -> dict[str, Any]:
    record = make_record(case, task, hub_revisions={"test": "b" * 40})
    record["recipe"]["data"]["test"] = {"path": "org/reviews", "label": "label"}
    record["recipe"]["publish"]["benchmark"] = BENCHMARK
    record["published"] = {"repo_id": "me/model"}
    return record


def test_the_hub_reads_the_results() -> None:
    files = build_benchmark_files(Record.parse(measured()), "1790000000")
    assert list(files) == [".eval_results/hftl-org-reviews.yaml", EVERY_EVAL_EVER_FILE]
    tree = yaml.safe_load(files[".eval_results/hftl-org-reviews.yaml"])
    (entry,) = parse_eval_result_entries(tree)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/reviews", "default", 0.7254)
    assert entry.dataset_revision == "b" * 40 and entry.notes == "test accuracy, mean over 3 seeds"


@pytest.mark.parametrize(
    ("case", "task"),
    [(case, "classification") for case in ("positive", "one seed", "no baseline")]
    + [("negative", "regression")],
)
def test_every_eval_ever_takes_the_results(case: str, task: str) -> None:
    record = measured(case, task)
    files = build_benchmark_files(Record.parse(record), "1790000000")
    evaluation = json.loads(files[EVERY_EVAL_EVER_FILE])
    assert {key: type(value) for key, value in evaluation.items()} == REQUIRED
    assert evaluation["evaluation_id"].endswith("/1790000000")
    source, model = evaluation["source_metadata"], evaluation["model_info"]
    assert source["source_type"] == "evaluation_run" and source["source_organization_name"]
    assert source["evaluator_relationship"] == "first_party"
    assert evaluation["eval_library"].keys() >= {"name", "version"}
    details = model["additional_details"]
    assert model["id"] == "me/model" and all(isinstance(value, str) for value in details.values())
    assert details["deployment_type"] == "self_deployed"
    assert details["model_availability"] == "open_weights"
    results = evaluation["evaluation_results"]
    assert len(results) == (1 if case == "no baseline" else 2)
    for result in results:
        assert result.keys() >= {"evaluation_name", "source_data", "metric_config", "score_details"}
        assert result["source_data"]["source_type"] == "hf_dataset"
        metric, score = result["metric_config"], result["score_details"]
        assert isinstance(metric["lower_is_better"], bool)
        for number in (metric["min_score"], metric["max_score"], score["score"]):
            assert isinstance(number, int | float) or number in ("Infinity", "-Infinity")
        assert all(isinstance(value, str) for value in score["details"].values())
    assert results[0]["metric_config"]["lower_is_better"] == (task == "regression")
    gain = record["transfer_gain"]
    if gain is not None and gain["ci95"] is not None:
        interval = results[1]["score_details"]["uncertainty"]["confidence_interval"]
        assert [interval["lower"], interval["upper"]] == gain["ci95"]
        assert interval["confidence_level"] == 0.95


def test_the_files_pass_the_gates_and_those_of_others_are_left_alone(tmp_path: Path) -> None:
    for name, text in build_benchmark_files(Record.parse(measured()), "1790000000").items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert check_files(tmp_path) == [".eval_results/hftl-org-reviews.yaml", EVERY_EVAL_EVER_FILE]
    assert build_benchmark_files(Record.parse(make_record()), "1") == {}, "without a benchmark"
    # A push deletes what it may publish and does not; a community's results are none of it.
    assert not is_publishable(".eval_results/org-reviews.yaml")


@pytest.mark.parametrize("test", [{"fraction": 0.2}, {"path": "org/other"}])
def test_a_benchmark_that_is_not_the_test_set_is_refused(test: dict[str, Any]) -> None:
    tree = {
        "source": {"model": "org/model"},
        "data": {"train": {"path": "org/reviews"}, "test": test},
        "publish": {"benchmark": BENCHMARK},
    }
    with pytest.raises(RecipeError, match="publish.benchmark"):
        Recipe.parse(tree)
    tree["data"]["test"] = {"path": "org/reviews"}
    assert Recipe.parse(tree).publish.benchmark is not None


def test_emissions_are_grams_of_a_known_place() -> None:
    assert compute_emissions({"energy_kwh": 0.25}, 400.0) == {"co2_grams": 100.0}
    assert compute_emissions({}, 400.0) == {} == compute_emissions({"energy_kwh": 0.25}, None)
    record = make_record()
    record["environment"] |= {"energy_kwh": 0.25, "co2_grams": 100.0}
    assert "co2_eq_emissions" not in front_matter(render(record))[0]
    place = {"location": "Quebec, Canada", "grams_per_kwh": 400.0}
    record["recipe"]["publish"]["emissions"] = place
    card = render(record)
    stated = front_matter(card)[0]["co2_eq_emissions"]
    assert stated["emissions"] == 100.0 and stated["geographical_location"] == "Quebec, Canada"
    assert stated["training_type"] == "fine-tuning" and stated["hardware_used"] == "cpu"
    assert validate_own_card(card) == []
    assert ("emissions", "100 g of CO2 equivalents") in format_environment(
        Environment(**record["environment"])
    )


def test_widget_examples_have_their_outputs() -> None:
    samples = [("a | good: film", "positive", {"negative": 0.125, "positive": 0.875}),
               ("two\nlines", "negative", {"negative": 1.0, "positive": 0.0})]  # fmt: skip
    record = make_record() | {
        "widget": [example.to_dict() for example in build_widget_examples(samples)]
    }
    for pooling in ("mean", "native"):
        record["recipe"]["finetune"]["pooling"] = pooling
        card = render(record)
        (shown,) = front_matter(card)[0]["widget"]
        assert shown["text"] == "a | good: film"
        assert shown["output"] == [
            {"label": "positive", "score": 0.875}, {"label": "negative", "score": 0.125}
        ]  # fmt: skip
        assert validate_own_card(card) == []
    assert "widget" not in front_matter(render(make_record()))[0]
