"""What LoRA costs a device, in a process of its own: `python -m benchmarks.peers.lora_cost JOB DEVICE BATCHES OUT`.

FLOPs by torch's counter, forward and backward, of one epoch over the device's rows (or its first BATCHES batches); seconds
for the same; peak memory of the whole process.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.lora import Classifier, Rows, Training, read_job


def main() -> None:
    path, device, limit, out = sys.argv[1:5]
    torch.set_num_threads(1)
    job = read_job(Path(path))
    rows = job.train[int(device)]
    if int(limit):
        most = int(limit) * job.recipe.batch_size
        rows = Rows(rows.texts[:most], rows.labels[:most])
    model = Classifier(job)
    training = Training(model, job.recipe.learning_rate, job.recipe)
    warm = replace(rows, texts=rows.texts[: job.recipe.batch_size], labels=rows.labels[: job.recipe.batch_size])
    training.epoch(warm, np.random.default_rng(0), 0.0)
    began = time.perf_counter()
    training.epoch(rows, np.random.default_rng(1), 0.0)
    seconds = time.perf_counter() - began
    with FlopCounterMode(display=False) as counter:
        training.epoch(rows, np.random.default_rng(1), 0.0)
    count = len(rows.labels)
    found = {
        "flops_per_sample": counter.get_total_flops() / count,
        "seconds_per_sample": seconds / count,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "trained_bytes": sum(values.nbytes for values in model.trained().values()),
    }
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
