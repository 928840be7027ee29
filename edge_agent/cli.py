"""The command `edge-agent`: parse, read the settings, call one function. Heavy imports stay inside the commands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_agent import exit_codes

if TYPE_CHECKING:
    from edge_agent.settings import AgentSettings

DEFAULT_CONFIG = Path("/etc/mobillm-fleet/agent.toml")

app = typer.Typer(
    name="edge-agent",
    help="Runs private samples forward through a frozen backbone and sends what a coordinator needs to train a side network.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="MOBILLM_CONFIG", help=f"Settings (TOML). Without it {DEFAULT_CONFIG}, if it is there, and MOBILLM_* variables."),
]


@app.command()
def run(config: ConfigOption = None) -> None:
    """Take samples, send frames, keep what is not receipted; until SIGTERM or, if so set, until all is done."""
    with _told_plainly():
        settings = _settings(config)
        _configure_logging(settings.log_level, settings.log_format)
        from edge_agent.signals import stop_on_signals

        stop = stop_on_signals()
        if settings.bundle_file is not None:
            from edge_agent.enrol import enrol_before_start

            if not enrol_before_start(settings, stop):
                raise typer.Exit(exit_codes.OK)
        from edge_agent import agent

        code = agent.run(settings, stop)
    raise typer.Exit(code)


@app.command()
def enrol(
    bundle: Annotated[Path | None, typer.Option("--bundle", "-b", help="From `coordinator enrol`; wiped once it is spent. Without it the settings' bundle_file.")] = None,
    config: ConfigOption = None,
    state: Annotated[Path | None, typer.Option("--state", help="Where the identity goes, instead of the settings' state_directory.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds. Without it: after 5 minutes without an answer, but an approval is waited for.")] = None,
) -> None:
    """Get this device's own certificate with a bundle. 0: enrolled (also if it was before), 75: try again later, 78: a new bundle is needed."""
    with _told_plainly():
        from edge_agent.settings import enrolment_places

        places = enrolment_places(config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None))
        bundle, folder = bundle or places.bundle_file, state or places.state_directory
        if bundle is None:
            raise typer.BadParameter("give --bundle FILE, or bundle_file in the settings")
        logging.basicConfig(level=logging.CRITICAL)  # what goes wrong is told in one line at the end
        from edge_agent import enrol as enrolment
        from edge_agent.trusted_clock import TrustedClock

        try:
            clock = TrustedClock(folder)
            done = enrolment.enrol(bundle, folder, clock=clock, timeout_seconds=timeout, say=lambda text: typer.echo(f"edge-agent: {text}"))
        except enrolment.EnrolmentFailed as error:
            typer.echo(f"edge-agent: not enrolled: {error}", err=True)
            if clock.trouble:
                typer.echo(f"edge-agent: {clock.trouble}", err=True)
            raise typer.Exit(error.exit_code) from error
        typer.echo(f"edge-agent: {done}")
        if places.names_broker:
            typer.echo("edge-agent: the settings name a broker of their own under [broker]: remove host and files there, so that the agent uses this identity")


@app.command()
def infer(  # noqa: PLR0917 - typer calls it by name
    text: Annotated[str | None, typer.Argument(help="What to label.")] = None,
    second: Annotated[str | None, typer.Argument(help="The second text, where the samples are pairs.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Label every row of this .jsonl or .csv file (also .gz).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    predictions: Annotated[bool, typer.Option("--predictions", help="With --file: print every row's label, not only the sums.")] = False,
    config: ConfigOption = None,
) -> None:
    """Label a text, or the rows of a file, with the newest checkpoint that the agent fetched; a language model's: what the rows cost it."""
    with _told_plainly():
        if (text is None) == (file is None):
            raise typer.BadParameter("give a text, or --file FILE")
        settings = _settings(config)
        _configure_logging("warning")
        from edge_agent import infer_command

        if file is not None:
            infer_command.label_file(settings, file, as_json=as_json, with_predictions=predictions)
        else:
            assert text is not None
            infer_command.label_text(settings, text if second is None else (text, second), as_json=as_json)


@app.command()
def generate(  # noqa: PLR0917 - typer calls it by name
    prompt: Annotated[str, typer.Argument(help="What the text begins with.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="End after so many tokens, if the text has not ended before.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="How daring: 0 always takes the most probable token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among so many of the most probable tokens; 0: among all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Choose among the most probable tokens that together have this probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")] = None,
    respond: Annotated[bool, typer.Option("--respond", help="The prompt is the first text of a pair: write the second.")] = False,
    backbone_only: Annotated[bool, typer.Option("--backbone-only", help="Without the side network, for comparison.")] = False,
    config: ConfigOption = None,
) -> None:
    """Continue a text with the backbone and the newest side network that the agent fetched, printing as it goes."""
    with _told_plainly():
        settings = _settings(config)
        _configure_logging("warning")
        from edge_agent import language_command
        from edge_agent.generation import Sampling

        sampling = Sampling(temperature, top_k, top_p, seed)
        language_command.generate(settings, prompt, sampling, max_new_tokens, respond=respond, backbone_only=backbone_only)


@app.command()
def doctor(
    config: ConfigOption = None, as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check clock, broker, disk, backbone, memory and sources; 0 if all is well, 1 if something needs a cure."""
    with _told_plainly():
        settings = _settings(config)
        logging.disable(logging.CRITICAL)  # what goes wrong stands in the table
        from edge_agent.doctor import examine, show

        findings = examine(settings)
        show(findings, as_json=as_json)
        failed = any(finding.level == "failed" for finding in findings)
    raise typer.Exit(exit_codes.CRASH if failed else exit_codes.OK)


@app.command()
def alive(
    max_age: Annotated[float, typer.Option(min=1, help="Seconds since its last sign of life.")] = 60.0,
    config: ConfigOption = None,
) -> None:
    """Whether the agent on this machine is alive: exit code 0 or 1 and a line why. For health checks."""
    with _told_plainly():
        from side_tuning.alive import alive_trouble

        trouble = alive_trouble(_settings(config).alive_file, max_age)
        typer.echo(f"edge-agent: {trouble or 'alive'}")
    raise typer.Exit(exit_codes.CRASH if trouble else exit_codes.OK)


@app.command("check-config")
def check_config(config: ConfigOption = None) -> None:
    """Print the settings in effect, and say what in them cannot work."""
    with _told_plainly():
        settings = _settings(config)
        from edge_agent.config_check import problems, shown

        for line in shown(settings):
            typer.echo(line)
        found = problems(settings)
        for problem in found:
            typer.echo(f"problem: {problem}", err=True)
    raise typer.Exit(exit_codes.CONFIG_ERROR if found else exit_codes.OK)


@app.command("systemd-unit")
def systemd_unit(config: Annotated[Path, typer.Option("--config", "-c", help="The settings that the service reads.")] = DEFAULT_CONFIG) -> None:
    """Print the systemd unit for this installation, to be saved as /etc/systemd/system/mobillm-edge-agent.service."""
    from importlib.resources import files

    unit = files("edge_agent").joinpath("systemd", "mobillm-edge-agent.service").read_text(encoding="utf-8")
    program = Path(sys.executable).with_name("edge-agent")
    typer.echo(unit.replace("/opt/mobillm-fleet/bin/edge-agent", str(program)).replace(str(DEFAULT_CONFIG), str(config.absolute())), nl=False)


@app.command()
def flash(  # noqa: PLR0917 - typer calls it by name
    image: Annotated[Path | None, typer.Option(help="The image: .img, .img.xz, .img.gz or .img.zst. A .bmap beside it is used.")] = None,
    target: Annotated[Path | None, typer.Option(help="The card's disk (see --list), or a file.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="From `coordinator enrol DEVICE`.")] = None,
    fleet: Annotated[Path | None, typer.Option(help="Make a card for every line of this CSV file (docs/flashing.md), one after the other.")] = None,
    bundles: Annotated[Path, typer.Option(help="With --fleet: the folder with DEVICE.bundle.json.")] = Path("bundles"),
    labels: Annotated[Path, typer.Option(help="With --fleet: the folder for labels (text, and QR codes as SVG and PNG).")] = Path("labels"),
    list_them: Annotated[bool, typer.Option("--list", help="Show the disks, and which of them may be written.")] = False,
    sha256: Annotated[str | None, typer.Option(help="Of the unpacked image.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Of the unpacked image, in bytes.")] = None,
    hostname: Annotated[str | None, typer.Option(help="By default the device's name.")] = None,
    user: Annotated[str | None, typer.Option(help="A user to make on the device.")] = None,
    password_hash_file: Annotated[Path | None, typer.Option(help="The user's password as `openssl passwd -6` or `mkpasswd` prints it.")] = None,
    ssh_key: Annotated[list[Path] | None, typer.Option(help="A .pub file; may be given again.")] = None,
    wifi: Annotated[str | None, typer.Option(help="The network's name; its passphrase is asked for.")] = None,
    wifi_secret_file: Annotated[Path | None, typer.Option(help="Read the passphrase from this file instead.")] = None,
    country: Annotated[str | None, typer.Option(help="Whose rules the radio follows, such as GB.")] = None,
    timezone: Annotated[str | None, typer.Option(help="Such as Europe/London.")] = None,
    agent_config: Annotated[Path | None, typer.Option(help="agent.toml for the board; set bundle_file to /var/lib/mobillm-fleet/device.bundle in it.")] = None,
    backbone: Annotated[Path | None, typer.Option(help="A prepared folder; goes on the card where it fits, else the device fetches it.")] = None,
    largest_gb: Annotated[float, typer.Option(min=1, help="Refuse larger disks: a card is rarely that large, somebody's data is.")] = 256,
    unmount: Annotated[bool, typer.Option("--unmount", help="Let go of what the desktop mounted from the card when it was plugged in.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before overwriting a disk, or a file with something in it.")] = False,
) -> None:
    """Write an image to a card, put the device's identity on it, and read everything back."""
    from rich.console import Console

    from edge_agent.flash import command
    from edge_agent.flash.errors import FlashError

    try:
        if list_them:
            command.print_disks(Console(), int(largest_gb * 10**9))
            return
        if image is None or target is None or (bundle is None) == (fleet is None):
            raise typer.BadParameter("give --image, --target, and --bundle or --fleet (or --list alone)")
        options = command.FlashOptions(
            image, target, bundle or Path(), sha256, size, hostname, user, password_hash_file, tuple(ssh_key or ()), wifi, wifi_secret_file,
            country, timezone, agent_config, backbone, int(largest_gb * 10**9), yes, unmount,
        )
        if fleet is None:
            command.flash(options, Console())
            return
        from edge_agent.flash.fleet import ask_for_card, flash_fleet

        flash_fleet(fleet, options, Console(), bundles=bundles, labels=labels, wait_for_card=ask_for_card)
    except FlashError as error:
        typer.echo(f"edge-agent: {error}", err=True)
        raise typer.Exit(exit_codes.CRASH) from error


@app.command()
def install(  # noqa: PLR0917 - typer calls it by name
    root: Annotated[Path, typer.Option(help="The tree of a system that will be flashed, such as Linux_for_Tegra/rootfs; nothing is run then.")] = Path("/"),
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Settings to put in place, unless there are some already.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="From `coordinator enrol DEVICE`; set bundle_file to /var/lib/mobillm-fleet/device.bundle.")] = None,
    program: Annotated[Path | None, typer.Option(help="edge-agent as the board will see it; by default this one, with --root /opt/mobillm-fleet/bin.")] = None,
    remove: Annotated[bool, typer.Option("--uninstall", help="Take the service away; settings, spool and identity stay.")] = False,
    purge: Annotated[bool, typer.Option("--purge", help="With --uninstall: settings, spool and identity go too.")] = False,
) -> None:
    """Make the agent a service of this board. Running it again changes nothing."""
    from edge_agent import install as installing
    from side_tuning.bundle import BundleError

    notes = list[str]()
    try:
        if remove:
            changes = installing.uninstall(root, purge=purge)
        else:
            here = installing.this_program() if root == Path("/") else installing.DEFAULT_PROGRAM
            plan = installing.Plan(root, program or here, config, bundle)
            changes = installing.install(plan)
            notes = installing.still_to_do(plan)
    except (installing.InstallError, BundleError, OSError) as error:
        typer.echo(f"edge-agent: {error}", err=True)
        raise typer.Exit(exit_codes.CRASH) from error
    for line in [*(changes or ["nothing to do"]), *(f"still to do: {note}" for note in notes)]:
        typer.echo(line)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib import metadata

    typer.echo(metadata.version("mobillm-fleet"))


def _settings(config: Path | None) -> AgentSettings:
    from edge_agent.settings import load_settings

    return load_settings(config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None))


@contextmanager
def _told_plainly() -> Iterator[None]:
    """Errors that carry their cure end the program with one message instead of a traceback."""
    from edge_agent.identity_file import IdentityError
    from edge_agent.settings import ConfigError
    from edge_agent.spool_file import SpoolError
    from side_tuning.backbone_manifest import BackboneError
    from side_tuning.broker_settings import BrokerFilesError
    from side_tuning.signatures import SignatureError

    try:
        yield
    except (ConfigError, IdentityError, BackboneError, BrokerFilesError, SignatureError) as error:
        typer.echo(f"edge-agent: {error}", err=True)
        raise typer.Exit(exit_codes.CONFIG_ERROR) from error
    except SpoolError as error:  # the next start may find room, or a new file
        typer.echo(f"edge-agent: {error}", err=True)
        raise typer.Exit(exit_codes.CRASH) from error


def _configure_logging(level: str, form: str = "text") -> None:
    import os
    import time

    from side_tuning.json_logs import json_handler

    if form == "json":
        logging.basicConfig(level=level.upper(), handlers=[json_handler("edge-agent")])
        return
    # The journal stamps its lines itself.
    stamp = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s.%(msecs)03dZ "
    formatter = logging.Formatter(stamp + "%(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler])


def main() -> None:
    app()


if __name__ == "__main__":
    main()
