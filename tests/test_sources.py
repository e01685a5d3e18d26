"""Check the list of known source models: its order, what loads, and the suggestions of init."""

import json
from pathlib import Path
from typing import get_args

import pytest
from conftest import sentences, write_csv
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from hftl.cli import SourceField, SourceModality, app
from hftl.config.recipe import Recipe
from hftl.config.section import is_hub_id
from hftl.errors import RecipeError
from hftl.init import write_recipe
from hftl.models import known_sources
from hftl.models.architectures import ARCHITECTURES, READ_AS, UNHEADED
from hftl.models.known_sources import list_known_sources, suggest_known_source

SOURCES = list_known_sources()
FIELDS, MODALITIES = get_args(known_sources.SourceField), get_args(known_sources.SourceModality)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["sources", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_list_is_sorted_and_covers_every_field_and_modality() -> None:
    keys = [(FIELDS.index(s.field), MODALITIES.index(s.modality), s.id.lower()) for s in SOURCES]
    assert keys == sorted(keys) and len(set(keys)) == len(keys) >= 60
    assert {s.field for s in SOURCES} == set(FIELDS) == set(SourceField)
    assert {s.modality for s in SOURCES} == set(MODALITIES) == set(SourceModality)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.id)
def test_what_loads_has_a_spec_and_what_does_not_says_why(
    source: known_sources.KnownSource,
) -> None:
    has_spec = source.family in (*ARCHITECTURES, *UNHEADED, *READ_AS)
    assert (source.obstacle is None) == (has_spec and source.own_format is None)
    if source.obstacle is None or source.own_format is None:
        assert source.family in CONFIG_MAPPING, "an architecture of transformers"
        assert is_hub_id(source.id)
    else:
        assert source.own_format not in known_sources.SHARED_FORMATS


def test_models_named_as_out_of_reach_say_why() -> None:
    for name in ("MedCLIP", "BioViL", "BiomedCLIP", "bioclip", "SatMAE", "Prithvi", "CellViT",
                 "OpenFlamingo"):  # fmt: skip
        named = [source for source in SOURCES if name in source.id]
        assert named and all(source.own_format for source in named), name


def test_table_and_json_select_by_field_and_modality() -> None:
    table = run("--field", "medical", "--modality", "text").splitlines()
    assert table[0].split() == ["source", "size", "license", "loads"]
    assert table[2] == "medical, text"
    (row,) = (line for line in table if "dmis-lab/biobert" in line)
    assert row.split() == ["dmis-lab/biobert-v1.1", "108M", "-", "yes"]
    lines = run().splitlines()
    assert max(len(line) for line in lines if not line.startswith("  no: ")) <= 100
    assert any(line.startswith("  no: imageomics/bioclip: it is saved for") for line in lines)
    assert not any("dinov2" in line or "scibert" in line for line in table)
    tree = json.loads(run("--json", "--modality", "image"))
    assert {entry["modality"] for entry in tree} == {"image"}
    by_id = {entry["id"]: entry for entry in tree}
    assert by_id["facebook/dinov2-small"]["obstacle"] is None
    assert "terratorch" in by_id["ibm-nasa-geospatial/Prithvi-EO-2.0-300M"]["obstacle"]
    assert CliRunner().invoke(app, ["sources", "--field", "cooking"]).exit_code == 2


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("bert-base-uncased", "google-bert/bert-base-uncased"),
        ("google-bert/bert-base-uncase", "google-bert/bert-base-uncased"),
        ("all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("biomedclip", None),
        ("my-team/xyz", None),
    ],
)
def test_a_name_that_is_nearly_known_is_suggested(
    name: str, nearest: str | None, tmp_path: Path
) -> None:
    assert suggest_known_source(name) == nearest
    table = write_csv(tmp_path / "reviews.csv", ["text", "label"], sentences(40))
    _, notes = write_recipe(table, name, tmp_path / "a.yaml")
    assert any(f"did you mean {nearest}?" in note for note in notes) == (nearest is not None)


def test_init_fills_in_the_public_id_of_a_packaged_source(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "reviews.csv", ["text", "label"], sentences(40))
    packaged = [source for source in SOURCES if source.package is not None]
    assert packaged, "the source of the README's commands"
    for number, known in enumerate(packaged):
        place = f"package:{known.package}"
        path, notes = write_recipe(table, place, tmp_path / f"{number}.yaml")
        assert Recipe.load(path).source.published_as == known.id and any(
            "public id" in n for n in notes
        )
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text('{"model_type": "bert"}')
    path, _ = write_recipe(table, str(tmp_path / "own"), tmp_path / "own.yaml")
    assert "# org/name on the hub; without" in path.read_text("utf-8")
    assert Recipe.load(path).source.published_as is None
    path, _ = write_recipe(table, "google-bert/bert-base-uncased", tmp_path / "hub.yaml")
    assert "\n  # published_as: org/name" in path.read_text("utf-8")


@pytest.mark.parametrize("numbered", [True, False])
def test_init_shows_how_to_name_labels_that_are_numbers(numbered: bool, tmp_path: Path) -> None:
    rows = [
        (text, int(label == "positive") if numbered else label) for text, label in sentences(40)
    ]
    table = write_csv(tmp_path / "reviews.csv", ["text", "label"], rows)
    path, _ = write_recipe(table, "google-bert/bert-base-uncased", tmp_path / "a.yaml")
    written = path.read_text("utf-8")
    assert ('# label_names: {0: "...", 1: "..."}' in written) == numbered
    path.write_text(written.replace("# label_names", "label_names"), "utf-8")
    assert Recipe.load(path).data.get_label_words("1") == ("..." if numbered else "1")


def test_init_refuses_a_model_that_cannot_be_loaded_and_takes_one_that_can(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "reviews.csv", ["text", "label"], sentences(40))
    with pytest.raises(RecipeError, match=r"cannot be loaded: it is saved for open_clip"):
        write_recipe(table, "imageomics/bioclip", tmp_path / "a.yaml")
    with pytest.raises(RecipeError, match=r"timm/resnet50.a1_in1k reads pictures, and the data"):
        write_recipe(table, "timm/resnet50.a1_in1k", tmp_path / "a.yaml")
    assert not (tmp_path / "a.yaml").exists()
    _, notes = write_recipe(table, "google-bert/bert-base-uncased", tmp_path / "a.yaml")
    assert not any(note.startswith("source:") for note in notes)
