"""README's map of the tree names every module, and every picture and document that it points to exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("side_tuning", "edge_agent", "coordinator", "dashboards")
# Folders whose README line speaks for all that is in them.
WHOLE = ("coordinator/store", "coordinator/demonstration")


def test_every_module_has_its_phrase():
    paths = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    missing = [
        str(path)
        for path in sorted(paths)
        if not path.name.startswith("__") and not str(path).startswith(WHOLE) and not re.search(rf"(?<![\w/]){re.escape(path.name)}", README)
    ]
    assert not missing


def test_what_it_points_to_exists():
    targets = re.findall(r"!?\[[^\]]*\]\(([^)#]+)\)", README) + re.findall(r"`(docs/[\w./-]+)`", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []
