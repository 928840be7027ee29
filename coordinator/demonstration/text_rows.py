"""Rows of a data set for language models: plain text, or a prompt and the response that the loss sits on."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.demonstration.data import DataError, Text

# What prompt and response are called: the project's own names, those of instruction sets, those of the E2E set.
PAIRS = (("text_a", "text_b"), ("prompt", "response"), ("mr", "ref"))


@dataclass(frozen=True)
class TextRow:
    """One text, or (prompt, response), and who wrote it."""

    text: Text
    user: str | None = None


def read_texts(folder: Path, split: str) -> list[TextRow]:
    """The rows of `split`.jsonl[.gz] in `folder`, in order.

    Raises:
        DataError: no such file, or a row without a text.

    """
    for suffix in (".jsonl.gz", ".jsonl"):
        if (path := folder / f"{split}{suffix}").is_file():
            break
    else:
        raise DataError(f"{folder} holds neither {split}.jsonl nor {split}.jsonl.gz")
    opened: Any = gzip.open if path.suffix == ".gz" else open
    rows = []
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_row(json.loads(line), f"{path}, line {number}"))
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read after row {len(rows)}: {error}") from error
    return rows


def _row(row: Any, where: str) -> TextRow:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object with `text`, or with a prompt and a response")
    user = None if row.get("user") is None else str(row["user"])
    if isinstance(row.get("text"), str) and row["text"].strip():
        return TextRow(row["text"], user)
    for prompt, response in PAIRS:
        if all(isinstance(row.get(name), str) and row[name].strip() for name in (prompt, response)):
            return TextRow((row[prompt], row[response]), user)
    named = ", ".join(f"`{a}` and `{b}`" for a, b in PAIRS)
    raise DataError(f"{where}: no text; a row has `text`, or one of {named}")
