"""Learning a number: one output, squared error on standardised targets.

What is published estimates in the targets' own unit: mean and spread of the targets are folded into the head, so a
device needs to know of neither.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coordinator.training.learner import Learner, Rows
from coordinator.training.settings import TrainingSettings
from side_tuning.network.side_network import SideNetwork, SideNetworkConfig
from side_tuning.wire.messages import Task


class TargetScale(nn.Module):
    """Running mean and variance of all targets that were drawn (Chan's update); saved with the checkpoint."""

    count: Tensor
    mean: Tensor
    squares: Tensor  # sum of squared distances from the mean

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "mean", "squares"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def observe(self, targets: Tensor) -> None:
        """Take in a batch of targets (N,)."""
        fresh = targets.double()
        total = self.count + len(fresh)
        apart = fresh.mean() - self.mean
        self.squares += ((fresh - fresh.mean()) ** 2).sum() + apart**2 * self.count * len(fresh) / total
        self.mean += apart * len(fresh) / total
        self.count.copy_(total)

    @property
    def spread(self) -> Tensor:
        """Standard deviation; 1 where all targets are alike."""
        found = torch.sqrt(self.squares / self.count.clamp(min=1))
        return torch.where(found > 0, found, torch.ones_like(found))


class RegressionLearner(Learner):
    """The learner of a regression; `Rows.labels` are the targets (N,), float64."""

    def __init__(self, settings: TrainingSettings, config: SideNetworkConfig) -> None:
        super().__init__(settings, config)
        self.targets = TargetScale().to(self.device)

    def extra_networks(self) -> dict[str, nn.Module]:
        return {"targets": self.targets}

    def ladder_for_devices(self) -> SideNetwork:
        scaled: SideNetwork = copy.deepcopy(self.average_ladder)
        with torch.no_grad():
            scaled.head.weight *= self.targets.spread
            scaled.head.bias.copy_(scaled.head.bias * self.targets.spread + self.targets.mean)
        return scaled

    def _loss(self, batch: Sequence[Rows]) -> Tensor:
        x, mask, targets = self._align(batch)
        self.targets.observe(targets)
        standard = (targets - self.targets.mean) / self.targets.spread
        return F.mse_loss(self.ladder(x, mask)[:, 0], standard.float())


def make_learner(settings: TrainingSettings, config: SideNetworkConfig, task: Task) -> Learner:
    """The learner of a task whose samples have one answer each: a class, or a number."""
    return RegressionLearner(settings, config) if task == "regression" else Learner(settings, config)
