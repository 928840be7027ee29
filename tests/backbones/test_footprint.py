"""What loading costs, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.backbones import prepare
from tests.backbones.conftest import Prepared
from tests.backbones.models import save_random_model

MEASURE = """
import json, resource, sys, time
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = time.monotonic()
from edge_agent.backbone import Backbone
import_seconds, loaded_early = time.monotonic() - start, "torch" in sys.modules
import side_tuning.backbone_model
before, start = peak(), time.monotonic()
backbone = Backbone.load(sys.argv[1])
backbone.hidden_states(["turn on the light"], [backbone.last_layer], 16)
print(json.dumps({"import_seconds": import_seconds, "torch_at_import": loaded_early, "before_mb": before,
    "load_seconds": time.monotonic() - start, "growth_mb": peak() - before, "peak_mb": peak(),
    "extra": [m for m in ("optimum", "transformers", "scipy", "sympy") if m in sys.modules]}))
"""


def measure(folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True, timeout=120
    )
    figures: dict[str, Any] = json.loads(done.stdout)
    print(figures)
    return figures


def test_importing_the_module_loads_no_torch_and_a_device_needs_no_transformers(prepared: Prepared) -> None:
    figures = measure(prepared("minilm", "int4"))
    assert not figures["torch_at_import"]
    assert figures["import_seconds"] < 1
    assert figures["extra"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "share"), [("int8", 0.5), ("int4", 0.4)])
def test_the_float_model_never_exists_in_memory(weights: str, share: float, tmp_path: Path) -> None:
    """A model of 180 MB of float weights loads and runs in a fraction of that."""
    model = save_random_model(
        "bert", tmp_path / "big", hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=6,
        vocab_size=30_000,
    )  # fmt: skip
    float_mb = (model / "model.safetensors").stat().st_size / 1e6
    assert float_mb > 100
    prepare(model, tmp_path / "out", weights=weights, max_tokens=32)  # type: ignore[arg-type]
    figures = measure(tmp_path / "out")
    assert figures["growth_mb"] < share * float_mb
