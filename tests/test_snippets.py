"""Render the card's code for plain libraries."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from hftl.card.snippets import ModelFolder, render_plain_snippet
from hftl.data.images import decode_image

CASES = list(
    itertools.product(
        ("native", "mean", "cls"),
        (True, False),
        ("org/base", None),
        ("0123abcd", None),
        (1, 3),
        ('"A text of your own."', '"A first text.", "A second text."'),
    )
)


@pytest.mark.parametrize(("pooling", "adapter", "base", "revision", "outputs", "example"), CASES)
def test_snippet_compiles_and_loads_the_right_thing(
    pooling: str, adapter: bool, base: str | None, revision: str | None, outputs: int, example: str
) -> None:
    code = render_plain_snippet(
        ModelFolder("org/adapter", base, revision, pooling, outputs, adapter, "text", example)
    )
    compile(code, "snippet", "exec")
    place = '"org/adapter"' if pooling == "native" else 'snapshot_download("org/adapter")'
    assert "hftl" not in code and f"path = {place}\n" in code and f"tokenizer({example}," in code
    # Where peft has a class of its own, the adapter's config names the base and its commit.
    short = adapter and pooling == "native" and base is not None
    spelt_out = adapter and not short
    assert ("AutoPeftModelForSequenceClassification.from_pretrained(path," in code) == short
    assert ("PeftModel.from_pretrained(base, path)" in code) == spelt_out
    assert (f'"{base}"' in code) == (spelt_out and base is not None)
    assert (f'revision="{revision}"' in code) == (spelt_out and revision is not None)
    assert ("head.safetensors" in code) == (pooling != "native")
    assert (f"num_labels={outputs}" in code) == (adapter and pooling == "native")
    auto = "AutoModelForSequenceClassification" if pooling == "native" else "AutoModel"
    if not short:
        assert f"import {auto}, AutoTokenizer" in code and f" = {auto}.from_pretrained(" in code


def test_texts_are_cut_as_they_were_for_the_figures() -> None:
    for kind in ("text", "words"):
        folder = ModelFolder("org/a", "org/base", None, "mean", 2, True, kind, '"A text."')
        whole, cut = (render_plain_snippet(replace(folder, max_tokens=n)) for n in (None, 48))
        assert "truncation" not in whole
        assert cut.replace("truncation=True, max_length=48, ", "") == whole != cut
    image = replace(folder, kind="image", max_tokens=None)
    assert "truncation" not in render_plain_snippet(image)


def test_pictures_are_read_as_they_were_for_the_figures(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    picture = Image.fromarray(draw.integers(0, 256, (6, 9, 4), np.uint8), "RGBA")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    palette = picture.convert("RGB").quantize(8)
    for name, image, more in (
        ("alpha.png", picture, {}), ("turned.png", picture.convert("RGB"), {"exif": exif}),
        ("palette.png", palette, {"transparency": 3}), ("grey.png", picture.convert("LA"), {}),
    ):  # fmt: skip
        path = tmp_path / name
        image.save(path, **more)
        folder = ModelFolder("a", None, None, "native", 2, False, "image", repr(str(path)))
        for prompt in (None, "What is it?"):
            code = render_plain_snippet(replace(folder, prompt=prompt))
            assert '.from_pretrained(path, backend="pil")' in code
            imported = "from PIL import Image, ImageOps\n"
            space: dict[str, Any] = {}
            lines = code[code.index("picture = ") : code.index("inputs = ")]
            assert imported in code and "picture, return_tensors" in code
            exec(imported + lines, space)  # noqa: S102
            assert space["picture"].tobytes() == decode_image(path, None, 100).tobytes(), name


@pytest.mark.parametrize(("pooling", "other"), [("mean", "cls"), ("cls", "mean")])
def test_poolings_differ(pooling: str, other: str) -> None:
    def code(name: str) -> str:
        return render_plain_snippet(
            ModelFolder("publish", "org/base", None, name, 2, True, "text", '"A text."')
        )

    assert code(pooling) != code(other)
    assert ("attention_mask" in code(pooling)) == (pooling == "mean")
    assert ("hidden[:, 0]" in code(pooling)) == (pooling == "cls")


@pytest.mark.parametrize("kind", ["text", "words"])
def test_short_snippet_is_five_lines(kind: str) -> None:
    code = render_plain_snippet(
        ModelFolder("org/a", "org/base", "0123", "native", 2, True, kind, '"A text."')
    )
    assert len(code.split("\n\n")[1].splitlines()) == 5


@pytest.mark.parametrize("name", ['x")\nimport os  #', "a\\", "'\"\n"])
def test_no_name_becomes_code(name: str) -> None:
    code = render_plain_snippet(ModelFolder(name, name, name, "mean", 2, True, "text", '"A text."'))
    imports = [line for line in code.splitlines() if line.startswith(("import", "from"))]
    compile(code, "snippet", "exec")
    assert len(imports) == 4 and "import os" not in imports
