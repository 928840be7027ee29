"""From hidden states to what is sent: pooled vectors, or every token through the fixed low-rank map, a summary before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.wire.codecs import encode_vectors
from side_tuning.wire.frame import Tap
from side_tuning.wire.messages import Mode, TapPlan
from side_tuning.wire.summaries import join_summaries

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edge_agent.backbone import Backbone, Texts


class PlanError(ValueError):
    """A tap plan that this backbone cannot carry out; the text says which value and the cure."""


@dataclass
class TapMatrices:
    """Float taps of one batch, by layer: one row per sample (`pooled`), or per real token, the summary's before them (`sequence`)."""

    values: dict[int, np.ndarray[Any, Any]]  # (rows, width or rank) float32
    tokens: list[int]  # real tokens of each sample; of a language model its rows
    maps: dict[int, str | None]  # hash of the map that was applied
    depth: int  # layers of the backbone; the last one may have a codec of its own
    summary_rows: int = 0  # of each sample, before its tokens
    token_ids: list[np.ndarray[Any, Any]] | None = None  # `causal-lm`: each sample's, (tokens + 1,) int64
    supervised_from: list[int] | None = None  # `causal-lm`: the first row of each sample that is trained

    def counts(self, mode: Mode) -> list[int]:
        """Rows of each sample in every layer."""
        return [1] * len(self.tokens) if mode == "pooled" else [n + self.summary_rows for n in self.tokens]


def check_plan(plan: TapPlan, manifest: BackboneManifest) -> None:
    """Raise `PlanError` if `plan` cannot run on this backbone."""
    if (reason := manifest.refusal(plan)) is not None:
        raise PlanError(reason)


def compute_taps(backbone: Backbone, texts: Texts, plan: TapPlan) -> TapMatrices:
    """Run the texts forward once and keep what `plan` asks for."""
    import numpy as np

    manifest = backbone.manifest
    check_plan(plan, manifest)
    layers = plan.taps(manifest.layers)
    if plan.task == "causal-lm":
        return _language_taps(backbone, texts, plan)
    activations = backbone.hidden_states(texts, layers, plan.max_tokens)
    tokens = activations.mask.sum(dim=1)
    values: dict[int, np.ndarray[Any, Any]] = {}
    maps: dict[int, str | None] = {}
    for layer in layers:
        states = activations.states[layer]  # (B, T, width)
        if plan.mode == "pooled":
            values[layer] = np.ascontiguousarray(_pool(states, activations.mask, tokens, plan.pooling).numpy())
            maps[layer] = None
        else:
            values[layer] = _mapped(backbone, layer, states[activations.mask], plan)
            maps[layer] = manifest.maps[layer]
            if plan.summary:
                summaries = _pool(states, activations.mask, tokens, plan.pooling).numpy()
                values[layer] = join_summaries(summaries, values[layer], tokens.tolist())
    return TapMatrices(values, tokens.tolist(), maps, manifest.layers, plan.summary_rows(manifest.width))


def _language_taps(backbone: Backbone, texts: Texts, plan: TapPlan) -> TapMatrices:
    """The kept rows of every text, and the ids that they are trained to predict."""
    import numpy as np
    import torch

    layers = plan.taps(backbone.manifest.layers)
    activations, texts_rows = backbone.language_states(texts, layers, plan)
    starts = [number * activations.mask.shape[1] for number in range(len(texts_rows))]
    places = torch.from_numpy(np.concatenate([start + rows.kept for start, rows in zip(starts, texts_rows, strict=True)]))
    return TapMatrices(
        {layer: _mapped(backbone, layer, activations.states[layer].flatten(0, 1)[places], plan) for layer in layers},
        [len(rows.kept) for rows in texts_rows],
        {layer: backbone.manifest.maps[layer] for layer in layers},
        backbone.manifest.layers,
        token_ids=[rows.ids for rows in texts_rows],
        supervised_from=[rows.supervised_from for rows in texts_rows],
    )


def _mapped(backbone: Backbone, layer: int, states: Tensor, plan: TapPlan) -> np.ndarray[Any, Any]:
    """Hidden states (rows, width) through the layer's fixed map: (rows, rank)."""
    import numpy as np

    manifest = backbone.manifest
    return np.ascontiguousarray(states.numpy() @ backbone.map_matrix(layer, plan.width_at(layer, manifest.layers, manifest.width)))


def to_wire_taps(matrices: TapMatrices, plan: TapPlan) -> tuple[Tap, ...]:
    """Encode each layer's rows with the plan's codec for it."""
    codecs = {layer: plan.codec_at(layer, matrices.depth) for layer in matrices.values}
    return tuple(
        Tap(
            layer=layer,
            rows=values.shape[0],
            width=values.shape[1],
            codec=codecs[layer],
            group=plan.group,
            map=matrices.maps[layer],
            data=encode_vectors(values, codecs[layer], plan.group),
        )
        for layer, values in matrices.values.items()
    )


def _pool(states: Tensor, mask: Tensor, tokens: Tensor, pooling: str) -> Tensor:
    import torch

    if pooling == "first":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states)), tokens - 1]
    return (states * mask.unsqueeze(-1)).sum(dim=1) / tokens.unsqueeze(-1)
