"""Render the card and report of records made by hand."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from support.records import (
    GAINS,
    add_forgetting,
    make_record,
    render,
    render_page,
    validate_own_card,
)

from hftl.card.card import format_gain_sentence
from hftl.card.plots import plot_frontier, plot_ladder
from hftl.card.report import render_report
from hftl.card.wording import (
    build_forgetting_rows,
    describe_arm,
    format_forgetting_sentence,
)
from hftl.measure.record import BaselineGain, Gain, Record
from hftl.measure.verdict import format_gain, judge_record
from hftl.pipeline.evaluate import _format_summary
from hftl.publish.sanitize import sanitize_record
from hftl.runtime.run_folder import to_json

WORDS = {
    "positive": "Transfer helped",
    "equivalent": "practically no difference",
    "negative": "Negative transfer",
    "undetermined": "not settled",
    "one seed": "not settled",
    "no baseline": "No baseline",
}


@pytest.mark.parametrize(
    ("search", "said"),
    [
        (None, None),
        ({"learning_rate": 1e-3, "tried": []}, None),
        ({"learning_rate": 1e-3, "at_edge": False, "beyond": []}, None),
        ({"learning_rate": 1e-2, "at_edge": True, "beyond": [1e-2]}, "may be better than it is"),
        ({"learning_rate": 1e-3, "at_edge": False, "beyond": [1e-2]}, "0.01 was tried as well."),
    ],
)
def test_the_card_says_where_scratchs_rate_was_at_the_edge(
    search: dict[str, Any] | None, said: str | None
) -> None:
    card = render(make_record() | {"scratch_search": search})
    assert ("For scratch" in card) == (said is not None)
    assert said is None or said in card


CASES = list(GAINS)
KINDS = [("classification", "lora"), ("regression", "full"), ("classification", "head")]
EVERY = [(case, *kind) for case in CASES for kind in KINDS]


def read_back(tree: dict[str, Any], folder: Path) -> Record:
    """Return the record of a run folder that holds this tree."""
    (folder / "record.json").write_text(to_json(tree), encoding="utf-8")
    return Record.read(folder)


def front_matter(card: str) -> tuple[dict[str, Any], str]:
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(front), body


def table_rows(body: str) -> list[list[str]]:
    """Return the cells of the card's table, its header first."""
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines if "---" not in line]


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [n for value in tree.values() for n in numbers(value)]
    if isinstance(tree, list):
        return [n for value in tree for n in numbers(value)]
    return [tree] if isinstance(tree, (int, float)) and not isinstance(tree, bool) else []


@pytest.mark.parametrize(("case", "task", "own"), EVERY)
def test_front_matter_is_read_by_yaml_and_by_the_hub(case: str, task: str, own: str) -> None:
    card = render(make_record(case, task, own))
    front, _ = front_matter(card)
    assert ModelCard(card).data.to_dict() == front
    assert front["base_model"] == "org/tiny-MiniLM"
    assert front["base_model_relation"] == ("adapter" if own == "lora" else "finetune")
    # No class of transformers has a mean-pooled head.
    assert front["library_name"] == ("peft" if own == "lora" else "hftl")
    assert front["pipeline_tag"] == "text-classification"
    tags = {"base_model:adapter:org/tiny-MiniLM"} if own == "lora" else set()
    assert set(front["tags"]) == {"hftl", "transfer-learning", own} | tags
    assert validate_own_card(card) == []


@pytest.mark.parametrize("own", ["lora", "full"])
def test_metadata_of_a_native_model_promise_the_task(own: str) -> None:
    record = make_record(own=own)
    record["recipe"]["finetune"]["pooling"] = "native"
    front, body = front_matter(render(record))
    assert front["library_name"] == ("peft" if own == "lora" else "transformers")
    assert front["pipeline_tag"] == "text-classification"
    assert ("AutoConfig, AutoTokenizer, pipeline" in body) == (own == "lora")
    assert "do not load it" not in body


@pytest.mark.parametrize(("ci95", "words"), [
    ([-0.021, 0.011], "Not better than head"), ([-0.02, -0.001], "Worse than head"),
    ([0.001, 0.02], None),
])  # fmt: skip
def test_first_sentence_says_that_a_model_is_not_better_than_head(
    ci95: list[float], words: str | None, tmp_path: Path
) -> None:
    record = make_record()
    row = next(row for row in record["ladder"] if row["arm"] == "head")
    row["gain_of_own"] |= {"value": sum(ci95) / 2, "ci95": ci95}
    row["test"] = 0.7254 - sum(ci95) / 2
    record["verdict"] = judge_record(Record.parse(record)).to_dict()
    sentence = format_gain_sentence(Record.parse(record))
    assert sentence.startswith(words or "Transfer helped")
    assert (format_gain(Gain(**row["gain_of_own"])) in sentence) == (words is not None)
    assert "Transfer helped" in sentence, "what it beats is told all the same"
    colors = ("#9a6700", "#1a7f37") if words else ("#1a7f37", "#9a6700")
    card = render(record).replace("assets/", "none/")
    page = render_report(card, Path(), Record.parse(record))
    assert colors[0] in page and colors[1] not in page
    bold = next(line for line in render(record).splitlines() if line.startswith("**"))
    assert bold == f"**{sentence}**"
    assert sentence in _format_summary(read_back(record, tmp_path), True)


def test_metadata_hold_the_known_facts() -> None:
    record = make_record(hub_revisions={"train": "a" * 40, "test": "b" * 40, "general": "c" * 40})
    tables = record["recipe"]["data"]
    tables["train"] |= {"path": "org/reviews", "name": "en"}
    tables["test"] = {"path": "org/other", "name": None}
    tables["general"] = {"path": "org/news"}
    record["recipe"]["publish"] |= {"license": "mit", "language": ["en", "no"]}
    record["source"]["revision"] = "d" * 40
    record["test_metrics"] = {"accuracy": 0.7254, "f1": 0.7123}
    card = render(record)
    front, body = front_matter(card)
    assert front["license"] == "mit" and front["language"] == ["en", "no"]
    assert front["datasets"] == ["org/reviews", "org/other"], "general data taught nothing"
    assert front["base_model_revision"] == "d" * 40 and f"at commit `{'d' * 40}`" in body
    _, results = model_index_to_eval_results(front["model-index"])
    assert [(r.metric_type, r.metric_value) for r in results[:2]] == [
        ("accuracy", 0.7254), ("f1", 0.7123)
    ]  # fmt: skip
    assert {(r.dataset_type, r.dataset_revision) for r in results} == {("org/other", "b" * 40)}
    assert "means over seeds: f1 0.712." in body and validate_own_card(card) == []


def test_unknown_facts_are_left_out() -> None:
    front, body = front_matter(render(make_record()))
    assert not {"license", "language", "datasets", "base_model_revision"} & set(front)
    assert "means over seeds" not in body and "None" not in body and "unknown" not in body.lower()


def test_adapter_on_an_adapted_base_names_that_base_once_it_is_published() -> None:
    record = make_record()
    record["adapt"] = {"stages": [], "gain": None, "outcome": "x", "base": {"weights_sha256": "1"}}
    assert "base_model" not in front_matter(render(record))[0]
    record["adapt"]["base"] |= {"published_as": "org/adapted", "revision": "e" * 40}
    card = render(record)
    assert front_matter(card)[0]["base_model"] == "org/adapted"
    assert 'from_pretrained("org/adapted", revision="' + "e" * 40 in card


def test_reason_of_a_forced_push_stands_above_the_verdict() -> None:
    record = make_record("negative") | {"forced": {"reason": "the team compares it"}}
    body = front_matter(render(record))[1]
    words = "> **Published although the verdict is hold:** the team compares it"
    assert body.index("Negative transfer") < body.index(words) < body.index("Verdict:")
    assert "Published although" not in render(make_record("negative"))


def test_classes_that_the_baseline_tells_apart_better_are_limits() -> None:
    rows = [{"label": f"c{i}", "own": 0.5, "baseline": 0.4 + 0.05 * i, "rows": 9} for i in range(9)]
    record = make_record() | {"classes": {"baseline": "scratch", "rows": rows}}
    limits = render(record).split("## Limits")[1]
    assert "behind scratch on 6 of 9, most of all `c8` (F1 0.500 against 0.800), `c7`" in limits
    assert "`c4`" in limits and "`c3`" not in limits
    record["classes"]["rows"] = rows[:2]
    assert "Class by class" not in render(record)


def test_examples_stand_in_the_card_only_where_the_record_has_them() -> None:
    record = make_record()
    assert "mistakes" not in render(record)
    record["examples"] = [
        {"texts": ["one", "two"], "true": "positive", "said": "negative", "surety": 0.98},
        {"words": ["before it", "Word", ""], "true": "A", "said": "B", "surety": 0.9},
        {"picture": "assets/mistake-03.png", "true": "A", "said": "B", "surety": 0.8},
    ]
    part = render(record).split("## Its most confident mistakes\n\n")[1].split("\n## ")[0]
    assert part.splitlines() == [
        "| input | true | said | probability |",
        "|---|---|---|---|",
        "| `one` / `two` | `positive` | `negative` | 0.980 |",
        "| `before it` **`Word`**  | `A` | `B` | 0.900 |",
        "| ![](assets/mistake-03.png) | `A` | `B` | 0.800 |",
    ]


@pytest.mark.parametrize(
    ("name", "title"),
    [("package:corpus/bbcnews/data", "bbcnews"), ("org/reviews", "reviews"), ("a.csv", "a"),
     ("train.parquet", "train"), ("my data.csv", "my-data")],
)  # fmt: skip
def test_title_says_which_data(name: str, title: str) -> None:
    assert f"\n# tiny-MiniLM-{title}-lora\n" in render(make_record(name=name))


@pytest.mark.parametrize("case", CASES)
def test_model_index_comes_back_with_the_gain(case: str) -> None:
    record = make_record(case)
    front, _ = front_matter(render(record))
    name, results = model_index_to_eval_results(front["model-index"])
    result = {result.metric_type: result for result in results}
    assert name == "tiny-MiniLM-reviews-lora"
    assert result["accuracy"].metric_value == 0.7254 and result["accuracy"].dataset_split == "test"
    gain = record["transfer_gain"]
    assert ("transfer_gain" in result) == (gain is not None)
    if gain is not None:
        keys = ("metric", "baseline", "seeds", "ci95", "outcome")
        arguments = {key: gain[key] for key in keys if gain[key] is not None}
        assert result["transfer_gain"].metric_value == gain["value"]
        assert result["transfer_gain"].metric_args == arguments


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_gain_is_the_first_bold_line(case: str, task: str) -> None:
    record = make_record(case, task)
    _, body = front_matter(render(record))
    headline = next(line for line in body.splitlines() if line.startswith("**"))
    assert body.index(headline) < body.index("Verdict") < body.index("|")
    assert (
        headline == f"**{format_gain_sentence(Record.parse(record))}**" and WORDS[case] in headline
    )
    assert all(word not in body for word in set(WORDS.values()) - {WORDS[case], "No baseline"})
    if record["transfer_gain"] is not None:
        assert format_gain(BaselineGain(**record["transfer_gain"])) in headline
        sure = "one seed, no interval" if case == "one seed" else "95 % interval, 3 seeds"
        assert sure in headline


def test_sentence_gives_both_scores() -> None:
    assert format_gain_sentence(Record.parse(make_record("negative"))) == (
        "Negative transfer, this model is worse than its baseline: accuracy 0.725 against 0.809 "
        "for classical (TF-IDF with a linear model), a gain of -0.084 [-0.121, -0.047] "
        "(95 % interval, 3 seeds)."
    )


@pytest.mark.parametrize("case", CASES)
def test_card_gives_the_verdict_and_every_reason(case: str) -> None:
    record = make_record(case)
    card = render(record)
    assert f"Verdict: **{record['verdict']['decision']}**" in card
    assert record["verdict"]["decision"] == ("publish" if case == "positive" else "hold")
    for reason in record["verdict"]["reasons"]:
        assert reason[1:] in card


@pytest.mark.parametrize(("case", "task", "own"), EVERY)
def test_every_number_in_the_table_stands_in_the_record(case: str, task: str, own: str) -> None:
    record = make_record(case, task, own)
    known = numbers([record["ladder"], record["arms"]])
    shown = {form(n) for n in known for form in ("{:.3f}".format, "{:+.3f}".format, "{:,}".format)}
    head, *rows = table_rows(front_matter(render(record))[1])
    assert len(rows) == len(record["ladder"]) and {len(row) for row in rows} == {len(head)}
    printed = [n for row in rows for cell in row[1:] for n in re.findall(r"[-+]?\d[\d.,]*\d", cell)]
    assert len(printed) >= 2 * len(rows)
    assert set(printed) <= shown


def test_table_gives_each_arm_its_own_figures() -> None:
    rows = table_rows(front_matter(render(make_record("positive")))[1])
    assert rows[0] == [
        "arm", "test accuracy", "sd over seeds", "this model gains", "trained parameters"
    ]  # fmt: skip
    assert rows[1] == ["**lora** (this model)", "**0.725**", "0.011", "", "148,226"]
    assert rows[2][1:] == ["0.704", "0.011", "+0.021 [+0.005, +0.037]", "770"]
    assert rows[3] == ["classical (TF-IDF with a linear model)", "0.620", "0.011",
                       "+0.105 [+0.071, +0.139]", "18,412"]  # fmt: skip


def test_lower_error_is_called_better() -> None:
    assert "test rmse, less is better |" in render(make_record(task="regression"))
    assert "less is better" not in render(make_record())


@pytest.mark.parametrize(
    ("case", "behind"), [("positive", False), ("negative", True), ("undetermined", False)]
)
def test_arms_that_are_ahead_stand_among_the_limits(case: str, behind: bool) -> None:
    limits = render(make_record(case)).split("## Limits")[1]
    assert ("It is behind classical (TF-IDF with a linear model): -0.084" in limits) == behind
    assert "The weights are those of seed 2, the best on validation" in limits


def test_one_seed_is_not_called_the_best_of_several() -> None:
    record = make_record()
    record["recipe"]["measure"]["seeds"], record["published_seed"] = [0], 0
    card = render(record)
    assert "Weights and figures are those of seed 0 alone; another seed may differ." in card
    assert "the published seed" not in card and "over all seeds" not in card


def test_card_describes_the_data() -> None:
    record = make_record(bad_rows=7, leaked=5)
    record["check"]["warnings"] = ["9% of the texts are cut"]
    record["recipe"]["data"]["group"] = "author"
    card = render(record)
    for words in (
        "400 labelled rows a seed (200 a class", "400 validation rows", "797 test rows", "2,083",
        "4,000 rows were read before train was cut to `data.shots`", "labels were used: those of",
        "12 duplicates", "3 rows were dropped", "7 bad rows",
        "5 of these stood", "rows of one group never stand in two splits",
        "## What to know before use\n\n- 9% of the texts are cut.\n",
    ):  # fmt: skip
        assert words in card
    assert "What to know" not in render(make_record()) and "bad rows were" not in render(
        make_record()
    )


def test_copies_of_pictures_are_the_same_pixels() -> None:
    assert "12 duplicates were dropped (the same pixels)" in render(make_record(modality="image"))


def test_arms_of_a_target_and_draws_of_other_sizes_are_named_as_they_are() -> None:
    for task, words in (("classification", "most frequent answer"), ("regression", "mean of the")):
        record = Record.parse(make_record(task=task))
        assert describe_arm("majority", record).startswith(f"majority (always the {words}")
    read = {"train_per_seed": 27, "train_spread": [25, 31], "total": 95}
    assert "trained on 25 to 31 labelled rows a seed" in render(make_record(labels_read=read))


@pytest.mark.parametrize(("own", "epochs"), [("lora", True), ("head", False)])
def test_solved_head_has_no_epochs(own: str, epochs: bool) -> None:
    card = render(make_record(own=own))
    assert ("best epoch" in card) == epochs and ("learning rate 0.0005, 5 epochs" in card) == epochs
    assert ("its penalty by cross-validation" in card) != epochs


def test_card_without_a_baseline_says_what_was_chosen_on_validation() -> None:
    words = "the best epoch and the published seed were chosen on"
    assert words in render(make_record("no baseline")).replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "call"),
    [("text", 'predict(["A text of your own."])'),
     (["a"], 'predict(["A text of your own."])'),
     (["a", "b"], 'predict([("A first text.", "A second text.")])')],
)  # fmt: skip
def test_code_of_the_card_compiles(text: str | list[str], call: str) -> None:
    card = render(make_record(text=text), place="org/adapter")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2 and call in blocks[0]
    for block in blocks:
        compile(block, "card", "exec")
        assert '"org/adapter"' in block


@pytest.mark.parametrize("labels", [[f"c{i}" for i in range(12)], [f"c{i}" for i in range(40)]])
def test_many_labels_are_cut(labels: list[str]) -> None:
    card = render(make_record(labels=labels))
    assert "`c11`" in card and "`c12`" not in card
    assert (" and 28 more." in card) == (len(labels) == 40)


def test_recipe_in_the_card_is_the_recipe() -> None:
    record = make_record()
    block = re.search(r"```yaml\n(.*?)```", render(record), re.DOTALL)
    assert block is not None and yaml.safe_load(block[1]) == record["recipe"]


def shape(card: str) -> list[tuple[str, str]]:
    """Return the card's blocks and tables, without their words."""
    tokens = MarkdownIt("commonmark").enable("table").parse(front_matter(card)[1])
    return [(token.type, token.tag) for token in tokens]


@pytest.mark.parametrize("case", ["positive", "no baseline"])
def test_same_record_gives_the_same_bytes(case: str, tmp_path: Path) -> None:
    first, second = make_record(case), copy.deepcopy(make_record(case))
    assert render(first) == render(second)
    for name, record in (("a", first), ("b", second)):
        plot_ladder(Record.parse(record), tmp_path / name / "ladder.png")
    plot_ladder(Record.parse(make_record("negative")), tmp_path / "c" / "ladder.png")
    images = [(tmp_path / name / "ladder.png").read_bytes() for name in "abc"]
    assert images[0] == images[1] != images[2] and images[0].startswith(b"\x89PNG")


@pytest.mark.parametrize(("task", "better"), [("classification", "right"), ("regression", "left")])
def test_picture_shows_the_test_scores_and_gains(
    task: str, better: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    record = make_record("negative", task)
    plot_ladder(Record.parse(record), tmp_path / "ladder.png")
    axes = drawn[0].axes[0]
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    for row, scores in zip(reversed(record["ladder"]), dots, strict=True):
        arms = [arm["metrics"]["test"] for arm in record["arms"] if arm["arm"] == row["arm"]]
        assert list(scores) == [metrics[record["metric"]] for metrics in arms]
    assert f"{better} is better" in axes.get_xlabel()
    names = [label.get_text() for label in axes.get_yticklabels()]
    gains = [label.get_text() for label in axes.child_axes[0].get_yticklabels()]
    assert gains[names.index("lora (this model)")] == "" and gains[-1] == "this model gains"
    assert gains[names.index("classical")] == "-0.084 [-0.121, -0.047]"


@pytest.mark.parametrize(("task", "best"), [("classification", 1.0), ("regression", 0.0)])
def test_no_tick_is_better_than_a_perfect_prediction(
    task: str, best: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    record = make_record(task=task)
    for arm in record["arms"]:
        arm["metrics"]["test"][record["metric"]] = best
    for row in record["ladder"]:
        row["test"] = best
    plot_ladder(Record.parse(record), tmp_path / "ladder.png")
    axes = drawn[0].axes[0]
    ticks = axes.get_xticks()
    assert best in ticks
    assert all(tick <= 1 for tick in ticks) if best else all(tick >= 0 for tick in ticks)
    assert axes.get_xlim()[0] < best < axes.get_xlim()[1]


def test_published_record_names_no_local_path(tmp_path: Path) -> None:
    model, data = tmp_path / "my-model", tmp_path / "reviews.csv"
    model.mkdir()
    data.touch()
    record = make_record()
    record["source"] |= {
        "model": str(model), "name": "my-model", "published_as": None, "local": True,
    }  # fmt: skip
    record["recipe"]["source"] |= {"model": str(model), "published_as": None}
    tables = record["recipe"]["data"]
    tables["train"]["path"] = str(data)
    tables["test"] = {"path": str(data)}
    record["recipe"]["finetune"]["training"]["accelerator_config"] = str(data)
    record["data"]["bad_rows_listed"] = [{"where": "reviews.csv line 2", "why": "the target 'Ann'"}]
    before = to_json(record)
    published = sanitize_record(Record.parse(record))
    assert to_json(record) == before
    card = render(published.to_dict())
    for text in (card, published.to_json()):
        assert str(tmp_path) not in text and str(tmp_path.parent) not in text
    assert "A LoRA adapter of my-model that" in card and "huggingface.co" not in card
    assert "base_model" not in front_matter(card)[0]
    assert published.recipe.data.train.path == "reviews.csv"
    assert "Ann" not in published.to_json(), "what a bad row says is the user's own"


@pytest.mark.parametrize("case", ["positive", "no baseline"])
def test_report_is_one_file_with_picture_and_table(case: str, tmp_path: Path) -> None:
    record = make_record(case, labels=["<script>x</script>", "b"])
    plot_ladder(Record.parse(record), tmp_path / "assets" / "ladder.png")
    report = render_page(record, tmp_path)
    assert report.count("<html") == report.count("<table>") == report.count("<img") == 1
    assert 'src="data:image/png;base64,' in report and 'src="assets' not in report
    assert report.count("<tr>") == 1 + len(record["ladder"])
    assert "<title>tiny-MiniLM-reviews-lora</title>" in report
    assert not re.search(r"<script|&lt;details|\x02|\x03", report) and "model-index" not in report
    assert report.count("<details>") == report.count("</details>") == 2
    assert "<summary>The recipe</summary>" in report
    assert not re.search(r'(src|href)="(?!https://huggingface\.co/|data:)', report)


@pytest.mark.parametrize("case", ["positive", "one seed"])
@pytest.mark.parametrize("control", ["document", None])
def test_forgetting_has_a_section(case: str, control: str | None) -> None:
    record = add_forgetting(make_record(case), control)
    card = render(record)
    part = card.split("## What it forgot\n\n")[1].split("\n## ")[0]
    assert part.startswith(format_forgetting_sentence(Record.parse(record)))
    assert "the source model knew was not measured" not in card
    tables = part.split("\n\n")[1:3]
    head, _, own, other = tables[0].splitlines()
    assert head == "| arm | original | after | forgotten | against |"
    assert own.startswith("| lora | ") and "| 75% less than head |" in own
    assert other.startswith("| head | ") and other.endswith(" |  |")
    known = numbers(record["forgetting"])
    shown = {form(n) for n in known for form in ("{:.3f}".format, "{:+.3f}".format)}
    printed = re.findall(r"[-+]?\d\.\d{3}", "".join(tables))
    assert len(printed) > 20 and set(printed) <= shown
    assert ("document by a probe of the original" in tables[1]) == (control is not None)
    for words in ("670 rows of `nyt.csv` (3,901 were read)", "one `document` count as one unit",
                 "2 copies of the run's own inputs"):  # fmt: skip
        assert words in part


def test_sentence_of_forgetting() -> None:
    assert format_forgetting_sentence(Record.parse(add_forgetting(make_record()))) == (
        "Nearest neighbour of the same document: a share of 0.700 under the original, 0.680 under "
        "this model, +0.020 [+0.010, +0.030] forgotten (95 % interval, 3 seeds), 75% less than "
        "head."
    )
    worse = format_forgetting_sentence(Record.parse(add_forgetting(make_record(), gone=-0.5)))
    assert worse.endswith("3 seeds), 50% more than head.")
    alone = format_forgetting_sentence(
        Record.parse(add_forgetting(make_record("one seed"), None, None))
    )
    assert alone.endswith("+0.090 forgotten (no interval).")


@pytest.mark.parametrize("against", [None, {"arm": "head", "gone": None}])
def test_table_of_forgetting_compares_only_where_there_is_something(against: Any) -> None:
    record = add_forgetting(make_record())
    record["forgetting"]["arms"][0]["against"] = against
    assert build_forgetting_rows(Record.parse(record))[0] == [
        "arm",
        "original",
        "after",
        "forgotten",
    ]
    assert {len(row) for row in build_forgetting_rows(Record.parse(record))} == {4}


@pytest.mark.parametrize("name", ["two\nlines", "$x$ \\frac"])
def test_no_control_breaks_the_picture(name: str, tmp_path: Path) -> None:
    plot_frontier(Record.parse(add_forgetting(make_record(), name)), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_frontier_shows_every_arm_and_is_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = add_forgetting(make_record())
    for name in "ab":
        plot_frontier(Record.parse(copy.deepcopy(record)), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    plot_frontier(Record.parse(record), tmp_path / "c.png")
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    for label, arm in (("lora (this model)", "lora"), ("head", "head")):
        entry = next(e for e in record["forgetting"]["arms"] if e["arm"] == arm)
        score = next(row["test"] for row in record["ladder"] if row["arm"] == arm)
        assert list(lines[label].get_xdata()) == [entry["forgotten"]["value"]]
        assert list(lines[label].get_ydata()) == [score]
    seeds = [line for line in drawn[0].axes[0].lines if len(line.get_xdata()) == 3]
    assert len(seeds) == 2 and "left is better" in drawn[0].axes[0].get_xlabel()


@pytest.mark.parametrize(("epochs", "words"), [(1.0, "1 epoch, "), (0.5, "0.5 epochs, ")])
def test_number_of_epochs_is_written_out(epochs: float, words: str) -> None:
    record = make_record()
    record["recipe"]["finetune"]["training"]["num_train_epochs"] = epochs
    assert words in render(record)


@pytest.mark.parametrize(("case", "pushed"), [("positive", True), ("negative", False)])
def test_summary_proposes_a_push_only_for_publish(case: str, pushed: bool, tmp_path: Path) -> None:
    summary = _format_summary(read_back(make_record(case), tmp_path), True)
    assert f"  hftl predict {tmp_path} INPUT" in summary
    assert (f"  hftl publish {tmp_path} --dry-run" in summary) == pushed
    assert "the same command" not in summary


def test_summary_of_one_seed_says_how_to_go_on(tmp_path: Path) -> None:
    record = make_record("negative")
    record["recipe"]["measure"]["seeds"] = [4]
    summary = _format_summary(read_back(record, tmp_path), True)
    assert '  the same command with "measure.seeds=[4, 5, 6]": what stands is kept' in summary


def test_a_card_without_a_public_base_says_so_and_names_its_folder() -> None:
    record = make_record()
    record["source"] |= {"name": "my-bert", "published_as": None, "local": True}
    record["recipe"]["source"] |= {"model": "my-bert", "published_as": None}
    card = render(record)
    assert '# The base has no public id: give the path of its folder, "my-bert".' in card
    assert 'base = AutoModel.from_pretrained("my-bert")' in card and "the base model" not in card
    assert "Base: `my-bert`, which has no public id, so that only who has its folder can" in card
    assert "Cite the source model as its authors ask." in card
    assert "no public id" not in render(make_record())
