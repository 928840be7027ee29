"""Flower over its real network: a SuperLink, SuperNodes behind counting proxies, `flwr run`; what one round moves per device.

Two devices and a few rounds: every round moves the same arrays to and from every device, whatever their number.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.counting_proxy import CountingProxy
from coordinator.demonstration.fleet import free_port
from coordinator.demonstration.processes import Child

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-peers"
NODES = 2
TIMEOUT_SECONDS = 240.0
_APP = """
[project]
name = "lora-fedavg"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "benchmarks"

[tool.flwr.app.components]
serverapp = "app:server_app"
clientapp = "app:client_app"

[tool.flwr.app.config]
job = "{job}"
rounds = {rounds}
"""

# Flower looks for the two names in the source, without running it.
_APP_MODULE = "from benchmarks.peers import flower_app\n\nclient_app = flower_app.client_app\nserver_app = flower_app.server_app\n"


class FlowerError(RuntimeError):
    """Flower's programs did not do a run; the text holds what they said."""


@dataclass(frozen=True)
class Moved:
    """What one round moves per device, and what the device's programs hold at their largest."""

    up_bytes: float
    down_bytes: float
    peak_rss_bytes: int
    rounds: int


def installed() -> bool:
    return (PEERS / "bin" / "flower-superlink").exists()


def move(job: Path, rounds: int, folder: Path) -> Moved:
    app = folder / "app"
    app.mkdir(parents=True)
    (app / "pyproject.toml").write_text(_APP.format(job=job, rounds=rounds), encoding="utf-8")
    (app / "app.py").write_text(_APP_MODULE, encoding="utf-8")
    home = folder / "home"
    home.mkdir()
    port = free_port()  # all of the SuperLink's interfaces answer there
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', encoding="utf-8"
    )
    programs = PEERS / "bin"
    environment = {
        "FLWR_HOME": str(home), "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def child(name: str, *command: str) -> Child:
        named = [f"{key}={value}" for key, value in environment.items()]
        return Child(name, ["env", *named, *command], folder / f"{name}.log")

    superlink = child(
        "superlink", str(programs / "flower-superlink"), "--insecure", "--disable-runtime-dependency-installation", "--port", str(port),
    )  # fmt: skip
    with ExitStack() as stack:
        stack.callback(superlink.end, 10.0)
        superlink.start()
        _listening(port, superlink)
        proxies = [CountingProxy(("127.0.0.1", port)) for _ in range(NODES)]
        nodes = []
        for number, proxy in enumerate(proxies):
            stack.callback(proxy.close)
            node = child(
                f"supernode-{number}", str(programs / "flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{proxy.port}",
                "--port", str(free_port()), "--node-config", f"device={number}",
            )  # fmt: skip
            stack.callback(node.end, 10.0)
            node.start()
            nodes.append(node)
        run = child("run", str(programs / "flwr"), "run", str(app), "here", "--stream")
        stack.callback(run.end, 5.0)
        run.start()
        peak = 0
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while run.running:
            peak = max([peak, *(_tree_rss(node.process_id) for node in nodes)])
            if time.monotonic() > deadline:
                raise FlowerError(f"no end after {TIMEOUT_SECONDS:.0f} s:\n{run.last_words()}\n{superlink.last_words()}")
            time.sleep(0.2)
        said = (folder / "run.log").read_text(encoding="utf-8", errors="replace")
        if f"[ROUND {rounds}/{rounds}]" not in said or "Strategy execution finished" not in said:
            raise FlowerError(f"{run.last_words()}\n{superlink.last_words()}\n{nodes[0].last_words()}")
        up, down = (sum(getattr(proxy, way) for proxy in proxies) / NODES / rounds for way in ("up", "down"))
    return Moved(up, down, peak, rounds)


def _tree_rss(process_id: int | None) -> int:
    """Of the SuperNode with its ClientApp: everything that this device runs."""
    try:
        root = psutil.Process(process_id)
        return sum(one.memory_info().rss for one in [root, *root.children(recursive=True)])
    except psutil.Error:
        return 0


def _listening(port: int, program: Child) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        running = program.running
        if any(one.laddr.port == port and one.status == psutil.CONN_LISTEN for one in psutil.net_connections("tcp")):
            return
        if not running:
            break
        time.sleep(0.2)
    raise FlowerError(f"the SuperLink does not listen:\n{program.last_words()}")
