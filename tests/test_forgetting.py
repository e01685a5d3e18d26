"""Measure forgetting: the figures of given features, and whole runs that record them."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, pictures, sentences, write_csv
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoModel, AutoTokenizer

import hftl
from hftl import console
from hftl.analysis.drift import compute_cka, jackknife_relational_kl
from hftl.analysis.neighbours import mean_shared_neighbours, rank_neighbours
from hftl.config.overrides import apply_overrides
from hftl.config.recipe import Recipe
from hftl.data.general import read_general
from hftl.errors import RunFolderError
from hftl.measure.forgetting import (
    ForgettingSpec,
    build_forgetting_arms,
    forgetting_reduction,
    measure_forgetting,
)
from hftl.measure.forgetting_facts import Forgotten, Headline
from hftl.measure.record import Record
from hftl.pipeline import forgetting
from hftl.pipeline.run import Run
from hftl.runtime.run_folder import to_json

pytestmark = pytest.mark.usefixtures("fast_reload")

ROWS, WIDTH = 80, 6


def features(seed: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)


def mean_kl(before: np.ndarray, after: np.ndarray) -> float:
    return jackknife_relational_kl(before, after, 0.05, np.zeros(len(before), np.int64)).value


def mean_hits(side: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(labels[rank_neighbours(side, 1)[:, 0]] == labels))


def sides(scale: float, seed: int) -> dict[str, np.ndarray]:
    """Return features of both parts, moved by noise of this scale."""
    return {
        "general": features(0) + np.float32(scale) * features(seed),
        "new": features(1, 30) + np.float32(scale) * features(seed + 50, 30),
    }


SPEC = ForgettingSpec(
    {"document": np.array([f"d{i // 4}" for i in range(ROWS)]),
     "tone": np.array(["a", "b"] * (ROWS // 2))},
    ("tone",), np.arange(ROWS) // 4, 0.05,
)  # fmt: skip
BEFORE = sides(0, 2)
ARMS = {"own": [sides(0.3, 2), sides(0.3, 3)], "plain": [sides(1, 4), sides(1, 5)]}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Measure both arms."""
    return measure_forgetting(BEFORE, ARMS, SPEC)


def test_every_figure_is_its_formula_over_the_seeds(measured: dict[str, Any]) -> None:
    for arm, figures in measured.items():
        after = [side["general"] for side in ARMS[arm]]
        old = BEFORE["general"]
        expected = {
            "neighbours": [mean_shared_neighbours(old, side) for side in after],
            "cka": [compute_cka(old, side) for side in after],
            "kl": [mean_kl(old, side) for side in after],
            "new_kl": [mean_kl(BEFORE["new"], s["new"]) for s in ARMS[arm]],
        }
        same = [mean_hits(side, SPEC.controls["document"]) for side in after]
        for figure, values in [*((figures[n], v) for n, v in expected.items()),
                               (figures["controls"]["document"]["same"], same)]:  # fmt: skip
            assert figure["per_seed"] == pytest.approx(values, abs=1e-12)
            assert figure["after"] == pytest.approx(np.mean(values), abs=1e-12)
            assert figure["change"] == pytest.approx(figure["after"] - figure["before"], abs=1e-12)
        assert figures["neighbours"]["before"] == figures["cka"]["before"] == 1
        assert figures["kl"]["before"] == figures["new_kl"]["before"] == 0
        assert figures["controls"]["document"]["probe_fixed"] is None
        assert figures["controls"]["tone"]["probe_refitted"]["after"] > 0.2


def test_the_interval_holds_the_change_and_needs_seeds(measured: dict[str, Any]) -> None:
    for figures in measured.values():
        for name in ("neighbours", "cosine", "kl", "new_kl", "cka"):
            low, high = figures[name]["ci95"]
            assert low < figures[name]["change"] < high
            assert (low + high) / 2 == pytest.approx(figures[name]["change"], abs=1e-9)
        assert figures["cka"]["floor"] < 0.5 < figures["cka"]["after"]
    one = measure_forgetting(BEFORE, {"own": ARMS["own"][:1]}, SPEC)["own"]
    assert one["kl"]["ci95"] is None and one["kl"]["after"] > 0


def test_documents_are_the_units_of_the_interval() -> None:
    """Rows of one document that move together say little more than one of them."""
    after = [sides(0, 2), sides(0, 3)]
    for side in after:
        side["general"][::8] = side["general"][1::8] = side["general"][2::8] = -features(7)[::8]
    widths = []
    for units in (np.arange(ROWS), np.arange(ROWS) // 8):
        figures = measure_forgetting(BEFORE, {"own": after}, ForgettingSpec({}, (), units, 0.05))
        widths.append(np.ptp(figures["own"]["cosine"]["ci95"]))
    assert widths[0] != widths[1] and min(widths) > 0


def test_an_arm_that_did_not_move_has_forgotten_nothing() -> None:
    figures = measure_forgetting(BEFORE, {"own": [BEFORE, BEFORE]}, SPEC)
    _, (arm,) = build_forgetting_arms(figures, SPEC, {})
    assert arm["forgotten"] == {"value": 0, "ci95": [0, 0], "per_seed": [0, 0]}
    for figure in ("neighbours", "kl", "new_kl"):
        assert arm["figures"][figure]["change"] == 0
    for figure in ("cka", "cosine"):
        assert arm["figures"][figure]["change"] == pytest.approx(0, abs=1e-12)
    for control in arm["figures"]["controls"].values():
        assert all(figure is None or figure["change"] == 0 for figure in control.values())


def test_the_headline_is_the_first_control_and_neighbours_without(measured: dict[str, Any]) -> None:
    headline, arms = build_forgetting_arms(measured, SPEC, {"own": "plain", "plain": None})
    assert headline == Headline(figure="same", control="document")
    for arm in arms:
        figure = arm["figures"]["controls"]["document"]["same"]
        assert arm["forgotten"]["value"] == pytest.approx(-figure["change"])
        assert arm["forgotten"]["ci95"] == [-figure["ci95"][1], -figure["ci95"][0]]
    bare = ForgettingSpec({}, (), SPEC.units, 0.05)
    figures = measure_forgetting(BEFORE, ARMS, bare)
    headline, arms = build_forgetting_arms(figures, bare, {"own": "plain"})
    assert headline == Headline(figure="neighbours", control=None)
    own, plain = (arm["forgotten"]["value"] for arm in arms)
    assert 0 < own < plain
    assert arms[0]["against"] == {"arm": "plain", "gone": pytest.approx(1 - own / plain)}
    assert arms[1].against is None


@pytest.mark.parametrize(
    ("own", "other", "interval", "share"),
    [
        (0.05, 0.2, [0.1, 0.3], 0.75),
        (0.3, 0.2, [0.1, 0.3], -0.5),
        (0, 0.2, None, 1),
        (0.1, 0, None, None),
        (0.1, -0.1, None, None),
        (-0.003, 0.0005, [-0.019, 0.02], None),
        (0.1, 0.2, [0, 0.4], None),
    ],
)
def test_the_share_that_is_gone_is_of_more_than_noise(
    own: float, other: float, interval: list[float] | None, share: float | None
) -> None:
    plain = Forgotten(value=other, ci95=interval and (interval[0], interval[1]), per_seed=[])
    reduction = forgetting_reduction(Forgotten(value=own, ci95=None, per_seed=[]), plain)
    assert reduction == (None if share is None else pytest.approx(share))


def test_without_general_data_only_new_inputs_are_compared() -> None:
    nothing = ForgettingSpec({}, (), None, 0.05)
    before, after = {"new": BEFORE["new"]}, [{"new": s["new"]} for s in ARMS["own"]]
    figures = measure_forgetting(before, {"own": after}, nothing)
    headline, (arm,) = build_forgetting_arms(figures, nothing, {})
    assert headline is None and arm.forgotten is None
    assert arm["figures"]["new_kl"]["after"] > 0
    assert all(arm["figures"][name] is None for name in ("neighbours", "cka", "cosine", "kl"))
    lone = {"new": BEFORE["new"][:1]}
    assert measure_forgetting(lone, {"own": [lone]}, nothing)["own"]["new_kl"] is None


def tree_of(folder: Path, model: Path, **general: Any) -> dict[str, Any]:
    table = write_csv(folder / "reviews.csv", ["text", "label"], sentences(160))
    rows = [(text, f"d{i // 6}", tone) for i, (text, tone) in enumerate(sentences(240, 7))]
    path = write_csv(folder / "general.csv", ["text", "document", "tone"], rows)
    training = {"num_train_epochs": 1, "learning_rate": 5e-3, "bf16": False}
    return {
        "source": {"model": str(model)},
        "data": {"train": {"path": str(table)}, "max_length": 16,
                 "general": {"path": str(path), **general}},
        "finetune": {"pooling": "mean", "strategy": "full", "training": training},
        "measure": {"seeds": [0, 1], "arms": ["head", "classical"]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> tuple[Path, dict[str, Any]]:
    """Finish a run with general data that has two controls."""
    folder = tmp_path_factory.mktemp("forgetting")
    tree = tree_of(folder, tiny_model(), label=["document", "tone"])
    hftl.run(Recipe.parse(copy.deepcopy(tree)), folder / "run")
    return folder / "run", tree


def test_the_record_follows_from_the_stored_embeddings(finished: tuple[Path, Any]) -> None:
    run, _ = finished
    record = Record.read(run)["forgetting"]
    before = load_file(run / "phases" / "original" / "embeddings.safetensors")
    after = [load_file(run / "arms" / f"full-seed{s}" / "embeddings.safetensors") for s in (0, 1)]
    assert before["general"].shape == (record["rows"], 16) and record["rows"] == 120
    assert before["new"].shape == (record["new_rows"], 16) and record["new_rows"] == 32
    own, head = record["arms"]
    assert (own["arm"], head["arm"]) == ("full", "head")
    assert own["figures"]["neighbours"]["per_seed"] == pytest.approx(
        [mean_shared_neighbours(before["general"], side["general"]) for side in after]
    )
    assert own["figures"]["new_kl"]["after"] > 0 and head["forgotten"]["value"] == 0
    assert record["documents"] == "document" and record["controls"] == [
        {"name": "document", "values": 20, "classes": False},
        {"name": "tone", "values": 2, "classes": True},
    ]
    assert not (run / "arms" / "head-seed0" / "embeddings.safetensors").exists()


def test_embeddings_are_those_of_the_published_model(finished: tuple[Path, Any]) -> None:
    run, _ = finished
    seed = Record.read(run)["published_seed"]
    model = AutoModel.from_pretrained(run / "publish").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "publish")
    stored = load_file(run / "arms" / f"full-seed{seed}" / "embeddings.safetensors")["general"]
    rows = read_general(run / "phases" / "general-rows").eval_rows
    for number in (0, 7, 119):
        batch = tokenizer(rows[number].content[0], return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        np.testing.assert_allclose(stored[number], hidden[0].mean(0).numpy(), atol=1e-5)


def test_the_card_the_report_and_the_terminal_show_it(finished: tuple[Path, Any]) -> None:
    run, _ = finished
    record = Record.read(run)
    own = record["forgetting"]["arms"][0]
    card = (run / "publish" / "README.md").read_text("utf-8")
    part = card.split("## What it forgot\n")[1].split("\n## ")[0]
    figure = own["figures"]["controls"]["document"]["same"]
    assert f"{figure['before']:.3f} under the original, {figure['after']:.3f} under this" in part
    assert "| tone by a probe of the original |" in part and "document by a probe" not in part
    assert "`general.csv` (240 were read)" in part and "assets/frontier.png" in part
    assert "Forgetting of what the source model knew was not measured" not in card
    assert (run / "publish" / "assets" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    report = (run / "report.html").read_text("utf-8")
    # Beside the tables of mistakes, which come with the classes.
    assert report.count("<img") == 2 and report.count("<table>") >= 3
    assert "tone by a probe of the original</td>" in report
    lines = console.format_forgetting(record).splitlines()
    assert "nearest neighbour of the same document, 120 rows" in lines[0]
    assert lines[1].split() == ["arm", "original", "after", "forgotten"] and len(lines) == 5


@pytest.fixture
def again(finished: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Any]:
    """Copy the finished run and its recipe."""
    run, tree = finished
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run", copy.deepcopy(tree)


def test_the_same_command_again_computes_nothing(
    again: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tree = again
    for name in ("hftl.pipeline.forgetting.embed_source", "hftl.finetune.arm.embed_compared_rows",
                 "hftl.finetune.solved_arms.embed_compared_rows",
                 "hftl.pipeline.pipeline.load_general"):  # fmt: skip
        monkeypatch.setattr(name, lambda *_: pytest.fail("computed again"))
    before = Record.read(run).hash
    shutil.rmtree(run / "phases" / "report")
    record = hftl.run(Recipe.parse(tree), run)
    assert record is not None and record.hash == before


def test_another_seed_is_compared_with_the_same_original(again: tuple[Path, Any]) -> None:
    run, tree = again
    before = Record.read(run)["forgetting"]["arms"][0]["forgotten"]["per_seed"]
    tree["measure"] = {"seeds": [0, 1, 2], "arms": []}
    record = hftl.run(Recipe.parse(tree), run, until="measure")
    assert record is not None
    per_seed = record["forgetting"]["arms"][0]["forgotten"]["per_seed"]
    assert per_seed[:2] == before and len(per_seed) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "tone"}, r"data.general.label: \['document', 'tone'\] -> tone"),
        ({"rows": 60}, "data.general.rows: 1000 -> 60"),
        (None, "data.general.rows: 1000 -> unset"),
    ],
)
def test_changed_general_data_are_refused(
    finished: tuple[Path, Any], change: dict[str, Any] | None, message: str
) -> None:
    run, tree = finished
    tree = copy.deepcopy(tree)
    tree["data"]["general"] = change and tree["data"]["general"] | change
    with pytest.raises(RunFolderError, match=message):
        hftl.run(Recipe.parse(tree), run)


def test_other_rows_of_general_data_are_refused(again: tuple[Path, Any], tmp_path: Path) -> None:
    run, tree = again
    rows = [(text, f"e{i // 6}", tone) for i, (text, tone) in enumerate(sentences(240, 8))]
    path = write_csv(tmp_path / "other.csv", ["text", "document", "tone"], rows)
    tree["data"]["general"]["path"] = str(path)
    with pytest.raises(RunFolderError, match="made with other general data"):
        hftl.run(Recipe.parse(tree), run)


@pytest.mark.parametrize(
    "change",
    ["data.max_length=6", "data.seed=1", "data.general.label=tone", "data.general.rows=60",
     "data.task=regression", "tokenizer", "config"],
)  # fmt: skip
def test_the_source_is_embedded_again_where_its_embeddings_would_differ(
    change: str, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm that read 6 tokens was compared with the source on 16."""
    calls: list[int] = []

    def embed(context: Any, seed: int, heads: Any) -> dict[str, np.ndarray]:
        calls.append(seed)
        return {"new": np.zeros((2, 3), np.float32)}

    monkeypatch.setattr(forgetting, "embed_source", embed)
    made = Recipe.parse(tree_of(tmp_path, tiny_model(), label=["document", "tone"]))
    context = bench_of(made)
    for moved in ("here", "there"):
        forgetting._load_source_embeddings(Run(made, tmp_path, print), context)
        made.data.general.__dict__["path"] = moved
    assert len(calls) == 1, "where data are does not matter"
    if change == "tokenizer":
        context = replace(context, preprocessing_hash="other")
    elif change == "config":
        context = replace(context, config_hash="other")
    else:
        made = Recipe.parse(apply_overrides(made.to_dict(), [change]))
    forgetting._load_source_embeddings(Run(made, tmp_path, print), context)
    assert len(calls) == 2


def test_the_record_follows_general_data_that_no_arm_reads(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A head forgets nothing, so that it does not run again, but its rows are counted."""
    tree = tree_of(tmp_path, tiny_model())
    tree["finetune"]["strategy"], tree["measure"] = "head", {"seeds": [0], "arms": []}
    path, rows = tmp_path / "general.csv", [240]
    for change in (None, "shorter", "txt"):
        if change == "shorter":
            path.write_text("\n".join(path.read_text().splitlines()[:101]) + "\n")
        elif change == "txt":
            tree["data"]["general"]["format"] = "txt"
        record = hftl.run(Recipe.parse(copy.deepcopy(tree)), tmp_path / "run", until="measure")
        assert record is not None and record.forgetting.general is not None
        rows.append(record.forgetting.general.rows_read)
    assert rows == [240, 240, 100, 101]


def test_without_general_data_the_card_says_so(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    tree = tree_of(tmp_path, tiny_model())
    tree["data"]["general"] = None
    tree["measure"] = {"seeds": [0], "arms": []}
    record = hftl.run(Recipe.parse(tree), tmp_path / "run")
    assert record is not None
    figures = record["forgetting"]
    assert figures["rows"] == 0 and figures["headline"] is None and figures["controls"] == []
    assert figures["arms"][0]["figures"]["new_kl"]["after"] > 0
    card = (tmp_path / "run" / "publish" / "README.md").read_text("utf-8")
    assert "Forgetting of what the source model knew was not measured" in card
    assert "What it forgot" not in card
    assert not (tmp_path / "run" / "publish" / "assets" / "frontier.png").exists()


def test_retention_is_compared_with_the_same_arm_without() -> None:
    made = Recipe.parse({
        "source": {"model": "m"}, "data": {"train": {"path": "a.csv"}},
        "retain": {"l2sp": {"weight": 0.1}},
        "measure": {"arms": [{"full_bare": {"finetune.strategy": "full", "retain": None}},
                             {"slow": {"retain": None, "finetune.training.learning_rate": 1e-7}},
                             {"bare": {"retain": None, "finetune.blocks": 3}}]},
    })  # fmt: skip
    own, other, slow, bare = made.arms
    assert own.retain is not None and bare.retain is None
    assert forgetting._find_arm_without_retention(made, own, made.arms) == "bare"
    assert forgetting._find_arm_without_retention(made, own, [own, other, slow]) is None
    assert forgetting._find_arm_without_retention(made, bare, [own, bare]) is None


@pytest.mark.slow
def test_an_adapted_head_is_compared_with_the_source_before(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hftl.adapt.adaptation.HEAD_MAX_STEPS", 3)
    tree = tree_of(tmp_path, tiny_model())
    training = {"num_train_epochs": 3, "learning_rate": 3e-3, "bf16": False}
    tree["adapt"] = {"objective": "mlm", "guard": "off", "training": training}
    tree["finetune"]["strategy"] = "head"
    tree["measure"] = {"seeds": [0], "arms": []}
    record = hftl.run(Recipe.parse(tree), tmp_path / "run", until="measure")
    assert record is not None
    own, source = record["forgetting"]["arms"]
    assert record["adapt"]["stages"][0]["kept"] == "adapted"
    assert own["arm"] == "head" and own["figures"]["kl"]["after"] > 0
    assert source["arm"] == "source" and source["figures"]["kl"]["after"] == 0


def test_pictures_are_measured_too(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    train, general = pictures(tmp_path / "train", 24), tmp_path / "general"
    shutil.copytree(train, general)
    draw = np.random.default_rng(5)
    for label in ("light", "dark"):
        for number in range(30):
            noise = draw.integers(0, 255, (36, 40, 3)).astype("uint8")
            Image.fromarray(noise).save(general / label / f"new{number}.png")
    tree = {
        "source": {"model": str(tiny_model("dinov2"))},
        "data": {"train": {"path": str(train)},
                 "general": {"path": str(general), "label": "label"}},
        "finetune": {"training": {"num_train_epochs": 1, "learning_rate": 5e-3, "bf16": False}},
        "measure": {"seeds": [0], "arms": []},
    }  # fmt: skip
    run = tmp_path / "run"
    record = hftl.run(Recipe.parse(tree), run, until="measure")
    assert record is not None
    measured = record["forgetting"]
    assert measured["general"]["known"] > 0 and measured["rows"] == 30 and measured["tau"] == 0.07
    (own,) = measured["arms"]
    assert own["figures"]["controls"]["label"]["probe_fixed"]["before"] > 0.2
    assert own["figures"]["kl"]["after"] > 0 and own["figures"]["neighbours"]["after"] < 1
    stored = load_file(run / "arms" / "lora-seed0" / "embeddings.safetensors")
    assert stored["general"].shape[0] == 30 and stored["new"].shape[0] == measured["new_rows"]
    assert json.loads(to_json(measured)) == measured
