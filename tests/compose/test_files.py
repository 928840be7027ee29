"""The compose files, Dockerfiles and settings' example, read but not run: schema, rules that hold for every service, pins."""

from __future__ import annotations

import json
import re
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
TOP = HERE.parents[1]
FILES = sorted(TOP.glob("docker-compose*.yml"))
OWN_IMAGES = [path for path in FILES if path.name != "docker-compose.monitoring.yml"]
# Copied unchanged from the PyPI package docker-compose 1.29.2 (Apache License 2.0, Copyright 2014 Docker, Inc.). Docker
# compose has taken more since, never less.
SCHEMA = json.loads((HERE / "compose_spec.json").read_text())
MONITORING = {name for path in FILES if path not in OWN_IMAGES for name in re.findall(r"(?<!\$)\$\{([A-Z_]+)", path.read_text())}
PRIVATE = {"authority", "broker", "gateway-identity", "enrolment-identity", "doctor-identity", "dashboard-password"}


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def base_services() -> dict[str, Any]:
    return load(TOP / "docker-compose.yml")["services"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_file_is_valid_by_the_compose_specification(path):
    jsonschema.Draft7Validator(SCHEMA).validate(load(path))


@pytest.mark.parametrize("path", OWN_IMAGES, ids=lambda path: path.name)
def test_every_service_is_confined(path):
    """No capabilities but named ones, no new privileges, log and memory limits, an end to waiting for its end."""
    for name, service in load(path)["services"].items():
        if "image" not in service:  # changes a service of another file
            continue
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["logging"]["options"]["max-size"], name
        assert service["mem_limit"], name
        assert service["restart"] in ("unless-stopped", "on-failure"), name
        assert "privileged" not in service, name
        if name != "database":  # PostgreSQL keeps locks and sockets in several places
            assert service["read_only"] is True, name
            assert service["user"] == ("0:0" if name == "init" else "10001:10001"), name


def test_a_secret_is_mounted_only_where_it_is_used():
    where = {secret: set() for secret in PRIVATE}
    for name, service in base_services().items():
        for volume in service.get("volumes", []):
            source, _, mode = volume.partition(":")[0], *volume.partition(":")[1:]
            if source in where:
                where[source].add(f"{name}{' (ro)' if mode.endswith(':ro') else ''}")
    assert where == {
        "authority": {"init", "enrolment"},
        "broker": {"init", "enrolment", "broker (ro)"},
        "gateway-identity": {"init", "enrolment", "gateway (ro)"},
        "enrolment-identity": {"init", "enrolment"},
        "doctor-identity": {"init", "enrolment"},
        "dashboard-password": {"init", "dashboard (ro)"},
    }


def test_only_the_broker_can_be_reached_from_outside():
    for name, service in base_services().items():
        for port in service.get("ports", []):
            assert name == "broker" or port.startswith("127.0.0.1:") or "127.0.0.1" in port.split(":-")[1], (name, port)


def test_every_variable_of_the_compose_files_is_explained_in_the_example():
    used = {name for path in OWN_IMAGES for name in re.findall(r"(?<!\$)\$\{([A-Z_]+)", path.read_text())}
    explained = set(re.findall(r"^#?([A-Z_]+)=", (TOP / ".env.example").read_text(), re.MULTILINE))
    assert used - explained == set()
    assert explained - used - MONITORING == set()


def test_the_example_changes_nothing():
    """Copied to .env as it stands, it leaves every default."""
    lines = (TOP / ".env.example").read_text().splitlines()
    assert all(not line or line.startswith("#") for line in lines)


@pytest.mark.parametrize(("image", "extras"), [("agent", ["edge"]), ("coordinator", ["coordinator", "postgresql"])])
def test_the_images_are_built_from_what_the_project_asks_for(image, extras):
    """Every requirement of pyproject.toml is pinned, to a release that it allows, and so is whatever that needs."""
    pins = {}
    for name in ("torch", image):
        for line in (TOP / "scripts" / "image" / f"{name}.txt").read_text().splitlines():
            if line and not line.startswith("#"):
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate():
                    pins[canonicalize_name(requirement.name)] = next(iter(requirement.specifier)).version
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    todo = [(Requirement(line), ("",)) for line in project["dependencies"]]
    todo += [(Requirement(line), ("",)) for extra in extras for line in project["optional-dependencies"][extra]]
    seen = set()
    while todo:
        requirement, for_extras = todo.pop()
        if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": extra}) for extra in for_extras):
            continue
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{requirement} is not in scripts/image/{image}.txt"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement}, but {pins[name]} in scripts/image/{image}.txt"
        if (name, *requirement.extras) not in seen:
            seen.add((name, *requirement.extras))
            todo += [(Requirement(line), ("", *requirement.extras)) for line in distribution(name).requires or []]


@pytest.mark.parametrize("program", ["edge_agent", "coordinator"])
def test_the_images_run_as_nobody_in_particular(program):
    text = (TOP / program / "Dockerfile").read_text()
    final = text[text.rindex("FROM docker.io/library/python:3.11-slim-bookworm AS coordinator") if program == "coordinator" else text.rindex("FROM") :]
    assert "USER 10001:10001" in final
    assert 'ENTRYPOINT ["' in final
    assert not re.search(r"apt-get|gcc|build-essential", text)


def test_nothing_secret_can_be_copied_into_an_image():
    lines = (TOP / ".dockerignore").read_text().splitlines()
    assert next(line for line in lines if line and not line.startswith("#")) == "*", "everything is left out but what is named"
    assert not [line for line in lines if line.startswith("!") and re.search(r"\.env|tests|\.git|key|pem|bundle", line)]
