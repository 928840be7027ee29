"""Sentence pairs with a number each, for trying a regression where no rated pairs are at hand: `python -m coordinator.demonstration.overlap_rows`.

The number is computed, not a person's judgement: of the words that either sentence has, the share that both have, 0 to 5.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from coordinator.demonstration.data import DataError
from coordinator.demonstration.text_rows import read_texts

MOST = 5.0


def overlap(a: str, b: str) -> float:
    """Shared words over all words of the two sentences (Jaccard's index), 0 to `MOST`."""
    words_a, words_b = (set(re.findall(r"\w+", text.lower())) for text in (a, b))
    everything = words_a | words_b
    return round(MOST * len(words_a & words_b) / len(everything), 2) if everything else 0.0


def write_overlaps(folder: Path, out: Path) -> int:
    """Write the pairs of `folder` with their overlap as labels to `out`; returns how many.

    Raises:
        DataError: a file is missing, or rows are no pairs.

    """
    out.mkdir(parents=True, exist_ok=True)
    written = 0
    for split in ("train", "test"):
        lines = []
        for row in read_texts(folder, split):
            if isinstance(row.text, str):
                raise DataError(f"{folder} has single texts: the overlap takes pairs, text_a and text_b")
            a, b = row.text
            lines.append(json.dumps({"text_a": a, "text_b": b, "label": overlap(a, b)}, ensure_ascii=False) + "\n")
        (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        written += len(lines)
    return written


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="coordinator.demonstration.overlap_rows", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl[.gz] and test.jsonl[.gz] of sentence pairs")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    options = parser.parse_args(arguments)
    try:
        print(f"{write_overlaps(options.data, options.out):,} pairs written to {options.out}")
    except (DataError, OSError) as error:
        print(f"overlap_rows: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
