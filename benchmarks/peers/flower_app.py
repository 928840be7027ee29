"""The Flower app of the comparison: a ClientApp that trains LoRA on its own rows, and a ServerApp with Flower's own FedAvg.

The same two run over a real SuperLink and SuperNodes (`flower_network`) and in one process (`flower_learning`). The run's
configuration names the job; the node's configuration says which device it is.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.peers.lora import Classifier, Job, Training, read_job

client_app = ClientApp()
server_app = ServerApp()


@lru_cache(maxsize=1)
def opened(path: str) -> tuple[Job, Classifier]:
    """The job and its model; a process that serves several messages loads them once."""
    torch.set_num_threads(1)
    job = read_job(Path(path))
    return job, Classifier(job)


def to_record(state: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: torch.from_numpy(values) for name, values in state.items()})


def from_record(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in record.to_torch_state_dict().items()}


def strategy() -> FedAvg:
    """Every device in every round, weighted by its samples; accuracy is measured by the server, which costs no device anything."""
    return FedAvg(fraction_train=1.0, fraction_evaluate=0.0)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    job, model = opened(str(context.run_config["job"]))
    config: Any = message.content["config"]
    device, server_round = int(context.node_config["device"]), int(config["server-round"])
    model.load(from_record(message.content["arrays"]))
    rows = job.train[device]
    recipe = job.recipe
    training = Training(model, recipe.learning_rate, recipe)
    random = np.random.default_rng((job.seed, server_round, device))
    torch.manual_seed((job.seed << 20) + (server_round << 10) + device)
    done = (server_round - 1) / recipe.rounds
    loss = [training.epoch(rows, random, done) for _ in range(recipe.local_epochs)][-1]
    metrics = MetricRecord({"loss": loss, "num-examples": len(rows.labels)})
    return Message(RecordDict({"arrays": to_record(model.trained()), "metrics": metrics}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    _, model = opened(str(context.run_config["job"]))
    rounds = int(context.run_config["rounds"])
    strategy().start(grid, to_record(model.trained()), num_rounds=rounds, train_config=ConfigRecord())
