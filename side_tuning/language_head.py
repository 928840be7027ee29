"""The frozen ends of a language model, from its artifact: token embeddings, the inverse of the last layer's map, norm and head.

Among the weights of a decoder's artifact are `language_head.norm.weight` (and `.bias`), `language_head.projection.weight` where
the family has one (OPT-350M's way from its width to that of its embeddings), and `language_head.vocabulary.weight`, or `.data`
with `.scale`, where the head is not the token table itself. Coordinator and device compute with the same object.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from side_tuning.backbone_manifest import CONFIG, MAPS, WEIGHTS, BackboneError, read_manifest
from side_tuning.network.vocabulary import FloatVocabulary, Int8Vocabulary, Vocabulary
from side_tuning.plain_transformer import FAMILIES

PREFIX = "language_head"


@dataclass(frozen=True)
class TailNames:
    """What a family calls the parts between its last block and its vocabulary."""

    norm: str
    projection: str = ""


TAILS = {
    "opt": TailNames("decoder.final_layer_norm", "decoder.project_out"),
    "gpt2": TailNames("ln_f"),
    "llama": TailNames("norm"),
    "qwen2": TailNames("norm"),
}


class LanguageHead:
    """Everything of one backbone that the side network of a language model needs and never trains."""

    def __init__(
        self,
        embeddings: Vocabulary,
        vocabulary: Vocabulary,
        *,
        norm_weight: Tensor | None,  # None: the family's blocks end with a norm of their own
        norm_bias: Tensor | None,
        epsilon: float,
        projection: Tensor | None,
        last_map: Tensor,
    ) -> None:
        self.embeddings = embeddings
        self.vocabulary = vocabulary
        self._norm_weight, self._norm_bias, self._epsilon = norm_weight, norm_bias, epsilon
        self._projection = projection
        self._last_map = last_map  # (d, columns)
        self._inverses: dict[int, Tensor] = {}

    @classmethod
    def load(cls, folder: Path | str) -> LanguageHead:
        """Read the head of the artifact in `folder`; weights stay mapped from its files.

        Raises:
            BackboneError: an encoder, or an artifact that was prepared without a head.

        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest.last_rank:
            raise BackboneError(
                f"the backbone in {folder} was prepared without its language model's head: prepare a decoder "
                "(OPT, GPT-2, Llama, Qwen2) that has one again with `coordinator backbone prepare`"
            )
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        table = FAMILIES[config["model_type"]].tokens
        with safe_open(folder / WEIGHTS, framework="pt") as file, safe_open(folder / MAPS, framework="pt") as maps:
            names = set(file.keys())

            def tensor(name: str) -> Tensor | None:
                return file.get_tensor(f"{PREFIX}.{name}").float() if f"{PREFIX}.{name}" in names else None

            embeddings = _vocabulary(file, table)
            if embeddings is None:
                raise BackboneError(f"{folder}: the token table {table} is missing; prepare the backbone again")
            return cls(
                embeddings,
                _vocabulary(file, f"{PREFIX}.vocabulary") or embeddings,
                norm_weight=tensor("norm.weight"),
                norm_bias=tensor("norm.bias"),
                epsilon=next((config[n] for n in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps") if n in config), 1e-5),
                projection=tensor("projection.weight"),
                last_map=maps.get_tensor(f"layer.{manifest.layers}").float(),
            )

    @property
    def width(self) -> int:
        """Of the hidden states that the head reads."""
        return int(self._last_map.shape[0])

    @property
    def token_width(self) -> int:
        """Of the token embeddings."""
        return int(self.embeddings.rows(0, 1).shape[1])

    def embed(self, ids: Tensor) -> Tensor:
        """Frozen token embeddings, (..., e), for ids (...)."""
        if isinstance(self.embeddings, Int8Vocabulary):
            rows = F.embedding(ids, self.embeddings.data).float()
            return rows * F.embedding(ids, self.embeddings.scale.float())
        assert isinstance(self.embeddings, FloatVocabulary)
        return F.embedding(ids, self.embeddings.weight).float()

    def restore(self, rows: Tensor) -> Tensor:
        """Hidden states (..., d) from the first columns of the last layer's map (..., r): the least-squares inverse."""
        rank = rows.shape[-1]
        if rank not in self._inverses:
            self._inverses[rank] = torch.linalg.pinv(self._last_map[:, :rank].double()).float()
        return rows @ self._inverses[rank].to(rows.device)

    def before_vocabulary(self, h: Tensor) -> Tensor:
        """Final norm and projection: (..., d) to what the vocabulary's matrix is applied to, (..., e)."""
        if self._norm_weight is None:
            pass
        elif self._norm_bias is None:
            h = F.rms_norm(h, self._norm_weight.shape, self._norm_weight, self._epsilon)
        else:
            h = F.layer_norm(h, self._norm_weight.shape, self._norm_weight, self._norm_bias, self._epsilon)
        return h if self._projection is None else h @ self._projection.T

    def to(self, device: torch.device) -> LanguageHead:
        """Move everything; returns itself."""
        for owner, name in [
            (self, "_norm_weight"), (self, "_norm_bias"), (self, "_projection"), (self, "_last_map"),
            *((v, n) for v in (self.embeddings, self.vocabulary) for n in ("weight", "data", "scale")),
        ]:  # fmt: skip
            found = getattr(owner, name, None)
            if isinstance(found, Tensor):
                setattr(owner, name, found.to(device))
        return self


def _vocabulary(file: Any, name: str) -> Vocabulary | None:
    names = set(file.keys())
    if f"{name}.data" in names:
        return Int8Vocabulary(file.get_tensor(f"{name}.data"), file.get_tensor(f"{name}.scale"))
    if f"{name}.weight" in names:
        return FloatVocabulary(file.get_tensor(f"{name}.weight"))
    return None
