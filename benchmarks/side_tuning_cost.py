"""What this project costs a device, in a process of its own: `python -m benchmarks.side_tuning_cost JOB BACKBONE DEVICE OUT PLANS`.

The agent's forward pass and encoding over the device's rows, under the plan `PLANS/MODE` of both modes: FLOPs by torch's counter, seconds, payload
bytes, and the peak memory of a process that imports nothing but what the agent imports for it (one process per mode).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path


def main() -> None:
    job, backbone, device, out, plans = sys.argv[1:6]
    found = {}
    for mode in ("pooled", "sequence"):
        done = subprocess.run(
            [sys.executable, "-c", "from benchmarks.side_tuning_cost import measure; import sys; measure(*sys.argv[1:])", job, backbone, device, str(Path(plans) / mode)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[mode] = json.loads(done.stdout.splitlines()[-1])
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def measure(job: str, folder: str, device: str, plan_file: str) -> None:
    """Print the costs as JSON."""
    import time

    from edge_agent.backbone import Backbone
    from edge_agent.taps import compute_taps, to_wire_taps
    from side_tuning.wire.messages import TapPlan

    content = json.loads(Path(job).read_text(encoding="utf-8"))
    texts = [text if isinstance(text, str) else tuple(text) for text in content["train"][int(device)]["texts"]]
    plan = TapPlan.from_bytes(Path(plan_file).read_bytes())
    backbone = Backbone.load(folder)
    size = 0

    def work() -> None:
        nonlocal size
        size = sum(len(tap.data) for at in range(0, len(texts), 16) for tap in to_wire_taps(compute_taps(backbone, texts[at : at + 16], plan), plan))

    compute_taps(backbone, texts[:16], plan)
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before the counter, which brings in more of torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    count = len(texts)
    print(json.dumps({
        "flops_per_sample": counter.get_total_flops() / count, "seconds_per_sample": seconds / count,
        "payload_bytes_per_sample": size / count, "peak_rss_bytes": peak,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
