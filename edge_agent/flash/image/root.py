"""From Debian's tree to our root: the files of `files/`, the agent in a virtual environment, its service."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from edge_agent.flash.image.tree import EPOCH, ImageError, run
from edge_agent.install import Plan, install

REPOSITORY = Path(__file__).parents[3]
FILES = Path(__file__).with_name("files")
ENVIRONMENT = Path("opt/mobillm-fleet")
STATE = Path("var/lib/mobillm-fleet")
# What a start imports is compiled ahead, since a read-only root cannot keep it later.
STARTS = "cryptography.x509, lz4.frame, msgpack, numpy, paho.mqtt.client, psutil, pydantic_settings, safetensors.torch, tokenizers, torch, typer"
AGENT = "edge_agent.agent, edge_agent.backbone, edge_agent.cli, edge_agent.doctor, edge_agent.infer_command, edge_agent.enrol"


def unpack(tar: Path, root: Path) -> None:
    root.mkdir(parents=True)
    run(["tar", "-xpf", str(tar), "-C", str(root), "--numeric-owner"])


def add_agent(root: Path) -> None:
    """Torch for the Cortex-A72, everything that it needs, and this project, where the unit looks for them. Nothing is emulated but `venv`."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise ImageError("uv is not installed: pip install uv")
    in_root(root, ["/usr/bin/python3", "-m", "venv", "--without-pip", f"/{ENVIRONMENT}"])
    library = next((root / ENVIRONMENT / "lib").glob("python3.*"))
    packages = library / "site-packages"
    version = library.name.removeprefix("python")
    command = [uv, "pip", "install", "--quiet", "--python-platform", "aarch64-manylinux_2_28", "--python-version", version, "--target", str(packages), "--link-mode", "copy"]
    pins = REPOSITORY / "scripts/image"
    run([*command, "--only-binary", ":all:", "-r", str(pins / "torch.txt"), "-r", str(pins / "agent.txt")])
    with tempfile.TemporaryDirectory() as wheels:
        run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, str(REPOSITORY)])
        run([*command, "--no-deps", str(next(Path(wheels).glob("*.whl")))])
    for left in ("bin", ".lock"):
        shutil.rmtree(packages / left, ignore_errors=True)
    program = root / ENVIRONMENT / "bin/edge-agent"
    program.write_text(f"#!/{ENVIRONMENT}/bin/python\nfrom edge_agent.cli import main\n\nmain()\n", encoding="utf-8")
    program.chmod(0o755)
    run(["sh", str(pins / "slim"), str(root / ENVIRONMENT)])


def compile_agent(root: Path) -> None:
    """Import once under emulation of the oldest processor that must do, which leaves the compiled files behind."""
    set_times(root / ENVIRONMENT)
    in_root(root, [f"/{ENVIRONMENT}/bin/python", "-c", f"import {STARTS}, {AGENT}"])


def configure(root: Path, backbone: Path | None = None) -> None:
    """Our files, the service, an empty machine id; the package manager as it was before the build."""
    shutil.copytree(FILES, root, dirs_exist_ok=True)
    for folder in FILES.rglob("*"):
        if folder.is_file():
            (root / folder.relative_to(FILES)).chmod(0o755 if os.access(folder, os.X_OK) else 0o644)
    install(Plan(root, Path("/") / ENVIRONMENT / "bin/edge-agent"))
    for unit, target in (("grow-data", "sysinit"), ("first-boot", "cloud-init"), ("seal-root", "cloud-init")):
        name = f"mobillm-{unit}.service"
        wants = root / f"etc/systemd/system/{target}.target.wants" / name
        wants.parent.mkdir(parents=True, exist_ok=True)
        wants.unlink(missing_ok=True)
        wants.symlink_to(f"/etc/systemd/system/{name}")
    if backbone is not None:
        shutil.copytree(backbone, root / STATE / "backbone", dirs_exist_ok=True)
    (root / "etc/machine-id").write_text("")
    (root / "etc/hostname").write_text("mobillm\n")
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()  # every board makes its own
    for log in (root / "var/log").rglob("*.log"):
        log.write_text("")
    if (root / "usr/bin/py3compile.debian").exists():
        (root / "usr/bin/py3compile").unlink()
        in_root(root, ["dpkg-divert", "--local", "--rename", "--remove", "/usr/bin/py3compile"])
    in_root(root, ["systemd-sysusers"])  # the first boot makes no users: the stamps below tell it that all is done
    for stamp in ("etc/.updated", "var/.updated"):
        (root / stamp).touch()  # spares the first boot what the build has done
    set_times(root)


def set_times(top: Path) -> None:
    """One time on everything, so that building again gives the same bytes."""
    for folder, _, names in os.walk(top):
        for path in (folder, *(os.path.join(folder, name) for name in names)):
            os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
        for name in os.listdir(folder):
            if os.path.islink(os.path.join(folder, name)):
                os.utime(os.path.join(folder, name), (EPOCH, EPOCH), follow_symlinks=False)


# Mounted in a namespace of its own, which ends with the program: what a killed build leaves behind would else have this machine's
# /dev in it, for the next one to delete.
_ENTER = 'mount --bind /dev "$0/dev" && mount --bind /proc "$0/proc" && exec chroot "$0" "$@"'


def in_root(root: Path, command: list[str]) -> str:
    """Run a program of the tree by user-mode emulation. Only /dev and /proc are there: with /sys some libraries crash under emulation."""
    for name in ("dev", "proc"):
        (root / name).mkdir(exist_ok=True)
    environment = {"QEMU_CPU": "cortex-a72", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    return run(["unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, str(root), *command], environment=environment)
