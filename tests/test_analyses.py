"""Check the analyses that a run makes: record, card, report, and that they are made once."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_csv
from support.command import Hftl
from test_feature_store import forwards

from hftl.card.evidence import describe_curve, describe_distance, describe_probe, describe_shift
from hftl.measure.record import Record

__all__ = ["forwards"]
pytestmark = pytest.mark.usefixtures("fast_reload", "fewer_folds")


@pytest.fixture
def analysed(recipe_tree: dict[str, Any], tmp_path: Path) -> Path:
    """Write a recipe that makes every analysis and trains nothing."""
    general = [[f"the plot {i} was {i % 5}"] for i in range(60)]
    recipe_tree["data"] |= {
        "validation": {"fraction": 0.3},
        "test": {"fraction": 0.4},
        "general": {"path": str(write_csv(tmp_path / "general.csv", ["text"], general))},
    }
    recipe_tree["finetune"]["strategy"] = "head"
    recipe_tree["measure"] |= {
        "arms": ["majority"], "seeds": [0], "analyses": ["probe", "curve", "distance", "shift"]
    }  # fmt: skip
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_tree))
    return path


def test_a_run_makes_and_shows_its_analyses_once(
    hftl: Hftl, analysed: Path, tmp_path: Path, forwards: list[int]
) -> None:
    run = tmp_path / "out"
    first = hftl("measure", analysed, "measure.analyses=[probe]", "--output", run)
    assert first.code == 0, first.err
    record = Record.read(run)
    assert record.analysis is not None and record.analysis.probe is not None
    assert set(record["analysis"]) == {"probe"}, "what was not made is absent"
    passes = len(forwards)

    outcome = hftl("run", analysed, "--output", run)
    assert outcome.code == 0, outcome.err
    section = Record.read(run).analysis
    assert section is not None and section.curve is not None and section.distance is not None
    assert section.shift is not None and [one.name for one in section.shift.sets] == ["test"]
    assert {path.name for path in (run / "analysis").iterdir()} == {
        f"{name}.{kind}"
        for name in ("probe", "curve", "distance", "shift")
        for kind in ("json", "png")
    }
    assert len(forwards) > passes, "general rows are new"
    card = (run / "publish" / "README.md").read_text()
    for name, sentence in (
        ("probe", describe_probe(section.probe)),
        ("curve", describe_curve(section.curve)),
        ("distance", describe_distance(section.distance)),
        ("shift", describe_shift(section.shift)),
    ):
        assert f"(assets/{name}.png)" in card and sentence[:40] in card
        assert (run / "publish" / "assets" / f"{name}.png").exists()
    report = (run / "report.html").read_text()
    assert report.count("data:image/png") >= 4
    passes, written = len(forwards), (run / "record.json").stat().st_mtime_ns

    again = hftl("run", analysed, "--output", run)
    assert again.code == 0 and len(forwards) == passes
    assert (run / "record.json").stat().st_mtime_ns == written
    assert hftl("card", run).code == 0
    published = Record.read_file(run / "publish" / "hftl.json")
    assert published.analysis is not None and published.analysis.probe is not None
    assert "/" not in published.analysis.probe.source


def test_unknown_and_repeated_analyses_are_refused(hftl: Hftl, analysed: Path) -> None:
    hftl("check", analysed, "measure.analyses=[probes]").assert_error(2, "measure.analyses")
    hftl("check", analysed, "measure.analyses=[probe, probe]").assert_error(2, "given twice")
