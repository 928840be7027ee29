"""A fleet in real containers: builds the images, runs the commands of docs/bring-up.md, looks into containers and volumes.

Everything carries the project's name, so that what an earlier run left behind can be told apart and cleared away.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.brokers import free_port
from tests.waiting import wait_until

TOP = Path(__file__).parents[2]
GUIDE = TOP / "docs" / "bring-up.md"
PROJECT = "mobillm-fleet-test"
BASE = "docker.io/library/python:3.11-slim-bookworm"
PROGRAMS = ("broker", "gateway", "trainer", "enrolment", "dashboard")
DEVICES = ("kitchen", "bedroom")
IMAGES = {
    "coordinator": ("coordinator/Dockerfile", "coordinator"),
    "simulation": ("coordinator/Dockerfile", "simulation"),
    "agent": ("edge_agent/Dockerfile", ""),
}
PATIENCE_SECONDS = 300.0


def image(name: str) -> str:
    return f"localhost/{PROJECT}/{name}:latest"


def podman(*arguments: str, check: bool = True, text: str | None = None) -> str:
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, errors="replace", input=text or "")
    if check and done.returncode != 0:
        raise AssertionError(f"podman {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def container(service: str) -> str:
    return f"{PROJECT}_{service}_1"


def state_of(service: str) -> dict[str, Any]:
    return json.loads(podman("inspect", "--format", "{{json .State}}", container(service)))


def volumes() -> dict[str, Path]:
    """This project's volumes by their names in the compose files, with the folder that holds their content."""
    names = [name for name in podman("volume", "ls", "-q").split() if name.startswith(f"{PROJECT}_")]
    return {name.removeprefix(f"{PROJECT}_"): Path(podman("volume", "inspect", "--format", "{{.Mountpoint}}", name).strip()) for name in names}


def containers() -> list[str]:
    return [name for name in podman("ps", "-a", "--format", "{{.Names}}").split() if name.startswith(f"{PROJECT}_")]


def clear_away() -> None:
    """Containers, volumes and networks of this project, also those of a run that was killed."""
    if there := containers():
        podman("rm", "-f", "-t", "5", *there, check=False)
    for name in volumes():
        podman("volume", "rm", "-f", f"{PROJECT}_{name}", check=False)
    for name in podman("network", "ls", "--format", "{{.Name}}").split():
        if name.startswith(f"{PROJECT}_"):
            podman("network", "rm", "-f", name, check=False)


def build_images() -> dict[str, float]:
    """Build all three from this tree; layers that are known are taken from the cache. Seconds for each."""
    took = {}
    for name, (file, target) in IMAGES.items():
        start = time.monotonic()
        command = ["buildah", "bud", "--isolation", "chroot", "--layers", "-t", image(name), "-f", file]
        index = os.environ.get("TORCH_INDEX_URL", "")
        command += ["--build-arg", f"TORCH_INDEX_URL={index}"] if index else []
        command += ["--target", target] if target else []
        done = subprocess.run([*command, "."], cwd=TOP, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, f"building {name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        took[name] = time.monotonic() - start
    return took


def sections() -> dict[str, list[str]]:
    """The guide's `sh` blocks by the number of their section."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", GUIDE.read_text(), flags=re.MULTILINE)[1:]:
        if blocks := re.findall(r"^```sh\n(.*?)^```", part, re.MULTILINE | re.DOTALL):
            found[part.split(".")[0]] = blocks
    return found


class Stack:
    """A folder with a copy of the compose files, in which the guide's commands run with `docker` standing for podman."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: set[str] = set()
        for path in (*TOP.glob("docker-compose*.yml"), TOP / ".env.example"):
            shutil.copy(path, folder)
        shutil.copytree(TOP / "broker_config", folder / "broker_config")
        os.chmod(folder, 0o755)
        programs = folder / "programs"
        programs.mkdir()
        docker = programs / "docker"
        docker.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("as_docker.py")} "$@"\n')
        docker.chmod(0o755)
        ports = {name: str(free_port()) for name in ("BROKER_PORT", "CLAIMS_PORT", "DASHBOARD_PORT")}
        images = {f"{name.upper()}_IMAGE": image(name) for name in IMAGES}
        self.environment = {
            **os.environ, **ports, **images, "COMPOSE_PROJECT_NAME": PROJECT, "PATH": f"{programs}:{os.environ['PATH']}",
            "BROKER_BIND": "127.0.0.1", "DEVICE_RATE": "10",
        }  # fmt: skip

    def block(self, commands: str, seconds: float = PATIENCE_SECONDS) -> str:
        """Run a block of the guide, line by line; a line is tried again until it works, as a person would."""
        output = []
        for line in commands.strip().splitlines():
            deadline = time.monotonic() + seconds
            while True:
                done = subprocess.run(
                    ["bash", "-o", "pipefail", "-c", line], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                    errors="replace", timeout=900,
                )  # fmt: skip
                if done.returncode == 0:
                    break
                if time.monotonic() > deadline:
                    raise AssertionError(f"{line}\nended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
                time.sleep(2)
            output.append(done.stdout)
        return "".join(output)

    def section(self, number: str) -> str:
        self.ran.add(number)
        return "".join(self.block(commands) for commands in sections()[number])

    def coordinator(self, *arguments: str) -> str:
        return podman("exec", "-i", container("enrolment"), "coordinator", *arguments)

    def wait_until_enrolled(self, device: str) -> None:
        def enrolled() -> bool:
            return bool(json.loads(self.coordinator("devices", "show", device, "--json"))["identity"]["enrolled_at"])

        wait_slowly(enrolled, PATIENCE_SECONDS, f"{device} has its certificate")

    def devices(self) -> dict[str, dict[str, Any]]:
        return {record["device"]: record for record in json.loads(self.coordinator("devices", "--json"))}

    def ledgers(self) -> dict[str, dict[str, Any]]:
        return {name: record["ledger"] for name, record in self.devices().items()}

    def wait_for_devices(self, at_least: dict[str, int], seconds: float = PATIENCE_SECONDS) -> dict[str, dict[str, Any]]:
        """Until every device has that many samples stored; gives their ledgers."""

        def there() -> dict[str, dict[str, Any]] | None:
            try:
                ledgers = self.ledgers()
            except AssertionError:  # the container is on its way up
                return None
            return ledgers if all(name in ledgers and ledgers[name]["stored"] >= count for name, count in at_least.items()) else None

        found = wait_slowly(there, seconds, f"stored samples reach {at_least}")
        assert found is not None
        return found


def wait_slowly(predicate: Any, seconds: float, what: str) -> Any:
    """Each look starts a program in a container: not a hundred times a second."""

    def look() -> Any:
        value = predicate()
        if not value:
            time.sleep(2)
        return value

    return wait_until(look, seconds, what)


def logs() -> Iterator[str]:
    for name in containers():
        done = subprocess.run(["podman", "logs", "--tail", "60", name], capture_output=True, text=True, errors="replace")
        yield f"--- {name}: {podman('inspect', '--format', '{{.State.Status}} {{.State.ExitCode}}', name, check=False).strip()}\n{done.stdout}{done.stderr}"
