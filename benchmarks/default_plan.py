"""The tap plan that a coordinator makes where the settings say little: what most fleets have, and what the benchmarks measure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordinator.planning import plan_from_settings
from coordinator.settings import CoordinatorSettings
from side_tuning.wire.messages import TapPlan


def default_plan(depth: int, task: Mapping[str, Any], **plan: Any) -> TapPlan:
    """The plan for a fleet whose shallowest backbone has `depth` layers, with `task` and perhaps something of `plan` in the settings."""
    settings = CoordinatorSettings.model_validate({"data_directory": Path(), "broker": {"host": "localhost"}, "task": task, "plan": plan})
    made = plan_from_settings(settings, [depth])
    assert made is not None
    return made
