"""Load a prepared backbone and run it forward to the last tap, never further.

Rules: importing this module loads no torch; the full-precision model never exists in memory; later layers than asked
for do not run; a text's result does not depend on what else is in its batch.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.language_rows import LanguageRows, language_rows
from edge_agent.memory import MappedFile, let_go_of_code
from side_tuning.backbone_manifest import (
    CONFIG,
    MAPS,
    TOKENIZER,
    WEIGHTS,
    BackboneError,
    BackboneManifest,
    TextError,
    check_artifact,
    read_manifest,
)
from side_tuning.wire.messages import TapPlan

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Encoding, Tokenizer
    from torch import Tensor, nn

    from edge_agent.text_run import TextRun

__all__ = ["Activations", "Backbone", "BackboneError", "BackboneManifest", "TextError", "read_manifest"]

logger = logging.getLogger(__name__)

Texts = Sequence[str] | Sequence[tuple[str, str]] | Sequence[str | tuple[str, str]]


@dataclass
class Activations:
    """Hidden states by layer, and which positions hold a real token."""

    states: dict[int, Tensor]  # (B, T, width)
    mask: Tensor  # (B, T) bool


def _check_texts(texts: Texts) -> list[tuple[str, ...]]:
    """Each text's one or two parts; raises `TextError` for the first that is empty."""
    found: list[tuple[str, ...]] = []
    for index, text in enumerate(texts):
        parts = (text,) if isinstance(text, str) else tuple(text)
        if len(parts) not in (1, 2) or not all(isinstance(part, str) and part.strip() for part in parts):
            raise TextError(index, "is empty: leave it out, or give it words")
        found.append(parts)
    return found


class Backbone:
    """A loaded backbone. Not for use by two threads at once."""

    def __init__(
        self, manifest: BackboneManifest, model: nn.Module, blocks_name: str, tokenizer: Tokenizer, folder: Path
    ) -> None:
        self.manifest = manifest
        self._model = model
        self._blocks_name = blocks_name
        self._blocks = list(model.get_submodule(blocks_name).children())
        self._tokenizer = tokenizer
        self._folder = folder
        config: Any = model.config
        self._pad = config.pad_token_id if isinstance(config.pad_token_id, int) and config.pad_token_id >= 0 else 0
        ends = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("eos_token_id")
        self.end_tokens: list[int] = ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else []
        """Those that end a text; of several the first is the model's own, the others are of its way to chat."""
        self._type_ids = getattr(config, "type_vocab_size", 0) > 1
        self._tap: dict[int, Tensor] = {}
        self._maps: dict[int, np.ndarray[Any, Any]] = {}
        # One block's weights at a time are resident: 100 MB less for RoBERTa-base in int8 (docs/lab-notes.md).
        tensors = itertools.chain(model.parameters(), model.buffers())
        self._weights = MappedFile(folder / WEIGHTS, (tensor.data_ptr() for tensor in tensors))
        self._blocks[0].register_forward_pre_hook(lambda *_: self._weights.let_go())  # the token table's
        for number, block in enumerate(self._blocks, 1):
            block.register_forward_hook(self._keeper(number))
        self._wanted: frozenset[int] = frozenset()

    @classmethod
    def load(cls, folder: Path | str, *, threads: int = 1, last_layer: int | None = None) -> Backbone:
        """Load the artifact in `folder`, up to `last_layer` (all of its layers if None).

        Raises:
            BackboneError: missing, damaged or too short for `last_layer`.

        """
        folder = Path(folder)
        manifest = check_artifact(folder)
        last = manifest.layers if last_layer is None else last_layer
        if not 1 <= last <= manifest.layers:
            raise BackboneError(f"layer {last} is not in the backbone in {folder}: it has {manifest.layers} layers")
        import torch
        from tokenizers import Tokenizer

        from side_tuning.backbone_model import load_model

        let_go_of_code()  # before loading takes more
        torch.set_num_threads(threads)
        try:
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
            model, blocks_name = load_model(folder, last)
        except BackboneError:
            raise
        except Exception as error:  # the hash is right, so the installed libraries read it differently
            raise BackboneError(
                f"the backbone in {folder} cannot be loaded with the installed libraries "
                f"({type(error).__name__}: {error!s:.200}); it was prepared with {manifest.created_with}: "
                "install those versions or prepare it again"
            ) from error
        let_go_of_code()
        return cls(manifest, model, blocks_name, tokenizer, folder)

    @property
    def last_layer(self) -> int:
        """The last layer that was loaded."""
        return len(self._blocks)

    def hidden_states(self, texts: Texts, layers: Sequence[int], max_tokens: int) -> Activations:
        """Outputs of the blocks `layers` (1-based) for each text or pair of texts, cut to `max_tokens`.

        Raises:
            TextError: a text without a token; says which.
            BackboneError: a layer that was not loaded, or no texts.

        """
        if not texts:
            raise BackboneError("no texts were given")
        encodings = self._encode(texts, max_tokens)
        return self._forward([e.ids for e in encodings], layers, [e.type_ids for e in encodings])

    def language_states(self, texts: Texts, layers: Sequence[int], plan: TapPlan) -> tuple[Activations, list[LanguageRows]]:
        """Outputs of the blocks `layers` (1-based) and the rows of each text or pair for tuning a language model.

        Raises:
            TextError: a text that gives no row to train on; says which.
            BackboneError: a layer that was not loaded, or no texts.

        """
        if not texts:
            raise BackboneError("no texts were given")
        _check_texts(texts)
        rows = language_rows(self._tokenizer, texts, plan, next(iter(self.end_tokens), None))
        return self._forward([row.read for row in rows], layers), rows

    def _forward(self, tokens: Sequence[list[int]], layers: Sequence[int], type_ids: Sequence[list[int]] | None = None) -> Activations:
        import torch

        if not layers or not all(1 <= n <= self.last_layer for n in layers):
            raise BackboneError(f"layers {list(layers)} were asked of a backbone that has 1 to {self.last_layer}")
        B, T = len(tokens), max(map(len, tokens))
        ids = torch.full((B, T), self._pad)
        mask = torch.zeros((B, T), dtype=torch.long)
        types = torch.zeros((B, T), dtype=torch.long)
        for row, numbers in enumerate(tokens):
            ids[row, : len(numbers)] = torch.tensor(numbers)
            mask[row, : len(numbers)] = 1
            if type_ids is not None:
                types[row, : len(numbers)] = torch.tensor(type_ids[row])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._type_ids:
            inputs["token_type_ids"] = types

        self._run_only(max(layers))
        self._wanted = frozenset(layers)
        try:
            with torch.inference_mode():
                self._model(**inputs)
            states = {n: self._tap[n] for n in sorted(self._wanted)}
        finally:
            self._tap = {}
        return Activations(states, mask.bool())

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def folder(self) -> Path:
        """Of the artifact."""
        return self._folder

    def start_text(self) -> TextRun:
        """Run one text piece by piece through all loaded layers; for decoders."""
        from edge_agent.text_run import start_text

        self._run_only(self.last_layer)
        return start_text(self._model, self._blocks)

    def map_matrix(self, layer: int, rank: int) -> np.ndarray[Any, Any]:
        """The first `rank` columns of the layer's fixed map, (width, rank)."""
        if layer not in self._maps:
            from safetensors import safe_open

            with safe_open(self._folder / MAPS, framework="numpy") as file:
                self._maps[layer] = file.get_tensor(f"layer.{layer}")
        return self._maps[layer][:, :rank]

    def _encode(self, texts: Texts, max_tokens: int) -> list[Encoding]:
        pairs: list[str | tuple[str, str]] = []
        for parts in _check_texts(texts):
            if len(parts) == 1:
                pairs.append(parts[0])
            elif self.manifest.kind == "encoder":
                pairs.append((parts[0], parts[1]))
            else:  # a decoder's tokenizer puts nothing between the two
                pairs.append((parts[0], "\n" + parts[1]))
        self._tokenizer.enable_truncation(min(max_tokens, self.manifest.max_tokens), strategy="longest_first")
        encodings: list[Encoding] = self._tokenizer.encode_batch(pairs)
        for index, encoding in enumerate(encodings):
            if not encoding.ids:
                raise TextError(index, "has no token that the backbone knows: leave it out")
        return encodings

    def _run_only(self, layers: int) -> None:
        """Make the model end after `layers` blocks."""
        from torch import nn

        current = self._model.get_submodule(self._blocks_name)
        if len(list(current.children())) != layers:
            self._model.set_submodule(self._blocks_name, nn.ModuleList(self._blocks[:layers]))
            config: Any = self._model.config
            config.num_hidden_layers = layers

    def _keeper(self, number: int) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            self._weights.let_go()
            if number in self._wanted:
                self._tap[number] = output[0] if isinstance(output, tuple) else output

        return keep
