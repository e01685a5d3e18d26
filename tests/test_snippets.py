"""Render the card's code for plain libraries."""

import itertools

import pytest

from hftl.card.snippets import ModelFolder, render_plain_snippet

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
