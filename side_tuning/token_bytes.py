"""How many bytes of text each token of a tokenizer stands for, and bits per byte from it.

Losses per token cannot be compared between tokenizers, bits per byte can. Coordinator and device count with the same table.
Only the file is read, so no tokenizer needs to be loaded.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from side_tuning.backbone_manifest import TOKENIZER, BackboneError

WORD_START = "▁"  # how sentencepiece writes a space
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(folder: Path | str, vocabulary: int) -> np.ndarray:
    """UTF-8 bytes of the text of each token, (vocabulary,) int64; special and unused ones have none.

    Args:
        folder: of the backbone's artifact, with its tokenizer.
        vocabulary: entries of the model's token table, which may be more than the tokenizer has.

    Raises:
        BackboneError: the tokenizer cannot be read, or is of no kind that states its pieces.

    """
    path = Path(folder) / TOKENIZER
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        pieces = _pieces(body["model"]["vocab"])
        added = [(int(token["id"]), "" if token["special"] else str(token["content"])) for token in body.get("added_tokens") or []]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(f"{path} states no pieces that could be counted ({error!r:.120}); copy or prepare the backbone again") from error
    parts = _parts(body.get("decoder")) | _parts(body.get("pre_tokenizer"))
    by_letter = "ByteLevel" in parts  # GPT-2's way: each letter of a piece stands for one byte
    prefix = body["model"].get("continuing_subword_prefix") or ""
    table = np.zeros(vocabulary, np.int64)
    for number, piece in pieces:
        if not 0 <= number < vocabulary:
            continue
        if by_letter:
            table[number] = len(piece)
        elif "ByteFallback" in parts and _BYTE.fullmatch(piece):
            table[number] = 1
        else:
            table[number] = len(piece.removeprefix(prefix).replace(WORD_START, " ").encode(errors="surrogatepass"))
    for number, content in added:  # these stand as they are, whatever the kind
        if 0 <= number < vocabulary:
            table[number] = len(content.encode(errors="surrogatepass"))
    return table


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """From the summed losses of tokens and the bytes of their text; not a number where there is no text."""
    return nats / math.log(2) / text_bytes if text_bytes else math.nan


def _pieces(vocab: Any) -> list[tuple[int, str]]:
    """Numbers with pieces: a table in most kinds, a list of pieces with their odds in Unigram."""
    if isinstance(vocab, dict):
        return [(int(number), str(piece)) for piece, number in vocab.items()]
    return [(number, str(piece)) for number, (piece, _) in enumerate(vocab)]


def _parts(component: Any) -> set[str]:
    """The kinds of a tokenizer's component and of what it is composed of."""
    if not isinstance(component, dict):
        return set()
    inner = component.get("decoders") or component.get("pretokenizers") or []
    return {str(component.get("type"))}.union(*map(_parts, inner))
