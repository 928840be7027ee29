"""SIGTERM and SIGINT become an event; a second one ends the program at once."""

from __future__ import annotations

import threading

from side_tuning.stop_signals import stop_event


def stop_on_signals() -> threading.Event:
    """The event that the next SIGTERM or SIGINT sets. To be called in the main thread."""
    return stop_event(second_ends=True)
