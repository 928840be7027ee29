"""Writes text on the device: backbone, side network and the backbone's own frozen head, token by token.

Keys and values of backbone and side network are kept, so a token costs one row through each. The side network sees the rows
that it saw in training: of the prompt's, what the plan's `context_every` keeps. Unlike in training and evaluation its inputs have
not been through the codec, and the last hidden state not through its map either: here nothing has to travel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_agent.backbone import Backbone
from edge_agent.language_rows import context_places
from side_tuning.backbone_manifest import CONFIG, TextError
from side_tuning.wire.messages import TapPlan

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor

    from side_tuning.language_head import LanguageHead
    from side_tuning.network.language import KeyValues, LanguageAlignment, LanguageLadder

HELD_TOKENS = 8  # a character has at most 4 bytes; more tokens than these are no unfinished character


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.8  # 0: always the most probable one
    top_k: int = 0  # among so many of the most probable; 0: all
    top_p: float = 0.95  # among the most probable that together have this probability
    seed: int | None = None  # None: another text each time

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature {self.temperature} is not from 0 (always the most probable token) to 100")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is below 0; 0 takes all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p {self.top_p} is not above 0 and at most 1")


@dataclass(frozen=True)
class Side:
    """What a checkpoint adds to the backbone."""

    alignment: LanguageAlignment
    ladder: LanguageLadder
    plan: TapPlan


class Generator:
    """One backbone, alone or with a side network. Not for use by two threads at once."""

    def __init__(self, backbone: Backbone, side: Side | None = None) -> None:
        """Raises `BackboneError` where the backbone has no language model's head."""
        from side_tuning.language_head import LanguageHead

        self._backbone = backbone
        self._head = LanguageHead.load(backbone.folder)
        self._side = side
        self._ends = set(backbone.end_tokens)
        config = json.loads((backbone.folder / CONFIG).read_text(encoding="utf-8"))
        self.longest = int(config.get("max_position_embeddings") or config.get("n_positions") or backbone.manifest.max_tokens)
        """Tokens of prompt and answer together that the backbone has positions for."""
        self._known = min(backbone.tokenizer.get_vocab_size(), self._head.vocabulary.size)  # tables have more entries than there are tokens

    def start(self) -> Text:
        """A new text, to be fed with ids."""
        return Text(self._backbone, self._head, self._side)

    def write(self, prompt: str, sampling: Sampling = Sampling(), max_new_tokens: int = 128) -> Iterator[str]:
        """The continuation of `prompt`, piece by piece, each whole characters, until an end token or the limit.

        Raises:
            TextError: the prompt has no token, or leaves no room.

        """
        tokenizer = self._backbone.tokenizer
        tokenizer.no_truncation()
        ids = list(tokenizer.encode(prompt).ids)
        if not ids:
            raise TextError(0, "has no token that the backbone knows: write something else")
        if len(ids) >= self.longest:
            raise TextError(0, f"has {len(ids)} tokens, the backbone takes {self.longest} with the answer: shorten it")
        return self._write(ids, sampling, min(max_new_tokens, self.longest - len(ids)))

    def _write(self, ids: list[int], sampling: Sampling, most: int) -> Iterator[str]:
        import torch

        chance = torch.Generator()
        if sampling.seed is None:
            chance.seed()
        else:
            chance.manual_seed(sampling.seed)
        text, pieces = self.start(), Pieces(self._backbone.tokenizer, ids)
        new: Sequence[int] = ids
        for _ in range(most):
            token = choose(text.feed(new)[: self._known], sampling, chance)
            if token in self._ends:
                break
            new = [token]
            if piece := pieces.put(token):
                yield piece
        if piece := pieces.end():
            yield piece


class Text:
    """One text on its way through backbone, side network and head."""

    def __init__(self, backbone: Backbone, head: LanguageHead, side: Side | None) -> None:
        self._run = backbone.start_text()
        self._head, self._side = head, side
        self._past: list[KeyValues] | None = None
        if side is not None:
            depth = backbone.manifest.layers
            self._layers = side.plan.layers(depth)
            width = side.alignment.config.width_in
            import torch

            self._maps = {n: torch.from_numpy(backbone.map_matrix(n, width).copy()) for n in side.plan.taps(depth)}

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Take the next tokens, the prompt's first; returns the logits (V,) of what follows them."""
        import torch

        from side_tuning.network.vocabulary import logits_of

        with torch.inference_mode():
            states = self._run.step(ids)
            h = states[-1][-1:]
            if self._side is not None:
                rows = list(range(len(ids)))
                if self._past is None:
                    rows = [*context_places(len(ids) - 1, self._side.plan.context_every), len(ids) - 1]
                h = self._side.alignment.leave(self._ladder_rows(states, ids, rows), h)
            return logits_of(self._head.before_vocabulary(h), self._head.vocabulary)[0]

    def _ladder_rows(self, states: Sequence[Tensor], ids: Sequence[int], rows: list[int]) -> Tensor:
        """The ladder's output (1, s) for the last of the new rows."""
        import torch

        assert self._side is not None
        taps = {layer: states[layer - 1][rows] @ matrix for layer, matrix in self._maps.items()}
        x = torch.stack([taps[layer] for layer in self._layers])[None]  # (1, B, T, r)
        embedded = self._head.embed(torch.tensor([[ids[row] for row in rows]]))
        z, self._past = self._side.ladder(*self._side.alignment.enter(x, embedded), self._past)
        return z[0, -1:]


def choose(logits: Tensor, sampling: Sampling, chance: torch.Generator) -> int:
    """The next token by `sampling`, from logits (V,)."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    import torch

    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        logits, places = logits.topk(sampling.top_k)
    else:
        logits, places = logits.sort(descending=True)
    odds = torch.softmax(logits, dim=-1)
    if sampling.top_p < 1.0:
        # One goes when those before it already have top_p together; so the first always stays.
        odds = odds * (odds.cumsum(0) - odds < sampling.top_p)
    return int(places[torch.multinomial(odds, 1, generator=chance)])


class Pieces:
    """Turns ids into text as they come. What is no whole character yet is held back.

    Tokenizers drop or add spaces at the beginning of a text, so each new token is decoded behind those before it.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-HELD_TOKENS:])
        self._told = len(self._ids)  # ids whose text was given out; from `_from` on they are decoded with the new ones
        self._from = 0

    def put(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._ids.append(token)
        whole, before = self._texts()
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and len(self._ids) - self._told < HELD_TOKENS:
            return ""
        piece = whole[len(before) :]
        if piece:  # behind an end token, which has no text, the next would be decoded like the first of a text
            self._from, self._told = self._told, len(self._ids)
        return piece

    def end(self) -> str:
        """What was held back."""
        whole, before = self._texts()
        return whole[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode: Any = self._tokenizer.decode
        return decode(self._ids[self._from :]), decode(self._ids[self._from : self._told])
