"""The `dashboards` command line: `dashboards serve`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="dashboards", help="Shows the fleet, live, in the browser.", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

EXIT_CRASH = 1


@app.callback()
def dashboards() -> None:
    """Shows the fleet, live, in the browser."""


@app.command()
def serve(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", envvar="COORDINATOR_CONFIG", help="TOML file; COORDINATOR_... variables go before it."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at; `dashboard.host` by default.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65_535, help="`dashboard.port` by default.")] = None,
) -> None:
    """Serve the pages until SIGTERM or Ctrl-C."""
    from coordinator.settings import configure_logging, load_settings
    from dashboards.server import run

    settings = load_settings(config)
    configure_logging(settings, "dashboards")
    changes = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    run(settings.model_copy(update={"dashboard": settings.dashboard.model_copy(update=changes)}))


def main() -> None:
    """Run; a configuration that cannot work ends with exit code 78, which no supervisor restarts."""
    try:
        app()
    except (OSError, ValueError) as error:
        from coordinator.settings import EXIT_CONFIG, ConfigError

        if not isinstance(error, ConfigError | OSError):
            logging.getLogger(__name__).exception("unexpected failure")
        print(f"dashboards: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_CRASH)


if __name__ == "__main__":
    main()
