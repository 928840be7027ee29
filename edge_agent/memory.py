"""Keeps the process small: glibc is told not to hold on to the memory of finished forward passes."""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)

# malloc.h
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
LARGE_BYTES = 128 * 1024


def return_memory_early() -> None:
    """Large blocks come from and go back to the system; all threads share one arena. Call before any thread starts.

    By default glibc raises the threshold with every large block freed and gives each thread an arena that never
    shrinks: measured on MiniLM with 6 layers, batches of 16 in a thread, 333 MB resident instead of 280, at the same speed.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        logger.debug("this C library has no mallopt; its own rules stay in force")
        return
    mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
    mallopt(_M_ARENA_MAX, 1)
