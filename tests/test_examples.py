"""The configurations that docs/ shows are accepted by the programs that read them."""

from __future__ import annotations

from pathlib import Path

from coordinator.settings import load_settings as load_coordinator_settings
from edge_agent.settings import load_settings as load_agent_settings

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def test_the_coordinators_example_is_accepted():
    settings = load_coordinator_settings(EXAMPLES / "coordinator.toml")
    assert settings.task.labels == ("light_on", "light_off", "other")
    assert settings.training.anchors_file is not None


def test_the_agents_example_is_accepted():
    settings = load_agent_settings(EXAMPLES / "agent.toml")
    assert settings.device == "kitchen"
    assert settings.sources[0].held_out_fraction == 0.1
