"""What Flower's FedAvg learns, round by round: `python -m benchmarks.peers.flower_learning JOB OUT`.

Flower's own strategy, messages and ClientApp, handed over within one process: its network starts a new Python with torch
for every device and round, which here would measure nothing but that. What crosses the network is measured by
`benchmarks.flower_network`.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.peers.flower_app import client_app, from_record, opened, strategy, to_record
from benchmarks.peers.lora import accuracy


class OneProcess(Grid):
    """Hands every message to the ClientApp at once. Flower's base class wants the rest too; FedAvg calls none of it."""

    def __init__(self, job: str, devices: int) -> None:
        self._contexts = {
            number + 1: Context(
                run_id=1, node_id=number + 1, node_config={"device": number}, state=RecordDict(), run_config={"job": job}
            )
            for number in range(devices)
        }

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def get_nodes(self) -> Iterable[Any]:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex  # the SuperLink would give it one
            replies.append(client_app(message, self._contexts[message.metadata.dst_node_id]))
        return replies


def main() -> None:
    path, out = sys.argv[1:3]
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0  # messages carry them; a SuperLink would have set them
    job, model = opened(path)
    curve: list[dict[str, Any]] = []

    def evaluate(server_round: int, arrays: Any) -> MetricRecord:
        model.load(from_record(arrays))
        found = accuracy(model, job.test)
        curve.append({"round": server_round, "accuracy": found.fleet, "by_device": found.by_device})
        return MetricRecord({"accuracy": found.fleet})

    strategy().start(
        OneProcess(path, len(job.train)), to_record(model.trained()), num_rounds=job.recipe.rounds, evaluate_fn=evaluate
    )
    Path(out).write_text(json.dumps({"curve": curve}), encoding="utf-8")


if __name__ == "__main__":
    main()
