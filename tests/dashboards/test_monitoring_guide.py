"""docs/monitoring.md leaves out no alert and no metric, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.dashboards.monitored import PROMETHEUS_FILES, ROOT, filled_store, scraped

GUIDE = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
ALERTS = [
    (rule["alert"], rule["labels"]["severity"])
    for group in yaml.safe_load((PROMETHEUS_FILES / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]


def test_every_alert_has_its_heading_its_severity_and_something_to_do():
    assert re.findall(r"^### (\w+)\n\n\*(\w+)\.\* .+\n\n\*\*Do:\*\* .+$", GUIDE, re.MULTILINE) == ALERTS


def test_every_link_within_the_guide_leads_to_a_heading():
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", GUIDE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", GUIDE)) <= headings


def test_every_metric_is_explained(tmp_path: Path):
    with filled_store(tmp_path) as (settings, store):
        families = list(text_string_to_metric_families(scraped(settings, store)))
    exposed = {family.samples[0].name for family in families}
    assert set(re.findall(r"^\| `(mobillm_\w+)` \|", GUIDE, re.MULTILINE)) == exposed
