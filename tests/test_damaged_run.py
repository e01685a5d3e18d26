"""Damage each file of a finished run in each way: it is refused by name, or written anew."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import sentences, write_csv
from support.campaign_runs import hash_results
from test_resume import flip, replace_by_folder, replace_by_link

import hftl
from hftl.config.recipe import Recipe
from hftl.errors import RunFolderError
from hftl.runtime.finished_files import check_finished_files
from hftl.runtime.run_folder import MANIFEST

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_reload")]
UNCHECKED = (".lock", "log.txt")
"""What a command writes and none reads."""
PARTS = 3
"""Of the files, each tried alone: `-k missing-0` takes under a minute."""
Run = tuple[Path, dict[str, Any]]


def build_tree(table: Path, general: Path, model: Path, rate: float) -> dict[str, Any]:
    training = {"num_train_epochs": 1, "learning_rate": rate, "bf16": False}
    return {
        "source": {"model": str(model)},
        "data": {"train": {"path": str(table)}, "max_length": 16, "shots": 12,
                 "general": {"path": str(general), "label": "label"}},
        "adapt": {"objective": "mlm", "method": "lora", "guard": "off", "held_out": 0.2,
                  "training": training},
        "finetune": {"strategy": "lora", "training": training},
        "retain": {"kl": {"weight": 0.3, "inputs": "both"}, "replay": {"ratio": 0.5}},
        "measure": {"seeds": [0], "arms": ["head", "classical"]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> list[Run]:
    """Finish two runs, whose files have the same names."""
    folder = tmp_path_factory.mktemp("damaged")
    table = write_csv(folder / "reviews.csv", ["text", "label"], sentences(80))
    general = write_csv(folder / "general.csv", ["text", "label"], sentences(30, 7))
    runs = []
    for name, rate in (("run", 5e-3), ("other", 4e-3)):
        tree = build_tree(table, general, tiny_model("bert", masked_lm=True), rate)
        hftl.run(Recipe.parse(tree), folder / name)
        runs.append((folder / name, tree))
    return runs


def cut(share: float) -> Callable[[Path, Path], None]:
    return lambda path, _: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "missing": lambda path, _: path.unlink(),
    "empty": cut(0),
    "half": cut(0.5),
    "short": cut(0.99),
    "header": lambda path, _: flip(path, 0.0),
    "payload": lambda path, _: flip(path, 0.8),
    "of another run": lambda path, other: shutil.copyfile(other, path),
    "a folder": lambda path, _: replace_by_folder(path),
    "a link": lambda path, _: replace_by_link(path),
}


def list_files(run: Path) -> list[str]:
    files = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return sorted(name for name in files if name not in UNCHECKED)


def give_command_again(run: Run, place: Path, name: str, expected: dict[str, str]) -> str:
    """Return how it ended: "refused", "mended", or what went wrong.

    What a finished run does not read, as the model that is published already, is read once the
    published folder is lost.
    """
    folder, tree = run
    for _ in range(2):
        try:
            hftl.run(Recipe.parse(tree), place)
        except RunFolderError as error:
            # The manifest of another run tells of the files beside it.
            named = Path(name.replace(MANIFEST, "")).name
            return "refused" if named in str(error) else f"not named by {error}"
        if hash_results(place) != expected:
            return "ends otherwise"
        path = place / name
        if path.is_file() and not path.is_symlink() and have_same_bytes(path, folder / name):
            check_finished_files(place)
            return "mended"
        shutil.rmtree(place / "publish")
    return "goes on beside the damaged file"


def have_same_bytes(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_of_a_finished_run_is_refused_by_name_or_written_anew(
    damage: str, part: int, runs: list[Run], tmp_path: Path
) -> None:
    (run, _), (other, _) = runs
    expected, place = hash_results(run), tmp_path / "run"
    ends: dict[str, str] = {}
    for name in list_files(run)[part::PARTS]:
        is_same = damage == "of another run" and have_same_bytes(run / name, other / name)
        if is_same or not (run / name).stat().st_size:
            continue
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(run, place)
        DAMAGES[damage](place / name, other / name)
        ends[name] = give_command_again(runs[0], place, name, expected)
    print(f"{damage} {part}: {Counter(ends.values())}")
    assert {name: end for name, end in ends.items() if end not in ("refused", "mended")} == {}
