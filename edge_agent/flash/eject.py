"""Lets go of a finished card (Linux), and says whether it may be taken out. Everything on it is flushed before this."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def eject(disk: Path) -> str:
    """A sentence for the person. Never powers the reader off: the next card needs it."""
    if disk.name.startswith("mmcblk"):
        return f"{disk} is flushed; the card can be taken out."
    program = shutil.which("eject")
    if program is None:
        return f"{disk} is flushed but not ejected (the program 'eject' is not installed); the card can be taken out once the reader's light rests."
    result = subprocess.run([program, str(disk)], capture_output=True, text=True, check=False, timeout=60)
    if result.returncode:
        return f"{disk} is flushed but could not be ejected ({result.stderr.strip() or result.returncode}); take the card out once the reader's light rests."
    return f"{disk} is ejected; the card can be taken out."
