"""Settings of the trainer. The defaults come from docs/lab-notes.md."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from side_tuning.wire.messages import Task

FEWEST_ANCHORS = 50  # below that a map into the shared space means nothing


class LanguageSettings(BaseModel):
    """What differs where the task is `causal-lm`: a sample is a whole text, and every token of it is a label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    side_width: int = Field(default=128, ge=8, le=4096)
    heads: int = Field(default=4, ge=1, le=64)
    expansion: int = Field(default=4, ge=1, le=8)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    input_dropout: float = Field(default=0.0, ge=0, lt=1)
    batch_size: int = Field(default=16, ge=1)  # texts
    learning_rate: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    min_samples: int = Field(default=64, ge=1)
    evaluate_samples: int = Field(default=500, ge=1)


class TrainingSettings(BaseModel):
    """How the side network is trained from what is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=0, ge=0, lt=2**31)
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(default=1, ge=1)

    # The side network. A change here starts a new run.
    side_width: int = Field(default=64, ge=8, le=4096)
    heads: int = Field(default=4, ge=1, le=64)  # `sequence` mode
    expansion: int = Field(default=2, ge=1, le=8)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    input_dropout: float = Field(default=0.5, ge=0, lt=1)  # of tapped channels, before they are projected

    # Anchors: public, unlabelled texts of the task's own kind that tie the spaces of unlike backbones together.
    anchors_file: Path | None = None  # a text per line, or rows with `text`; a few hundred do
    anchor_width: int = Field(default=128, ge=8, le=1024)  # of the space that all backbone types share, per block

    # The step.
    batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=50, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    gradient_clip: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.998, ge=0, lt=1)  # weights that are evaluated and sent out: a running mean

    # What devices fetch. int4 is a sixth of float; agents of releases that had float only refuse anything else and keep what they have.
    checkpoint_precision: Literal["float", "fp16", "int8", "int4"] = "int4"

    language: LanguageSettings = LanguageSettings()

    # The sampler (METHOD: sampling). Shares go by stored samples to the power of tau: 1 every sample alike, 0 every device alike.
    tau: float = Field(default=0.5, ge=0, le=1)
    class_tau: float = Field(default=1.0, ge=0, le=1)  # the same between the classes within one device; below 1 raises rare ones
    min_samples: int = Field(default=256, ge=1)  # stored train samples before the first step
    replay_ratio: float = Field(default=20.0, gt=0)  # samples drawn in all, per stored train sample
    # While samples arrive only these are spent: what is learned long before the rest is there costs accuracy in the end.
    replay_ratio_arriving: float = Field(default=5.0, gt=0)
    replay_cap: int = Field(default=100, ge=1)  # draws of any one sample

    # Rhythm.
    poll_seconds: float = Field(default=1.0, gt=0)
    settle_seconds: float = Field(default=3.0, ge=0)  # without a new sample for this long, spend all draws; then, without a step, evaluate and save what is new
    evaluate_every_seconds: float = Field(default=15.0, gt=0)
    evaluate_samples: int = Field(default=20_000, ge=1)  # held-out samples looked at, spread evenly over all of them
    # A checkpoint costs every device its bytes. So the next one comes when the run has grown by this share of its steps, or when
    # the longest time is over; never sooner than the shortest.
    checkpoint_every_seconds: float = Field(default=60.0, gt=0)
    checkpoint_growth: float = Field(default=0.1, ge=0)
    checkpoint_longest_seconds: float = Field(default=900.0, gt=0)
    keep_checkpoints: int = Field(default=5, ge=2)

    def paid_draws(self, stored: int, *, arriving: bool) -> int:
        """Draws that `stored` train samples pay for, in all or while more are `arriving`."""
        return int((min(self.replay_ratio_arriving, self.replay_ratio) if arriving else self.replay_ratio) * stored)

    def of_task(self, task: Task) -> TrainingSettings:
        """The settings that training for `task` goes by: for a language model its own take the places of the general ones."""
        return self if task != "causal-lm" else self.model_copy(update=dict(self.language))
