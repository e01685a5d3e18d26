"""How to load a published folder with the plain libraries, as code that runs."""

POOLED = """import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
{peft_import}
path = "{place}"
tokenizer = AutoTokenizer.from_pretrained(path)
{load}
head = load_file(f"{{path}}/head.safetensors")
inputs = tokenizer({example}, return_tensors="pt")
with torch.inference_mode():
    hidden = model.eval()(**inputs).last_hidden_state
    {pooled}
    print(pooled @ head["weight"].T + head["bias"])"""

NATIVE = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
{peft_import}
path = "{place}"
tokenizer = AutoTokenizer.from_pretrained(path)
{load}
inputs = tokenizer({example}, return_tensors="pt")
with torch.inference_mode():
    print(model.eval()(**inputs).logits)"""

POOLINGS = {
    "mean": 'mask = inputs["attention_mask"].unsqueeze(-1)\n'
    "    pooled = (hidden * mask).sum(1) / mask.sum(1)",
    "cls": "pooled = hidden[:, 0]",
}


def plain_snippet(
    place: str, base: str | None, revision: str | None, pooling: str, outputs: int, adapter: bool,
    example: str,
) -> str:  # fmt: skip
    """Code that prints the logits of one example.

    Args:
        place: the folder or hub id of the published model.
        base: the public base of an adapter; None where it has none.
        revision: the base's commit, where it is pinned.
        pooling: native, mean or cls.
        outputs: classes, or 1 for a target.
        adapter: whether the folder holds an adapter or the whole model.
        example: the tokenizer's arguments, as source code.
    """
    auto = "AutoModelForSequenceClassification" if pooling == "native" else "AutoModel"
    labels = ""
    if pooling == "native":
        labels = f", num_labels={outputs}, ignore_mismatched_sizes=True"
    pinned = f', revision="{revision}"' if revision else ""
    peft_import = ""
    load = f"model = {auto}.from_pretrained(path)"
    if adapter:
        peft_import = "from peft import PeftModel\n"
        load = (
            f'base = {auto}.from_pretrained("{base or "the base model"}"{labels}{pinned})\n'
            "model = PeftModel.from_pretrained(base, path)"
        )
    template = NATIVE if pooling == "native" else POOLED
    return template.format(
        place=place, load=load, peft_import=peft_import, example=example,
        pooled=POOLINGS.get(pooling, ""),
    )  # fmt: skip
