"""`python -m dashboards`."""

from __future__ import annotations

from dashboards.cli import main

if __name__ == "__main__":
    main()
