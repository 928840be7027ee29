"""The training step of a language model: alignment, causal ladder, and the frozen head of each row's own backbone.

Every supervised row of a batch counts alike, whichever sample, device or backbone it is of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from coordinator.training.learner import PublishedFiles, Rows, Trained, seeded
from coordinator.training.settings import TrainingSettings
from coordinator.training.tap_cache import NO_TARGET
from side_tuning.language_head import LanguageHead
from side_tuning.network.anchor_map import AnchorMap
from side_tuning.network.files import load_language_alignment, load_language_ladder
from side_tuning.network.language import (
    LanguageAlignment,
    LanguageAlignmentConfig,
    LanguageLadder,
    LanguageLadderConfig,
)
from side_tuning.network.vocabulary import mean_loss, token_losses
from side_tuning.token_bytes import token_bytes

WARM_START_STEPS = 150
WARM_START_ROWS = 16


@dataclass(frozen=True)
class FrozenEnds:
    """Of one backbone: its embeddings and head, and how many bytes of text each token stands for."""

    head: LanguageHead
    bytes_of: np.ndarray  # (V,)

    @classmethod
    def load(cls, artifact: Path, device: torch.device) -> FrozenEnds:
        head = LanguageHead.load(artifact)
        return cls(head.to(device), token_bytes(artifact, head.vocabulary.size))


@dataclass(frozen=True)
class TokenLosses:
    """What the rows of `Rows` lose, (N, T); zero where a row has no target."""

    nats: np.ndarray
    untuned: np.ndarray  # nats of the backbone alone, through the same codec
    tokens: np.ndarray  # 1 where a row has a target
    text_bytes: np.ndarray  # of the targets


@dataclass(frozen=True)
class PublishedLanguage(PublishedFiles):
    """The files, and the networks that they hold."""

    ladder: LanguageLadder
    alignments: dict[str, LanguageAlignment]
    ends: dict[str, FrozenEnds]

    @torch.no_grad()
    def losses(self, rows: Rows) -> TokenLosses:
        """What a device with these files loses on `rows`."""
        assert rows.language is not None
        alignment, ends = self.alignments[rows.fingerprint], self.ends[rows.fingerprint]
        at = next(self.ladder.parameters()).device
        x, last = (torch.from_numpy(part).to(at) for part in (rows.inputs, rows.language.last))
        ids, targets = (torch.from_numpy(part).to(at) for part in (rows.language.ids, rows.language.targets))
        z, _ = self.ladder(*alignment.enter(x, ends.head.embed(ids)))
        wanted = targets != NO_TARGET
        restored = ends.head.restore(last[wanted])
        nats, untuned = (torch.zeros(wanted.shape, device=at) for _ in range(2))
        for losses, h in ((nats, alignment.leave(z[wanted], restored)), (untuned, restored)):
            losses[wanted], _ = token_losses(ends.head.before_vocabulary(h), ends.head.vocabulary, targets[wanted])
        counted = wanted.cpu().numpy()
        text_bytes = np.where(counted, ends.bytes_of[np.where(counted, rows.language.targets, 0)], 0)
        return TokenLosses(nats.cpu().numpy(), untuned.cpu().numpy(), counted, text_bytes)


def ladder_config(settings: TrainingSettings, blocks: int) -> LanguageLadderConfig:
    """`settings` are those of the task, `TrainingSettings.of_task`."""
    return LanguageLadderConfig(
        side_width=settings.side_width, blocks=blocks, heads=settings.heads, expansion=settings.expansion, dropout=settings.dropout
    )


class LanguageLearner(Trained):
    """One ladder for all backbones; what each has frozen comes from `ends_of`, by fingerprint."""

    def __init__(self, settings: TrainingSettings, config: LanguageLadderConfig, ends_of: Callable[[str], FrozenEnds]) -> None:
        with seeded(settings.seed, torch.device(settings.device)):
            ladder = LanguageLadder(config)
        super().__init__(settings, config, ladder)
        self.ends: dict[str, FrozenEnds] = {}
        self._ends_of = ends_of

    def add_backbone(self, fingerprint: str, width_in: int, *, step: int, anchor_map: AnchorMap | None = None, summary_width: int = 0) -> None:
        """Give a new backbone type its alignment; anchor maps and summaries are not for language models.

        Raises:
            BackboneError: its artifact is not at hand or has no head.

        """
        ends = self.ends[fingerprint] = self._ends_of(fingerprint)
        alignment = LanguageAlignment(
            LanguageAlignmentConfig(
                width_in=width_in,
                token_width=ends.head.token_width,
                width=ends.head.width,
                side_width=self.config.side_width,
                blocks=self.config.blocks,
            )
        )
        alignment.reset_projection(self._generator(fingerprint))
        alignment.taps.drop_inputs(self.settings.input_dropout)
        self._join(fingerprint, alignment, step)

    def warm_start(self, fingerprint: str, rows: Rows) -> float:
        """Fit the alignment of a type that just joined to the ladder as it is, on public rows; returns the last loss.

        Nothing but that alignment changes, so its devices gain from what the fleet has learned before their first sample.
        """
        alignment = self.alignments[fingerprint]
        optimizer = torch.optim.AdamW(alignment.parameters(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay)
        order = np.random.default_rng(self.settings.seed)
        loss = torch.zeros(())
        self.ladder.eval()
        with seeded(self.settings.seed, self.device):
            for _ in range(WARM_START_STEPS):
                some = order.choice(len(rows.inputs), min(WARM_START_ROWS, len(rows.inputs)), replace=False)
                loss = self._loss([_some(rows, some)])
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss, inputs=list(alignment.parameters()))
                optimizer.step()
        self.average_alignments[fingerprint].load_state_dict(alignment.state_dict())
        return float(loss.detach())

    def published(self) -> PublishedLanguage:
        files = super().published()
        alignments = {name: load_language_alignment(file).to(self.device) for name, file in files.alignment_files.items()}
        ladder = load_language_ladder(files.ladder_file).to(self.device)
        return PublishedLanguage(files.ladder_file, files.alignment_files, ladder, alignments, self.ends)

    def _loss(self, batch: Sequence[Rows]) -> Tensor:
        longest = max(rows.inputs.shape[2] for rows in batch)
        xs, tokens = [], []
        for rows in batch:
            assert rows.language is not None
            assert rows.mask is not None
            alignment, head = self.alignments[rows.fingerprint], self.ends[rows.fingerprint].head
            inputs = torch.from_numpy(rows.inputs).to(self.device)
            embedded = head.embed(torch.from_numpy(rows.language.ids).to(self.device))
            alignment.observe(inputs, embedded, torch.from_numpy(rows.mask).to(self.device))
            x, z = alignment.enter(inputs, embedded)
            missing = longest - inputs.shape[2]
            xs.append(F.pad(x, (0, 0, 0, missing)))
            tokens.append(F.pad(z, (0, 0, 0, missing)))
        z, _ = self.ladder(torch.cat(xs), torch.cat(tokens))
        total, count, done = z.new_zeros(()), 0, 0
        for rows in batch:
            assert rows.language is not None
            alignment, head = self.alignments[rows.fingerprint], self.ends[rows.fingerprint].head
            own = z[done : done + len(rows.inputs), : rows.inputs.shape[2]]
            done += len(rows.inputs)
            targets = torch.from_numpy(rows.language.targets).to(self.device)
            wanted = targets != NO_TARGET
            rows_wanted = int(wanted.sum())
            if not rows_wanted:
                continue
            last = head.restore(torch.from_numpy(rows.language.last).to(self.device)[wanted])
            h = head.before_vocabulary(alignment.leave(own[wanted], last))
            total = total + mean_loss(h, head.vocabulary, targets[wanted]) * rows_wanted
            count += rows_wanted
        return total / max(1, count)


def _some(rows: Rows, chosen: np.ndarray) -> Rows:
    assert rows.mask is not None
    assert rows.language is not None
    language = type(rows.language)(rows.language.last[chosen], rows.language.ids[chosen], rows.language.targets[chosen])
    return Rows(rows.fingerprint, rows.inputs[chosen], rows.mask[chosen], rows.labels[chosen], language)
