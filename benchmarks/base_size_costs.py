"""What a sample costs a device on a backbone of RoBERTa-base's size, for the methods of `benchmarks.federated`.

The weights are random, since no figure here depends on them. FLOPs by torch's counter, seconds, bytes and the peak memory of a process that does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.agent import make_model
from benchmarks.peers.lora import Job, Rows, write_job
from coordinator import backbones
from side_tuning.wire.messages import Mode, TapPlan

BATCHES = 6
MODES: tuple[Mode, ...] = ("pooled", "sequence")

Program = Callable[..., dict[str, Any]]  # a module's name, its arguments, `after`: those behind the file that it writes


def device_costs(job: Path, artifact: Path, plans: Mapping[Mode, TapPlan], program: Program, folder: Path) -> dict[str, Any]:
    """What a sample of the first device of `job` costs with LoRA and with ours, each in a process of its own; `folder` is made for the plans."""
    folder.mkdir()
    for mode, plan in plans.items():
        (folder / mode).write_bytes(plan.to_bytes())
    return {
        "lora": program("benchmarks.peers.lora_cost", str(job), "0", "0"),
        "ours": program("benchmarks.side_tuning_cost", str(job), str(artifact), "0", after=(str(folder),)),
    }


def measure(job: Job, layers: int, plan_for: Callable[[Mode, int], TapPlan], program: Program, folder: Path) -> dict[str, Any]:
    """Costs of LoRA and of ours on the first rows of `job`, with `layers` of the backbone's twelve.

    Args:
        job: whose rows, classes and recipe are taken.
        layers: from the input on.
        plan_for: the plan of a mode for a backbone of so many layers.
        program: runs a module in a process of its own and returns what it wrote.
        folder: for model, artifact and job.

    """
    rows = job.all_train
    count = BATCHES * job.recipe.batch_size
    some = Rows(rows.texts[:count], rows.labels[:count])
    folder.mkdir()
    model = make_model("roberta-base", folder / "model", [text if isinstance(text, str) else " ".join(text) for text in rows.texts])
    path, artifact = folder / "job.json", folder / "backbone"
    write_job(replace(job, model=model, layers=layers, train=[some], test=[some]), path)
    backbones.prepare(model, artifact, layers=layers, weights="float", max_tokens=job.max_tokens)
    plans = {mode: plan_for(mode, layers) for mode in MODES}
    return {"layers": layers, "samples": len(some.labels), **device_costs(path, artifact, plans, program, folder / "plans")}


def show(found: Mapping[str, Any], console: Console) -> None:
    table = Table("method", "GFLOP a sample", "ms a sample", "bytes", "peak MB", title=f"Width 768, {found['layers']} layers", title_justify="left")
    rows = [(f"ours, {mode}", one, f"{one['payload_bytes_per_sample']:,.0f} a sample") for mode, one in found["ours"].items()]
    rows.append(("LoRA", found["lora"], f"{found['lora']['trained_bytes']:,} each way a round, float32"))
    for name, one, size in rows:
        table.add_row(name, f"{one['flops_per_sample'] / 1e9:.2f}", f"{1e3 * one['seconds_per_sample']:.0f}", size, f"{one['peak_rss_bytes'] / 1e6:,.0f}")
    console.print(table)
