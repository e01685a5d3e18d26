"""Whole runs with an adaptation on tiny models: what they leave, reuse, refuse and publish."""

import json
import shutil
from collections.abc import Callable
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
from hftl.adapt import adaptation as training
from hftl.card.wording import format_adaptation_sentence
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.errors import RunFolderError
from hftl.measure.gain import describe_adaptation_outcome
from hftl.measure.record import AdaptSection, AdaptStage, Gain, LadderRow, Record
from hftl.measure.verdict import decide_verdict
from hftl.models.source import find_source, hash_source_weights
from hftl.pipeline.adaptation import warn_of_few_steps
from hftl.pipeline.pipeline import check_recipe
from hftl.publish.checks import check_files

TINY = {"num_train_epochs": 2, "learning_rate": 3e-3, "bf16": False}
FINETUNE = TINY | {"num_train_epochs": 1, "per_device_train_batch_size": 32}
ADAPT: dict[str, Any] = {"objective": "mlm", "guard": "off", "training": TINY}
LORA = ADAPT | {"method": "lora", "lora": {"r": 3}}
MAE = ADAPT | {"objective": "mae", "decoder": {"width": 16, "depth": 1}}
TEXT_FILES = {
    "README.md", "hftl.json", "config.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
Tiny = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plots, which take seconds; the run `finished` has them."""

    def blank(told: dict[str, Any], path: Path) -> None:
        path.parent.mkdir()
        path.touch()

    # A head that is barely warmed leaves something to learn from noise.
    monkeypatch.setattr("hftl.adapt.adaptation.HEAD_MAX_STEPS", 3)
    monkeypatch.setattr("hftl.pipeline.finalize_record.plot_ladder", blank)


def tree_of(model: Path, table: Path, adapt: Any, **finetune: Any) -> dict[str, Any]:
    """A recipe of one seed and no baseline."""
    return {
        "source": {"model": str(model)},
        "data": {"train": {"path": str(table)}, "max_length": 16},
        "adapt": adapt,
        "finetune": {"head_init": "random", "training": FINETUNE} | finetune,
        "measure": {"seeds": [0], "arms": []},
    }


def done(tree: dict[str, Any], run: Path, **more: Any) -> Record:
    record = hftl.run(Recipe.parse(json.loads(json.dumps(tree))), run, **more)
    assert record is not None
    return record


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("t") / "a.csv", ["text", "label"], sentences(160))


@pytest.fixture(scope="module")
def folder_of_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("p") / "pics", 20)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Tiny, texts: Path
) -> tuple[Path, dict[str, Any]]:
    """LoRA after LoRA on the native head; tests copy it before they change anything."""
    tree = tree_of(tiny_model("bert", True), texts, LORA)
    tree["measure"] = {"seeds": [0, 1], "arms": ["classical"]}
    run = tmp_path_factory.mktemp("finished") / "run"
    hftl.run(Recipe.parse(json.loads(json.dumps(tree))), run)
    return run, tree


@pytest.fixture
def again(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of it, in another place."""
    shutil.copytree(finished[0], tmp_path / "moved")
    return tmp_path / "moved", json.loads(json.dumps(finished[1]))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an adaptation was trained")

    monkeypatch.setattr(training, "adapt_encoder", never)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each adaptation has found that this test trains."""
    found: list[dict[str, Any]] = []
    adapt = training.adapt_encoder

    def listed(*words: Any, **more: Any) -> dict[str, Any]:
        found.append(adapt(*words, **more))
        return found[-1]

    monkeypatch.setattr(training, "adapt_encoder", listed)
    return found


def predictions(run: Path, arm: str, seed: int = 0) -> bytes:
    return (run / "arms" / f"{arm}-seed{seed}" / "predictions.parquet").read_bytes()


def published(run: Path, folder: str = "publish") -> set[str]:
    return set(check_files(run / folder))


def sha(folder: Path) -> str:
    return hash_source_weights(find_source(Source(model=str(folder))))


def test_the_finished_folder_holds_what_the_contract_says(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    run, _ = finished
    record = Record.read(run)
    assert published(run) == TEXT_FILES | {
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
    assert stage["loss"]["fall"] == 1 - stage["loss"]["after"] / stage["loss"]["before"]
    assert stage["loss"]["perplexity"][0] == pytest.approx(np.exp(stage["loss"]["before"]))
    assert (stage["corpus"]["from"], stage["corpus"]["leaked"]) == ("train", 0)


def test_source_is_the_run_without_adaptation(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, tree = finished
    done(tree | {"adapt": None}, tmp_path / "plain", until="measure")
    for seed in (0, 1):
        assert predictions(run, "source", seed) == predictions(tmp_path / "plain", "lora", seed)
        assert predictions(run, "source", seed) != predictions(run, "lora", seed)


def test_the_proof_of_the_reload(finished: tuple[Path, dict[str, Any]], tiny_model: Tiny) -> None:
    """One adapter of both stages, on the original base, by peft alone."""
    run, tree = finished
    record = Record.read(run)
    assert record["reload_difference"] <= 1e-5
    settings = json.loads((run / "publish" / "adapter_config.json").read_text("utf-8"))
    ranks = {settings["r"], *settings["rank_pattern"].values()}
    assert 3 + 8 in ranks and ranks <= {3, 8, 3 + 8}
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model("bert", True), num_labels=2
    )
    model = PeftModel.from_pretrained(base, run / "publish").eval()
    folder = run / "arms" / f"lora-seed{record['published_seed']}"
    told = [r for r in pq.read_table(folder / "predictions.parquet").to_pylist()
            if r["split"] == "test"]  # fmt: skip
    rows = [sentences(160)[row["row"]][0] for row in told]
    inputs = AutoTokenizer.from_pretrained(run / "publish")(rows, return_tensors="pt", padding=True)
    with torch.inference_mode():
        scores = model(**inputs).logits.softmax(-1).numpy()
    np.testing.assert_allclose(scores, [row["scores"] for row in told], atol=1e-5)
    found = hftl.load(run).predict(rows[:3])
    np.testing.assert_allclose([list(f["scores"].values()) for f in found], scores[:3], atol=1e-6)


def test_adapted_weights_are_where_fine_tuning_started(
    finished: tuple[Path, dict[str, Any]], tiny_model: Tiny
) -> None:
    """The merged encoder is the original and the factors."""
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
    kept = [n for n in before if n.removesuffix(".weight") not in layers and "pooler" not in n]
    assert all(torch.equal(before[n], after[n]) for n in kept)


def test_the_same_command_again_changes_nothing(
    again: tuple[Path, dict[str, Any]], no_training: None
) -> None:
    run, tree = again
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    done(tree, run)
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mask_ratio", 0.3, r"adapt\.mask_ratio: 0\.15 -> 0\.3"),
        ("method", "full", r"adapt\.method: lora -> full"),
        ("guard", "probe", r"adapt\.guard: off -> probe"),
        ("lora", {"r": 4}, r"adapt\.lora\.r: 3 -> 4"),
        ("held_out", 0.2, r"adapt\.held_out: 0\.1 -> 0\.2"),
        ("training", TINY | {"learning_rate": 1e-3},
         r"adapt\.training\.learning_rate: 0\.003 -> 0\.001"),
    ],
)  # fmt: skip
def test_a_changed_key_is_refused(
    again: tuple[Path, dict[str, Any]], key: str, value: Any, message: str
) -> None:
    run, tree = again
    tree["adapt"][key] = value
    with pytest.raises(RunFolderError, match=message) as found:
        done(tree, run)
    assert found.value.exit_code == 4


def test_a_second_adaptation_starts_from_the_first(
    again: tuple[Path, dict[str, Any]], trained: list[dict[str, Any]], tiny_model: Tiny
) -> None:
    """Only it and what follows from it is run."""
    run, tree = again
    kept = {
        name: (run / name).stat().st_mtime_ns
        for name in ("phases/adapt-1/told.json", "arms/source-seed0/metrics.json",
                     "arms/classical-seed1/metrics.json")
    }  # fmt: skip
    tree["adapt"] = [LORA, LORA | {"lora": {"r": 2}, "pack": True}]
    record = done(tree, run)
    assert len(trained) == 1
    assert {name: (run / name).stat().st_mtime_ns for name in kept} == kept
    first, second = record["adapt"]["stages"]
    assert second["loss"]["before"] == pytest.approx(first["loss"]["after"], abs=1e-5)
    assert second["warmed"]["steps"] == 0
    assert record["reload_difference"] <= 1e-5
    settings = json.loads((run / "publish" / "adapter_config.json").read_text("utf-8"))
    assert 3 + 2 + 8 in {settings["r"], *settings["rank_pattern"].values()}
    card = (run / "publish" / "README.md").read_text("utf-8")
    assert card.count("Adapted by masked language modelling") == 2


def test_adapt_stops_after_its_phase_and_takes_no_other_corpus(
    texts: Path, tiny_model: Tiny, tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    corpus, run = tmp_path / "c.csv", tmp_path / "run"
    write_csv(corpus, ["text"], [[text] for text, _ in sentences(60, 5)])
    tree = tree_of(tiny_model(), texts, ADAPT)
    tree["data"]["unlabeled"] = str(corpus)
    recipe = Recipe.parse(tree)
    assert hftl.run(recipe, run, until="adapt") is None
    assert hftl.run(recipe, run, until="adapt") is None
    assert len(trained) == 1
    assert (run / "phases" / "adapt-1" / "told.json").exists()
    assert not (run / "arms").exists() and not (run / "record.json").exists()
    write_csv(corpus, ["text"], [[text] for text, _ in sentences(61, 5)])
    with pytest.raises(RunFolderError, match="made with another corpus: adapt-1 does not fit"):
        hftl.run(recipe, run, until="adapt")
    assert len(trained) == 1


def test_an_adaptation_that_was_taken_away_is_named(
    again: tuple[Path, dict[str, Any]], no_training: None
) -> None:
    run, tree = again
    tree["adapt"] = None
    with pytest.raises(RunFolderError, match=r"another recipe: adapt: 1 -> 0 adaptations\. "):
        done(tree, run)


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        ("full", "lora"),
        ("lora+blocks", "full"),
        pytest.param("full", "head", marks=pytest.mark.slow),
        pytest.param("full", "full", marks=pytest.mark.slow),
        pytest.param("lora+blocks", "lora", marks=pytest.mark.slow),
        pytest.param("lora+blocks", "head", marks=pytest.mark.slow),
    ],
)
def test_an_adapted_base_goes_first(
    method: str, strategy: str, texts: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    """An adapter is put on publish-base/; a whole model needs none."""
    run = tmp_path / "run"
    record = done(
        tree_of(
            tiny_model(), texts, ADAPT | {"method": method}, strategy=strategy, pooling="mean"
        ),
        run,
    )  # fmt: skip
    assert record["reload_difference"] <= 1e-5
    assert "head.safetensors" in published(run)
    needs = strategy == "lora"
    assert (run / "publish-base").exists() == needs
    assert (record["adapt"]["base"] is not None) == needs
    assert ("model.safetensors" in published(run)) != needs
    assert hftl.load(run).predict(["a good film"])[0]["label"] in ("negative", "positive")
    if needs:
        base = run / "publish-base"
        assert published(run, "publish-base") == TEXT_FILES | {"model.safetensors"}
        assert record["adapt"]["base"]["weights_sha256"] == sha(base) != sha(tiny_model())
        PeftModel.from_pretrained(AutoModel.from_pretrained(base), run / "publish")
        refuses_another_base(run, tiny_model())


def refuses_another_base(run: Path, original: Path) -> None:
    with pytest.raises(RunFolderError, match="other weights than this adapter was trained on"):
        hftl.load(run / "publish", base=original)
    weights = run / "publish-base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunFolderError, match="other weights than this adapter was trained on"):
        hftl.load(run / "publish")
    with pytest.raises(RunFolderError, match="publish-base/model.safetensors is not what was"):
        hftl.load(run)


@pytest.mark.parametrize("strategy", ["head", pytest.param("full", marks=pytest.mark.slow)])
def test_a_whole_model_after_lora_holds_everything(
    strategy: str, texts: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    record = done(tree_of(tiny_model("bert", True), texts, LORA, strategy=strategy), run)
    assert record["reload_difference"] <= 1e-5 and not (run / "publish-base").exists()
    model = AutoModelForSequenceClassification.from_pretrained(run / "publish")
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("model", "method", "auto"),
    [
        ("dinov2", "lora", AutoModelForImageClassification),
        ("vit_mae", "full", ViTForImageClassification),
    ],
)
def test_pictures(
    model: str, method: str, auto: Any, folder_of_pictures: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    adapt = MAE | {"method": method, "training": TINY | {"learning_rate": 3e-3}}
    tree = tree_of(tiny_model(model), folder_of_pictures, adapt)
    record = done(tree, run)
    (stage,) = record["adapt"]["stages"]
    assert stage["kept"] == "adapted" and stage["corpus"]["documents"] > 0
    assert record["reload_difference"] <= 1e-5
    assert (run / "publish-base").exists() == (method == "full")
    base = run / "publish-base" if method == "full" else tiny_model(model)
    PeftModel.from_pretrained(auto.from_pretrained(base, num_labels=2), run / "publish")
    published(run)
    picture = next(folder_of_pictures.rglob("*.png"))
    assert hftl.load(run).predict([picture])[0]["label"] in ("light", "dark")


def card_of(run: Path, folder: str = "publish") -> str:
    return (run / folder / "README.md").read_text("utf-8")


def test_a_harmful_adaptation_is_undone(texts: Path, tiny_model: Tiny, tmp_path: Path) -> None:
    """Its loss falls, and the neighbours with it; the own arm then is `source` bit for bit."""
    rows = [[" ".join(["music"] * n + ["was"] * m)] for n in range(1, 8) for m in range(1, 8)]
    irrelevant = write_csv(tmp_path / "c.csv", ["text"], rows)
    harmful = ADAPT | {
        "guard": "neighbours", "tolerance": 0, "held_out": 0.3, "pack": False,
        "training": TINY | {"learning_rate": 3e-2},
    }  # fmt: skip
    tree = tree_of(tiny_model("bert", True), texts, harmful)
    tree["data"]["unlabeled"] = str(irrelevant)
    tree["measure"]["arms"] = [{"off": {"adapt.guard": "off"}}]
    said: list[str] = []
    record = done(tree, tmp_path / "run", say=said.append)
    (stage,) = record["adapt"]["stages"]
    assert stage["kept"] == "original" and stage["step"] == 0
    assert "the guard (neighbours) was below 1 wherever" in stage["why"]
    assert min(seen["target"] for seen in stage["history"]) < stage["loss"]["before"]
    run = tmp_path / "run"
    assert predictions(run, "lora") == predictions(run, "source") != predictions(run, "off")
    assert record["adapt"]["gain"]["value"] == 0
    undone = f"Adaptation was undone: {stage['why']}; the original weights were kept."
    assert undone in card_of(run) and undone in "\n".join(said)
    assert sum("kept what it started from" in line for line in said) == 1
    assert record["adapt"]["base"] is None and not (run / "publish-base").exists()
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model("bert", True), num_labels=2
    )
    PeftModel.from_pretrained(base, run / "publish")


ALONE = ADAPT | {"guard": "neighbours", "held_out": 0.3, "tolerance": 1}


def alone(model: Path, table: Path, adapt: dict[str, Any], run: Path) -> Record:
    """A run without a task."""
    tree = tree_of(model, table, adapt)
    tree["data"]["task"] = None
    record = done(tree, run)
    assert record["arms"] == [] and record.transfer_gain is None
    assert record["adapt"]["gain"] is None
    published(run)
    with pytest.raises(hftl.HftlError, match="has no trained head to predict with") as found:
        hftl.load(run)
    assert found.value.exit_code == 2
    return record


def test_an_encoder_alone(texts: Path, tiny_model: Tiny, tmp_path: Path) -> None:
    run, model = tmp_path / "run", tiny_model()
    record = alone(model, texts, ALONE, run)
    assert published(run) == TEXT_FILES | {"model.safetensors"}
    assert sha(run / "publish") == sha(run / "phases" / "adapt-1" / "encoder") != sha(model)
    AutoModel.from_pretrained(run / "publish")
    assert record.verdict["decision"] == "publish"
    card = card_of(run)
    assert "Whether adaptation helps a task was not measured: the recipe has none." in card
    assert 'AutoModel.from_pretrained(".")' in card and "validation and test" not in card


@pytest.mark.parametrize("model", ["bert", "dinov2"])
def test_an_adapter_alone(
    model: str, texts: Path, folder_of_pictures: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    """On the original base it is the encoder that adaptation left."""
    run, words = tmp_path / "run", model == "bert"
    adapt = ALONE | ({} if words else MAE | {"training": TINY | {"learning_rate": 3e-3}})
    adapt |= {"method": "lora", "lora": {"r": 3}, "guard": "neighbours"}
    alone(tiny_model(model), texts if words else folder_of_pictures, adapt, run)
    assert not (run / "publish" / "model.safetensors").exists()
    base = AutoModel.from_pretrained(tiny_model(model))
    adapter = PeftModel.from_pretrained(base, run / "publish").eval()
    adapted = AutoModel.from_pretrained(run / "phases" / "adapt-1" / "encoder").eval()
    inputs = {"input_ids": torch.arange(5, 15)[None]} if words else {
        "pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    }  # fmt: skip
    with torch.inference_mode():
        found, expected = (m(**inputs).last_hidden_state for m in (adapter, adapted))
        untouched = AutoModel.from_pretrained(tiny_model(model)).eval()(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.equal(found, untouched)
    assert "PeftModel.from_pretrained" in card_of(run)


def test_an_adaptation_alone_that_was_undone(texts: Path, tiny_model: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    adapt = ALONE | {"training": TINY | {"learning_rate": 1.0}, "tolerance": 0}
    record = alone(tiny_model("bert", True), texts, adapt, run)
    assert published(run) == TEXT_FILES
    assert record.verdict["decision"] == "hold"
    assert "Adaptation was undone: the held-out loss never fell" in card_of(run)
    assert 'from_pretrained(".")' not in card_of(run)


def test_no_local_path_and_no_hostile_one_reaches_what_is_published(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    hostile = tmp_path / "---\nlicense: mit" / 'a": [x]'
    hostile.mkdir(parents=True)
    rows = sentences(160)
    table = write_csv(hostile / "t'&<b>|`.csv", ["text", "label"], rows)
    corpus = write_csv(hostile / "c: {d}.csv", ["text"], [[text] for text, _ in sentences(90, 5)])
    tree = tree_of(tiny_model(), table, ADAPT | {"transductive": True})
    tree["data"] |= {"unlabeled": str(corpus), "general": str(corpus)}
    run = tmp_path / "run"
    record = done(tree, run)
    told = json.loads((run / "publish" / "hftl.json").read_text("utf-8"))
    assert told["recipe"]["data"]["unlabeled"]["path"] == corpus.name
    assert record["adapt"]["stages"][0]["general"] is not None
    for folder in ("publish", "publish-base"):
        published(run, folder)
        card = card_of(run, folder)
        _, front, body = card.split("---\n", 2)
        metadata = yaml.safe_load(front)
        assert "hftl" in metadata["tags"] and "license" not in metadata
        assert "Transductive: inputs of validation and test, without their labels" in body
        assert "<b>" not in (run / "report.html").read_text("utf-8")
        assert str(tmp_path) not in card


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
def test_the_sentence_says_which_sign_it_has(outcome: str, value: float, words: str) -> None:
    gain = Gain.model_validate(make_gain(value, [value - 0.01, value + 0.01], outcome))
    stage = AdaptStage.model_construct(kept="adapted", why=None)
    section = AdaptSection.model_construct(
        stages=[stage], gain=gain, outcome=describe_adaptation_outcome([stage], gain)
    )
    rows = [LadderRow(arm=arm, validation=0.5, test=test, sd=None, gain_of_own=None)
            for arm, test in (("lora", 0.85), ("source", 0.8))]  # fmt: skip
    record = Record.parse(make_record()).model_copy(update={"adapt": section, "ladder": rows})
    assert format_adaptation_sentence(record).startswith(words)
    reasons = decide_verdict(None, None, 0.0, gain).reasons
    assert any("adaptation did harm" in reason for reason in reasons) == (outcome == "negative")


def test_hardly_any_steps_are_told_before_they_are_made(
    tiny_model: Tiny, table: Path, tmp_path: Path
) -> None:
    """From what train holds before it is cut into blocks, and exactly where it trains."""
    tree = tree_of(tiny_model(), table, ADAPT | {"training": TINY | {"num_train_epochs": 3}})
    _, found = check_recipe(Recipe.parse(json.loads(json.dumps(tree))))
    (told,) = [line for line in found["warnings"] if "optimizer steps" in line]
    assert "adapt: mlm full has about 6 optimizer steps, too few" in told
    lines: list[str] = []
    hftl.run(Recipe.parse(tree), tmp_path / "run", until="adapt", say=lines.append)
    steps = json.loads((tmp_path / "run/phases/adapt-1/told.json").read_text("utf-8"))["steps"]
    assert any(f"warning: adapt: mlm full has {steps} optimizer steps" in line for line in lines)
    tree["adapt"]["training"]["num_train_epochs"] = 10
    _, found = check_recipe(Recipe.parse(tree))
    assert not any("optimizer steps" in line for line in found["warnings"])
    tree["adapt"]["training"]["max_steps"] = 2
    tree["data"]["unlabeled"] = {"path": "a.txt", "text": "text"}
    (told,) = warn_of_few_steps(Recipe.parse(tree), bench_of(Recipe.parse(tree)))
    assert "about 2 optimizer steps" in told
