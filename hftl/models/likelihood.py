"""Compute how likely a vision-language model finds each label as the answer to a prompt.

A label's likelihood is the sum of its tokens' log-probabilities after the prompt. Logits are
computed where a label's tokens are predicted alone: over a whole prompt they would be gigabytes.
"""

from typing import Any

import numpy as np
import torch

from hftl.data.prompted_inputs import PromptedInputs
from hftl.data.text_inputs import EncodedRow
from hftl.models.features import BATCH_TOKENS, batch_by_length
from hftl.models.heads import load_class
from hftl.models.source import SourceModel
from hftl.runtime import distributed
from hftl.runtime.progress import track


def load_language_model(source: SourceModel) -> Any:
    """Return the source with its own head, which predicts tokens, in eval mode and fp32."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(source.config)]
    model, _ = load_class(source, kind, source.config, {})
    return model.eval()


def tokenize_answers(inputs: PromptedInputs, texts: list[str]) -> list[list[int]]:
    """Return the tokens of answers, apart from the prompt by a space where it ends in none."""
    space = "" if inputs.prompt[-1:].isspace() else " "
    return [inputs.tokenizer(space + text, add_special_tokens=False)["input_ids"] for text in texts]


def compute_likelihoods(
    model: Any, encoded: list[EncodedRow], answers: list[list[int]], inputs: PromptedInputs,
    device: str,
) -> np.ndarray:  # fmt: skip
    """Return the log-likelihood of every answer after every row, (rows, answers). Collective.

    Args:
        model: predicts tokens, see `load_language_model`.
        encoded: prompts with their pictures.
        answers: token ids.
        inputs: collates the rows.
        device: the model's.
    """
    longest = max(map(len, answers))
    lengths = [inputs.length(row) + longest for row in encoded]
    computed: dict[int, np.ndarray] = {}
    with torch.no_grad():
        for numbers in track(
            distributed.shard_items(batch_by_length(lengths, BATCH_TOKENS)), "likelihoods"
        ):
            rows = [encoded[number] for number in numbers]
            scores = [_score_answer(model, rows, answer, inputs, device) for answer in answers]
            computed.update(zip(numbers, np.stack(scores, axis=1), strict=True))
    merged = {k: v for part in distributed.gather_values(computed) for k, v in part.items()}
    return np.stack([merged[number] for number in range(len(encoded))])


def _score_answer(
    model: Any, rows: list[EncodedRow], answer: list[int], inputs: PromptedInputs, device: str
) -> np.ndarray:
    """Return the log-likelihood of one answer after each row, (rows,)."""
    batch = inputs.collate([_append_answer(row, answer) for row in rows])
    batch = {name: value.to(device) for name, value in batch.items()}
    hidden = model.model(**batch).last_hidden_state
    # A token is predicted at the one before it.
    first = torch.tensor([inputs.length(row) - 1 for row in rows], device=device)
    places = first[:, None] + torch.arange(len(answer), device=device)
    states = hidden[torch.arange(len(rows), device=device)[:, None], places]
    logits = model.get_output_embeddings()(states).float()
    targets = torch.tensor(answer, device=device).expand(len(rows), -1)
    scores = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return scores.sum(1).double().cpu().numpy()


def _append_answer(row: EncodedRow, answer: list[int]) -> EncodedRow:
    """Return a row with an answer after its prompt."""
    more = {"input_ids": answer, "attention_mask": [1] * len(answer)}
    more["mm_token_type_ids"] = [0] * len(answer)
    grown: EncodedRow = dict(row)
    for name in more.keys() & row.keys():
        grown[name] = [*map(int, row[name]), *more[name]]
    return grown
