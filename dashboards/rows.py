"""The fleet's table: what is wrong with each device in words, worst first, filtered and cut into pages. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from urllib.parse import urlencode

from coordinator.store.fleet import DeviceOverview
from coordinator.store.views import DeviceAccess
from coordinator.timeline import late_first_steps
from dashboards.shown import span
from dashboards.snapshot import STATES, FleetSnapshot
from side_tuning.tasks import Metric

PAGE_ROWS = 100
CLOCK_OFF_SECONDS = 300.0  # more than a slow link explains; certificates and schedules begin to suffer
EXPIRES_SOON_SECONDS = 14 * 86_400.0

Sort = Literal["worst", "name", "rate", "samples", "score"]
SORTS: tuple[Sort, ...] = ("worst", "name", "rate", "samples", "score")

# Lower is worse. An account that does not balance means lost data: nothing but a lost device goes before it.
_STATE_RANK = {"lost": 0, "late": 2, "quiet": 4, "offline": 5, "on-time": 6}


@dataclass(frozen=True)
class FleetRow:
    """One line of the table."""

    overview: DeviceOverview
    group: str
    troubles: tuple[str, ...]
    rank: int
    certificate_expires_at: datetime | None


@dataclass(frozen=True)
class Query:
    """What somebody asked to see; every value comes from a URL, so anything unknown means "all"."""

    state: str = ""
    backbone: str = ""
    group: str = ""
    name: str = ""
    sort: Sort = "worst"
    page: int = 1

    @classmethod
    def read(cls, values: Mapping[str, str]) -> Query:
        sort = values.get("sort", "worst")
        page = values.get("page", "1")
        return cls(
            state=values.get("state", "") if values.get("state") in (*STATES, "trouble") else "",
            backbone=values.get("backbone", "")[:64],
            group=values.get("group", "")[:64],
            name=values.get("name", "")[:64],
            sort=sort if sort in SORTS else "worst",
            page=int(page) if page.isascii() and page.isdigit() and len(page) <= 6 and int(page) > 0 else 1,
        )

    def url(self, **changes: object) -> str:
        """The query part of a link to the same table with changes; defaults are left out."""
        values = {"state": self.state, "backbone": self.backbone, "group": self.group, "name": self.name, "sort": self.sort, "page": self.page}
        values |= changes
        kept = {name: str(value) for name, value in values.items() if value not in ("", "worst", 1)}
        return f"?{urlencode(kept)}" if kept else "?"


@dataclass(frozen=True)
class FleetPage:
    """The rows of one page, and how many there are in all."""

    rows: tuple[FleetRow, ...]
    found: int
    page: int
    pages: int


def troubles_of(one: DeviceOverview, access: DeviceAccess | None, now: datetime) -> tuple[str, ...]:
    """What needs a person, in words that say where to look."""
    found = []
    ledger, health = one.ledger, one.health
    if not ledger.balanced:
        found.append(f"loss ledger does not balance: {max(ledger.missing, 0)} of {ledger.produced} samples unaccounted for")
    if access is not None and access.revoked_at is not None:
        found.append("revoked" + (f": {access.revoked_reason}" if access.revoked_reason else ""))
    if access is not None and access.certificate_expires_at is not None:
        left = (access.certificate_expires_at - now).total_seconds()
        if left <= 0:
            found.append(f"its certificate expired {span(left)} ago: enrol it again")
        elif left < EXPIRES_SOON_SECONDS:
            found.append(f"its certificate expires in {span(left)}")
    if one.clock_offset_seconds is not None and abs(one.clock_offset_seconds) > CLOCK_OFF_SECONDS:
        side = "behind" if one.clock_offset_seconds < 0 else "ahead"
        found.append(f"its clock is {span(one.clock_offset_seconds)} {side}: let it reach a time server")
    if one.rejected_frames:
        found.append(f"{one.rejected_frames} frame{'' if one.rejected_frames == 1 else 's'} rejected")
    found += [late.words for late in late_first_steps(access, one, now)]
    if health is None:
        return tuple(found)
    if health.plan_error:
        found.append(f"refuses its tap plan: {health.plan_error}")
    if health.checkpoint_error:
        found.append(f"refused a checkpoint: {health.checkpoint_error}")
    if health.throttled:
        found.append("its processor is throttled: heat or power supply")
    if health.presence == "online" and health.reason:
        found.append(f"it says: {health.reason}")
    if health.spool is not None and health.spool.refused:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(health.spool.refused.items())[:5])
        found.append(f"refused on the device: {reasons}")
    return tuple(found)


def rows_of(snapshot: FleetSnapshot) -> list[FleetRow]:
    """A row for every device, worst first."""
    rows = []
    for one in snapshot.devices:
        access = snapshot.access.get(one.device)
        troubles = troubles_of(one, access, snapshot.at)
        rank = min(_STATE_RANK[one.state], 6 if one.ledger.balanced else 1)
        rank -= 1 if troubles and rank >= 2 else 0
        expires = None if access is None else access.certificate_expires_at
        rows.append(FleetRow(one, "" if access is None else access.group, troubles, rank, expires))
    rows.sort(key=lambda row: (row.rank, row.overview.device))
    return rows


def page_of(rows: Sequence[FleetRow], query: Query, metric: Metric) -> FleetPage:
    """The rows that the query asks for. `rows` come worst first; `metric` says which way scores are worse."""
    found = [row for row in rows if _wanted(row, query)]
    if query.sort == "name":
        found.sort(key=lambda row: row.overview.device)
    elif query.sort == "rate":
        found.sort(key=lambda row: -row.overview.rate_5m)
    elif query.sort == "samples":
        found.sort(key=lambda row: -row.overview.stored_samples)
    elif query.sort == "score":  # the worst device first; never measured last
        found.sort(key=lambda row: math.inf if row.overview.score is None else metric.rank(row.overview.score))
    pages = max(1, -(-len(found) // PAGE_ROWS))
    page = min(query.page, pages)
    return FleetPage(tuple(found[(page - 1) * PAGE_ROWS : page * PAGE_ROWS]), len(found), page, pages)


def _wanted(row: FleetRow, query: Query) -> bool:
    one = row.overview
    if query.state == "trouble":
        if not row.troubles:
            return False
    elif query.state and one.state != query.state:
        return False
    return (
        (not query.backbone or (one.backbone or "").startswith(query.backbone))
        and (not query.group or row.group == query.group)
        and (not query.name or query.name.lower() in one.device.lower())
    )
