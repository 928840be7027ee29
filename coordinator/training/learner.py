"""One training step, written once: align per backbone type, ladder, loss, AdamW, running mean of the weights.

The trainer and the centralised reference both call `Learner.step`. Everything that a step depends on is in the
learner's state and the step's number; there is no schedule that would have to know the end.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coordinator.training.settings import TrainingSettings
from side_tuning.network.alignment import Alignment
from side_tuning.network.anchor_map import AnchorMap
from side_tuning.network.files import load_alignment, load_ladder, save_alignment, save_ladder
from side_tuning.network.side_network import SideNetwork, SideNetworkConfig, predict_logits
from side_tuning.wire.messages import CodecName, Mode

Network = TypeVar("Network", bound=nn.Module)
AnyAlignment = Alignment | AnchorMap


@dataclass(frozen=True)
class LanguageColumns:
    """What the rows of a language model have beside their taps."""

    last: np.ndarray  # (N, T, R): the last layer through its map
    ids: np.ndarray  # (N, T): what stood at each row
    targets: np.ndarray  # (N, T): what each row is trained to predict, or -1


@dataclass(frozen=True)
class Rows:
    """Samples of one backbone type, ready for its alignment."""

    fingerprint: str
    inputs: np.ndarray  # (N, B, d), or (N, B, T, d) in `sequence` mode
    mask: np.ndarray | None  # (N, T), true at real rows
    labels: np.ndarray  # (N,); targets of a regression, float64
    language: LanguageColumns | None = None


def side_network_config(
    settings: TrainingSettings,
    *,
    blocks: int,
    classes: int,
    mode: Mode,
    entry_width: int = 0,
    summary: bool = False,
    entry_summary_width: int = 0,
) -> SideNetworkConfig:
    return SideNetworkConfig(
        side_width=settings.side_width,
        blocks=blocks,
        classes=classes,
        mode=mode,
        heads=settings.heads,
        expansion=settings.expansion,
        dropout=settings.dropout,
        entry_width=entry_width,
        summary=summary,
        entry_summary_width=entry_summary_width,
    )


@dataclass(frozen=True)
class PublishedFiles:
    """The averaged weights as devices get them."""

    ladder_file: bytes
    alignment_files: Mapping[str, bytes]  # by fingerprint


@dataclass(frozen=True)
class Published(PublishedFiles):
    """The files, and the networks that they hold."""

    ladder: SideNetwork
    alignments: Mapping[str, AnyAlignment]

    def logits(self, rows: Rows) -> np.ndarray:
        """What a device with these files computes."""
        return predict_logits(self.alignments[rows.fingerprint], self.ladder, rows.inputs, rows.mask)


class Trained:
    """Networks under training, their running means, and the optimizer; what is lost is for subclasses to say."""

    def __init__(self, settings: TrainingSettings, config: Any, ladder: nn.Module) -> None:
        self.settings = settings
        self.config = config
        self.device = torch.device(settings.device)
        self.ladder: Any = ladder.to(self.device)
        self.average_ladder: Any = _frozen_copy(self.ladder)
        self.alignments: dict[str, Any] = {}  # in the order in which the backbone types came
        self.average_alignments: dict[str, Any] = {}
        self.joined_at: dict[str, int] = {}  # fingerprint -> step
        self.optimizer = torch.optim.AdamW(
            _groups(self.ladder, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.98), fused=True
        )

    def add_backbone(self, fingerprint: str, width_in: int, *, step: int, anchor_map: AnchorMap | None = None, summary_width: int = 0) -> None:
        """Give a new backbone type its alignment: its anchor map, or else one that later steps train with the rest."""
        raise NotImplementedError

    def ladder_for_devices(self) -> Any:
        """The averaged ladder, as it goes out."""
        return self.average_ladder

    def extra_networks(self) -> dict[str, nn.Module]:
        """What a checkpoint keeps besides ladder and alignments, by name."""
        return {}

    def published(self) -> PublishedFiles:
        """The averaged weights, rounded to `checkpoint_precision`."""
        precision = None if self.settings.checkpoint_precision == "float" else self.settings.checkpoint_precision
        # An anchor map goes to a device once, and its error would never be trained away: 0.3 points in int4 (docs/lab-notes.md).
        of_map: CodecName | None = "int8" if precision == "int4" else precision
        files = {
            name: save_alignment(alignment, precision=of_map if isinstance(alignment, AnchorMap) else precision)
            for name, alignment in self.average_alignments.items()
        }
        return PublishedFiles(save_ladder(self.ladder_for_devices(), precision=precision), files)

    def step(self, batch: Sequence[Rows], step: int) -> float:
        """Train on one mixed batch; returns its mean loss."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / (settings.warmup_steps + 1))
        self.ladder.train()
        with seeded((settings.seed << 32) + step + 1, self.device):  # dropout of step t is a function of seed and t
            loss = self._loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(
            [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None],
            settings.gradient_clip,
        )
        self.optimizer.step()
        self._average(step)
        return float(loss.detach())

    def _loss(self, batch: Sequence[Rows]) -> Tensor:
        raise NotImplementedError

    def _join(self, fingerprint: str, alignment: nn.Module, step: int) -> None:
        """Train `alignment` from `step` on."""
        self.joined_at[fingerprint] = step
        self.alignments[fingerprint] = alignment.to(self.device)
        self.average_alignments[fingerprint] = _frozen_copy(alignment)
        for group in _groups(alignment, self.settings.weight_decay):
            self.optimizer.add_param_group(group)

    def _generator(self, fingerprint: str) -> torch.Generator:
        """Of the projections that a backbone type begins with."""
        digest = hashlib.sha256(f"{self.settings.seed}/{fingerprint}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    @torch.no_grad()
    def _average(self, step: int) -> None:
        pairs: list[tuple[nn.Module, nn.Module, int]] = [(self.average_ladder, self.ladder, 0)]
        pairs += [
            (self.average_alignments[f], alignment, self.joined_at[f])
            for f, alignment in self.alignments.items()
            if alignment is not self.average_alignments[f]  # an anchor map has nothing to average
        ]
        for average, live, joined_at in pairs:
            age = step - joined_at
            # A mean over the whole life at first, over the last 1 / (1 - decay) steps later.
            decay = min(self.settings.ema_decay, (1 + age) / (10 + age))
            torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1 - decay)
            for mean, buffer in zip(average.buffers(), live.buffers(), strict=True):
                mean.copy_(buffer)


class Learner(Trained):
    """Classification: alignments, ladder and head, cross entropy."""

    def __init__(self, settings: TrainingSettings, config: SideNetworkConfig) -> None:
        with seeded(settings.seed, torch.device(settings.device)):
            ladder = SideNetwork(config)
        if ladder.entry is not None:
            ladder.entry.drop_inputs(settings.input_dropout)
        super().__init__(settings, config, ladder)

    def add_backbone(self, fingerprint: str, width_in: int, *, step: int, anchor_map: AnchorMap | None = None, summary_width: int = 0) -> None:
        if anchor_map is not None:
            self.joined_at[fingerprint] = step
            self.alignments[fingerprint] = self.average_alignments[fingerprint] = anchor_map.to(self.device)
            return
        alignment = Alignment(width_in, self.config.width_in, self.config.blocks, summary_width, self.config.summary_width)
        alignment.drop_inputs(self.settings.input_dropout)
        alignment.reset_projection(self._generator(fingerprint))
        self._join(fingerprint, alignment, step)

    def published(self) -> Published:
        files = super().published()
        alignments = {name: load_alignment(file).to(self.device) for name, file in files.alignment_files.items()}
        return Published(files.ladder_file, files.alignment_files, load_ladder(files.ladder_file).to(self.device), alignments)

    def _loss(self, batch: Sequence[Rows]) -> Tensor:
        x, mask, labels = self._align(batch)
        return F.cross_entropy(self.ladder(x, mask), labels, label_smoothing=self.settings.label_smoothing)

    def _align(self, batch: Sequence[Rows]) -> tuple[Tensor, Tensor | None, Tensor]:
        aligned, masks, labels = [], [], []
        for rows in batch:
            inputs = torch.from_numpy(rows.inputs).to(self.device)
            alignment = self.alignments[rows.fingerprint]
            mask = None if rows.mask is None else torch.from_numpy(rows.mask).to(self.device)
            alignment.observe(inputs, mask)
            x, mask = alignment(inputs), alignment.ladder_mask(mask)
            if mask is not None:
                masks.append(mask)
            aligned.append(x)
            labels.append(torch.from_numpy(rows.labels))
        if masks:
            longest = max(mask.shape[1] for mask in masks)
            aligned = [F.pad(x, (0, 0, 0, longest - x.shape[2])) for x in aligned]
            masks = [F.pad(mask, (0, longest - mask.shape[1])) for mask in masks]
        x, mask = torch.cat(aligned), torch.cat(masks) if masks else None
        if self.ladder.entry is not None:
            self.ladder.entry.observe(x, mask)
        return x, mask, torch.cat(labels).to(self.device)


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases, norms, gates and the layer map do not."""
    named = list(module.named_parameters())
    decays: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in named:
        is_matrix = p.dim() >= 2 and name.rpartition(".")[2] not in ("bias", "layer_logits")
        (decays if is_matrix else others).append(p)
    return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _frozen_copy(module: Network) -> Network:
    return copy.deepcopy(module).requires_grad_(False).eval()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generator, seeded inside and untouched outside."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes a stack trace, for a GPU that nobody asked for
        if on_gpu:
            torch.cuda.manual_seed_all(seed)
        yield
