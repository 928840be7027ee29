"""LoRA without Flower, and the upper bound: `python -m benchmarks.peers.lora_methods JOB METHOD OUT [COSTS]`.

METHOD is centralised (all rows in one place), full (the same, every weight trained), local (a model per device, never
sent) or fedbuff (asynchronous: after Nguyen et al., "Federated learning with buffered asynchronous aggregation").
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.lora import Accuracy, Classifier, Job, Training, accuracy, correct, read_job
from benchmarks.time_model import DeviceProfile, asynchronous

Point = dict[str, Any]


def centralised(job: Job, *, adapters: bool = True) -> list[Point]:
    """All rows in one place; one point per epoch."""
    model = Classifier(job, adapters=adapters)
    recipe = job.recipe
    training = Training(model, recipe.central_learning_rate if adapters else recipe.full_learning_rate, recipe)
    random = np.random.default_rng(job.seed)
    curve = []
    for epoch in range(recipe.central_epochs):
        training.epoch(job.all_train, random, epoch / recipe.central_epochs)
        curve.append(_point(accuracy(model, job.test), epoch=epoch + 1))
    return curve


def local_only(job: Job) -> list[Point]:
    """A model per device, on its own rows only, measured on its own test rows."""
    right, sizes = [], []
    recipe = job.recipe
    for device, (train, test) in enumerate(zip(job.train, job.test, strict=True)):
        model = Classifier(job)
        training = Training(model, recipe.learning_rate, recipe)
        random = np.random.default_rng((job.seed, device))
        for epoch in range(recipe.central_epochs):
            training.epoch(train, random, epoch / recipe.central_epochs)
        right.append(correct(model, test))
        sizes.append(len(test.labels))
    return [_point(Accuracy(sum(right) / sum(sizes), [a / b for a, b in zip(right, sizes, strict=True)]), epoch=recipe.central_epochs)]


def fedbuff(job: Job, costs: dict[str, Any]) -> list[Point]:
    """Devices train and send at their own pace; the server moves by the mean of every `buffer` updates.

    An update counts 1 / sqrt(1 + staleness), as in the paper; the server's step is 1. Training ends when as many device
    epochs were spent as FedAvg spends.
    """
    recipe = job.recipe
    fleet = [DeviceProfile(**one) for one in costs["fleet"]]
    model = Classifier(job)
    versions: list[dict[str, np.ndarray]] = [model.trained()]
    buffer: list[tuple[float, dict[str, np.ndarray]]] = []
    size = max(2, len(fleet) // 2)
    budget = recipe.rounds * len(fleet)  # turns
    turns = [0] * len(fleet)
    samples = [0] * len(fleet)
    curve: list[Point] = []

    def turn(device: int, now: float, version: int) -> int | None:
        rows = job.train[device]
        model.load(versions[version])
        training = Training(model, recipe.learning_rate, recipe)
        random = np.random.default_rng((job.seed, turns[device], device))
        torch.manual_seed((job.seed << 20) + (turns[device] << 10) + device)
        for _ in range(recipe.local_epochs):
            training.epoch(rows, random, min(1.0, sum(turns) / budget))
        turns[device] += 1
        samples[device] += recipe.local_epochs * len(rows.labels)
        newest = len(versions) - 1
        change = {name: values - versions[version][name] for name, values in model.trained().items()}
        buffer.append(((1 + newest - version) ** -0.5, change))
        if len(buffer) == size:
            versions.append({name: old + sum(weight * one[name] for weight, one in buffer) / size for name, old in versions[-1].items()})
            buffer.clear()
            if len(versions) % 2 == 1:  # about once for every round of FedAvg
                model.load(versions[-1])
                curve.append(_point(accuracy(model, job.test), seconds=now, turns=list(turns), samples=list(samples)))
        return None if sum(turns) >= budget else len(versions) - 1

    seconds = [recipe.local_epochs * len(rows.labels) * costs["seconds_per_sample"] for rows in job.train]
    asynchronous(fleet, seconds, costs["down"], costs["up"], turn)
    return curve


def _point(found: Accuracy, **more: Any) -> Point:
    return {"accuracy": found.fleet, "by_device": found.by_device, **more}


def main() -> None:
    path, method, out = sys.argv[1:4]
    torch.set_num_threads(1)
    job = read_job(Path(path))
    methods: dict[str, Callable[[], list[Point]]] = {
        "centralised": lambda: centralised(job),
        "full": lambda: centralised(job, adapters=False),
        "local": lambda: local_only(job),
        "fedbuff": lambda: fedbuff(job, json.loads(Path(sys.argv[4]).read_text(encoding="utf-8"))),
    }
    Path(out).write_text(json.dumps({"curve": methods[method]()}), encoding="utf-8")


if __name__ == "__main__":
    main()
