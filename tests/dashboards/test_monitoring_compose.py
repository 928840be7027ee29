"""docker-compose.monitoring.yml: valid, reachable from this machine only, and it mounts files that exist."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import yaml

from tests.dashboards.monitored import GRAFANA_FILES, PROMETHEUS_FILES, ROOT

FILE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.monitoring.yml").read_text(encoding="utf-8"))
SERVICES = {name: FILE["services"][name] for name in ("prometheus", "grafana")}


def test_it_is_valid_by_the_compose_specification():
    schema = json.loads((ROOT / "tests" / "compose" / "compose_spec.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(schema).validate(FILE)


def test_nobody_else_reaches_it_and_it_can_do_little():
    for name, service in SERVICES.items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["mem_limit"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert re.search(r":v?\d+\.\d+\.\d+\}$", service["image"]), "a pinned version"
        assert "PASSWORD" not in {key for key in service.get("environment", {}) if not key.endswith("__FILE")}


def test_what_is_mounted_from_the_project_is_there_and_read_only():
    bound = [mount.split(":") for service in SERVICES.values() for mount in service["volumes"] if mount.startswith("./")]
    assert len(bound) == 3
    for source, _, mode in bound:
        assert (ROOT / source).is_dir(), source
        assert mode == "ro", source


def test_grafana_finds_prometheus_and_prometheus_the_dashboard():
    (job,) = yaml.safe_load((PROMETHEUS_FILES / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    host, _, port = job["static_configs"][0]["targets"][0].partition(":")
    dashboard = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"][host]
    assert any(published.endswith(f":{port}") for published in dashboard["ports"])
    assert f'"{host}"' in dashboard["environment"]["COORDINATOR_DASHBOARD__ALLOWED_HOSTS"], "it answers to that name"
    assert FILE["services"][host] == {"networks": ["monitoring"]}
    (source,) = yaml.safe_load((GRAFANA_FILES / "provisioning" / "datasources" / "prometheus.yml").read_text(encoding="utf-8"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((GRAFANA_FILES / "provisioning" / "dashboards" / "mobillm.yml").read_text(encoding="utf-8"))["providers"]
    mounted = {mount.split(":")[1] for mount in SERVICES["grafana"]["volumes"]}
    assert provider["options"]["path"] in mounted
    assert SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{provider['options']['path']}/fleet.json"
