"""MAIN FLOW of the image: Debian's tree -> our root -> an image file, packed, with its os_list.json.

python -m edge_agent.flash.image.build --out FOLDER      (as root, from a checkout; docs/image.md)
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from edge_agent.flash.image import root as roots
from edge_agent.flash.image.disk import make_disk
from edge_agent.flash.image.os_list import os_list, write_os_list
from edge_agent.flash.image.tree import ImageError, cache_folder, debian_tree, packages, run

NAME = "mobillm-fleet-arm64"


def build(out: Path, *, cache: Path, backbone: Path | None, base_url: str) -> Path:
    """Make image, packed image and list in `out`; returns the image.

    Raises:
        ImageError: says what is missing.

    """
    if os.geteuid() != 0:
        raise ImageError("the tree's files belong to root and to others; run this with sudo")
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {what}", file=sys.stderr, flush=True)

    say("Debian's tree (the first time half an hour)")
    tar = debian_tree(packages(), cache)
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    tree = work / "root"
    say("unpacking")
    roots.unpack(tar, tree)
    say("the agent and torch")
    roots.add_agent(tree)
    roots.configure(tree, backbone)
    say("importing once, emulated")
    roots.compile_agent(tree)
    roots.set_times(tree)
    image = out / f"{NAME}.img"
    say("file systems")
    make_disk(tree, image)
    packed = image.with_suffix(".img.zst")
    say("packing")
    run(["zstd", "--quiet", "--force", "-12", "-T0", str(image), "-o", str(packed)])
    write_os_list(out / "os_list.json", os_list(image, packed, f"{base_url.rstrip('/')}/{packed.name}", datetime.now(timezone.utc)))
    shutil.rmtree(work)
    say(f"{image}: {image.stat().st_size:,} bytes, packed {packed.stat().st_size:,}")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m edge_agent.flash.image.build", description="Build the arm64 image.")
    parser.add_argument("--out", type=Path, required=True, help="folder for image, packed image and os_list.json")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="where Debian's tree is kept between builds")
    parser.add_argument("--backbone", type=Path, help="a prepared backbone to put on the image")
    parser.add_argument("--base-url", default="https://images.example/", help="where the packed image will be served; stands in os_list.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        build(options.out, cache=options.cache, backbone=options.backbone, base_url=options.base_url)
    except ImageError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
