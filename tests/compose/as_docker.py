"""Stands in for `docker` in the commands of docs/bring-up.md where only podman is installed: as_docker.py compose ...

podman-compose 1.0.3 differs from `docker compose` in four ways that matter here: it does not pass on exit codes, does
not renew containers on `up`, stops with one second of grace, and builds in a way that some machines do not permit.
Images are built beforehand, so `build` and `pull` do nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

GRACE_SECONDS = "90"


def files() -> list[str]:
    """As `docker compose` finds them: COMPOSE_FILE in .env, of which podman-compose takes no notice."""
    settings = Path(".env").read_text() if Path(".env").exists() else ""
    named = re.findall(r"^COMPOSE_FILE=(.*)$", settings, re.MULTILINE)
    return (named[-1] if named else "docker-compose.yml").split(":")


def project() -> str:
    return os.environ["COMPOSE_PROJECT_NAME"]


def podman_compose(*arguments: str, project_name: str | None = None) -> int:
    """Run it; the exit code is the worst of the podman commands that it ran, which it only prints."""
    named = [part for file in files() for part in ("-f", file)]
    done = subprocess.run(["podman-compose", "-p", project_name or project(), *named, *arguments], check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sys.stdout.write(done.stdout)
    codes = [int(code) for code in re.findall(r"^exit code: (\d+)$", done.stdout, re.MULTILINE)]
    return done.returncode or max(codes, default=0)


def containers() -> list[str]:
    """Names of this project's containers, in the order in which the files name their services."""
    services = [name for file in files() for name in yaml.safe_load(Path(file).read_text())["services"]]
    return [f"{project()}_{name}_1" for name in dict.fromkeys(services)]


def existing() -> set[str]:
    return set(subprocess.run(["podman", "ps", "-a", "--format", "{{.Names}}"], capture_output=True, text=True, check=True).stdout.split())


def down(*arguments: str) -> int:
    there = [name for name in containers() if name in existing()]
    if there:
        subprocess.run(["podman", "stop", "-t", GRACE_SECONDS, *there], check=False, stdout=subprocess.DEVNULL)
        subprocess.run(["podman", "rm", "-f", *there], check=False, stdout=subprocess.DEVNULL)
    if "-v" in arguments:
        podman_compose("down", "-v")
    return 0


def compose(command: str, *arguments: str) -> int:
    plain = [argument for argument in arguments if not argument.startswith("-")]
    if command in ("build", "pull"):
        return 0
    if command == "up":
        down()
        podman_compose("up", "-d", "--no-build")
        return 0 if existing() >= set(containers()) else 1
    if command == "down":
        return down(*arguments)
    if command == "exec":
        position = next(i for i, argument in enumerate(arguments) if not argument.startswith("-"))
        return subprocess.run(["podman", "exec", "-i", f"{project()}_{arguments[position]}_1", *arguments[position + 1 :]], check=False).returncode
    if command in ("stop", "restart"):
        names = [f"{project()}_{name}_1" for name in plain] or containers()
        return subprocess.run(["podman", command, "-t", GRACE_SECONDS, *names], check=False, stdout=subprocess.DEVNULL).returncode
    if command == "start":
        return subprocess.run(["podman", "start", *[f"{project()}_{name}_1" for name in plain]], check=False, stdout=subprocess.DEVNULL).returncode
    if command == "ps":
        return subprocess.run(["podman", "ps", "-a", "--filter", f"name=^{project()}_"], check=False).returncode
    if command == "logs":
        return max(subprocess.run(["podman", "logs", "--tail", "50", f"{project()}_{name}_1"], check=False).returncode for name in plain)
    if command == "run":  # it would build what the service depends on, itself included
        return podman_compose("run", "--no-deps", *arguments)
    return podman_compose(command, *arguments)


def main() -> None:
    if sys.argv[1] != "compose":
        sys.exit(f"as_docker.py: only `docker compose` is known, not `docker {sys.argv[1]}`")
    sys.exit(compose(*sys.argv[2:]))


if __name__ == "__main__":
    main()
