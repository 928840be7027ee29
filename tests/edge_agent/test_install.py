"""The agent as a service: staged into a tree, twice, and taken away. Files are checked by systemd's own programs where they are here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge_agent.cli import app
from edge_agent.install import UNIT, InstallError, Plan, install, uninstall
from tests.edge_agent.jetson import make_jetson_tree
from tests.flash.test_first_boot import make_bundle


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_jetson_tree(tmp_path)


def arguments(tree: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "agent.toml").write_text('bundle_file = "/var/lib/mobillm-fleet/device.bundle"\n')
    if not (tmp_path / "kitchen.bundle.json").exists():
        (tmp_path / "kitchen.bundle.json").write_text(make_bundle().to_text())
    return ["install", "--root", str(tree), "--config", str(tmp_path / "agent.toml"), "--bundle", str(tmp_path / "kitchen.bundle.json")]


def contents(tree: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(tree)): (path.stat().st_mode & 0o777, path.read_bytes()) for path in files}


def test_a_tree_gets_everything_once(tree: Path, tmp_path: Path):
    runner = CliRunner()
    result = runner.invoke(app, arguments(tree, tmp_path))
    assert result.exit_code == 0, result.output
    first = contents(tree)
    assert first["var/lib/mobillm-fleet/device.bundle"][0] == 0o600
    assert first["etc/mobillm-fleet/agent.toml"][0] == 0o640
    assert b"ExecStart=/opt/mobillm-fleet/bin/edge-agent run" in first[f"etc/systemd/system/{UNIT}"][1]
    link = tree / "etc/systemd/system/multi-user.target.wants" / UNIT
    assert str(link.readlink()) == f"/etc/systemd/system/{UNIT}"

    again = runner.invoke(app, arguments(tree, tmp_path))
    assert again.output == "nothing to do\n"
    assert contents(tree) == first


def test_a_tree_that_counts_as_updated_still_gets_its_user_at_the_first_boot(tree: Path, tmp_path: Path):
    """systemd-sysusers has ConditionNeedsUpdate=/etc: it runs where this stamp is missing or older than /usr."""
    (tree / "etc" / ".updated").touch()
    runner = CliRunner()
    result = runner.invoke(app, arguments(tree, tmp_path))
    assert "removed etc/.updated" in result.output
    assert not (tree / "etc" / ".updated").exists()
    assert runner.invoke(app, arguments(tree, tmp_path)).output == "nothing to do\n"


def test_what_was_changed_is_repaired_but_settings_are_left_alone(tree: Path, tmp_path: Path):
    runner = CliRunner()
    runner.invoke(app, arguments(tree, tmp_path))
    (tree / "etc/systemd/system" / UNIT).write_text("broken")
    (tree / "etc/mobillm-fleet/agent.toml").write_text("mine")
    output = runner.invoke(app, arguments(tree, tmp_path)).output
    assert f"wrote etc/systemd/system/{UNIT}" in output
    assert "left etc/mobillm-fleet/agent.toml as it is" in output
    assert (tree / "etc/mobillm-fleet/agent.toml").read_text() == "mine"


def test_uninstall_keeps_what_is_the_persons_unless_told(tree: Path, tmp_path: Path):
    before = contents(tree)
    runner = CliRunner()
    runner.invoke(app, arguments(tree, tmp_path))
    assert runner.invoke(app, ["install", "--root", str(tree), "--uninstall"]).exit_code == 0
    assert set(contents(tree)) - set(before) == {"etc/mobillm-fleet/agent.toml", "var/lib/mobillm-fleet/device.bundle"}
    assert not (tree / "etc/systemd/system/multi-user.target.wants" / UNIT).is_symlink()
    runner.invoke(app, ["install", "--root", str(tree), "--uninstall", "--purge"])
    assert contents(tree) == before


def test_on_a_live_board_the_service_is_started_in_order(tree: Path, monkeypatch: pytest.MonkeyPatch):
    """Everything but the root folder is real here; the commands are recorded, since this machine is nobody's board."""
    commands: list[list[str]] = []
    monkeypatch.setattr(Plan, "live", True)
    plan = Plan(tree, Path("/opt/venv/bin/edge-agent"))
    install(plan, run=lambda command: commands.append(list(command)))
    assert [command[0] for command in commands] == ["systemd-sysusers", "systemd-tmpfiles", "systemctl", "systemctl"]
    assert commands[-1] == ["systemctl", "restart", UNIT]
    uninstall(tree, purge=False, run=lambda command: commands.append(list(command)))
    assert ["systemctl", "disable", "--now", UNIT] in commands


def test_a_folder_that_is_no_system_is_refused(tmp_path: Path):
    with pytest.raises(InstallError, match="no root of an operating system"):
        install(Plan(tmp_path, Path("/x")))


def test_a_link_in_the_tree_is_not_followed(tree: Path, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    (tree / "etc/systemd/system" / UNIT).symlink_to(outside)
    with pytest.raises(InstallError, match="is a link"):
        install(Plan(tree, Path("/x")))
    assert outside.read_text() == "untouched"


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed")
def test_systemds_own_programs_make_user_and_folders(tree: Path, tmp_path: Path):
    CliRunner().invoke(app, arguments(tree, tmp_path))
    for name in ("passwd", "group", "shadow", "gshadow"):
        (tree / "etc" / name).write_text("root:x:0:0:root:/root:/bin/sh\n" if name == "passwd" else "")
    result = subprocess.run(["systemd-sysusers", f"--root={tree}"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "mobillm-fleet:" in (tree / "etc/passwd").read_text()


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("rootfs/etc/nv_tegra_release", "NVIDIA's own packages are not in the tree yet; run sudo ./apply_binaries.sh"),
        ("rootfs/usr", "has no root file system in it; unpack NVIDIA's"),
        ("rootfs/etc", "has no root file system in it; unpack NVIDIA's"),
        ("flash.sh", "no complete Jetson Linux (no flash.sh)"),
        ("bootloader", "no complete Jetson Linux (no bootloader)"),
        ("kernel", "no complete Jetson Linux (no kernel)"),
        ("nv_tegra", "no complete Jetson Linux (no nv_tegra)"),
    ],
)
@pytest.mark.parametrize("moved", [False, True])
def test_nvidias_tree_before_its_time_is_refused_untouched(tree: Path, tmp_path: Path, gone: str, words: str, moved: bool):
    """Under another name too: what is beside `rootfs` tells what it is."""
    place = tree.parent / gone
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()
    if moved:
        tree = tree.parent.rename(tmp_path / "jetpack-6") / "rootfs"
    before = contents(tree)
    result = CliRunner().invoke(app, arguments(tree, tmp_path))
    assert result.exit_code == 1
    assert words in result.output
    assert contents(tree) == before


def test_a_root_that_is_not_nvidias_needs_none_of_that(tmp_path: Path):
    root = tmp_path / "rootfs"
    (root / "etc").mkdir(parents=True)
    (root / "usr" / "lib" / "systemd").mkdir(parents=True)
    assert CliRunner().invoke(app, arguments(root, tmp_path)).exit_code == 0


def test_what_is_still_to_do_before_flashing_is_said(tree: Path, tmp_path: Path):
    """apply_binaries.sh links default.target so until l4t_create_default_user.sh has run; that target conflicts with multi-user.target."""
    (tree / "opt/mobillm-fleet/bin/edge-agent").unlink()
    target = tree / "etc/systemd/system/default.target"
    target.symlink_to("/lib/systemd/system/nv-oem-config.target")
    output = CliRunner().invoke(app, arguments(tree, tmp_path)).output
    assert "still to do: /opt/mobillm-fleet/bin/edge-agent is not in" in output
    assert "still to do: the board will ask on its screen who uses it" in output
    target.unlink()
    target.symlink_to("/lib/systemd/system/graphical.target")
    (tree / "opt/mobillm-fleet/bin/edge-agent").touch()
    assert "still to do" not in CliRunner().invoke(app, arguments(tree, tmp_path)).output
