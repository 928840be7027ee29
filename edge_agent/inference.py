"""Backbone and the current side network together: text in, label or number out.

The taps pass through the checkpoint's own codec before the side network sees them, as they did in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.backbone import Backbone, BackboneManifest, TextError, Texts, read_manifest
from edge_agent.checkpoint_store import CheckpointError, StoredCheckpoint, current_checkpoint, load_checkpoint
from edge_agent.taps import check_plan, compute_taps
from side_tuning.wire.codecs import round_trip

if TYPE_CHECKING:
    from side_tuning.network.alignment import Alignment
    from side_tuning.network.anchor_map import AnchorMap
    from side_tuning.network.side_network import SideNetwork

__all__ = ["CheckpointError", "Estimate", "Prediction", "Predictor", "load_networks", "open_predictor"]


@dataclass(frozen=True)
class Prediction:
    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Estimate:
    """What a regression says, in the unit of its targets."""

    value: float


class Predictor:
    """One checkpoint on one backbone. Not for use by two threads at once (neither is the backbone)."""

    def __init__(self, backbone: Backbone, checkpoint: StoredCheckpoint | Path, *, batch_size: int = 16) -> None:
        """Load the side network of a checkpoint, or of a checkpoint's folder.

        Raises:
            CheckpointError: it is damaged, or was made for another backbone.

        """
        if isinstance(checkpoint, Path):
            checkpoint = load_checkpoint(checkpoint)
        if checkpoint.manifest.fingerprint != backbone.manifest.fingerprint:
            raise CheckpointError(
                f"checkpoint {checkpoint.manifest.generation} is for backbone {checkpoint.manifest.fingerprint}, this device "
                f"runs {backbone.manifest.fingerprint}; wait for the agent to fetch the one for its backbone"
            )
        if checkpoint.manifest.plan.task == "causal-lm":
            raise CheckpointError(f"checkpoint {checkpoint.manifest.generation} is a language model's, which has no labels: use `edge-agent generate`")
        self.checkpoint = checkpoint
        self.labels = checkpoint.manifest.plan.labels
        self.task = checkpoint.manifest.plan.task
        self._backbone = backbone
        self._batch_size = batch_size
        check_plan(checkpoint.manifest.plan, backbone.manifest)
        self._alignment, self._ladder = load_networks(checkpoint, backbone.manifest)

    @property
    def generation(self) -> int:
        return self.checkpoint.manifest.generation

    def predict(self, texts: Texts) -> Sequence[Prediction | Estimate]:
        """The most probable label of each text (or pair of texts), in order; a number each where the task is regression.

        Raises:
            TextError: a text without words; its `index` counts within `texts`.

        """
        found: list[Prediction | Estimate] = []
        for start in range(0, len(texts), self._batch_size):
            found += self._predict_batch(texts[start : start + self._batch_size], start)
        return found

    def _predict_batch(self, texts: Texts, start: int) -> Sequence[Prediction | Estimate]:
        import numpy as np

        from side_tuning.network.side_network import block_inputs, pad_tokens, predict_logits

        plan = self.checkpoint.manifest.plan
        try:
            matrices = compute_taps(self._backbone, texts, plan)
        except TextError as error:
            raise TextError(start + error.index, error.reason) from error
        taps = {layer: round_trip(rows, plan.codec, plan.group) for layer, rows in matrices.values.items()}
        mask = None
        if plan.mode == "sequence":
            for layer, rows in taps.items():
                taps[layer], mask = pad_tokens(rows, matrices.counts(plan.mode))
        inputs = block_inputs(taps, plan.layers(self._backbone.manifest.layers))
        logits = predict_logits(self._alignment, self._ladder, inputs, mask)
        if self.task == "regression":
            return [Estimate(float(row[0])) for row in logits]
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = odds / odds.sum(axis=1, keepdims=True)
        best = probabilities.argmax(axis=1)
        return [Prediction(self.labels[i], int(i), float(row[i])) for i, row in zip(best, probabilities, strict=True)]


def load_networks(checkpoint: StoredCheckpoint, backbone: BackboneManifest) -> tuple[Alignment | AnchorMap, SideNetwork]:
    """Load alignment and ladder and check that they fit each other, their plan and this backbone."""
    from side_tuning.network.files import NetworkFileError, load_alignment, load_ladder

    manifest = checkpoint.manifest
    try:
        ladder, alignment = load_ladder(checkpoint.ladder), load_alignment(checkpoint.alignment)
    except (NetworkFileError, OSError) as error:
        raise CheckpointError(f"checkpoint {manifest.generation} cannot be loaded: {error}") from error
    plan = manifest.plan
    width_in = backbone.width if plan.mode == "pooled" else min(plan.rank, backbone.width)
    facts: Sequence[tuple[str, object, object]] = (
        ("classes", ladder.config.classes, 1 if plan.task == "regression" else len(plan.labels)),
        ("blocks", ladder.config.blocks, plan.blocks),
        ("blocks of the alignment", alignment.config.blocks, plan.blocks),
        ("width of the alignment's input", alignment.config.width_in, width_in),
        ("mode", ladder.config.mode, plan.mode),
        ("summary", ladder.config.summary, plan.summary),
        ("width of the summary", alignment.config.summary_width, plan.summary_width(backbone.width)),
        ("width of the summary's output", alignment.config.summary_width_out, ladder.config.summary_width),
        ("width of the alignment's output", alignment.config.width_out, ladder.config.width_in),
    )
    for name, found, wanted in facts:
        if found != wanted:
            raise CheckpointError(f"checkpoint {manifest.generation} contradicts itself: {name} is {found}, expected {wanted}")
    return alignment, ladder


def open_predictor(backbone_folder: Path, state_directory: Path, *, threads: int = 1, batch_size: int = 16) -> Predictor:
    """The newest checkpoint that the agent fetched, on this device's backbone.

    Raises:
        CheckpointError: none yet, or it cannot be used.
        BackboneError: the backbone cannot be used.

    """
    checkpoint = current_checkpoint(state_directory)
    last_layer = max(checkpoint.manifest.plan.taps(read_manifest(backbone_folder).layers))
    backbone = Backbone.load(backbone_folder, threads=threads, last_layer=last_layer)
    return Predictor(backbone, checkpoint, batch_size=batch_size)
