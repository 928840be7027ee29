"""Checkpoint folders `{run}/{step:08d}`: what the devices get, and all that the trainer needs to go on bit for bit.

    ladder.safetensors, alignment-{fingerprint}.safetensors   averaged weights, rounded, as sent out
    trainer.safetensors                                       live weights, averages, optimizer, sampler's counts
    checkpoint.json                                           plan, side width, metrics, sha256 of each file

A folder appears whole or not at all: it is written under another name, synced and renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from coordinator.files import sync_folder
from coordinator.training.learner import Trained
from side_tuning.network.anchor_map import AnchorMap
from side_tuning.wire.messages import TapPlan

log = logging.getLogger(__name__)

FORMAT = 1
DESCRIPTION = "checkpoint.json"
TRAINER = "trainer.safetensors"


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the text names the file and why."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its weights."""

    step: int  # the next one
    samples_drawn: int
    watermark: int  # row id of the newest sample in the store that has been looked at
    row_ids: np.ndarray  # of the train samples, ascending
    counts: np.ndarray  # how often each was drawn


def save_checkpoint(
    folder: Path, learner: Trained, progress: Progress, *, run: str, plan: TapPlan, metrics: Mapping[str, float], created_at: float
) -> Path:
    """Write the folder of `progress.step` under `folder` (the run's) and return it; an existing one is kept as it is.

    Raises:
        OSError: no room, or no right to write; nothing is left behind.

    """
    final = folder / f"{progress.step:08d}"
    if final.exists():
        return final
    published = learner.published()
    files = {"ladder.safetensors": published.ladder_file}
    files |= {f"alignment-{fingerprint}.safetensors": file for fingerprint, file in published.alignment_files.items()}
    files[TRAINER] = _pack(learner, progress)
    description = {
        "format": FORMAT,
        "run": run,
        "step": progress.step,
        "created_at": created_at,
        "plan": asdict(plan),
        "side_width": learner.config.side_width,
        "metrics": dict(metrics),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    files[DESCRIPTION] = json.dumps(description, indent=1).encode()
    beside = folder / f".{final.name}.new"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for name, data in files.items():
            with (beside / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(beside)
        beside.rename(final)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)  # a full disk needs the room
        raise
    sync_folder(folder)
    return final


def saved_steps(folder: Path) -> list[Path]:
    """The run's whole checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if path.name.isdigit() and (path / DESCRIPTION).exists())


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` of a run, and what a crash left half-written."""
    for path in [*saved_steps(folder)[:-keep], *folder.glob(".*.new")]:
        shutil.rmtree(path, ignore_errors=True)


def metrics_of(path: Path) -> dict[str, float]:
    """The figures that were saved with a checkpoint."""
    return {name: float(value) for name, value in json.loads((path / DESCRIPTION).read_bytes())["metrics"].items()}


def resume(folder: Path, learner: Trained) -> Progress | None:
    """Bring `learner` (fresh, same settings) to the newest usable checkpoint of the run; None if there is none."""
    for path in reversed(saved_steps(folder)):
        try:
            return load_checkpoint(path, learner)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
    return None


def load_checkpoint(path: Path, learner: Trained) -> Progress:
    """Bring a fresh `learner` to the state that was saved in `path`; it is not touched if the files are damaged."""
    try:
        description = json.loads((path / DESCRIPTION).read_bytes())
        found = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in description["sha256"]}
        with safe_open(path / TRAINER, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # a missing file, JSON, SafetensorError: all say that it cannot be used
        raise CheckpointError(f"checkpoint {path} cannot be read: {type(error).__name__}: {error}") from error
    damaged = [name for name, digest in description["sha256"].items() if found[name] != digest]
    if damaged:
        raise CheckpointError(f"checkpoint file {path / damaged[0]} is damaged: its sha256 does not fit")
    _unpack(learner, state, tensors)
    return Progress(
        state["step"],
        state["samples_drawn"],
        state["watermark"],
        tensors["sampler/row_ids"].numpy(),
        tensors["sampler/counts"].numpy(),
    )


def _pack(learner: Trained, progress: Progress) -> bytes:
    tensors = {
        "sampler/row_ids": torch.from_numpy(np.ascontiguousarray(progress.row_ids, np.int64)),
        "sampler/counts": torch.from_numpy(np.ascontiguousarray(progress.counts, np.int32)),
    }
    for place, network in _networks(learner).items():
        tensors |= {f"{place}/{name}": tensor for name, tensor in network.state_dict().items()}
    for number, moments in learner.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": tensor for name, tensor in moments.items()}
    state = {
        "step": progress.step,
        "samples_drawn": progress.samples_drawn,
        "watermark": progress.watermark,
        "backbones": [
            {
                "fingerprint": f,
                "width_in": a.config.width_in,
                "summary_width": a.config.summary_width,
                "joined_at": learner.joined_at[f],
                "anchored": isinstance(a, AnchorMap),
            }
            for f, a in learner.alignments.items()
        ],
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save_tensors(tensors, {"state": json.dumps(state)})


def _unpack(learner: Trained, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    # In the order of joining: that is the order of the optimizer's parameter groups.
    for backbone in state["backbones"]:
        width_in, summary_width = backbone["width_in"], backbone.get("summary_width", 0)
        anchor_map = None
        if backbone["anchored"]:  # its numbers come with the tensors below
            anchor_map = AnchorMap(width_in, learner.config.width_in, learner.config.blocks, summary_width, learner.config.entry_summary_width)
        learner.add_backbone(
            backbone["fingerprint"], width_in, step=backbone["joined_at"], anchor_map=anchor_map, summary_width=summary_width
        )
    for place, network in _networks(learner).items():
        network.load_state_dict({name: tensors[f"{place}/{name}"] for name in network.state_dict()})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, number, moment = name.split("/")
            moments.setdefault(int(number), {})[moment] = tensor
    learner.optimizer.load_state_dict({**learner.optimizer.state_dict(), "state": moments})


def _networks(learner: Trained) -> dict[str, torch.nn.Module]:
    networks: dict[str, torch.nn.Module] = {"ladder": learner.ladder, "average_ladder": learner.average_ladder}
    for number, (fingerprint, alignment) in enumerate(learner.alignments.items()):
        networks[f"alignment/{number}"] = alignment
        if not isinstance(alignment, AnchorMap):  # an anchor map is its own average
            networks[f"average_alignment/{number}"] = learner.average_alignments[fingerprint]
    return networks | learner.extra_networks()
