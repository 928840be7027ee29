"""Which run this is: begin a new one, or go on with the last one where plan, network and store are still the same."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from coordinator.files import write_atomically
from coordinator.store.engine import Store
from coordinator.store.errors import StoreError, StoreUnavailable
from coordinator.store.training import evaluations, insert_run
from coordinator.training.anchors import digest_of
from coordinator.training.settings import TrainingSettings
from side_tuning.wire.messages import TapPlan

log = logging.getLogger(__name__)

# Settings that fix the shapes or the meaning of the weights; the others may change within a run.
_FIXED = ("seed", "side_width", "heads", "expansion", "dropout", "anchor_width")


@dataclass(frozen=True)
class RunIdentity:
    """The name of a run and what it was begun for."""

    name: str
    made_for: Mapping[str, Any]


def what_is_learned(plan: TapPlan, settings: TrainingSettings) -> dict[str, Any]:
    """What must stay the same for weights and cached activations to stay of use."""
    learned: dict[str, Any] = {
        "labels": list(plan.labels),
        "blocks": plan.blocks,
        "mode": plan.mode,
        "pooling": plan.pooling,
        "rank": plan.rank if plan.mode == "sequence" else 0,
        **{name: getattr(settings, name) for name in _FIXED},
    }
    if plan.summary:  # noted where there is one only, so that runs from before there were summaries go on without
        learned["summary"] = True
    if plan.task != "classification":  # likewise
        learned |= {"task": plan.task, "last_rank": plan.last_rank if plan.task == "causal-lm" else 0}
    return learned


def begin_or_continue(store: Store, data_directory: Path, plan: TapPlan, settings: TrainingSettings, at: datetime) -> RunIdentity:
    """The last run, if it was begun for the same task and this store knows it; else a new one. Says why."""
    path = data_directory / "training-run.json"
    made_for = {**what_is_learned(plan, settings), "anchors": digest_of(settings.anchors_file)}
    last = _read(path)
    reason = "there was none before" if last is None else _why_not(store, last, made_for)
    if last is not None and reason is None:
        log.info("training run %s goes on", last.name)
        return last
    run = RunIdentity(f"{at:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}", made_for)
    with store.write() as session:
        insert_run(session, run.name, {**settings.model_dump(mode="json"), "learns": made_for}, at)
    write_atomically(path, json.dumps({"run": run.name, "made_for": made_for}).encode())
    log.info("training run %s begins: %s", run.name, reason)
    return run


def _read(path: Path) -> RunIdentity | None:
    try:
        content = json.loads(path.read_bytes())
        return RunIdentity(str(content["run"]), dict(content["made_for"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); a new run begins", path, error)
        return None


def _why_not(store: Store, last: RunIdentity, made_for: Mapping[str, Any]) -> str | None:
    for name in dict.fromkeys([*last.made_for, *made_for]):
        if name not in made_for:
            return f"{name} was {_short(last.made_for[name])}"
        if last.made_for.get(name) != made_for[name]:
            return f"{name} changed from {_short(last.made_for.get(name))} to {_short(made_for[name])}"
    try:
        with store.read() as session:
            evaluations(session, last.name, limit=1)
    except StoreUnavailable:
        raise
    except StoreError:
        return f"the store does not know the last run, {last.name}"
    return None


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
