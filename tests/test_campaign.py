"""Check what is kept of campaigns: trials of the same code add up, those of other code go."""

from pathlib import Path

import pytest
from support import campaign_results
from support.campaign_results import Log, Trial, read_campaign


def make_trial(number: int, problem: str = "") -> Trial:
    return Trial(recipe="text", seed=0, number=number, of=4, what="1.00 s", problem=problem)


def test_trials_of_the_same_code_add_up_and_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trials = tmp_path / "campaign.json", [make_trial(0), make_trial(1, "exit 1")]
    Log(path).add("kills", trials[1])
    log = Log(path)
    log.add("kills", trials[0])
    log.add("races", trials[0])
    assert [log.has("kills", make_trial(number).key) for number in range(3)] == [True, True, False]
    stored = read_campaign(path)
    assert list(stored.kinds) == ["kills", "races"] and stored.kinds["kills"].trials == trials
    assert "1 of 2" in stored.table[2] and stored.table[-1] == "  kills text 1, 1.00 s: exit 1"
    monkeypatch.setattr(campaign_results, "hash_code", lambda: "another")
    log = Log(path)
    assert not log.has("kills", trials[0].key)
    log.add("kills", make_trial(3))
    kinds = read_campaign(path).kinds
    assert kinds["kills"].trials == [make_trial(3)] and kinds["races"].trials == [trials[0]]


def test_campaign_without_a_file_keeps_nothing(tmp_path: Path) -> None:
    log = Log(None)
    log.add("kills", make_trial(0))
    assert log.has("kills", make_trial(0).key) and not list(tmp_path.iterdir())
