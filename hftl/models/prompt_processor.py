"""Load the processor of a vision-language source, and build the encoding of pictures by it."""

from typing import Any

from transformers import ProcessorMixin

from hftl.config.data import DEFAULT_PROMPT, TEXT_PLACE, Data
from hftl.data.prompted_inputs import PromptedInputs
from hftl.errors import RecipeError, format_error_line
from hftl.models.source import CONFIG_ERRORS, SourceModel, load_image_processor, load_tokenizer


def build_prompted_inputs(data: Data, source: SourceModel) -> PromptedInputs:
    """Build the encoding of pictures for a vision-language source.

    Raises:
        RecipeError: for keys of sources that read pictures alone.
    """
    for key, given in (("image_size", data.image_size), ("augment", data.augment != "none")):
        if given:
            raise RecipeError(
                f"data.{key} is for sources that read pictures alone; the processor of "
                f"{source.name} sets their size",
                "Remove it",
            )
    processor = load_prompt_processor(source)
    return PromptedInputs(
        data, processor, {}, 1, prompt=render_prompt(processor, data.prompt),
        max_length=data.max_length, folder=source.folder,
    )  # fmt: skip


def load_prompt_processor(source: SourceModel) -> Any:
    """Return the source's processor without its part for videos, which needs torchvision.

    Raises:
        RecipeError: if the checkpoint ships none, or a package is missing that it needs.
    """
    from transformers import PROCESSOR_MAPPING

    known: Any = PROCESSOR_MAPPING[type(source.config)]
    parts = {"image_processor": load_image_processor(source), "tokenizer": load_tokenizer(source)}

    class PictureProcessor(known):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is not None:
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

    try:
        settings, _ = known.get_processor_dict(source.folder)
        arguments = [parts.get(name) for name in known.get_attributes()]
        return PictureProcessor.from_args_and_dict(arguments, settings)
    except (ImportError, *CONFIG_ERRORS) as error:
        # OSError for a file that is missing or no JSON, ImportError for a package.
        raise RecipeError(
            f"source.model: {source.name} has no usable processor: {format_error_line(error)}",
            "Install what it needs (pip install 'hftl[vision-language]'), or save the processor "
            "beside the model",
        ) from error


def render_prompt(processor: Any, prompt: str | None) -> str:
    """Return a prompt as the model was trained to read it, the picture before the text.

    A source without a chat format, as one that was not trained to follow instructions, reads the
    picture's place and the text.
    """
    words = DEFAULT_PROMPT if prompt is None else prompt
    if processor.chat_template is None:
        return f"{processor.image_token}{words}"
    content: Any = [{"type": "image"}, {"type": "text", "text": words}]
    # SmolVLM's own method asks the part for videos, which is not there.
    rendered = ProcessorMixin.apply_chat_template(
        processor, [{"role": "user", "content": content}], add_generation_prompt=True
    )
    if TEXT_PLACE in words and TEXT_PLACE not in rendered:
        raise RecipeError(
            f"data.prompt: the source's chat format drops {TEXT_PLACE}", "Leave the text out"
        )
    return rendered
