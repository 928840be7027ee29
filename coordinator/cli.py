"""The `coordinator` command line. Subcommands parse, build and call one function; heavy imports are inside them."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.command_line import Config, open_settings, opened_store
from coordinator.identity_commands import register_identity_commands
from coordinator.upkeep_commands import register_upkeep_commands
from side_tuning.json_logs import logs_are_json

if TYPE_CHECKING:
    from coordinator.settings import CoordinatorSettings

EXIT_CRASH = 1
EXIT_CONFIG = 78  # as coordinator.settings says; not imported, to start fast

app = typer.Typer(
    name="coordinator",
    help="Trains one side network from the activations that a fleet of devices sends.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
database_app = typer.Typer(help="The database's schema.", no_args_is_help=True)
backbone_app = typer.Typer(help="Backbones that devices run.", no_args_is_help=True)
plan_app = typer.Typer(help="The tap plan: what the devices send.", no_args_is_help=True)
rejections_app = typer.Typer(help="Messages that were not accepted.", no_args_is_help=True)
checkpoints_app = typer.Typer(help="Side networks offered to the devices.", no_args_is_help=True)
app.add_typer(database_app, name="database")
app.add_typer(backbone_app, name="backbone")
app.add_typer(plan_app, name="plan")
app.add_typer(rejections_app, name="rejections")
app.add_typer(checkpoints_app, name="checkpoints")
register_identity_commands(app)
register_upkeep_commands(app)

# Programs.


@app.command()
def run(
    config: Config = None,
    broker: Annotated[str, typer.Option(help="embedded, mosquitto, or external: one that runs already.")] = "external",
    dashboard: Annotated[bool, typer.Option("--dashboard/--no-dashboard", help="Serve the pages too.")] = True,
) -> None:
    """Start and supervise the gateway, the trainer, enrolment, the dashboard and, if asked, a broker on this machine."""
    from coordinator.local_broker import broker_command
    from coordinator.store.schema import upgrade
    from coordinator.supervisor import Program, supervise

    settings = open_settings(config, "run")
    if broker not in ("embedded", "mosquitto", "external"):
        raise typer.BadParameter(f"{broker!r} is not one of embedded, mosquitto, external", param_hint="--broker")
    upgrade(settings.database_url)
    programs = []
    if (command := broker_command(broker, settings)) is not None:  # type: ignore[arg-type]
        programs.append(Program("broker", command))
    place = [] if config is None else ["--config", str(config.resolve())]
    names = ["gateway", "train"] + ["enrolment"] * _has_authorities(settings)
    programs += [Program(name, [sys.executable, "-m", "coordinator.cli", name, *place]) for name in names]
    if dashboard:  # devices must be served even where its port is taken
        programs.append(Program("dashboard", [sys.executable, "-m", "dashboards", "serve", *place], essential=False))
    sys.exit(supervise(programs, _stop_on_signals()))


@app.command()
def gateway(config: Config = None) -> None:
    """Receive frames and health, store them, send receipts, plans and checkpoints."""
    from coordinator.gateway import run as run_gateway

    run_gateway(open_settings(config, "gateway"), _stop_on_signals())


@app.command()
def enrolment(config: Config = None) -> None:
    """Give devices their certificates, keep the broker's revocation lists, throw out who was revoked."""
    from coordinator.enrolment import run as run_enrolment

    run_enrolment(open_settings(config, "enrolment"), _stop_on_signals())


@app.command()
def train(config: Config = None) -> None:
    """Train the side network from what is stored, and offer checkpoints."""
    from coordinator.training.trainer import run as run_trainer

    run_trainer(open_settings(config, "train"), _stop_on_signals())


@app.command()
def broker(port: Annotated[int, typer.Option(min=1, max=65_535, help="Port on the loopback.")] = 1883) -> None:
    """Run the embedded broker: this machine only, no passwords, MQTT 3.1.1. For demonstrations."""
    from coordinator.embedded_broker import run as run_broker

    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)-7s broker: %(message)s", datefmt="%H:%M:%S")
    run_broker(port)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def demo(context: typer.Context) -> None:
    """Watch devices with unlike backbones teach one side network, all on this machine."""
    from coordinator.demonstration.demo import run as run_demo

    sys.exit(run_demo(list(context.args)))


@app.command("check-config")
def check_config(config: Config = None) -> None:
    """Print the effective settings; passwords are masked."""
    from coordinator.settings import describe_settings

    print(describe_settings(open_settings(config, "check-config")))


# The database.


@database_app.command("upgrade")
def database_upgrade(config: Config = None) -> None:
    """Make the tables, or bring an older schema up to date."""
    from coordinator.store.schema import upgrade

    settings = open_settings(config, "database")
    upgrade(settings.database_url)
    print("the schema is up to date")


@database_app.command("check")
def database_check(config: Config = None) -> None:
    """Say whether the database can be used by this program."""
    with opened_store(config):
        print("the database is fine")


# Backbones.


@backbone_app.command("prepare")
def backbone_prepare(  # noqa: PLR0917 - one per option
    model: Annotated[str, typer.Option(help="Folder or Hugging Face name of a model.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Layers to keep; all by default.")] = None,
    weights: Annotated[str, typer.Option(help="float, int8 or int4.")] = "int8",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest text that it will see.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the fixed maps for `sequence` mode.")] = 0,
    calibrate: Annotated[Path | None, typer.Option(help="Public texts to fit those maps to, a text or a row with `text` per line.")] = None,
) -> None:
    """Cut and quantize a model into a backbone for devices."""
    if weights not in ("float", "int8", "int4"):
        raise typer.BadParameter(f"{weights!r} is not one of float, int8, int4", param_hint="--weights")
    from coordinator.backbones import prepare
    from coordinator.training.anchors import read_texts

    found = read_texts(calibrate, "--calibrate") if calibrate else []
    texts = [text if isinstance(text, str) else "\n".join(text) for text in found]  # type: ignore[arg-type]
    manifest = prepare(model, out, layers=layers, weights=weights, max_tokens=max_tokens, seed=seed, calibrate=texts, progress=print)  # type: ignore[arg-type]
    print(f"{manifest.fingerprint}  {out}: {_describe_backbone(manifest)}")
    print(f"next: coordinator backbone register {out}")


@backbone_app.command("register")
def backbone_register(folders: list[Path], config: Config = None) -> None:
    """Accept frames from devices that run these backbones."""
    from coordinator.backbone_library import keep_artifact
    from coordinator.store.registry import register_backbone
    from side_tuning.backbone_manifest import BackboneError, read_manifest

    manifests = [read_manifest(folder) for folder in folders]
    with opened_store(config) as (settings, store):
        with store.write() as session:
            for manifest in manifests:
                register_backbone(session, manifest)
        for folder, manifest in zip(folders, manifests, strict=True):
            print(f"{manifest.fingerprint}  {_describe_backbone(manifest)}")
            try:  # frames are welcome even where the artifact cannot be kept
                keep_artifact(settings.data_directory, folder)
            except BackboneError as error:
                print(f"  registered, but not for anchors: {error}", file=sys.stderr)


@backbone_app.command("assign")
def backbone_assign(
    fingerprint: Annotated[str, typer.Argument(help="Of a registered backbone, or its beginning; 'none' takes an assignment back.")],
    config: Config = None,
    device: Annotated[list[str] | None, typer.Option(help="For this device (may be given again) instead of the whole fleet.")] = None,
    actor: Annotated[str, typer.Option(help="Who does it, for the audit trail.")] = "operator",
) -> None:
    """Send this backbone to devices that have none; those that have one keep it."""
    from coordinator.backbone_library import find_artifact
    from coordinator.store.assignments import assign_backbone, find_backbone
    from coordinator.store.timestamps import utc_now
    from side_tuning.backbone_manifest import BackboneError
    from side_tuning.wire.topics import check_device_name

    owners: list[str | None] = [check_device_name(name) for name in device or ()] or [None]
    with opened_store(config) as (settings, store), store.write() as session:
        found = "" if fingerprint == "none" else find_backbone(session, fingerprint)
        if found and find_artifact(settings.data_directory, found) is None:
            raise BackboneError(f"backbone {found} is registered, but its files are not kept here; run `coordinator backbone register FOLDER` again")
        for owner in owners:
            assign_backbone(session, found, owner, at=utc_now(), actor=actor)
    for owner in owners:
        print(f"{owner or 'fleet'}: {found or 'no backbone is sent any more'}")


@backbone_app.command("list")
def backbone_list(config: Config = None) -> None:
    """The registered backbones."""
    from coordinator.store.assignments import assignments
    from coordinator.store.registry import backbones

    with opened_store(config, read_only=True) as (_, store), store.read() as session:
        assigned = assignments(session)
        for fingerprint, row in backbones(session).items():
            owners = [device or "the fleet" for device, found in assigned.items() if found == fingerprint]
            print(f"{fingerprint}  {_describe_backbone(row.manifest)}" + (f"; sent to {', '.join(owners)}" if owners else ""))


# Tap plans.


@plan_app.command("show")
def plan_show(config: Config = None) -> None:
    """Every device's newest tap plan; "fleet" is for those that have none of their own."""
    from coordinator.planning import describe
    from coordinator.store.registry import plans

    with opened_store(config, read_only=True) as (_, store), store.read() as session:
        newest = {row.device: row for row in sorted(plans(session), key=lambda row: row.version)}
    if not newest:
        print("no tap plan yet; register a backbone and start the gateway, or use `coordinator plan set`")
    for row in newest.values():
        print(f"{row.device or 'fleet'}: version {row.version}: {describe(row.plan)}")


@plan_app.command("set")
def plan_set(  # noqa: PLR0917 - one per option
    config: Config = None,
    device: Annotated[str | None, typer.Option(help="For this device alone.")] = None,
    blocks: Annotated[int | None, typer.Option(min=1, max=64)] = None,
    mode: Annotated[str | None, typer.Option(help="pooled or sequence.")] = None,
    pooling: Annotated[str | None, typer.Option(help="mean, first or last.")] = None,
    codec: Annotated[str | None, typer.Option(help="rot4, int4, int2, int8 or fp16.")] = None,
    group: Annotated[int | None, typer.Option(min=0, max=128)] = None,
    rank: Annotated[int | None, typer.Option(min=1, max=4096)] = None,
    summary: Annotated[bool | None, typer.Option("--summary/--no-summary", help="A pooled vector beside the tokens of sequence mode. With it, what is stored without is of no use.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, max=8192)] = None,
    frame_samples: Annotated[int | None, typer.Option(min=1, max=4096)] = None,
    frame_bytes: Annotated[int | None, typer.Option(min=1024, max=16 * 1024 * 1024)] = None,
    linger_seconds: Annotated[float | None, typer.Option(min=0, max=3600)] = None,
    last_rank: Annotated[int | None, typer.Option(min=1, max=4096, help="Of the last layer; causal-lm alone, like the next two.")] = None,
    last_codec: Annotated[str | None, typer.Option(help="rot4, int4, int2, int8 or fp16.")] = None,
    context_every: Annotated[int | None, typer.Option(min=0, max=8192, help="Of a prompt's tokens every k-th is kept; 0 none.")] = None,
) -> None:
    """Give out a new version of the tap plan with these values changed."""
    from coordinator.planning import change_plan, describe

    given = {
        "blocks": blocks,
        "mode": mode,
        "pooling": pooling,
        "codec": codec,
        "group": group,
        "rank": rank,
        "summary": summary,
        "max_tokens": max_tokens,
        "frame_samples": frame_samples,
        "frame_bytes": frame_bytes,
        "linger_seconds": linger_seconds,
        "last_rank": last_rank,
        "last_codec": last_codec,
        "context_every": context_every,
    }
    with opened_store(config) as (settings, store):
        plan = change_plan(settings, store, device, {name: value for name, value in given.items() if value is not None})
    print(f"{device or 'fleet'}: version {plan.version}: {describe(plan)}")


# The fleet.


@rejections_app.command("list")
def rejections_list(
    config: Config = None,
    device: Annotated[str | None, typer.Option()] = None,
    limit: Annotated[int, typer.Option(min=1)] = 50,
) -> None:
    """The newest rejected messages and their reasons."""
    from coordinator.store.rejections import rejections

    with opened_store(config, read_only=True) as (_, store), store.read() as session:
        rows = rejections(session, device, limit)
    for row in rows:
        name = f"{row.spool}/{row.sequence}" if row.spool else "unnamed"
        times = f" ({row.times} times)" if row.times > 1 else ""
        print(f"{row.id}  {row.received_at:%Y-%m-%d %H:%M:%S}  {row.device}  {name}  {row.payload_bytes} bytes  {row.reason}{times}")
    if not rows:
        print("nothing was rejected")


@rejections_app.command("retry")
def rejections_retry(config: Config = None, device: Annotated[str | None, typer.Option()] = None) -> None:
    """Check rejected frames again, for instance after registering their backbone, and store those that pass."""
    from coordinator.retry import retry_rejections

    with opened_store(config) as (settings, store):
        result = retry_rejections(store, device, max_body_bytes=settings.gateway.max_body_bytes)
    print(f"{result.stored} frames stored with {result.samples} samples, {result.still_rejected} are still rejected")
    for reason, count in result.reasons.items():
        print(f"  {count} x {reason}")


# Checkpoints.


@checkpoints_app.command("list")
def checkpoints_list(config: Config = None) -> None:
    """Checkpoints, newest first."""
    from coordinator.store.training import checkpoints

    with opened_store(config, read_only=True) as (_, store), store.read() as session:
        rows = checkpoints(session)
    for row in rows:
        published = f"published {row.published_at:%Y-%m-%d %H:%M:%S}" if row.published_at else "not published"
        print(f"{row.generation}  {row.created_at:%Y-%m-%d %H:%M:%S}  run {row.run} step {row.step}  {published}  {row.folder}")
    if not rows:
        print("no checkpoints yet")


@checkpoints_app.command("republish")
def checkpoints_republish(generation: int, config: Config = None) -> None:
    """Offer an earlier checkpoint again, as a new generation: a roll-back."""
    from coordinator.store.timestamps import utc_now
    from coordinator.store.training import republish_checkpoint

    with opened_store(config) as (_, store), store.write() as session:
        new = republish_checkpoint(session, generation, utc_now())
    print(f"checkpoint {generation} goes out again as {new}")


# Shared pieces.


def _has_authorities(settings: CoordinatorSettings) -> bool:
    """Whether `coordinator enrolment` has anything to do here: with TLS, once `coordinator init` has run."""
    found = (settings.authority_directory / "fleet-authority.key").exists()
    if settings.broker.tls and not found and settings.broker.certificate_file is None:
        logging.getLogger(__name__).warning("TLS is on, but there are no keys and certificates: run `coordinator init`")
    return settings.broker.tls and found


def _stop_on_signals() -> threading.Event:
    from side_tuning.stop_signals import stop_event

    return stop_event()


def _describe_backbone(manifest: Any) -> str:
    return f"{manifest.family}, {manifest.layers} of {manifest.layers_total} layers, width {manifest.width}, {manifest.weights}"


def main() -> None:
    """Run; what a person can put right is said in a line, with exit code 78 if it is the configuration."""
    try:
        app()
    except Exception as error:
        from pydantic import ValidationError

        from coordinator.files import file_trouble
        from coordinator.settings import ConfigError
        from coordinator.store.errors import StoreError, StoreUnavailable

        configuration = isinstance(error, ConfigError) or (isinstance(error, StoreError) and not isinstance(error, StoreUnavailable))
        files = file_trouble(error) if isinstance(error, OSError) else ""
        expected = configuration or files or isinstance(error, ValueError | StoreUnavailable | RuntimeError)
        if not expected or isinstance(error, ValidationError):
            logging.getLogger(__name__).exception("unexpected failure")
        if logs_are_json():
            logging.getLogger(__name__).critical("%s", files or error)
        else:
            print(f"coordinator: {files or error}", file=sys.stderr)
        sys.exit(EXIT_CONFIG if configuration else EXIT_CRASH)


if __name__ == "__main__":
    main()
