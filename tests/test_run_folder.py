"""Write and lock run folders: every stage is complete or absent, and one process holds it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hftl.errors import RecipeError, RunFolderError
from hftl.runtime import run_folder
from hftl.runtime.run_folder import StageInputs, has_equal, read_part
from hftl.train.facts import ScratchSearch

READS = {"recipe": {"finetune.lora.r": 8}, "weights": None}


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """Commit a stage of two files."""
    folder = tmp_path / "arms" / "lora-seed0"
    with run_folder.commit_stage(folder, READS) as aside:
        (aside / "sub").mkdir()
        (aside / "a.txt").write_text("first", encoding="utf-8")
        (aside / "sub" / "b.txt").write_text("second", encoding="utf-8")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}  # fmt: skip


def test_a_stage_stands_with_its_hashes_and_inputs(stage: Path) -> None:
    assert sorted(files(stage)) == ["MANIFEST.json", "a.txt", "sub/b.txt"]
    assert run_folder.read_stage_inputs(stage) == READS
    assert [p.name for p in stage.parent.iterdir()] == ["lora-seed0"]
    manifest = json.loads((stage / run_folder.MANIFEST).read_text(encoding="utf-8"))
    assert sorted(manifest) == ["files", "own", "reads"]
    assert all(len(digest) == 64 for digest in manifest["files"].values())


def test_nothing_stands_before_the_end(tmp_path: Path) -> None:
    with run_folder.commit_stage(tmp_path / "data", READS) as aside:
        (aside / "a.txt").write_text("x", encoding="utf-8")
        assert not (tmp_path / "data").exists()
        assert run_folder.read_stage_inputs(tmp_path / "data") is None
    assert (tmp_path / "data" / "a.txt").exists()


def test_a_body_that_raises_leaves_the_folder_as_it_was(stage: Path, tmp_path: Path) -> None:
    before = files(stage)
    for folder, error in ((stage, OSError), (tmp_path / "data", KeyboardInterrupt)):
        with pytest.raises(error), run_folder.commit_stage(folder, {}) as aside:
            (aside / "a.txt").write_text("half", encoding="utf-8")
            raise error
    assert files(stage) == before and run_folder.read_stage_inputs(stage) == READS
    assert not (tmp_path / "data").exists()
    assert run_folder.read_stage_inputs(tmp_path / "data") is None


def test_inputs_that_both_lack_are_not_equal() -> None:
    first = StageInputs(recipe={"finetune.lora.r": 8}, data="a")
    assert has_equal(first, StageInputs(recipe={"finetune.lora.r": 8}), "recipe")
    assert not has_equal(first, StageInputs(recipe={"finetune.lora.r": 9}), "recipe")
    assert not has_equal(first, StageInputs(data="a"), "recipe")
    assert not has_equal(StageInputs(), StageInputs(), "recipe")


@pytest.mark.parametrize("name", ["recipe", "asked"])
def test_a_manifest_whose_recipe_keys_are_no_mapping_is_damaged(stage: Path, name: str) -> None:
    path = stage / run_folder.MANIFEST
    path.write_text(json.dumps({"files": {}, "reads": {name: [1]}}), "utf-8")
    with pytest.raises(RunFolderError, match=r"MANIFEST\.json is missing or unreadable"):
        run_folder.read_stage_inputs(stage)


@pytest.mark.parametrize("name", run_folder.RUN_FOLDERS)
def test_a_file_where_a_run_keeps_a_folder_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a user's", "utf-8")
    with pytest.raises(RunFolderError, match=f"{name} is a file.*Remove it"):
        run_folder.create_run_folder(tmp_path)


def test_a_run_within_the_folder_of_another_is_refused(tmp_path: Path) -> None:
    run_folder.create_run_folder(tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").touch()
    with pytest.raises(RecipeError, match="phases/x lies in the run folder .*/run"):
        run_folder.create_run_folder(tmp_path / "run" / "phases" / "x")
    assert not (tmp_path / "run" / "phases").exists()
    # A project may hold a recipe of that name beside its runs.
    (tmp_path / "recipe.yaml").touch()
    run_folder.create_run_folder(tmp_path / "another")


def test_a_stage_is_replaced_as_a_whole(stage: Path) -> None:
    old = run_folder.hash_stage(stage)
    with run_folder.commit_stage(stage, {"recipe": {}}) as aside:
        (aside / "c.txt").write_text("third", encoding="utf-8")
        assert (stage / "a.txt").read_text(encoding="utf-8") == "first"
    assert sorted(files(stage)) == ["MANIFEST.json", "c.txt"]
    assert run_folder.read_stage_inputs(stage) == {"recipe": {}}
    assert run_folder.hash_stage(stage) != old
    assert [p.name for p in stage.parent.iterdir()] == ["lora-seed0"]


def test_leftovers_of_a_killed_attempt_are_not_taken_over(stage: Path) -> None:
    left = stage.parent / ".tmp-lora-seed0"
    left.mkdir()
    (left / "old.txt").write_text("old", encoding="utf-8")
    with run_folder.commit_stage(stage, READS) as aside:
        (aside / "new.txt").write_text("new", encoding="utf-8")
    assert sorted(files(stage)) == ["MANIFEST.json", "new.txt"]


def test_the_digest_is_that_of_the_content(stage: Path, tmp_path: Path) -> None:
    with run_folder.commit_stage(tmp_path / "again", READS) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "b.txt").write_text("second", encoding="utf-8")
        (aside / "a.txt").write_text("first", encoding="utf-8")
    assert run_folder.hash_stage(tmp_path / "again") == run_folder.hash_stage(stage)


@pytest.mark.parametrize("name", ["a.txt", "sub/b.txt"])
@pytest.mark.parametrize(
    ("content", "message"), [(None, "is missing"), (b"fIrst", "is not what was written")]
)
def test_a_file_that_is_missing_or_changed_is_named(
    stage: Path, name: str, content: bytes | None, message: str
) -> None:
    (stage / name).unlink() if content is None else (stage / name).write_bytes(content)
    with pytest.raises(RunFolderError, match=f"{name} {message}") as caught:
        run_folder.read_stage_inputs(stage)
    assert str(stage) in caught.value.fix


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"null", b"{}", b'{"files": {}}',
                                     b'{"files": 3, "reads": {}}', b"\xff", b"[" * 100_000],
                         ids=range(10))  # fmt: skip
def test_a_manifest_that_is_missing_or_damaged_is_named(stage: Path, content: bytes | None) -> None:
    path = stage / run_folder.MANIFEST
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"MANIFEST\.json is missing or unreadable"):
        run_folder.read_stage_inputs(stage)


def test_a_manifest_with_a_damaged_letter_is_named_and_no_changed_recipe(stage: Path) -> None:
    path = stage / run_folder.MANIFEST
    written = path.read_text("utf-8")
    for old, new in (('"reads"', '"readt"'), ('"own"', '"owm"'), ('"recipe"', '"recipf"')):
        assert old in written
        path.write_text(written.replace(old, new), "utf-8")
        with pytest.raises(RunFolderError, match=r"MANIFEST\.json is (missing or|not what)"):
            run_folder.read_stage_inputs(stage)
    older = json.loads(written)
    older.pop("own")
    path.write_text(json.dumps(older), "utf-8")
    assert run_folder.read_stage_inputs(stage) == READS


HOLD = """
import sys, time
from pathlib import Path
from hftl.runtime import run_folder
from hftl.runtime.run_folder import StageInputs, has_equal, read_part
from hftl.train.facts import ScratchSearch
with run_folder.lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Start another process that holds the run folder until its input ends."""
    run_folder.create_run_folder(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


@pytest.mark.parametrize("name", [
    ".tmp-recipe.yaml", ".tmp-beats/0", ".tmp-error.json", ".tmp-publish/.tmp-hftl.json",
])  # fmt: skip
def test_what_a_killed_run_left_half_written_is_removed(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text("cut o")
    run_folder.create_run_folder(run)
    with run_folder.lock_run(run):
        assert [path.name for path in run.iterdir()] == [".lock"]
    (run / ".tmp-thesis").touch()
    with pytest.raises(RecipeError, match="holds '.tmp-thesis'"):
        run_folder.create_run_folder(run)


def test_a_folder_that_another_process_holds(tmp_path: Path, holder: Any) -> None:
    (tmp_path / ".tmp-theirs").mkdir()
    with (
        pytest.raises(RunFolderError, match=f"is in use by process {holder.pid}") as caught,
        run_folder.lock_run(tmp_path),
    ):
        pass
    assert caught.value.exit_code == 4
    assert (tmp_path / ".tmp-theirs").exists(), "the holder's work must not be removed"
    holder.communicate()
    with run_folder.lock_run(tmp_path):
        assert not (tmp_path / ".tmp-theirs").exists()


def test_a_killed_holder_holds_nothing(tmp_path: Path, holder: Any) -> None:
    holder.kill()
    holder.wait()
    with run_folder.lock_run(tmp_path):
        pass


def test_leftovers_go_and_the_rest_stays(stage: Path, tmp_path: Path) -> None:
    run_folder.create_run_folder(tmp_path)
    before = files(stage)
    for name in (".tmp-publish", "arms/.tmp-head-seed1", "arms/.tmp-old-lora-seed0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x", encoding="utf-8")
    (tmp_path / ".tmp-record.json").write_text("{", encoding="utf-8")
    (tmp_path / "record.json").write_text("{}", encoding="utf-8")
    with run_folder.lock_run(tmp_path):
        assert not list(tmp_path.rglob(".tmp-*"))
    assert files(stage) == before
    assert (tmp_path / "record.json").exists()


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    run_folder.write_text(path, "Grüße")
    assert path.read_text(encoding="utf-8") == "Grüße"
    with pytest.raises(UnicodeEncodeError):
        run_folder.write_text(path, "half \ud800")
    assert path.read_text(encoding="utf-8") == "Grüße"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RecipeError, match="cannot be written.*Choose another --output"):
            run_folder.create_run_folder(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [('{"learning_rate": null}', "'learning_rate': input should"), ("{", "''"), (None, "missing")],
)
def test_a_part_that_is_not_what_was_written_is_named(
    text: str | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "search.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RunFolderError, match=says) as raised:
        read_part(path, ScratchSearch)
    assert str(path) in raised.value.what and "Remove" in raised.value.fix
