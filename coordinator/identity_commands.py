"""The commands about who may come in: init, enrol, devices, claims, audit. Registered by coordinator/cli.py.

Only `init` and `enrol` need the authorities' keys. The others write to the store; `coordinator enrolment` and the
gateway act on it within about a second.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.command_line import Config, open_settings, opened_store

if TYPE_CHECKING:
    from coordinator.claims import ClaimWish
    from coordinator.settings import CoordinatorSettings
    from coordinator.store.audit import AuditRow
    from coordinator.store.engine import Store
    from coordinator.store.identities import CertificateRow, ClaimRow

devices_app = typer.Typer(help="The devices: what they do, and whether they may.", invoke_without_command=True)
claims_app = typer.Typer(help="Rights to a first certificate, handed out in bundles.", no_args_is_help=True)

Device = Annotated[str, typer.Argument(help="The device's name.")]
Actor = Annotated[str, typer.Option(help="Who does it, for the audit trail.")]
AsJson = Annotated[bool, typer.Option("--json")]

_DURATION = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)([dhms])")
_UNITS = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_LONGEST_CLAIM = timedelta(days=365)
_RENEWAL_LIFETIME = timedelta(days=7)
_AUDIT_SHOWN = 10


def register_identity_commands(app: typer.Typer) -> None:
    app.command()(init)
    app.command()(enrol)
    app.command()(audit)
    app.add_typer(devices_app, name="devices")
    app.add_typer(claims_app, name="claims")


def init(config: Config = None) -> None:
    """Make keys, certificates and the database's tables; run again, it renews what ends soon and leaves the rest alone."""
    from coordinator.identities import make_identities
    from coordinator.outbox import ensure_signing_key
    from coordinator.store.schema import upgrade

    settings = open_settings(config, "init")
    for line in make_identities(settings, _now()) or ["keys and certificates are all there and fit for use"]:
        print(line)
    ensure_signing_key(settings)
    upgrade(settings.database_url)
    print("the database's schema is up to date")


def enrol(  # noqa: PLR0917 - one per option
    device: Annotated[str | None, typer.Argument(help="The device's name; or give --fleet.")] = None,
    config: Config = None,
    fleet: Annotated[Path | None, typer.Option(help="Every device of this file (docs/flashing-raspberry-pi.md) that is not enrolled and has no good bundle.")] = None,
    out: Annotated[str, typer.Option(help="File to write the bundle to, '-' for stdout; DEVICE.bundle.json by default. With --fleet a folder, bundles by default.")] = "",
    expires: Annotated[str, typer.Option(help="How long the claim is good: 7d, 12h, 30m.")] = "7d",
    group: Annotated[str | None, typer.Option(help="Sorts devices on screen; no rule looks at it. With --fleet, for lines that name none.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Fingerprint, or its beginning, of the registered backbone that it is to be sent.")] = None,
    readmit: Annotated[bool, typer.Option("--readmit", help="Let a revoked device in again.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle file if it exists.")] = False,
    actor: Actor = "operator",
) -> None:
    """Give a device a one-time claim to its first certificate, in a bundle for `edge-agent enrol --bundle`."""
    from coordinator.claims import ClaimWish
    from coordinator.fleet_claims import fleet_lines, needs_no_claim, revoked_among
    from coordinator.store.assignments import find_backbone

    if (device is None) == (fleet is None):
        raise typer.BadParameter("give a device, or --fleet with a fleet file")
    lifetime, group = _duration(expires), _group(group)
    if device is not None:
        wish = ClaimWish(device=_device_name(device), lifetime=lifetime, group=group, readmit=readmit, actor=actor)
        place = None if out == "-" else Path(out or f"{device}.bundle.json")
        if place is not None and place.is_dir():
            place /= f"{device}.bundle.json"
        if place is not None and place.exists() and not force:
            raise ValueError(f"{place} exists: give another --out, or --force to replace it")
        wishes = [(wish, place)]
    with opened_store(config) as (settings, store):
        if fleet is not None:
            if out == "-":
                raise typer.BadParameter("--fleet needs a folder", param_hint="--out")
            wishes, lines = [], fleet_lines(fleet)
            with store.read() as session:
                revoked = revoked_among(session, lines)
            if revoked and not readmit:
                raise ValueError(f"revoked: {', '.join(revoked)}; add --readmit to let them in again, or take out their lines. No bundle was made")
            for line in lines:
                place = Path(out or "bundles") / f"{line.device}.bundle.json"
                with store.read() as session:
                    reason = needs_no_claim(session, line, place, _now())
                if reason is not None and not force:
                    print(f"{line.device} {reason}: left as it is (--force makes a new claim)")
                else:
                    wish = ClaimWish(device=line.device, lifetime=lifetime, group=line.values.get("group", group), readmit=readmit, actor=actor)
                    wishes.append((wish, place))
        with store.read() as session:
            fingerprint = None if backbone is None else find_backbone(session, backbone)
        for wish, place in wishes:
            _enrol_one(settings, store, wish, fingerprint, place)


def _enrol_one(settings: CoordinatorSettings, store: Store, wish: ClaimWish, fingerprint: str | None, place: Path | None) -> None:
    """One claim, its bundle to `place` or to stdout."""
    from coordinator.claims import make_claim, prepare_claim
    from coordinator.files import write_atomically
    from coordinator.identities import LOCAL_NAMES
    from coordinator.store.assignments import assign_backbone

    prepared = prepare_claim(settings, wish, _now())
    bundle = prepared.bundle

    def hand_out() -> None:
        if place is None:
            sys.stdout.write(bundle.to_text())
            sys.stdout.flush()
        else:
            write_atomically(place, bundle.to_text().encode(), 0o600)

    withdrawn = make_claim(store, wish, prepared, hand_out)
    if fingerprint is not None:
        with store.write() as session:
            assign_backbone(session, fingerprint, wish.device, at=_now(), actor=wish.actor)
    say = sys.stderr if place is None else sys.stdout
    for earlier in withdrawn:
        print(f"withdrew {earlier.id}, the open claim that {wish.device} had from {_moment(earlier.created_at)}: its bundle is worthless now", file=say)
    print(f"{bundle.claim}: good for one certificate of {bundle.device}, until {_moment(prepared.expires_at)} UTC", file=say)
    print(f"the device will look for the broker at {bundle.host}, ports {bundle.port} and {bundle.claims_port}", file=say)
    if bundle.host in LOCAL_NAMES:
        print("  only devices on this machine find it there: for others set enrolment.public_host (PUBLIC_HOST with", file=say)
        print("  docker compose), run `coordinator init`, and enrol again", file=say)
    if place is not None:
        print(f"wrote {place}: a secret until it is used. On the device: edge-agent enrol --bundle {place.name}", file=say)


# Devices.


@devices_app.callback()
def devices(context: typer.Context, config: Config = None, as_json: AsJson = False) -> None:
    """Every device: its state and since when, its rate, whether its samples add up, and what waits for a person."""
    context.obj = config
    if context.invoked_subcommand is None:
        devices_list(context, config, as_json)


@devices_app.command("list")
def devices_list(context: typer.Context, config: Config = None, as_json: AsJson = False) -> None:
    """The same as `coordinator devices`."""
    from coordinator.device_table import device_lines, device_records

    with opened_store(_given(context, config), read_only=True) as (_, store):
        if as_json:
            print(json.dumps(device_records(store), indent=2))
            return
        from coordinator.claims import access_lines

        with store.read() as session:
            access = access_lines(session, _now())
        print("\n".join([*device_lines(store), *access]))


@devices_app.command("show")
def devices_show(context: typer.Context, device: Device, config: Config = None, as_json: AsJson = False) -> None:
    """A device's first steps, identity, claims and certificates, and the newest of its audit trail."""
    from coordinator.device_table import device_lines, timeline_lines
    from coordinator.store.audit import audit_entries
    from coordinator.store.first_steps import beginning_of
    from coordinator.store.fleet import device_overview
    from coordinator.store.identities import IdentityError, certificates_of, claims_of, find_identity
    from coordinator.timeline import timeline, why_nothing_stored

    _device_name(device)
    now = _now()
    with opened_store(_given(context, config), read_only=True) as (_, store):
        with store.read() as session:
            identity = find_identity(session, device)
            claims, certificates = claims_of(session, device), certificates_of(session, device)
            entries = audit_entries(session, device, _AUDIT_SHOWN)
            overview = device_overview(session, now, device=device)
            way = timeline(beginning_of(session, device, now), now, *(why_nothing_stored(one) for one in overview))
        heard = device_lines(store, device)
    known = bool(heard) and heard[0].startswith(f"{device} ")
    if identity is None and not known:
        raise IdentityError(f"no device {device!r}; `coordinator devices` lists them, `coordinator enrol {device}` admits it")
    if as_json:
        record = {
            "first_steps": [{"step": step.step, "done": step.done, "at": step.at, "overdue": step.overdue and step.overdue.words} for step in way.steps],
            "identity": None if identity is None else vars(identity),
            "claims": [{**_public(row), "state": row.state(now)} for row in claims],
            "certificates": [_public(row) for row in certificates],
            "audit": [vars(row) for row in entries],
        }
        print(json.dumps(record, indent=2, default=_plain))
        return
    print("\n".join(heard) if known else f"{device}  not heard of yet")
    print("\n".join(["first steps:", *timeline_lines(way)]))
    if identity is None:
        print("identity: none; it was never given a claim here")
    else:
        words = [f"since {_moment(identity.created_at)}", f"group {identity.group or 'none'}"]
        words.append(f"enrolled {_moment(identity.enrolled_at)}" if identity.enrolled_at else "not enrolled yet")
        if identity.revoked_at:
            words.append(f"REVOKED {_moment(identity.revoked_at)}" + (f" ({identity.revoked_reason})" if identity.revoked_reason else ""))
        print(f"identity: {', '.join(words)}")
    for claim in claims:
        print(f"claim {_claim_line(claim, now)}")
    for certificate in certificates:
        print(f"certificate {_certificate_line(certificate, now)}")
    for entry in entries:
        print(f"audit {_audit_line(entry)}")


@devices_app.command("approve")
def devices_approve(context: typer.Context, device: Device, config: Config = None, actor: Actor = "operator") -> None:
    """Let a device that waits have its certificate (where enrolment.approval is manual)."""
    from coordinator.store.identities import approve_device

    _device_name(device)
    with opened_store(_given(context, config)) as (_, store), store.write() as session:
        claim = approve_device(session, device, at=_now(), actor=actor)
    print(f"{device} is approved{_held_key(claim)} and gets its certificate when it asks next (until {_moment(claim.expires_at)} UTC)")


@devices_app.command("revoke")
def devices_revoke(
    context: typer.Context, device: Device, config: Config = None, reason: Annotated[str, typer.Option(help="For the record.")] = "", actor: Actor = "operator"
) -> None:
    """Shut a device out, with its certificates and open claims."""
    from coordinator.store.identities import revoke_device

    _device_name(device)
    with opened_store(_given(context, config)) as (_, store), store.write() as session:
        changed = revoke_device(session, device, at=_now(), actor=actor, reason=reason)
    if changed:
        print(f"{device} is revoked; `coordinator enrolment` cuts it off within about a second")
    else:
        print(f"{device} was revoked already")


@devices_app.command("rotate")
def devices_rotate(context: typer.Context, device: Device, config: Config = None, actor: Actor = "operator") -> None:
    """Ask a device to make a new key and get a new certificate now, well before its present one ends."""
    from coordinator.claims import ask_for_renewal

    _device_name(device)
    with opened_store(_given(context, config)) as (_, store), store.write() as session:
        ask_for_renewal(session, device, at=_now(), actor=actor, lifetime=_RENEWAL_LIFETIME)
    print(f"{device} is asked for a new certificate, now or when it is back within {_RENEWAL_LIFETIME.days} days")


# Claims and the audit trail.


@claims_app.command("list")
def claims_list(
    config: Config = None,
    device: Annotated[str | None, typer.Option(help="Of this device alone.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Spent, withdrawn and expired ones too.")] = False,
) -> None:
    """The claims that can still become a certificate."""
    from coordinator.store.identities import claims_of

    now = _now()
    with opened_store(config, read_only=True) as (_, store), store.read() as session:
        rows = [row for row in claims_of(session, device) if every or row.state(now) in ("open", "waiting", "approved")]
    for row in rows:
        print(f"{row.device}  {_claim_line(row, now)}")
    if not rows:
        print("no claims" if every else "no open claims")


@claims_app.command("withdraw")
def claims_withdraw(
    claim: str, config: Config = None, reason: Annotated[str, typer.Option(help="For the record.")] = "", actor: Actor = "operator"
) -> None:
    """Make a claim worthless, for instance because its bundle got into wrong hands."""
    from coordinator.store.identities import withdraw_claim

    with opened_store(config) as (_, store), store.write() as session:
        changed = withdraw_claim(session, claim, at=_now(), actor=actor, reason=reason)
    print(f"{claim} is withdrawn: its bundle is worthless" if changed else f"{claim} was withdrawn already")


def audit(
    config: Config = None,
    device: Annotated[str | None, typer.Option(help="Of this device alone.")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 50,
    as_json: AsJson = False,
) -> None:
    """Who did what to whose access, or tried to; newest first."""
    from coordinator.store.audit import audit_entries

    with opened_store(config, read_only=True) as (_, store), store.read() as session:
        rows = audit_entries(session, device, limit)
    if as_json:
        print(json.dumps([vars(row) for row in rows], indent=2, default=_plain))
        return
    for row in rows:
        print(f"{row.device or '-'}  {_audit_line(row)}")
    if not rows:
        print("nothing to tell yet")


# Shared pieces.


def _given(context: typer.Context, config: Path | None) -> Path | None:
    """`coordinator devices --config FILE show kitchen` names the file before the sub-command."""
    return config or context.obj


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _device_name(device: str) -> str:
    from side_tuning.wire.topics import check_device_name

    return check_device_name(device)


def _duration(text: str) -> timedelta:
    found = _DURATION.fullmatch(text.strip())
    lifetime = timedelta(seconds=float(found[1]) * _UNITS[found[2]]) if found else timedelta()
    if not timedelta(0) < lifetime <= _LONGEST_CLAIM:
        raise typer.BadParameter(f"{text!r} is no time such as 7d, 12h or 30m, of at most {_LONGEST_CLAIM.days}d", param_hint="--expires")
    return lifetime


def _group(group: str | None) -> str | None:
    from side_tuning.bundle import GROUP

    if group and not GROUP.fullmatch(group):
        raise typer.BadParameter(f"{group!r}: use up to 64 letters, digits, '_', '.', '-'", param_hint="--group")
    return group


def _claim_line(row: ClaimRow, now: datetime) -> str:
    state = row.state(now)
    at = {"spent": row.spent_at, "withdrawn": row.withdrawn_at, "waiting": row.requested_at, "approved": row.approved_at}.get(state)
    since = f" since {_moment(at)}" if at else ""
    return f"{row.id}  {state}{since}{_held_key(row)}; made {_moment(row.created_at)}, until {_moment(row.expires_at)}"


def _held_key(row: ClaimRow) -> str:
    """Which key waits under this claim, as the device shows it too: whoever took the bundle has another."""
    from coordinator.authority import RequestError, key_digest, public_key_of, read_request

    if row.request is None:
        return ""
    try:
        return f" with the key {key_digest(public_key_of(read_request(row.request)))[:16]}"
    except RequestError:
        return " with an unreadable request"


def _certificate_line(row: CertificateRow, now: datetime) -> str:
    if row.revoked_at is not None:
        state = f"revoked {_moment(row.revoked_at)}" + (f" ({row.revoked_reason})" if row.revoked_reason else "")
    elif row.expires_at <= now:
        state = "expired"
    else:
        state = "not in use yet" if row.seen_at is None else f"in use since {_moment(row.seen_at)}"
    return f"{row.serial}  {state}; issued {_moment(row.issued_at)}, until {_moment(row.expires_at)}"


def _audit_line(row: AuditRow) -> str:
    denied = "" if row.outcome == "done" else f" {row.outcome.upper()}"
    return f"{_moment(row.at)}  {row.actor}: {row.action}{denied}" + (f" ({row.detail})" if row.detail else "")


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}"


def _public(row: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if not isinstance(value, bytes)}


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else str(value)
