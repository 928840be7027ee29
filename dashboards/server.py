"""Runs the application under uvicorn; open streams end when the program is told to."""

from __future__ import annotations

import logging
import signal
import socket
from types import FrameType

import uvicorn

from coordinator.settings import ConfigError, CoordinatorSettings
from dashboards.app import make_app
from dashboards.guard import is_loopback
from dashboards.live import Live

logger = logging.getLogger(__name__)

GOODBYE_SECONDS = 3


class Server(uvicorn.Server):
    """A server whose live pages do not hold up its end."""

    def __init__(self, config: uvicorn.Config, live: Live) -> None:
        super().__init__(config)
        self._live = live

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._live.close()
        super().handle_exit(sig, frame)


def make_server(settings: CoordinatorSettings) -> Server:
    """A server that is ready to run."""
    app = make_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.dashboard.host,
        port=settings.dashboard.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GOODBYE_SECONDS,
    )
    return Server(config, app.state.live)


def run(settings: CoordinatorSettings) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        ConfigError: the address cannot be listened at.

    """
    logging.getLogger("uvicorn").setLevel("WARNING")
    host, port = settings.dashboard.host, settings.dashboard.port
    server = make_server(settings)

    def end(*_: object) -> None:
        server.should_exit = True

    # uvicorn takes these over, and hands each signal on to them once it has ended: without them it would die of it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)
    except OSError as error:
        raise ConfigError(f"cannot listen at {host} port {port}: {error.strerror or error}; choose another with --host and --port") from error
    if not is_loopback(host):
        logger.warning("whoever reaches %s port %d can look at the fleet; put something that asks who they are in front", host, port)
    logger.info("http://%s:%d/", f"[{host}]" if ":" in host else host, port)
    with listener:
        server.run(sockets=[listener])
