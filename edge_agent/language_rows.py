"""Which tokens of a text become rows that a language model's side network is trained on.

A row is a position with a next token. Of a single text every row is trained. Of a pair (prompt, response), which a decoder
reads as one text with a line break between, only the rows whose next token is of the response are; of the prompt's other rows
every k-th is kept as context, counted backwards from them. Behind a response stands the backbone's end token, so that the end
of an answer is learned too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from side_tuning.backbone_manifest import TextError
from side_tuning.wire.messages import TapPlan

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edge_agent.backbone import Texts

BETWEEN = "\n"  # prompt and response


@dataclass(frozen=True)
class LanguageRows:
    """One text. `read` goes through the backbone; `kept` are the rows that are sent, places in `read`."""

    read: list[int]  # token ids
    kept: np.ndarray[Any, Any]  # (rows,) int64, ascending
    ids: np.ndarray[Any, Any]  # (rows + 1,) int64: those of the kept rows, and the token after the last
    supervised_from: int  # the first of the kept rows that is trained


def language_rows(tokenizer: Tokenizer, texts: Texts, plan: TapPlan, end: int | None = None) -> list[LanguageRows]:
    """The rows of each text or pair; `end` is the token that is put behind a response, unless it stands there or the response is cut.

    Raises:
        TextError: a text that gives no row to train on; says which, why, and the cure.

    """
    whole = [text if isinstance(text, str) else BETWEEN.join(text) for text in texts]
    tokenizer.no_truncation()
    found = []
    for index, encoding in enumerate(tokenizer.encode_batch(whole)):
        text = texts[index]
        start = 0 if isinstance(text, str) else len(text[0]) + len(BETWEEN)
        ends = [end] if start and end is not None and encoding.ids[-1:] != [end] else []
        found.append(_rows(index, encoding.ids + ends, encoding.offsets, start, plan))
    return found


def context_places(first: int, every: int) -> list[int]:
    """Which of the rows before row `first` are kept: every `every`-th, counted backwards from it; 0 keeps none."""
    return list(range(first % every, first, every)) if every else []


def _rows(index: int, ids: list[int], offsets: Sequence[tuple[int, int]], response_at: int, plan: TapPlan) -> LanguageRows:
    """`offsets` are each token's first character and end, `response_at` is the response's first character, 0 in a single text."""
    if len(ids) < 2:
        raise TextError(index, "is a single token, after which nothing comes to be predicted: leave it out, or join it to the next one", "too short")
    first = 0
    if response_at:
        # A token across the border belongs to the response; special tokens stand nowhere and end at 0.
        first = next((place for place, (_, end) in enumerate(offsets) if end > response_at), 0) - 1
        if first < 0:
            raise TextError(index, "has a response without a token that could be predicted: leave it out, or put something before it", "too short")
    rows = min(len(ids) - 1, plan.max_tokens)
    if first >= rows:
        raise TextError(
            index,
            f"has a prompt of {first + 1} tokens, which leaves none of the plan's {plan.max_tokens} for the response: shorten the prompt, or "
            "raise the plan's max_tokens",
            "prompt too long",
        )
    context = context_places(first, plan.context_every)
    kept = np.array([*context, *range(first, rows)], np.int64)
    return LanguageRows(ids[:rows], kept, np.array([*(ids[place] for place in kept), ids[rows]], np.int64), len(context))
