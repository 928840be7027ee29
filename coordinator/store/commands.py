"""Orders to devices: people write them, the gateway sends them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from coordinator.store.models import CommandRow, Device
from side_tuning.wire.messages import CommandName

LIFETIME = timedelta(days=1)  # a device that is away for longer is not to be surprised by an old order
KEPT = timedelta(days=30)
MOST_AT_ONCE = 100


def add_command(
    session: Session, device: str, name: CommandName, *, by: str, now: datetime, lifetime: timedelta = LIFETIME
) -> CommandRow:
    """Write an order for `device`; the gateway sends it within about a second, or when the device is back."""
    row = CommandRow(device=device, name=name, created_at=now, expires_at=now + lifetime, created_by=by, sent_at=None)
    session.add(row)
    session.flush()
    return row


def commands_to_send(session: Session, now: datetime) -> Sequence[CommandRow]:
    """Orders that were not sent and have not expired, oldest first; not those of devices that are known to be away."""
    there = or_(Device.presence.is_(None), Device.presence == "online")
    waiting = select(CommandRow).outerjoin(Device, Device.name == CommandRow.device)
    waiting = waiting.where(CommandRow.sent_at.is_(None), CommandRow.expires_at > now, there)
    return session.scalars(waiting.order_by(CommandRow.id).limit(MOST_AT_ONCE)).all()


def mark_commands_sent(session: Session, ids: Sequence[int], now: datetime) -> None:
    """The broker has these orders; old ones go."""
    for row in session.scalars(select(CommandRow).where(CommandRow.id.in_(ids))):
        row.sent_at = now
    session.execute(delete(CommandRow).where(CommandRow.expires_at < now - KEPT))
