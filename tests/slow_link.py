"""A TCP proxy whose uplink or downlink carries so many bytes per second, like a poor mobile connection."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

SLICE_SECONDS = 0.05
BUFFER_BYTES = 16_384  # small: what waits in buffers would look like a fast link to the sender


@contextlib.contextmanager
def slow_uplink(port: int, bytes_per_second: float) -> Iterator[int]:
    """The port of a proxy to `port` on loopback; downlink unlimited."""
    with _slow(port, bytes_per_second, None) as slow_port:
        yield slow_port


@contextlib.contextmanager
def slow_downlink(port: int, bytes_per_second: float) -> Iterator[int]:
    """The same the other way: uplink unlimited."""
    with _slow(port, None, bytes_per_second) as slow_port:
        yield slow_port


@contextlib.contextmanager
def _slow(port: int, up: float | None, down: float | None) -> Iterator[int]:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    stopping = threading.Event()
    threading.Thread(target=_accept, args=(listener, port, up, down, stopping), daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        stopping.set()
        listener.close()


def _accept(listener: socket.socket, port: int, up: float | None, down: float | None, stopping: threading.Event) -> None:
    while not stopping.is_set():
        try:
            device, _ = listener.accept()
        except OSError:
            return
        broker = socket.socket()
        broker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        broker.connect(("127.0.0.1", port))
        threading.Thread(target=_pump, args=(device, broker, up, stopping), daemon=True).start()
        threading.Thread(target=_pump, args=(broker, device, down, stopping), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket, bytes_per_second: float | None, stopping: threading.Event) -> None:
    free_at = time.monotonic()
    try:
        while not stopping.is_set():
            content = source.recv(65_536 if bytes_per_second is None else max(1, int(bytes_per_second * SLICE_SECONDS)))
            if not content:
                break
            target.sendall(content)
            if bytes_per_second is not None:  # the link is busy for as long as these bytes take
                free_at = max(free_at, time.monotonic()) + len(content) / bytes_per_second
                stopping.wait(max(0.0, free_at - time.monotonic()))
    except OSError:
        pass
    finally:
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
