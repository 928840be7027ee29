"""What a caller of the store can do: stop and tell a person (`StoreError`), or try again (`StoreUnavailable`)."""

from __future__ import annotations


class StoreError(RuntimeError):
    """The store cannot be used like this; the text says why and what to do."""


class StoreUnavailable(StoreError):  # noqa: N818 - named for what the caller sees, like BrokerUnavailable
    """Disk full, locked or out of reach for now: nothing of the transaction is kept, try again later."""
