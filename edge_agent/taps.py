"""From hidden states to what is sent: pooled vectors, or every token through the fixed low-rank map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.wire.codecs import encode_vectors
from side_tuning.wire.frame import Tap
from side_tuning.wire.messages import TapPlan

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edge_agent.backbone import Backbone, Texts


class PlanError(ValueError):
    """A tap plan that this backbone cannot carry out; the text says which value and the cure."""


@dataclass
class TapMatrices:
    """Float taps of one batch, by layer: one row per sample (`pooled`) or per real token (`sequence`)."""

    values: dict[int, np.ndarray[Any, Any]]  # (rows, width or rank) float32
    tokens: list[int]  # real tokens of each sample
    maps: dict[int, str | None]  # hash of the map that was applied


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
            rows = states[activations.mask].numpy()  # (sum of tokens, width)
            values[layer] = np.ascontiguousarray(rows @ backbone.map_matrix(layer, plan.width_at(layer, manifest.layers, manifest.width)))
            maps[layer] = manifest.maps[layer]
    return TapMatrices(values, [int(n) for n in tokens], maps)


def to_wire_taps(matrices: TapMatrices, plan: TapPlan) -> tuple[Tap, ...]:
    """Encode each layer's rows with the plan's codec."""
    return tuple(
        Tap(
            layer=layer,
            rows=values.shape[0],
            width=values.shape[1],
            codec=plan.codec,
            group=plan.group,
            map=matrices.maps[layer],
            data=encode_vectors(values, plan.codec, plan.group),
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
