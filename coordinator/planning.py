"""The fleet's tap plan: what the settings ask for becomes a new version whenever the settings change.

A plan set by hand (`coordinator plan set`) stays until then: what the settings last asked for is remembered beside
the database, and only a difference from that makes a new version.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from coordinator.files import write_atomically
from coordinator.settings import ConfigError, CoordinatorSettings
from coordinator.store.engine import Store
from coordinator.store.registry import backbones, insert_plan, newest_plan, plans
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import Mode, TapPlan, Task
from side_tuning.wire.topics import check_device_name

logger = logging.getLogger(__name__)

_WISH_FILE = "tap-plan-of-settings"


def plan_from_settings(settings: CoordinatorSettings, depths: Collection[int]) -> TapPlan | None:
    """The plan that the settings ask for, as version 1; None while there is nothing to derive its blocks from.

    Args:
        settings: `task` and `plan`.
        depths: layers of each registered backbone; the shallowest sets the number of blocks (METHOD: alignment).
    """
    wanted, task = settings.plan, settings.task.kind
    language = task == "causal-lm"
    if wanted.blocks is None and not depths:
        return None
    mode: Mode = wanted.mode or ("sequence" if language else "pooled")
    return TapPlan(
        version=1,
        labels=settings.task.labels,
        blocks=wanted.blocks or min([wanted.max_blocks, *depths]),
        mode=mode,
        pooling=wanted.pooling,
        codec=wanted.codec or ("rot4" if mode == "pooled" else "int4"),
        group=wanted.group,
        rank=wanted.rank or (128 if language else 64),
        max_tokens=wanted.max_tokens,
        frame_samples=wanted.frame_samples,
        frame_bytes=wanted.frame_bytes,
        linger_seconds=wanted.linger_seconds,
        task=task,
        last_rank=wanted.last_rank if language else 0,
        last_codec=wanted.last_codec if language else "int4",
        context_every=wanted.context_every if language else 1,
        summary=_with_summary(settings, mode, task),
    )


def _with_summary(settings: CoordinatorSettings, mode: Mode, task: Task) -> bool:
    return settings.plan.summary is not False and mode == "sequence" and task != "causal-lm"


def follow_settings(settings: CoordinatorSettings, store: Store) -> TapPlan | None:
    """Insert a new fleet plan if the settings (or the shallowest backbone) changed; returns it if so."""
    with store.read() as session:
        wish = _wish(settings, session)
        current = newest_plan(session)
    path = settings.data_directory / _WISH_FILE
    if wish is None or (current is not None and _read_wish(path) == wish):
        return None
    made = None
    if current is None or replace(current, version=1) != wish:
        with store.write() as session:
            made = _insert_next(session, wish, None)
        logger.info("tap plan %d: %s", made.version, describe(made))
    write_atomically(path, wish.to_bytes())
    return made


def change_plan(settings: CoordinatorSettings, store: Store, device: str | None, changes: dict[str, Any]) -> TapPlan:
    """Give out a new version with `changes`, by hand; it stays until the settings themselves change.

    Raises:
        ConfigError: nothing to change from, or values that no plan can have.
    """
    if device is not None:
        check_device_name(device)
    with store.write() as session:
        wish = _wish(settings, session)
        base = newest_plan(session, device) or wish
        if base is None:
            raise ConfigError("there is no tap plan to change yet; register a backbone first, or set plan.blocks in the settings")
        try:
            if (mode := changes.get("mode", base.mode)) != base.mode:
                changes = {"summary": _with_summary(settings, mode, base.task), **changes}
            changed = replace(base, **changes)
            TapPlan.from_bytes(changed.to_bytes())
        except FrameError as error:
            raise ConfigError(str(error)) from error
        made = _insert_next(session, changed, device)
        wish = _wish(settings, session)
    if wish is not None and device is None:
        write_atomically(settings.data_directory / _WISH_FILE, wish.to_bytes())
    return made


def _wish(settings: CoordinatorSettings, session: Session) -> TapPlan | None:
    wish = plan_from_settings(settings, [row.manifest.layers for row in backbones(session).values()])
    current = newest_plan(session)
    if wish is None or current is None or settings.plan.summary is not None or (wish.task, wish.mode) != (current.task, current.mode):
        return wish
    return replace(wish, summary=current.summary)  # a fleet that began without goes on without: its samples stay of use


def _insert_next(session: Session, plan: TapPlan, device: str | None) -> TapPlan:
    newest = max((row.version for row in plans(session)), default=0)
    made = replace(plan, version=next_version(newest, datetime.now(timezone.utc)))
    insert_plan(session, made, device)
    for row in backbones(session).values():
        if (reason := row.manifest.refusal(made)) is not None:
            logger.warning("devices with backbone %s will refuse it and keep their plan: %s", row.manifest.fingerprint[:8], reason)
    return made


def next_version(newest: int, now: datetime) -> int:
    """The version after `newest`, the highest ever given out to anybody: milliseconds since 1970, or `newest` + 1 if that is more.

    From the clock, so that a database that was made anew never gives a second meaning to a version that frames in some
    device's spool still name (docs/decisions/0007).
    """
    return max(newest + 1, int(now.timestamp() * 1000))


def describe(plan: TapPlan) -> str:
    """The plan in a line, for people."""
    shape = f"rank {plan.rank}, at most {plan.max_tokens} tokens" if plan.mode == "sequence" else plan.pooling
    if plan.summary:
        shape += f", {plan.pooling} summary"
    task: str = plan.task
    if plan.task == "classification":
        task = f"{len(plan.labels)} labels"
    if plan.task == "causal-lm":
        kept = {0: "no token", 1: "every token"}.get(plan.context_every, f"one token in {plan.context_every}")
        task = f"causal-lm (last layer: rank {plan.last_rank}, {plan.last_codec}; {kept} of a prompt)"
    return f"{plan.blocks} blocks, {plan.mode} ({shape}), {plan.codec} in groups of {plan.group}, {task}"


def _read_wish(path: Path) -> TapPlan | None:
    try:
        return TapPlan.from_bytes(path.read_bytes())
    except (FileNotFoundError, FrameError):
        return None
