"""Run whole recipes with an adaptation on tiny models: what they leave, reuse, refuse, publish."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import bench_of, pictures, sentences, write_csv
from peft import PeftModel
from safetensors.torch import load_file
from support.records import make_gain, make_record
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTForImageClassification,
)

import hftl
from hftl.adapt import adaptation
from hftl.adapt.facts import AdaptStage
from hftl.card.wording import format_adaptation_sentence
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.errors import RunFolderError
from hftl.measure.gain import describe_adaptation_outcome
from hftl.measure.record import AdaptSection, Gain, LadderRow, Record
from hftl.measure.verdict import VerdictEvidence, decide_verdict
from hftl.models.source import find_source, hash_source_weights
from hftl.pipeline.corpus_checks import MAX_ROWS, check_corpora
from hftl.pipeline.objectives import list_adaptation_warnings
from hftl.pipeline.pipeline import check_recipe
from hftl.publish.checks import check_files

pytestmark = pytest.mark.usefixtures("fast_reload")

TINY = {"num_train_epochs": 2, "learning_rate": 3e-3, "bf16": False}
FINETUNE = TINY | {"num_train_epochs": 1, "per_device_train_batch_size": 32}
ADAPT: dict[str, Any] = {"objective": "mlm", "guard": "off", "training": TINY}
LORA = ADAPT | {"method": "lora", "lora": {"r": 3}}
MAE = ADAPT | {"objective": "mae", "decoder": {"width": 16, "depth": 1}}
ALONE = ADAPT | {"guard": "neighbours", "held_out": 0.3, "tolerance": 1}
TEXT_FILES = {
    "README.md", "hftl.json", "config.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
SENTENCES = sentences(160)
OTHER_SENTENCES = [[text] for text, _ in sentences(90, 5)]
Tiny = Callable[..., Path]
Finished = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Draw no plots, and train a new head so little that it learns even from noise."""

    def touch(record: dict[str, Any], path: Path) -> None:
        path.parent.mkdir()
        path.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hftl.adapt.adaptation.HEAD_MAX_STEPS", 3)
        patch.setattr("hftl.pipeline.publish_folder.plot_ladder", touch)
        yield


def build_tree(model: Path, table: Path, adapt: Any, **finetune: Any) -> dict[str, Any]:
    """Return a recipe of one seed and no baseline."""
    return {
        "source": {"model": str(model)},
        "data": {"train": {"path": str(table)}, "max_length": 16},
        "adapt": adapt,
        "finetune": {"head_init": "random", "training": FINETUNE} | finetune,
        "measure": {"seeds": [0], "arms": []},
    }


def parse(tree: dict[str, Any]) -> Recipe:
    return Recipe.parse(json.loads(json.dumps(tree)))


def run_recipe(tree: dict[str, Any], run: Path, **more: Any) -> Record:
    record = hftl.run(parse(tree), run, **more)
    assert record is not None
    return record


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("t") / "a.csv", ["text", "label"], SENTENCES)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("p") / "pics", 20)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Tiny, texts: Path) -> Finished:
    """LoRA after LoRA on the native head; tests copy it before they change anything."""
    tree = build_tree(tiny_model("bert", True), texts, LORA)
    tree["measure"] = {"seeds": [0, 1], "arms": ["classical"]}
    run = tmp_path_factory.mktemp("finished") / "run"
    run_recipe(tree, run)
    return run, tree


@pytest.fixture(scope="module")
def adapted_base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Tiny) -> tuple[Path, Record]:
    """LoRA after a full, transductive adaptation, with hostile names of data."""
    folder = tmp_path_factory.mktemp("base")
    hostile = folder / "---\nlicense: mit" / 'a": [x]'
    hostile.mkdir(parents=True)
    table = write_csv(hostile / "t'&<b>|`.csv", ["text", "label"], SENTENCES)
    corpus = write_csv(hostile / "c: {d}.csv", ["text"], OTHER_SENTENCES)
    tree = build_tree(tiny_model(), table, ADAPT | {"transductive": True}, pooling="mean")
    tree["data"] |= {"unlabeled": str(corpus), "general": str(corpus)}
    return folder / "run", run_recipe(tree, folder / "run")


@pytest.fixture
def moved(finished: Finished, tmp_path: Path) -> Finished:
    """Copy the finished run to another place."""
    shutil.copytree(finished[0], tmp_path / "moved")
    return tmp_path / "moved", json.loads(json.dumps(finished[1]))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """List the facts of each adaptation that the test trains."""
    facts: list[dict[str, Any]] = []
    adapt = adaptation.adapt_encoder

    def list_facts(*arguments: Any, **more: Any) -> dict[str, Any]:
        facts.append(adapt(*arguments, **more))
        return facts[-1]

    monkeypatch.setattr(adaptation, "adapt_encoder", list_facts)
    return facts


def read_predictions(run: Path, arm: str, seed: int = 0) -> bytes:
    return (run / "arms" / f"{arm}-seed{seed}" / "predictions.parquet").read_bytes()


def read_card(run: Path, folder: str = "publish") -> str:
    return (run / folder / "README.md").read_text("utf-8")


def read_ranks(run: Path) -> set[int]:
    settings = json.loads((run / "publish" / "adapter_config.json").read_text("utf-8"))
    return {settings["r"], *settings["rank_pattern"].values()}


def list_published(run: Path, folder: str = "publish") -> set[str]:
    return set(check_files(run / folder))


def hash_weights(folder: Path) -> str:
    return hash_source_weights(find_source(Source(model=str(folder))))


# A finished run


def test_finished_folder_follows_the_contract(finished: Finished) -> None:
    run, _ = finished
    record = Record.read(run)
    assert list_published(run) == TEXT_FILES | {
        "adapter_config.json", "adapter_model.safetensors", "assets/ladder.png",
    }  # fmt: skip
    assert {p.name for p in (run / "arms").iterdir()} == {
        f"{arm}-seed{seed}" for arm in ("lora", "source", "classical") for seed in (0, 1)
    }
    assert not (run / "publish-base").exists() and not list(run.glob("checkpoints/*"))
    gain = record["adapt"]["gain"]
    assert set(gain) == set(record["transfer_gain"])
    assert gain["baseline"] == "source" and gain["seeds"] == 2
    scores = {(e["arm"], e["seed"]): e["metrics"]["test"]["accuracy"] for e in record["arms"]}
    over = [scores["lora", seed] - scores["source", seed] for seed in (0, 1)]
    assert gain["value"] == pytest.approx(np.mean(over), abs=1e-12)
    (stage,) = record["adapt"]["stages"]
    assert stage["kept"] == "adapted" and stage["loss"]["after"] < stage["loss"]["before"]
    assert (stage["corpus"]["from"], stage["corpus"]["leaked"]) == ("train", 0)


def test_arm_source_is_the_run_without_adaptation(finished: Finished, tmp_path: Path) -> None:
    run, tree = finished
    measure = {"seeds": [1], "arms": []}
    run_recipe(tree | {"adapt": None, "measure": measure}, tmp_path / "plain", until="measure")
    assert read_predictions(run, "source", 1) == read_predictions(tmp_path / "plain", "lora", 1)
    assert read_predictions(run, "source", 1) != read_predictions(run, "lora", 1)


def test_published_adapter_holds_both_stages_on_the_original_base(
    finished: Finished, tiny_model: Tiny
) -> None:
    """Reload it by peft alone."""
    run, _ = finished
    record = Record.read(run)
    assert record["reload_difference"] <= 1e-5
    assert 3 + 8 in read_ranks(run) <= {3, 8, 3 + 8}
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model("bert", True), num_labels=2
    )
    model = PeftModel.from_pretrained(base, run / "publish").eval()
    folder = run / "arms" / f"lora-seed{record['published_seed']}"
    predictions = pq.read_table(folder / "predictions.parquet").to_pylist()
    predictions = [row for row in predictions if row["split"] == "test"]
    rows = [SENTENCES[row["row"]][0] for row in predictions]
    inputs = AutoTokenizer.from_pretrained(run / "publish")(rows, return_tensors="pt", padding=True)
    with torch.inference_mode():
        scores = model(**inputs).logits.softmax(-1).numpy()
    np.testing.assert_allclose(scores, [row["scores"] for row in predictions], atol=1e-5)
    again = [list(p["scores"].values()) for p in hftl.load(run).predict(rows[:3])]
    np.testing.assert_allclose(again, scores[:3], atol=1e-6)


def test_fine_tuning_starts_from_the_merged_encoder(finished: Finished, tiny_model: Tiny) -> None:
    phase = finished[0] / "phases" / "adapt-1"
    before = AutoModel.from_pretrained(tiny_model("bert", True)).state_dict()
    after = AutoModel.from_pretrained(phase / "encoder").state_dict()
    factors = load_file(phase / "lora.safetensors")
    layers = {name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")}
    for layer in layers:
        update = factors[f"{layer}.lora_B"] @ factors[f"{layer}.lora_A"]
        torch.testing.assert_close(
            after[f"{layer}.weight"] - before[f"{layer}.weight"], update, atol=1e-6, rtol=1e-4
        )
    assert layers and (factors[f"{min(layers)}.lora_B"] != 0).any()
    frozen = [n for n in before if n.removesuffix(".weight") not in layers and "pooler" not in n]
    assert all(torch.equal(before[n], after[n]) for n in frozen)


# Again, and changed


def test_the_same_command_again_changes_nothing(
    moved: Finished, trained: list[dict[str, Any]]
) -> None:
    run, tree = moved
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    run_recipe(tree, run)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert not trained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_ratio": 0.3}, r"adapt\.mask_ratio: 0\.15 -> 0\.3"),
        ({"lora": {"r": 4}}, r"adapt\.lora\.r: 3 -> 4"),
        ({"training": TINY | {"learning_rate": 1e-3}},
         r"adapt\.training\.learning_rate: 0\.003 -> 0\.001"),
        (None, r"another recipe: adapt: 1 -> 0 adaptations\. "),
    ],
)  # fmt: skip
def test_changed_key_is_refused(
    moved: Finished, trained: list[dict[str, Any]], change: Any, message: str
) -> None:
    run, tree = moved
    tree["adapt"] = None if change is None else tree["adapt"] | change
    with pytest.raises(RunFolderError, match=message) as caught:
        run_recipe(tree, run)
    assert caught.value.exit_code == 4 and not trained


@pytest.mark.slow
def test_second_adaptation_starts_from_the_first(
    moved: Finished, trained: list[dict[str, Any]]
) -> None:
    """Run it and what follows from it, nothing else."""
    run, tree = moved
    files = ("phases/adapt-1/told.json", "arms/source-seed0/metrics.json",
             "arms/classical-seed1/metrics.json")  # fmt: skip
    times = {name: (run / name).stat().st_mtime_ns for name in files}
    tree["adapt"] = [LORA, LORA | {"lora": {"r": 2}, "pack": True}]
    record = run_recipe(tree, run)
    assert len(trained) == 1
    assert {name: (run / name).stat().st_mtime_ns for name in files} == times
    first, second = record["adapt"]["stages"]
    assert second["loss"]["before"] == pytest.approx(first["loss"]["after"], abs=1e-5)
    assert second["warmed"]["steps"] == 0
    assert record["reload_difference"] <= 1e-5
    assert 3 + 2 + 8 in read_ranks(run)
    assert read_card(run).count("Adapted by masked language modelling") == 2


def test_adapt_stops_after_its_phase_and_takes_no_other_corpus(
    texts: Path, tiny_model: Tiny, tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    corpus, run = write_csv(tmp_path / "c.csv", ["text"], OTHER_SENTENCES[:60]), tmp_path / "run"
    tree = build_tree(tiny_model(), texts, ADAPT)
    tree["data"]["unlabeled"] = str(corpus)
    lines: list[str] = []
    assert hftl.run(parse(tree), run, until="adapt", say=lines.append) is None
    assert hftl.run(parse(tree), run, until="adapt") is None
    (facts,) = trained
    warning = f"warning: adapt: mlm full has {facts['steps']} optimizer steps"
    assert any(warning in line for line in lines)
    assert (run / "phases" / "adapt-1" / "told.json").exists()
    assert not (run / "arms").exists() and not (run / "record.json").exists()
    write_csv(corpus, ["text"], OTHER_SENTENCES[:61])
    with pytest.raises(RunFolderError, match="made with another corpus: adapt-1 does not fit"):
        hftl.run(parse(tree), run, until="adapt")
    assert len(trained) == 1


def test_check_warns_of_few_steps(
    tiny_model: Tiny, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(**settings: Any) -> Recipe:
        return parse(build_tree(tiny_model(), table, ADAPT | {"training": TINY | settings}))

    _, report = check_recipe(build(num_train_epochs=3))
    (line,) = [line for line in report["warnings"] if "optimizer steps" in line]
    assert "adapt: mlm full has 6 optimizer steps, too few" in line
    longer = build(num_train_epochs=10)
    lines = check_corpora(longer, bench_of(longer))
    assert not [line for line in lines if "optimizer steps" in line]
    (line,) = [line for line in lines if "held out, too few to choose weights by" in line]
    (stage,) = longer.stages
    assert not list_adaptation_warnings(stage, 10_000, 10)
    monkeypatch.setitem(MAX_ROWS, "text", 5)
    assert not check_corpora(longer, bench_of(longer)), "the rows that are not read count, too"


def test_check_of_an_adaptation_alone_says_where_texts_are_cut(
    tiny_model: Tiny, table: Path
) -> None:
    tree = build_tree(tiny_model(), table, ADAPT)
    tree["data"] |= {"task": None, "max_length": 999}
    tree["measure"] = {"arms": []}
    _, report = check_recipe(parse(tree))
    assert any("data.max_length=999 is above" in line for line in report["warnings"])


def test_check_counts_the_pictures_of_a_corpus_that_it_reads_in_part(
    image_folder: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAX_ROWS, "image", 5)
    recipe = parse(build_tree(tiny_model("dinov2"), image_folder, MAE))
    (line,) = check_corpora(recipe, bench_of(recipe))
    assert "mae" in line and "optimizer step" in line


# What is published


def test_adapted_base_of_an_adapter_is_published_first(
    adapted_base: tuple[Path, Record], tiny_model: Tiny, tmp_path: Path
) -> None:
    run, record = adapted_base
    assert record["reload_difference"] <= 1e-5
    assert {"head.safetensors", "adapter_model.safetensors"} <= list_published(run)
    base = run / "publish-base"
    assert list_published(run, "publish-base") == TEXT_FILES | {"model.safetensors"}
    assert record["adapt"]["base"]["weights_sha256"] == hash_weights(base)
    assert hash_weights(base) != hash_weights(tiny_model())
    PeftModel.from_pretrained(AutoModel.from_pretrained(base), run / "publish")
    run = shutil.copytree(run, tmp_path / "run")
    assert hftl.load(run).predict(["a good film"])[0]["label"] in ("negative", "positive")
    with pytest.raises(RunFolderError, match="other weights than this adapter was trained on"):
        hftl.load(run / "publish", base=tiny_model())
    weights = run / "publish-base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunFolderError, match="other weights than this adapter was trained on"):
        hftl.load(run / "publish")
    with pytest.raises(RunFolderError, match="publish-base/model.safetensors is not what was"):
        hftl.load(run)


def test_hostile_and_local_paths_are_not_published(adapted_base: tuple[Path, Record]) -> None:
    run, record = adapted_base
    recipe = json.loads((run / "publish" / "hftl.json").read_text("utf-8"))["recipe"]
    assert recipe["data"]["unlabeled"]["path"] == "c: {d}.csv"
    assert record["adapt"]["stages"][0]["general"] is not None
    assert "<b>" not in (run / "report.html").read_text("utf-8")
    for folder in ("publish", "publish-base"):
        list_published(run, folder)
        card = read_card(run, folder)
        _, front, body = card.split("---\n", 2)
        metadata = yaml.safe_load(front)
        assert "hftl" in metadata["tags"] and "license" not in metadata
        assert "Transductive: inputs of validation and test, without their labels" in body
        assert str(run.parent) not in card


@pytest.mark.parametrize(
    ("method", "strategy"),
    [("lora", "head"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (
        ("lora", "full"), ("full", "head"), ("full", "full"), ("lora+blocks", "full"),
    ))],
)  # fmt: skip
def test_whole_model_needs_no_adapted_base(
    method: str, strategy: str, texts: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    adapt = LORA if method == "lora" else ADAPT | {"method": method}
    tree = build_tree(tiny_model("bert", True), texts, adapt, strategy=strategy)
    record = run_recipe(tree, tmp_path)
    assert record["reload_difference"] <= 1e-5 and record["adapt"]["base"] is None
    assert not (tmp_path / "publish-base").exists()
    assert "model.safetensors" in list_published(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "publish")
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("model", "method", "auto"),
    [
        ("dinov2", "lora", AutoModelForImageClassification),
        pytest.param("vit_mae", "full", ViTForImageClassification, marks=pytest.mark.slow),
    ],
)
def test_images_are_adapted_and_published(
    model: str, method: str, auto: Any, image_folder: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    tree = build_tree(tiny_model(model), image_folder, MAE | {"method": method})
    record = run_recipe(tree, tmp_path)
    (stage,) = record["adapt"]["stages"]
    assert stage["kept"] == "adapted" and stage["corpus"]["documents"] > 0
    assert record["reload_difference"] <= 1e-5
    assert (tmp_path / "publish-base").exists() == (method == "full")
    base = tmp_path / "publish-base" if method == "full" else tiny_model(model)
    PeftModel.from_pretrained(auto.from_pretrained(base, num_labels=2), tmp_path / "publish")
    list_published(tmp_path)
    image = next(image_folder.rglob("*.png"))
    assert hftl.load(tmp_path).predict([image])[0]["label"] in ("light", "dark")


def test_harmful_adaptation_is_undone(texts: Path, tiny_model: Tiny, tmp_path: Path) -> None:
    """Lose neighbours while the loss falls: the own arm then is `source` bit for bit."""
    rows = [[" ".join(["music"] * n + ["was"] * m)] for n in range(1, 8) for m in range(1, 8)]
    harmful = ADAPT | {
        "guard": "neighbours", "tolerance": 0, "held_out": 0.3, "pack": False,
        "training": TINY | {"learning_rate": 3e-2},
    }  # fmt: skip
    tree = build_tree(tiny_model("bert", True), texts, harmful)
    tree["data"]["unlabeled"] = str(write_csv(tmp_path / "c.csv", ["text"], rows))
    tree["measure"]["arms"] = [{"off": {"adapt.guard": "off"}}]
    lines: list[str] = []
    run = tmp_path / "run"
    record = run_recipe(tree, run, say=lines.append)
    (stage,) = record["adapt"]["stages"]
    assert stage["kept"] == "original" and stage["step"] == 0
    assert "the guard (neighbours) was below 1 wherever" in stage["why"]
    assert min(seen["target"] for seen in stage["history"]) < stage["loss"]["before"]
    own, source, off = (read_predictions(run, arm) for arm in ("lora", "source", "off"))
    assert own == source != off
    assert record["adapt"]["gain"]["value"] == 0
    undone = f"Adaptation was undone: {stage['why']}; the original weights were kept."
    assert undone in read_card(run) and undone in "\n".join(lines)
    assert sum("kept what it started from" in line for line in lines) == 1
    assert record["adapt"]["base"] is None and not (run / "publish-base").exists()
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model("bert", True), num_labels=2
    )
    PeftModel.from_pretrained(base, run / "publish")


# Without a task


def adapt_alone(model: Path, table: Path, adapt: dict[str, Any], run: Path) -> Record:
    """Run a recipe without a task."""
    tree = build_tree(model, table, adapt)
    tree["data"]["task"] = None
    record = run_recipe(tree, run)
    assert record["arms"] == [] and record.transfer_gain is None
    assert record["adapt"]["gain"] is None
    list_published(run)
    with pytest.raises(hftl.HftlError, match="has no trained head to predict with") as caught:
        hftl.load(run)
    assert caught.value.exit_code == 2
    return record


def test_adapted_encoder_is_published_alone(texts: Path, tiny_model: Tiny, tmp_path: Path) -> None:
    model = tiny_model()
    record = adapt_alone(model, texts, ALONE, tmp_path)
    assert list_published(tmp_path) == TEXT_FILES | {"model.safetensors"}
    published = hash_weights(tmp_path / "publish")
    assert published == hash_weights(tmp_path / "phases" / "adapt-1" / "encoder")
    assert published != hash_weights(model)
    AutoModel.from_pretrained(tmp_path / "publish")
    assert record.verdict["decision"] == "publish"
    card = read_card(tmp_path)
    assert "Whether adaptation helps a task was not measured: the recipe has none." in card
    assert 'AutoModel.from_pretrained(".")' in card and "validation and test" not in card


@pytest.mark.parametrize("model", ["bert", pytest.param("dinov2", marks=pytest.mark.slow)])
def test_published_adapter_alone_is_the_adapted_encoder(
    model: str, texts: Path, image_folder: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    is_text = model == "bert"
    adapt = (ALONE if is_text else ALONE | MAE) | {
        "method": "lora", "lora": {"r": 3}, "guard": "neighbours",
    }  # fmt: skip
    adapt_alone(tiny_model(model), texts if is_text else image_folder, adapt, tmp_path)
    assert not (tmp_path / "publish" / "model.safetensors").exists()
    original, base = (AutoModel.from_pretrained(tiny_model(model)).eval() for _ in range(2))
    adapter = PeftModel.from_pretrained(base, tmp_path / "publish").eval()
    encoder = AutoModel.from_pretrained(tmp_path / "phases" / "adapt-1" / "encoder").eval()
    inputs = {"input_ids": torch.arange(5, 15)[None]} if is_text else {
        "pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    }  # fmt: skip
    with torch.inference_mode():
        hidden, expected, untouched = (
            m(**inputs).last_hidden_state for m in (adapter, encoder, original)
        )
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)
    assert not torch.equal(hidden, untouched)
    assert "PeftModel.from_pretrained" in read_card(tmp_path)


def test_undone_adaptation_alone_is_on_hold(texts: Path, tiny_model: Tiny, tmp_path: Path) -> None:
    adapt = ALONE | {"training": TINY | {"learning_rate": 1.0}, "tolerance": 0}
    record = adapt_alone(tiny_model("bert", True), texts, adapt, tmp_path)
    assert list_published(tmp_path) == TEXT_FILES
    assert record.verdict["decision"] == "hold"
    assert "Adaptation was undone: the held-out loss never fell" in read_card(tmp_path)
    assert 'from_pretrained(".")' not in read_card(tmp_path)


@pytest.mark.parametrize(
    ("outcome", "value", "words"),
    [
        ("positive", 0.05, "Adaptation helped: accuracy 0.850 against 0.800 without it, a gain of "
                           "+0.050 [+0.040, +0.060] (95 % interval, 3 seeds)."),
        ("negative", -0.05, "Adaptation did harm: without it the model is better: accuracy 0.850"),
        ("undetermined", 0.0, "Adaptation did not beat no adaptation beyond noise: accuracy 0.850"),
        ("equivalent", 0.0, "Adaptation made practically no difference: accuracy 0.850"),
    ],
)  # fmt: skip
def test_card_says_which_sign_the_gain_has(outcome: str, value: float, words: str) -> None:
    gain = Gain.model_validate(make_gain(value, [value - 0.01, value + 0.01], outcome))
    stage = AdaptStage.model_construct(kept="adapted", why=None)
    section = AdaptSection.model_construct(
        stages=[stage], gain=gain, outcome=describe_adaptation_outcome([stage], gain)
    )
    rows = [LadderRow(arm=arm, validation=0.5, test=test, sd=None, gain_of_own=None)
            for arm, test in (("lora", 0.85), ("source", 0.8))]  # fmt: skip
    record = Record.parse(make_record()).model_copy(update={"adapt": section, "ladder": rows})
    assert format_adaptation_sentence(record).startswith(words)
    reasons = decide_verdict(VerdictEvidence(
        gain=None, over_head=None, reload_difference=0.0, over_source=gain
    )).reasons  # fmt: skip
    assert any("adaptation did harm" in reason for reason in reasons) == (outcome == "negative")
