"""Debian's part of the image: an arm64 tree made by mmdebstrap, kept as a tar under the name of what went into it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SUITE = "trixie"
MIRROR = "http://deb.debian.org/debian"
EPOCH = 1764115200  # every time on the image: the release day of the package list
PACKAGES = Path(__file__).with_name("packages.txt")

# Nobody reads manuals on a device; byte-compilation under emulation would take as long as all the rest.
_OPTIONS = (
    "--architectures=arm64", "--variant=minbase", "--format=tar", "--components=main non-free-firmware",
    "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-include=/usr/share/doc/*/copyright", "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/info/*",
    '--essential-hook=chroot "$1" dpkg-divert --local --rename --divert /usr/bin/py3compile.debian --add /usr/bin/py3compile; ln -s true "$1/usr/bin/py3compile"',
)


class ImageError(RuntimeError):
    """The image cannot be made; the text says why and what to do."""


def packages(path: Path = PACKAGES) -> list[str]:
    """The package list, without comments and blank lines."""
    lines = (line.split("#", 1)[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobillm-fleet" / "trees"


def debian_tree(wanted: Sequence[str], cache: Path, *, mirror: str = MIRROR, more: Sequence[str] = ()) -> Path:
    """The tar of a tree with these packages, made where the cache has none: the first time half an hour. `more` are options of mmdebstrap.

    Raises:
        ImageError: mmdebstrap is missing or fails.

    """
    key = hashlib.sha256("\n".join([SUITE, str(EPOCH), *_OPTIONS, *more, *wanted]).encode()).hexdigest()[:16]
    path = cache / f"{SUITE}-arm64-{key}.tar"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    run(["mmdebstrap", *_OPTIONS, *more, f"--include={','.join(wanted)}", SUITE, str(aside), mirror], environment={"SOURCE_DATE_EPOCH": str(EPOCH)})
    aside.replace(path)
    return path


def run(command: Sequence[str], *, environment: dict[str, str] | None = None, stdin: str | None = None) -> str:
    """What the program printed. Raises `ImageError` with its last words."""
    program = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise ImageError(f"{command[0]} is not installed; docs/image.md lists what the build needs")
    result = subprocess.run(
        [program, *command[1:]], env={**os.environ, **(environment or {})}, input=stdin, capture_output=True, text=True, check=False,
    )
    if result.returncode:
        raise ImageError(f"{' '.join(command)[:200]} failed: {(result.stderr or result.stdout)[-2000:].strip()}")
    return result.stdout
