"""SIGTERM and SIGINT become an event, for both programs."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


def stop_event(*, second_ends: bool = False) -> threading.Event:
    """The event that the next SIGTERM or SIGINT sets; to be called in the main thread.

    Not set in the handler itself: that may interrupt the main thread while it holds the event's lock (in `stop.wait`),
    and would then wait for ever for a lock that only the main thread could give back.

    Args:
        second_ends: a second signal of the same kind ends the program at once.

    """
    stop = threading.Event()
    reading, writing = os.pipe()

    def pass_on() -> None:
        os.read(reading, 1)
        stop.set()

    def told(number: int, _frame: FrameType | None) -> None:
        if second_ends:
            signal.signal(number, signal.SIG_DFL)
        os.write(writing, b".")

    threading.Thread(target=pass_on, name="signals", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
    return stop
