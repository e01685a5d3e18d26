"""Tell folder, file, package and Hub id apart, without network and without importing."""

from itertools import product
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hftl.config.section import is_hub_id
from hftl.errors import RecipeError
from hftl.runtime.paths import (
    explain_missing_path,
    get_display_name,
    get_http_library,
    make_hub_load_error,
    resolve_local_path,
    resolve_published_path,
)

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a package that cannot be imported, but holds a model."""
    folder = tmp_path / "site" / "shipped_model"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


@pytest.mark.parametrize("place", ["bert-base-uncased", "org/model.v1-2", "Org_1/Name", "a/b"])
def test_hub_ids(place: str) -> None:
    assert resolve_local_path(place, "source.model") is None


@pytest.mark.parametrize(
    "place", ["models/a/b", "./bert", "../bert", "/none/bert", "my model", "org/", "-org/m", "~/x"]
)
def test_impossible_hub_id_is_a_path(place: str) -> None:
    result = resolve_local_path(place, "source.model")
    assert result is not None
    assert not result.exists()


def is_valid_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def test_a_hub_id_is_what_the_hubs_own_library_takes() -> None:
    names = ["".join(parts) for size in range(6) for parts in product("a_-./", repeat=size)]
    names += [f"{start}.git{end}" for start, end in product(("", "a", "a/b"), ("", "a", "/b"))]
    names += [f"{'a' * n}/{'b' * m}" for n, m in product((95, 96, 97), repeat=2)]
    names += ["a b", "a\n", "a\\b", "~/a", "C:a", "a@b"]
    taken = [name for name in names if is_hub_id(name)]
    assert taken == [name for name in names if is_valid_repo_id(name)] and len(taken) > 100
    assert not is_hub_id("modèle/café")


@pytest.mark.parametrize("place", ["reviews.csv", "data/reviews.jsonl", "a.PARQUET", "a/b.tsv"])
def test_missing_table_is_no_hub_id(place: str) -> None:
    assert resolve_local_path(place, "data.train.path") == Path(place)


def test_existing_path_is_no_hub_id(tmp_path: Path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_local_path("org/model", "source.model") == Path("org/model")


def test_the_home_folder_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_local_path("~/model", "source.model") == tmp_path / "model"
    assert resolve_local_path("~no-such-user/model", "source.model") == Path("~no-such-user/model")


def test_package_is_located_without_an_import(package: Path) -> None:
    assert resolve_local_path("package:shipped_model/model", "source.model") == package / "model"
    assert resolve_local_path("package:shipped_model", "source.model") == package


@pytest.mark.parametrize("place", ["package:no_such_model/model", "package:no-word/a"])
def test_missing_package_is_refused(place: str) -> None:
    with pytest.raises(RecipeError, match=r"^source\.model: the package .* is not installed"):
        resolve_local_path(place, "source.model")


@pytest.mark.parametrize(
    "place", ["", "a\0b", "package:", "package:/a", "https://host/a", "https:/host/a", "s3://a/b"]
)
def test_what_is_no_place_is_refused(place: str) -> None:
    with pytest.raises(RecipeError, match=r"^source\.model: (its name|package:|.* is an address)"):
        resolve_local_path(place, "source.model")


@pytest.mark.parametrize(
    ("address", "fix"),
    [
        ("https://huggingface.co/bert-base-uncased/tree/main", "hub id alone: bert-base-uncased"),
        ("https://huggingface.co/org/m/blob/main/config.json", "hub id alone: org/m"),
        ("https://huggingface.co/datasets/org/d/resolve/main/a.csv", "hub id alone: org/d"),
        ("https://huggingface.co/spaces/org/s?x=1", "hub id alone: org/s"),
        ("https://hf.co/org/m/", "hub id alone: org/m"), ("hf://org/m@main", "alone: org/m"),
        ("hf://models/org/m", "hub id alone: org/m"), ("hf://datasets/d", "hub id alone: d"),
        ("https://huggingface.co/", "Download it"), ("https://huggingface.co", "Download it"),
        ("https://host/huggingface.co/org/m", "Download it"), ("hf://-x/y", "Download it"),
    ],
)  # fmt: skip
def test_an_address_of_the_hub_gives_its_id(address: str, fix: str) -> None:
    with pytest.raises(RecipeError, match=f"is an address, .*{fix}$|is an address.*{fix}, and"):
        resolve_local_path(address, "source.model")


def test_missing_path_in_a_package_is_refused(package: Path) -> None:
    with pytest.raises(RecipeError, match=r"source\.model: the package 'shipped_model' has no 'x'"):
        resolve_local_path("package:shipped_model/x", "source.model")


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/home/me/.cache/hub/models--me--a-model/snapshots/0123", "me/a-model"),
        ("/home/me/.cache/hub/models--gpt2/snapshots/0123", "gpt2"),
        ("runs/models--me--a-model/publish", "runs/models--me--a-model/publish"),
        ("runs/snapshots/publish", "runs/snapshots/publish"),
    ],
)
def test_a_copy_in_the_hubs_cache_goes_by_its_id(folder: str, expected: str) -> None:
    assert get_display_name(Path(folder)) == expected


class _Answer:
    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


@pytest.mark.parametrize(
    ("place", "where", "fix"),
    [
        ("assets/movies/movies.csv", "does not exist in {}", "python benchmarks/assets.py movies"),
        ("assets/vit-dinov2-small", "does not exist in {}", "python benchmarks/assets.py vit"),
        ("data/movies.csv", "does not exist in {}", "Check the path"),
        ("/data/assets/movies.csv", "does not exist", "Check the path"),
    ],
)
def test_a_missing_path_names_the_folder_and_how_a_demo_is_built(
    place: str, where: str, fix: str, tmp_path: Path
) -> None:
    report, advice = explain_missing_path(place)
    assert report == where.format(tmp_path) and advice.endswith(fix)


def test_a_published_model_has_an_owner_or_is_a_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / "me" / "here").mkdir(parents=True)
    assert resolve_published_path("me/gone", "the model") is None
    for place in ("me/here", "gone", "runs/me/gone", "me/gone/", "./gone"):
        assert resolve_published_path(place, "the model") == Path(place)


def test_a_missing_folder_is_named_before_a_hub_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    away = get_http_library().ConnectError("no route")
    error = make_hub_load_error(away, "runs/gone", "model")
    assert error.what.startswith("no file or folder 'runs/gone' here; it may be a hub id, but")
    assert error.fix == "Check the path; for a hub id the network and HF_ENDPOINT"


@pytest.mark.parametrize(
    ("status", "offline", "report", "fix"),
    [
        (503, False, "source.model: the hub itself failed when it was asked for 'a/b' (HTTP 503)",
         "Try again later"),
        (404, True, "source.model: no file or folder 'a/b' here nor in the hub's cache, and "
         "HF_HUB_OFFLINE=1 keeps from the hub", "Check the path or id, or unset HF_HUB_OFFLINE"),
        (404, False, "source.model: no file or folder 'a/b' here, and the hub gives no model of "
         "that id: HTTP 404",
         "Check the path or id, the network, and `hf auth login` for a gated one"),
    ],
)  # fmt: skip
def test_hub_error_says_why_and_what_to_do(
    status: int, offline: bool, report: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    behind = OSError("an answer")
    behind.response = _Answer(status)  # pyright: ignore[reportAttributeAccessIssue]
    outer = OSError("Got: ConnectError: no route\nPlease check your connection")
    outer.__cause__ = behind
    behind.__cause__ = outer
    result = make_hub_load_error(outer, "a/b", "model", "source.model: ")
    assert (result.what, result.fix) == (report, fix)
