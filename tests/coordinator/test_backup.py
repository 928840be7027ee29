"""Backups: consistent while the gateway writes, whole or absent, checked to the last byte before anything is replaced."""

import io
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
from datetime import timedelta

import pytest
from cryptography import x509
from sqlalchemy import func, select

from coordinator import backup as backup_module
from coordinator.authority import certificate_pem, key_digest, load_authority, new_key, serial_hex
from coordinator.backup import MANIFEST, BackupError, create_backup
from coordinator.files import held, write_atomically
from coordinator.identities import make_identities
from coordinator.outbox import ensure_signing_key
from coordinator.restore import restore_backup
from coordinator.store.engine import open_store
from coordinator.store.identities import add_certificate, add_claim, certificates_of, claims_of
from coordinator.store.ingest import insert_frames
from coordinator.store.models import FrameBody, FrameRow, SampleRow, Spool
from coordinator.store.schema import downgrade
from coordinator.store.training import checkpoints, insert_checkpoint, insert_run
from side_tuning.alive import touch_alive
from tests.brokers import free_port
from tests.coordinator.fleet import make_payload, make_store, now, settings_file, settings_for
from tests.store.frames import received
from tests.store.postgres import PostgresMissingError, running_postgres
from tests.waiting import wait_until


@pytest.fixture
def settings(tmp_path):
    """A coordinator with everything: database, identities, keys, a checkpoint, and what no backup needs."""
    made = settings_for(tmp_path / "old")
    store = make_store(made)
    make_identities(made, now())
    ensure_signing_key(made)
    folder = made.checkpoints_directory / "run" / "00000010"
    folder.mkdir(parents=True)
    (folder / "ladder.safetensors").write_bytes(b"weights" * 1000)
    (made.data_directory / "tap-cache").mkdir()
    (made.data_directory / "tap-cache" / "large").write_bytes(b"x" * 1000)
    with store.write() as session:
        insert_frames(session, [received(make_payload("d", sequence)) for sequence in range(1, 6)])
        insert_run(session, "run", {}, now())
        insert_checkpoint(session, "run", 10, str(folder.resolve()), {}, now())
    store.close()
    return made


@pytest.fixture
def archive(settings, tmp_path):
    path = tmp_path / "backup.tar"
    create_backup(settings, path, now())
    return path


@pytest.fixture
def elsewhere(tmp_path):
    return settings_for(tmp_path / "new")


def tree(folder):
    """Every file with its content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counts(settings):
    store = open_store(settings.database_url, read_only=True)
    try:
        with store.read() as session:
            frames, bodies, samples = (session.scalar(select(func.count()).select_from(table)) for table in (FrameRow, FrameBody, SampleRow))
            stored, through = session.execute(select(func.sum(Spool.stored_samples), func.sum(Spool.stored_through))).one()
            return frames, bodies, samples, stored, through
    finally:
        store.close()


def rewritten(archive, change):
    """`archive` with its members as `change(name, content, info)` returns them; None leaves one out."""
    with tarfile.open(archive) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(archive, "w") as tar:
        for info, content in members:
            if (changed := change(info.name, content, info)) is not None:
                info.size = len(changed)
                tar.addfile(info, io.BytesIO(changed))


def test_a_backup_brings_everything_back_elsewhere(settings, elsewhere, archive):
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    manifest = restore_backup(elsewhere, archive, now())
    before, after = tree(settings.data_directory), tree(elsewhere.data_directory)
    for folder in (before, after):  # the database is a copy of its content, not of its bytes
        for name in [name for name in folder if name.startswith(("coordinator.db", "tap-cache/")) or name.endswith(".lock")]:
            del folder[name]
    assert after == before
    assert {"authority/fleet-authority.key", "checkpoint-signing.key", "identities/gateway/client.key"} <= set(after)
    assert not any("tap-cache" in name for name in manifest.files)
    assert counts(elsewhere) == counts(settings) == (5, 5, 10, 10, 5)
    store = open_store(elsewhere.database_url, read_only=True)
    with store.read() as session:
        (checkpoint,) = checkpoints(session)
    store.close()
    assert checkpoint.folder == str(elsewhere.checkpoints_directory.resolve() / "run" / "00000010")
    for name in ("authority/fleet-authority.key", "identities/gateway/client.key"):
        assert stat.S_IMODE((elsewhere.data_directory / name).stat().st_mode) == 0o600
    assert make_identities(elsewhere, now()) == []  # nothing to renew or to make anew


def test_folders_may_lie_elsewhere_than_before(settings, archive, tmp_path):
    apart = settings_for(tmp_path / "new", enrolment={"authority_directory": tmp_path / "vault", "broker_directory": tmp_path / "broker"})
    restore_backup(apart, archive, now())
    assert (tmp_path / "vault" / "fleet-authority.key").read_bytes() == (settings.authority_directory / "fleet-authority.key").read_bytes()
    assert (tmp_path / "broker" / "broker.pem").exists()
    assert not (apart.data_directory / "authority").exists()
    create_backup(apart, tmp_path / "second.tar", now())
    back = settings_for(tmp_path / "third")
    restore_backup(back, tmp_path / "second.tar", now())
    assert tree(back.authority_directory).keys() >= {"fleet-authority.key", "claims-authority.key"}


def test_without_keys_no_key_is_in_it(settings, tmp_path):
    manifest = create_backup(settings, tmp_path / "public.tar", now(), with_keys=False)
    assert not [name for name in manifest.files if name.endswith(".key")]
    assert "signing/checkpoint-signing.pub" in manifest.files
    assert b"PRIVATE KEY" not in (tmp_path / "public.tar").read_bytes()


def test_a_backup_while_the_gateway_writes_is_of_one_moment(settings, elsewhere, tmp_path):
    """Another process copies while this one commits all the time: frames, bodies, samples and spools must agree."""
    store = open_store(settings.database_url)
    stop = threading.Event()
    written = [5]

    def write():
        while not stop.is_set():
            with store.write() as session:
                first = written[0] + 1
                insert_frames(session, [received(make_payload("d", sequence)) for sequence in range(first, first + 4)])
            written[0] = first + 3

    writer = threading.Thread(target=write)
    writer.start()
    config = settings_file(tmp_path / "old", free_port())
    try:
        wait_until(lambda: written[0] > 20, 60, "it writes")
        for number in range(2):
            before = written[0]
            done = subprocess.run(
                [sys.executable, "-m", "coordinator.cli", "backup", str(tmp_path / "b.tar"), "--config", str(config)],
                capture_output=True, text=True, timeout=300,
            )
            assert done.returncode == 0, done.stderr
            assert "guard it" in done.stderr
            seen = written[0]
            assert seen > before, "it went on writing"
            there = settings_for(tmp_path / f"restored-{number}")
            restore_backup(there, tmp_path / "b.tar", now())
            frames, bodies, samples, stored, through = counts(there)
            assert frames == bodies == through
            assert samples == stored == 2 * frames
            assert before <= frames
    finally:
        stop.set()
        writer.join(60)
        store.close()
    assert (there.data_directory / "restored-settings.toml").read_text() == config.read_text()


@pytest.mark.parametrize("where", [0.02, 0.2, 0.4, 0.6, 0.8, 0.97])
def test_one_changed_byte_is_found_and_nothing_is_touched(elsewhere, archive, where):
    content = bytearray(archive.read_bytes())
    content[int(len(content) * where)] ^= 0x10
    archive.write_bytes(content)
    try:
        restore_backup(elsewhere, archive, now())
    except BackupError:
        assert set(tree(elsewhere.data_directory)) <= {"gateway.lock", "enrolment.lock", "trainer.lock"}
    else:  # the byte was padding between members
        assert counts(elsewhere) == (5, 5, 10, 10, 5)


def test_damage_within_a_file_is_named(elsewhere, archive):
    rewritten(archive, lambda name, content, _: content[:-1] + b"?" if name.endswith("ladder.safetensors") else content)
    with pytest.raises(BackupError, match=r"ladder\.safetensors is not what the manifest says"):
        restore_backup(elsewhere, archive, now())


@pytest.mark.parametrize("kept", [0, 100, 512, 5000, 0.5, 0.9])
def test_a_backup_cut_short_is_refused(elsewhere, archive, kept):
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(BackupError, match="use another copy"):
        restore_backup(elsewhere, archive, now())
    assert set(tree(elsewhere.data_directory)) <= {"gateway.lock", "enrolment.lock", "trainer.lock"}


@pytest.mark.parametrize(
    "name", ["../outside", "data/../../outside", "/etc/outside", "data", "other/file", "data//twice", "data/./here", "database/coordinator.db"]
)
def test_names_that_no_coordinator_writes_are_refused(elsewhere, archive, name):
    with tarfile.open(archive, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(BackupError, match="do not trust it"):
        restore_backup(elsewhere, archive, now())
    assert not list(elsewhere.data_directory.parent.rglob("outside"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(elsewhere, archive, kind):
    with tarfile.open(archive, "a") as tar:
        info = tarfile.TarInfo("data/link")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(BackupError, match="do not trust it"):
        restore_backup(elsewhere, archive, now())


@pytest.mark.parametrize("manifest", [b"", b"[]", b"{}", b'{"format": 2}', b"\xff"])
def test_manifests_that_cannot_be_read_are_refused(elsewhere, archive, manifest):
    rewritten(archive, lambda name, content, _: manifest if name == MANIFEST else content)
    with pytest.raises(BackupError):
        restore_backup(elsewhere, archive, now())


def test_what_is_there_stays_unless_forced_and_then_is_moved_aside(settings, archive):
    before = tree(settings.data_directory)
    with pytest.raises(BackupError, match="--force"):
        restore_backup(settings, archive, now())
    assert tree(settings.data_directory) == before
    (settings.data_directory / "checkpoint-signing.key").write_bytes(b"another")
    restore_backup(settings, archive, now(), force=True)
    (aside,) = settings.data_directory.glob("before-restore-*")
    assert (aside / "checkpoint-signing.key").read_bytes() == b"another"
    assert (settings.data_directory / "checkpoint-signing.key").read_bytes() == before["checkpoint-signing.key"]
    assert counts(settings) == (5, 5, 10, 10, 5)
    again = create_backup(settings, archive, now())
    assert not any("before-restore" in name for name in again.files)


def test_nothing_is_restored_under_a_running_program(elsewhere, archive):
    with held(elsewhere.data_directory / "gateway.lock", AssertionError()), pytest.raises(BackupError, match="stop every program"):
        restore_backup(elsewhere, archive, now())
    touch_alive(elsewhere.alive_file("trainer"))
    with pytest.raises(BackupError, match="program trainer runs"):
        restore_backup(elsewhere, archive, now(), force=True)


def test_an_older_schema_is_brought_up_to_date(settings, elsewhere, tmp_path):
    create_backup(settings, tmp_path / "b.tar", now())
    restore_backup(elsewhere, tmp_path / "b.tar", now())
    downgrade(elsewhere.database_url, "0001")
    with tarfile.open(tmp_path / "b.tar") as tar:
        assert "database/coordinator.db" in tar.getnames()
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:  # as the program that knew no other schema made it
        patch.setattr("coordinator.store.engine.SCHEMA_REVISION", "0001")
        create_backup(elsewhere, tmp_path / "old.tar", now())
    newest = settings_for(tmp_path / "newest")
    restore_backup(newest, tmp_path / "old.tar", now())
    assert counts(newest) == (5, 5, 10, 10, 5)


def test_too_little_room_and_senseless_places_are_refused_before_anything_is_written(settings, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(BackupError, match="is no folder"):
        create_backup(settings, tmp_path / "nowhere" / "b.tar", now())
    with pytest.raises(BackupError, match="is a folder"):
        create_backup(settings, tmp_path / "out", now())
    with pytest.raises(BackupError, match="lies within"):
        create_backup(settings, settings.data_directory / "b.tar", now())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(backup_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BackupError, match="free some space"):
        create_backup(settings, tmp_path / "out" / "b.tar", now())
    assert list((tmp_path / "out").iterdir()) == []


def test_a_backup_that_fails_leaves_the_last_one_alone(settings, archive, monkeypatch):
    before = archive.read_bytes()
    monkeypatch.setattr(backup_module, "_write_members", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        create_backup(settings, archive, now())
    assert archive.read_bytes() == before
    assert [path.name for path in archive.parent.iterdir() if path.name.startswith(".")] == []


def test_a_damaged_database_is_not_backed_up(settings, tmp_path):
    database = settings.data_directory / "coordinator.db"
    content = bytearray(database.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = b"\x5a" * 4096
    database.write_bytes(content)
    with pytest.raises(Exception, match=r"damaged|malformed"):
        create_backup(settings, tmp_path / "b.tar", now())
    assert not (tmp_path / "b.tar").exists()


def test_restoring_needs_the_same_kind_of_database(archive, tmp_path):
    other = settings_for(tmp_path / "new", database_url="postgresql://nobody@127.0.0.1/none")
    with pytest.raises(BackupError, match="sqlite:///"):
        restore_backup(other, archive, now())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pg_dump") is None, reason="pg_dump is not installed: apt-get install postgresql-client")
def test_postgresql_is_dumped_beside_the_files(settings, tmp_path, monkeypatch):
    psycopg = pytest.importorskip("psycopg")
    try:
        with running_postgres() as server:
            with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
                connection.execute("CREATE DATABASE fleet")
                connection.execute("CREATE DATABASE second")
            large = settings.model_copy(update={"database_url": f"{server}/fleet"})
            make_store(large).close()
            said = []
            manifest = create_backup(large, tmp_path / "b.tar", now(), say=said.append)
            assert ("database/postgresql.dump" in manifest.files, "database/coordinator.db" in manifest.files, said) == (True, False, [])
            there = settings_for(tmp_path / "new", database_url=f"{server}/second")
            restore_backup(there, tmp_path / "b.tar", now(), say=said.append)
            assert any("pg_restore --clean" in line for line in said)
            dump = there.data_directory / "postgresql.dump"
            subprocess.run(["pg_restore", f"--dbname={server}/second", str(dump)], check=True, timeout=300)
            open_store(f"{server}/second").close()
            monkeypatch.setenv("PATH", str(tmp_path))
            create_backup(large, tmp_path / "b.tar", now(), say=said.append)
            assert "pg_dump is not installed" in said[-1]
    except PostgresMissingError as error:
        pytest.skip(str(error))


def test_folders_that_are_mount_points_keep_their_place(archive, tmp_path):
    """As in containers: the folders are there, some files too, and none of the folders can be moved."""
    there = settings_for(tmp_path / "new", publishing={"signing_key_file": tmp_path / "signing" / "checkpoint-signing.key"})
    mounts = [there.data_directory / "identities" / "gateway", there.authority_directory, tmp_path / "signing"]
    for folder in mounts:
        folder.mkdir(parents=True)
    (there.data_directory / "tap-cache").mkdir()
    (there.data_directory / "tap-cache" / "old").write_bytes(b"of other samples")
    (mounts[1] / "fleet-authority.key").write_bytes(b"another")
    before = [folder.stat().st_ino for folder in mounts[::2]]
    restore_backup(there, archive, now(), force=True)
    assert [folder.stat().st_ino for folder in mounts[::2]][1:] == before[1:]
    assert ensure_signing_key(there) is not None
    assert make_identities(there, now()) == []
    assert not (there.data_directory / "tap-cache").exists()
    (aside,) = there.data_directory.glob("before-restore-*")
    assert (aside / "data" / "tap-cache" / "old").exists()
    assert not [*aside.rglob("*.key")], "other programs see data_directory, but not the authorities' folder"
    assert (there.authority_directory / aside.name / "fleet-authority.key").read_bytes() == b"another"


def test_who_was_shut_out_after_the_backup_stays_out(settings, tmp_path):
    """The backup knows a certificate and an open claim as good; the lists that the broker has know better."""
    fleet, claims = (load_authority(settings.authority_directory, name) for name in ("fleet-authority", "claims-authority"))
    key = new_key()
    certificate = fleet.issue(key.public_key(), "stolen", now=now(), days=90, usage="client")
    serial, claim = serial_hex(certificate), "claim-0123456789abcdef"
    store = open_store(settings.database_url)
    with store.write() as session:
        add_claim(session, claim, "stolen", serial="abc1", at=now(), actor="operator", expires_at=now() + timedelta(days=7))
        add_certificate(
            session, serial=serial, device="stolen", key_digest=key_digest(key.public_key()), pem=certificate_pem(certificate),
            issued_at=now(), expires_at=certificate.not_valid_after_utc, claim=None, actor="stolen",
        )  # fmt: skip
    store.close()
    create_backup(settings, tmp_path / "b.tar", now())
    lists = settings.broker_directory
    later = now() + timedelta(seconds=5)
    write_atomically(lists / "fleet-revoked.pem", fleet.revocation_list([(serial, later)], now=later, days=365))
    write_atomically(lists / "claims-revoked.pem", claims.revocation_list([("abc1", later)], now=later, days=365))
    said = []
    restore_backup(settings, tmp_path / "b.tar", now(), force=True, say=said.append)
    assert any("2 revocations" in line for line in said)
    store = open_store(settings.database_url, read_only=True)
    with store.read() as session:
        assert certificates_of(session, "stolen")[0].revoked_at is not None
        assert claims_of(session, "stolen")[0].withdrawn_at is not None
    store.close()
    assert int(serial, 16) in {row.serial_number for row in x509.load_pem_x509_crl((lists / "fleet-revoked.pem").read_bytes())}


def test_through_pipes(settings, tmp_path):
    config, there = settings_file(tmp_path / "old", free_port()), settings_file(tmp_path / "new", free_port())
    command = [sys.executable, "-m", "coordinator.cli"]
    made = subprocess.run([*command, "backup", "-", "--config", str(config)], capture_output=True, timeout=300)
    assert made.returncode == 0, made.stderr
    cut = subprocess.run([*command, "restore", "-", "--config", str(there)], input=made.stdout[:-20_000], capture_output=True, timeout=300)
    assert (cut.returncode, b"use another copy" in cut.stderr) == (1, True), cut.stderr
    done = subprocess.run([*command, "restore", "-", "--config", str(there)], input=made.stdout, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert counts(settings_for(tmp_path / "new")) == (5, 5, 10, 10, 5)
    assert not list(settings.data_directory.glob(".backup*"))


def test_restore_on_the_command_line(archive, tmp_path):
    config = settings_file(tmp_path / "new", free_port())
    command = [sys.executable, "-m", "coordinator.cli", "restore", str(archive), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "revoke again" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (again.returncode, "--force" in again.stderr, "Traceback" in again.stderr) == (1, True, False)
