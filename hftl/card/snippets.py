"""Write code that loads a published folder with the plain libraries."""

import json
from dataclasses import dataclass

from hftl.config.data import TEXT_PLACE
from hftl.config.section import is_hub_id
from hftl.models.architecture_spec import TOKEN_CLASSIFICATION
from hftl.models.architectures import ARCHITECTURES, READ_AS, UNHEADED
from hftl.models.quantization import list_whole_modules

PLAIN_TEMPLATE = """import torch
{imports}from transformers import {auto}, {reader}
{peft_import}
path = {place}
{reading}
{load}
{head}{picture}inputs = {inputs}
with torch.inference_mode():
    {output}"""
AUTO_PEFT_TEMPLATE = """from peft import {auto}
from transformers import {reader}

path = {place}
{reading}
{load}
inputs = {inputs}
print(model.eval()(**inputs).logits)"""
"""Where peft has a class for the task and the adapter names its own base."""

PIPELINE_TEMPLATE = """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig, AutoTokenizer, pipeline

path = {place}
config = AutoConfig.from_pretrained(path)
names = ("id2label", "label2id", "problem_type", "pad_token_id")
labels = {{name: getattr(config, name) for name in names}}
model = AutoPeftModelForSequenceClassification.from_pretrained(
    path, ignore_mismatched_sizes=True, **labels
)
tokenizer = AutoTokenizer.from_pretrained(path)
classifier = pipeline("text-classification", model=model, tokenizer=tokenizer)
print(classifier({example}{cut}))"""
"""`pipeline(model=path)` alone takes the labels of the base, or looks for its weights in the
folder of the adapter."""

POOLINGS = {
    "mean": 'mask = inputs["attention_mask"].unsqueeze(-1)\n'
    "    pooled = (hidden * mask).sum(1) / mask.sum(1)",
    "cls": "pooled = hidden[:, 0]",
    "last": "pooled = hidden[:, -1]  # of one row, which has no padding",
}
IMAGE_POOLINGS = {
    "mean": "pooled = hidden[:, {prefix}:].mean(1)",
    "cls": "pooled = hidden[:, 0]",
    "cls+mean": "pooled = torch.cat([hidden[:, 0], hidden[:, {prefix}:].mean(1)], -1)",
}
"""Of pictures, after as many tokens as stand before those of the patches."""
EMBEDDING_LINES = (
    "embedding = model.eval()({forward}).pooler_output\n"
    '    if "projection" in head:\n'
    '        embedding = embedding @ head["projection"].T\n'
    "    embedding = embedding / embedding.norm(dim=-1, keepdim=True)\n"
    '    print(embedding @ head["weight"].T + head["bias"])'
)
IMAGE_HALF_CLASSES = {
    "clip": "CLIPVisionModel", "siglip": "SiglipVisionModel", "siglip2": "Siglip2VisionModel",
    "metaclip_2": "MetaClip2VisionModel",
}  # fmt: skip
"""Of pairs of an image and a text encoder: the class of the image half."""
AUTO_CLASSES = {
    "text": "AutoModelForSequenceClassification",
    "words": "AutoModelForTokenClassification",
    "image": "AutoModelForImageClassification",
}
STOCK_CLASSES = {"vit_mae": "ViTForImageClassification"}
"""Architectures that no Auto class has a classifier for, and the class that takes their weights."""
ENCODER_CLASSES = {"vit_mae": "ViTModel"}
"""Architectures whose `AutoModel` hides patches, and the class that shows all."""
AUTO_PEFT_CLASSES = {
    "text": "AutoPeftModelForSequenceClassification",
    "words": "AutoPeftModelForTokenClassification",
}
PREPROCESSORS = {
    "text": ("AutoTokenizer", "tokenizer", 'tokenizer({example}, {cut}return_tensors="pt")'),
    "words": ("AutoTokenizer", "tokenizer",
              'tokenizer({example}, {cut}is_split_into_words=True, return_tensors="pt")'),
    "image": ("AutoImageProcessor", "processor",
              'processor(picture, return_tensors="pt")'),
}  # fmt: skip

PICTURE_LINES = """picture = ImageOps.exif_transpose(Image.open({example})).convert("RGBA")
ground = Image.new("RGBA", picture.size, "white")
picture = Image.alpha_composite(ground, picture).convert("RGB")
"""
"""Read a picture as `hftl.data.images` does: upright, with white behind transparency."""
PROMPTED_PREPROCESSOR = (
    "AutoProcessor",
    'processor = AutoProcessor.from_pretrained(path, backend="pil")',
    'processor(\n    text={text},\n    images=picture, return_tensors="pt",\n)',
)
"""Of a vision-language model."""
HEAD_LINE = 'head = load_file(f"{{path}}/head.safetensors"{device})\n'
QUANTIZATION = """,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules={whole}
    )"""
"""What loads a base as it was trained on, in 4 bits."""
GLOBAL_ATTENTION = """
inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
inputs["global_attention_mask"][:, 0] = 1"""
"""Of Longformer, whose stock classes let the first token see the whole text."""
TEXT_EXAMPLE = "A text of your own."


@dataclass(frozen=True)
class ModelFolder:
    """Describe a published folder as code loads it.

    Args:
        place: the folder or hub id of the published model.
        base: the public base of an adapter; None where it has none.
        revision: the base's commit, where it is pinned.
        pooling: native, mean, cls, cls+mean, embedding or last.
        outputs: classes, or 1 for a target.
        is_adapter: whether the folder holds an adapter or the whole model.
        kind: what the model takes: text, words or image.
        example: one input, as source code.
        interpolates: whether forward must interpolate its positions to the pictures' size.
        architecture: what the base's checkpoint says it is.
        prompt: that of a vision-language model.
        prefix: tokens of a picture before those of its patches, where the head pools them.
        is_quantized: whether the base's weights are held in 4 bits.
        max_tokens: after which a text was cut for every figure; None: nowhere.
        base_folder: the name of the base's folder, where it has no public id.
    """

    place: str
    base: str | None
    revision: str | None
    pooling: str
    outputs: int
    is_adapter: bool
    kind: str
    example: str
    interpolates: bool = False
    architecture: str = ""
    prompt: str | None = None
    prefix: int = 0
    is_quantized: bool = False
    max_tokens: int | None = None
    base_folder: str = ""

    @property
    def is_pooled(self) -> bool:
        """Return whether the head is a file of its own, on a pooling of hftl's."""
        return self.pooling != "native"

    @property
    def cut(self) -> str:
        """Return the arguments by which a tokenizer cuts a text where it was cut in training."""
        return "" if self.max_tokens is None else f"truncation=True, max_length={self.max_tokens}"

    @property
    def has_public_base(self) -> bool:
        """Return whether it is an adapter whose base the hub may have."""
        return self.is_adapter and self.base is not None and is_hub_id(self.base)


def render_plain_snippet(folder: ModelFolder) -> str:
    """Return code that prints the logits of one example, for words those of every token."""
    shortens = folder.kind in AUTO_PEFT_CLASSES and not folder.is_quantized
    if shortens and folder.has_public_base and not folder.is_pooled:
        return _render_auto_peft_snippet(folder)
    auto = _choose_class(folder)
    reader, reading, inputs = _render_input_lines(folder)
    imports = picture = head = ""
    if folder.kind == "image":
        imports = "from PIL import Image, ImageOps\n"
        picture = PICTURE_LINES.format(example=folder.example)
    path = json.dumps(folder.place)
    if folder.is_pooled:
        imports += "from safetensors.torch import load_file\n"
        head = HEAD_LINE.format(device=', "cuda"' if folder.is_quantized else "")
        if is_hub_id(folder.place):
            # The head is a file of its own, which no library fetches.
            imports = "from huggingface_hub import snapshot_download\n" + imports
            path = f"snapshot_download({path})"
    return PLAIN_TEMPLATE.format(
        place=path, auto=auto, imports=imports,
        reader=f"{reader}, BitsAndBytesConfig" if folder.is_quantized else reader,
        peft_import="from peft import PeftModel\n" if folder.is_adapter else "",
        reading=reading, load=_render_load_lines(folder, auto), head=head, picture=picture,
        inputs=inputs,
        output=_render_output_lines(folder),
    )  # fmt: skip


def _choose_class(folder: ModelFolder) -> str:
    """Return the class of transformers that loads the model, or what the adapter goes on."""
    if folder.pooling == "embedding":
        return IMAGE_HALF_CLASSES[folder.architecture]
    if folder.is_pooled:
        return ENCODER_CLASSES.get(folder.architecture, "AutoModel")
    auto = AUTO_CLASSES[folder.kind]
    return STOCK_CLASSES.get(folder.architecture, auto) if folder.is_adapter else auto


def _render_input_lines(folder: ModelFolder) -> tuple[str, str, str]:
    """Return the class that prepares inputs, the line that loads it, and its call."""
    reader, name, call = PREPROCESSORS[folder.kind]
    # The processors of torchvision, where that is installed, resize otherwise.
    backend = ', backend="pil"' if folder.kind == "image" else ""
    reading, text = f"{name} = {reader}.from_pretrained(path{backend})", ""
    if folder.prompt is not None:
        reader, reading, call = PROMPTED_PREPROCESSOR
        text = json.dumps(folder.prompt.replace(TEXT_PLACE, TEXT_EXAMPLE), ensure_ascii=False)
    cut = f"{folder.cut}, " if folder.cut else ""
    inputs = call.format(text=text, example=folder.example, cut=cut)
    if folder.is_quantized:
        inputs += '.to("cuda")'
    if folder.is_pooled and folder.architecture == "longformer":
        inputs += GLOBAL_ATTENTION
    return reader, reading, inputs


def _render_output_lines(folder: ModelFolder) -> str:
    """Return the lines that compute logits and print them."""
    forward = "**inputs, interpolate_pos_encoding=True" if folder.interpolates else "**inputs"
    if folder.pooling == "embedding":
        return EMBEDDING_LINES.format(forward=forward)
    if not folder.is_pooled:
        return f"print(model.eval()({forward}).logits)"
    pooling = (IMAGE_POOLINGS if folder.prefix else POOLINGS)[folder.pooling]
    return (
        f"hidden = model.eval()({forward}).last_hidden_state\n"
        f"    {pooling.format(prefix=folder.prefix)}\n"
        '    print(pooled @ head["weight"].T + head["bias"])'
    )


def render_pipeline_snippet(folder: ModelFolder) -> str | None:
    """Return code that runs an adapter in `transformers.pipeline` with its labels; None where the
    stock class does not take it as it is, or takes more than one text."""
    takes_pipeline = folder.kind == "text" and '", "' not in folder.example
    if folder.is_pooled or folder.is_quantized or not (takes_pipeline and folder.has_public_base):
        return None
    cut = f", {folder.cut}" if folder.cut else ""
    return PIPELINE_TEMPLATE.format(place=json.dumps(folder.place), example=folder.example, cut=cut)


def _render_auto_peft_snippet(folder: ModelFolder) -> str:
    auto = AUTO_PEFT_CLASSES[folder.kind]
    reader, reading, inputs = _render_input_lines(folder)
    return AUTO_PEFT_TEMPLATE.format(
        place=json.dumps(folder.place), auto=auto, reader=reader, reading=reading,
        load=f"model = {auto}.from_pretrained(path{_render_config_arguments(folder)})",
        inputs=inputs,
    )  # fmt: skip


def _render_config_arguments(folder: ModelFolder) -> str:
    """Return what the base's own config does not say of a classifier on it.

    A decoder's class finds the last token of a text by the padding token, which its base may lack.
    """
    spec = ARCHITECTURES.get(folder.architecture)
    padding = ", pad_token_id=tokenizer.pad_token_id" if spec and spec.is_causal else ""
    return f", num_labels={folder.outputs}, ignore_mismatched_sizes=True{padding}"


def _render_load_lines(folder: ModelFolder, auto: str) -> str:
    if not folder.is_adapter:
        return f"model = {auto}.from_pretrained(path)"
    arguments = "" if folder.is_pooled else _render_config_arguments(folder)
    if folder.is_quantized:
        arguments += _render_quantization(folder)
    if folder.revision:
        arguments += f", revision={json.dumps(folder.revision)}"
    return (
        f"{_render_base_line(folder.base, folder.base_folder, auto, arguments)}\n"
        "model = PeftModel.from_pretrained(base, path)"
    )


def _render_base_line(base: str | None, folder: str, auto: str, arguments: str) -> str:
    """Return the line that loads a base; above one without a public id, what to put there."""
    named = json.dumps(base or folder)
    note = "" if base else f"# The base has no public id: give the path of its folder, {named}.\n"
    return f"{note}base = {auto}.from_pretrained({named}{arguments})"


def _render_quantization(folder: ModelFolder) -> str:
    """Return the argument by which a base is loaded in 4 bits, as it was trained on."""
    spec = (ARCHITECTURES | UNHEADED)[READ_AS.get(folder.architecture, folder.architecture)]
    spec = spec.for_task(TOKEN_CLASSIFICATION if folder.kind == "words" else "classification")
    return QUANTIZATION.format(whole=json.dumps(list_whole_modules(spec)))


def render_encoder_snippet(
    place: str, base: str | None, revision: str | None, architecture: str | None, adapter: bool,
    adapted: bool, folder: str = "",
) -> str:  # fmt: skip
    """Return code that loads an adapted encoder.

    Args:
        place: the folder or hub id of the published encoder.
        base: the public id of the source; None where it has none.
        revision: the source's commit, where it is pinned.
        architecture: what the source's checkpoint says it is.
        adapter: whether the folder holds an adapter on the source.
        adapted: False where every adaptation was undone, so that the folder has no weights.
        folder: the name of the source's folder, where it has no public id.
    """
    where = json.dumps(place)
    pinned = f", revision={json.dumps(revision)}" if revision else ""
    auto = ENCODER_CLASSES.get(architecture or "", "AutoModel")
    if adapter:
        return (
            f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
            f"{_render_base_line(base, folder, auto, pinned)}\n"
            f"model = PeftModel.from_pretrained(base, {where})"
        )
    if adapted:
        return f"from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained({where})"
    line = _render_base_line(base, folder, auto, pinned).replace("base = ", "model = ")
    return f"from transformers import {auto}\n\n{line}"
