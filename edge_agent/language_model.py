"""A fetched checkpoint of a language model on this device's backbone: what texts cost it, and a generator.

The losses are those of training and of the coordinator's evaluation: the same rows, through maps and codecs and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.backbone import Backbone, BackboneManifest, TextError, Texts
from edge_agent.checkpoint_store import CheckpointError, StoredCheckpoint, current_checkpoint
from edge_agent.generation import Generator, Side
from edge_agent.taps import check_plan, compute_taps
from side_tuning.token_bytes import token_bytes
from side_tuning.wire.codecs import round_trip

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class TextLoss:
    """What one text's trained rows lose, summed."""

    nats: float
    backbone_nats: float  # without the side network, through the same codec
    tokens: int
    text_bytes: int  # that these tokens stand for


class LanguageModel:
    """One checkpoint on one backbone. Not for use by two threads at once."""

    def __init__(self, backbone: Backbone, checkpoint: StoredCheckpoint, *, batch_size: int = 16) -> None:
        """Raises `CheckpointError` if the checkpoint is damaged, or made for another backbone or task."""
        from side_tuning.language_head import LanguageHead

        self.side = load_side(checkpoint, backbone.manifest)
        check_plan(self.side.plan, backbone.manifest)
        self.generation = checkpoint.manifest.generation
        self._backbone = backbone
        self._head = LanguageHead.load(backbone.folder)
        self._bytes = token_bytes(backbone.folder, self._head.vocabulary.size)
        self._batch_size = batch_size

    def losses(self, texts: Texts) -> list[TextLoss]:
        """What each text (or pair) loses, in order.

        Raises:
            TextError: a text that gives no row; its `index` counts within `texts`.

        """
        found: list[TextLoss] = []
        for start in range(0, len(texts), self._batch_size):
            try:
                found += self._batch_losses(texts[start : start + self._batch_size])
            except TextError as error:
                raise TextError(start + error.index, error.reason, error.kind) from error
        return found

    def _batch_losses(self, texts: Texts) -> list[TextLoss]:
        import numpy as np
        import torch

        from side_tuning.network.side_network import block_inputs, pad_tokens

        plan, manifest = self.side.plan, self._backbone.manifest
        matrices = compute_taps(self._backbone, texts, plan)
        assert matrices.token_ids is not None
        assert matrices.supervised_from is not None
        taps = {n: round_trip(rows, plan.codec_at(n, matrices.depth), plan.group) for n, rows in matrices.values.items()}
        width = self.side.alignment.config.width_in
        rows = block_inputs({n: values[:, :width] for n, values in taps.items()}, plan.layers(matrices.depth))
        padded, mask = pad_tokens(rows, matrices.tokens)  # (N, T, B, r)
        ids, _ = pad_tokens(np.concatenate([numbers[:-1] for numbers in matrices.token_ids]), matrices.tokens)
        x = torch.from_numpy(padded).transpose(1, 2)
        with torch.inference_mode():
            z, _ = self.side.ladder(*self.side.alignment.enter(x, self._head.embed(torch.from_numpy(ids))))
        last = self._head.restore(torch.from_numpy(taps[manifest.layers]))
        targets = torch.from_numpy(np.concatenate([numbers[1:] for numbers in matrices.token_ids]))
        trained = np.concatenate(
            [np.arange(count) >= first for count, first in zip(matrices.tokens, matrices.supervised_from, strict=True)]
        )
        wanted = torch.from_numpy(trained)
        with torch.inference_mode():
            tuned = self._nats(self.side.alignment.leave(z[torch.from_numpy(mask)][wanted], last[wanted]), targets[wanted])
        untuned = self._nats(last[wanted], targets[wanted])
        sizes = self._bytes[targets[wanted].numpy()]
        counts = [tokens - first for tokens, first in zip(matrices.tokens, matrices.supervised_from, strict=True)]
        ends = np.cumsum(counts)
        return [
            TextLoss(float(tuned[end - count : end].sum()), float(untuned[end - count : end].sum()), count, int(sizes[end - count : end].sum()))
            for count, end in zip(counts, ends, strict=True)
        ]

    def _nats(self, h: Tensor, targets: Tensor) -> np.ndarray[Any, Any]:
        from side_tuning.network.vocabulary import token_losses

        losses, _ = token_losses(self._head.before_vocabulary(h), self._head.vocabulary, targets)
        return losses.double().numpy()


def load_side(checkpoint: StoredCheckpoint, backbone: BackboneManifest) -> Side:
    """Load alignment and ladder and check that they fit each other, their plan and this backbone."""
    from side_tuning.network.files import NetworkFileError, load_language_alignment, load_language_ladder

    manifest, plan = checkpoint.manifest, checkpoint.manifest.plan
    if manifest.fingerprint != backbone.fingerprint:
        raise CheckpointError(
            f"checkpoint {manifest.generation} is for backbone {manifest.fingerprint}, this device runs {backbone.fingerprint}; "
            "wait for the agent to fetch the one for its backbone"
        )
    if plan.task != "causal-lm":
        raise CheckpointError(f"checkpoint {manifest.generation} is of the task {plan.task}, which writes no text: use `edge-agent infer`")
    try:
        ladder, alignment = load_language_ladder(checkpoint.ladder), load_language_alignment(checkpoint.alignment)
    except (NetworkFileError, OSError) as error:
        raise CheckpointError(f"checkpoint {manifest.generation} cannot be loaded: {error}") from error
    facts: Sequence[tuple[str, object, object]] = (
        ("blocks", ladder.config.blocks, plan.blocks),
        ("blocks of the alignment", alignment.config.blocks, plan.blocks),
        ("width of the alignment's input", alignment.config.width_in, min(plan.rank, backbone.width)),
        ("width of the backbone", alignment.config.width, backbone.width),
        ("width of the alignment's output", alignment.config.width_out, ladder.config.side_width),
    )
    for name, found, wanted in facts:
        if found != wanted:
            raise CheckpointError(f"checkpoint {manifest.generation} contradicts itself: {name} is {found}, expected {wanted}")
    return Side(alignment, ladder, plan)


def open_language_model(backbone_folder: Path, state_directory: Path, *, threads: int = 1, batch_size: int = 16) -> LanguageModel:
    """The newest checkpoint that the agent fetched, on this device's backbone.

    Raises:
        CheckpointError: none yet, or it cannot be used.
        BackboneError: the backbone cannot be used.

    """
    checkpoint = current_checkpoint(state_directory)
    return LanguageModel(Backbone.load(backbone_folder, threads=threads), checkpoint, batch_size=batch_size)


def open_generator(backbone_folder: Path, state_directory: Path, *, threads: int = 1, backbone_only: bool = False) -> Generator:
    """Writes with the newest checkpoint, or with the backbone alone; raises as `open_language_model`."""
    checkpoint = None if backbone_only else current_checkpoint(state_directory)
    backbone = Backbone.load(backbone_folder, threads=threads)
    return Generator(backbone, None if checkpoint is None else load_side(checkpoint, backbone.manifest))
