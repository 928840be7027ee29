"""Anchors: public texts that the coordinator runs through every registered backbone, to bring unlike ones into one space.

The deepest backbone's taps, reduced per block to their main directions, are the shared space; every backbone type gets
a fixed ridge regression into it, from all of its taps at once (`AnchorMap`). No label is involved. Measured in
docs/lab-notes.md: with skewed labels on unlike backbones 33 % without anchors, 83 % with, where equal labels give 84 %.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save

from coordinator.backbone_library import find_artifact
from coordinator.files import write_atomically
from coordinator.settings import ConfigError
from coordinator.store.engine import Store
from coordinator.store.registry import backbones
from coordinator.training.settings import FEWEST_ANCHORS
from side_tuning.backbone_manifest import BackboneManifest, read_manifest
from side_tuning.network.anchor_map import CLAMP, AnchorMap
from side_tuning.network.files import NetworkFileError, load_alignment, save_alignment
from side_tuning.network.side_network import block_inputs
from side_tuning.wire.codecs import round_trip
from side_tuning.wire.messages import TapPlan
from side_tuning.wire.summaries import split_summaries

log = logging.getLogger(__name__)

MOST_TEXTS = 2_000
MOST_TOKEN_ROWS = 20_000
RIDGE = 0.3  # per row of standardised taps; 0.1 to 1 do alike (docs/lab-notes.md)
FORWARD_SECONDS = 1_800.0


class AnchorError(ConfigError):
    """Anchors that cannot be used; the text names the file and the cure."""


@dataclass(frozen=True)
class AnchorTaps:
    """The taps of the anchors on one backbone: `rows` (rows, B, d), one row per text, or per token with `tokens` per text."""

    rows: np.ndarray
    tokens: tuple[int, ...]
    summaries: np.ndarray | None = None  # (texts, B, width) where the plan has them

    def per_text(self) -> np.ndarray:
        """Means over each text's rows, (texts, B, d)."""
        starts = np.cumsum([0, *self.tokens[:-1]])
        return np.add.reduceat(self.rows, starts, axis=0) / np.array(self.tokens)[:, None, None]


class Anchors:
    """The anchors of one run; the shared space and every map into it are computed once and kept in the run's folder."""

    def __init__(self, texts: list[object], data_directory: Path, plan: TapPlan, target: AnchorTaps, run_folder: Path) -> None:
        self._texts = texts
        self._data_directory = data_directory
        self._plan = plan
        self._target = target
        self._run_folder = run_folder

    @property
    def width(self) -> int:
        """Of the shared space, per block."""
        return int(self._target.rows.shape[-1])

    @property
    def summary_width(self) -> int:
        """Of the space that summaries share, per block; 0 where the plan has none."""
        return 0 if self._target.summaries is None else int(self._target.summaries.shape[-1])

    @classmethod
    def open(
        cls, file: Path, data_directory: Path, plan: TapPlan, run_folder: Path, *, width: int, depths: dict[str, int]
    ) -> Anchors | None:
        """The anchors for a run, or None where no registered backbone's artifact is at hand.

        Args:
            file: the texts.
            data_directory: the coordinator's.
            plan: what is tapped.
            run_folder: keeps the shared space, so that a backbone that joins later is brought into the same one.
            width: of the shared space, at most.
            depths: layers of every registered backbone by fingerprint.

        """
        texts = read_texts(file)
        kept = run_folder / "anchor-target.safetensors"
        if kept.is_file():
            return cls(texts, data_directory, plan, _read_target(kept), run_folder)
        if any(run_folder.glob("[0-9]*/")):  # its weights have no place for anchors
            log.warning(
                "run %s began without anchors and goes on without: to use them, delete %s, and a new run begins",
                run_folder.name, data_directory / "training-run.json",
            )  # fmt: skip
            return None
        at_hand = [f for f in depths if find_artifact(data_directory, f) is not None]
        for reference in sorted(at_hand, key=lambda fingerprint: (depths[fingerprint], fingerprint), reverse=True):
            try:
                taps = compute_anchor_taps(texts, data_directory, reference, plan)
            except AnchorError as error:
                log.warning("%s; another backbone's space is shared instead", error)
                continue
            summaries = None if taps.summaries is None else main_directions(taps.summaries, width)
            target = AnchorTaps(main_directions(taps.rows, width), taps.tokens, summaries)
            _write_target(kept, target)
            log.info("%d anchors; the shared space is that of backbone %s, %d wide", len(texts), reference, target.rows.shape[-1])
            anchors = cls(texts, data_directory, plan, target, run_folder)
            anchors._keep(reference, taps)
            return anchors
        log.warning("no backbone's artifact is at hand, so anchors are not used: register them again with `coordinator backbone register`")
        return None

    def fit(self, fingerprint: str) -> AnchorMap | None:
        """The map of one backbone type; None where its artifact is not at hand."""
        kept = self._map_file(fingerprint)
        if kept.is_file():
            try:
                found = load_alignment(kept)
            except NetworkFileError as error:
                log.warning("%s cannot be used (%s); it is computed again", kept, error)
            else:
                if isinstance(found, AnchorMap):
                    return found
        if find_artifact(self._data_directory, fingerprint) is None:
            log.warning(
                "backbone %s has no artifact here, so its alignment is trained without anchors: "
                "register it again with `coordinator backbone register FOLDER`",
                fingerprint,
            )
            return None
        return self._keep(fingerprint, compute_anchor_taps(self._texts, self._data_directory, fingerprint, self._plan))

    def _keep(self, fingerprint: str, taps: AnchorTaps) -> AnchorMap:
        anchor_map = fit_to(taps, self._target)
        write_atomically(self._map_file(fingerprint), save_alignment(anchor_map))
        return anchor_map

    def _map_file(self, fingerprint: str) -> Path:
        return self._run_folder / f"anchor-map-{fingerprint}.safetensors"


def _write_target(file: Path, target: AnchorTaps) -> None:
    tensors = {"rows": target.rows, "tokens": np.array(target.tokens, np.int64)}
    if target.summaries is not None:
        tensors["summaries"] = target.summaries
    write_atomically(file, save(tensors))


def _read_target(file: Path) -> AnchorTaps:
    try:
        tensors = load_file(file)
        return AnchorTaps(tensors["rows"], tuple(tensors["tokens"].tolist()), tensors.get("summaries"))
    except Exception as error:  # SafetensorError is not exported as a type
        raise AnchorError(f"{file} is damaged ({error}): delete training-run.json in data_directory, and a new run begins") from error


def open_anchors(
    file: Path | None, data_directory: Path, store: Store, plan: TapPlan, run_folder: Path, *, width: int
) -> Anchors | None:
    """`Anchors.open` for what the store knows; None without a file."""
    if file is None:
        return None
    with store.read() as session:
        depths = {fingerprint: row.manifest.layers for fingerprint, row in backbones(session).items()}
    return Anchors.open(file, data_directory, plan, run_folder, width=width, depths=depths)


def digest_of(file: Path | None) -> str:
    """Names the texts in what a run was made for; empty without a file."""
    if file is None:
        return ""
    return hashlib.sha256(json.dumps(read_texts(file)).encode()).hexdigest()[:16]


def read_texts(file: Path, what: str = "training.anchors_file") -> list[object]:
    """Texts or pairs of texts: one per line, plain or as JSON with `text` or `text_a` and `text_b`; .gz too.

    `what` names the file in complaints.
    """
    texts: dict[object, None] = {}
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    texts[_text(line.strip(), f"{what} {file}, line {number}")] = None
                if len(texts) == MOST_TEXTS:
                    break
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise AnchorError(
            f"{what} {file} cannot be read: {error}; give UTF-8 text, plain or .gz, or leave the setting out"
        ) from error
    if len(texts) < FEWEST_ANCHORS:
        raise AnchorError(f"{what} {file} has {len(texts)} different texts; give at least {FEWEST_ANCHORS}, better 500")
    return list(texts)


def _text(line: str, where: str) -> object:
    if not line.startswith("{"):
        return line
    try:
        row = json.loads(line)
    except ValueError:
        row = {}
    parts = (row["text"],) if "text" in row else (row.get("text_a"), row.get("text_b"))
    if not all(isinstance(part, str) and part.strip() for part in parts):
        raise AnchorError(f'{where}: no text; rows look like {{"text": "..."}}; correct the line')
    return parts[0] if len(parts) == 1 else parts


def compute_anchor_taps(texts: list[object], data_directory: Path, fingerprint: str, plan: TapPlan) -> AnchorTaps:
    """Run the texts through a kept artifact, as a device would, its codec included."""
    tensors, manifest = export_anchors(texts, data_directory, fingerprint, plan)
    depth = manifest.layers
    taps = {layer: round_trip(tensors[f"layer.{layer}"], plan.codec, plan.group) for layer in plan.taps(depth)}
    inputs = block_inputs(taps, plan.layers(depth))
    tokens = tensors["tokens"].tolist() if plan.mode == "sequence" else [1] * len(inputs)
    summaries = None
    if plan.summary:
        summaries, inputs = split_summaries(inputs, tokens, manifest.width)
    if len(inputs) > MOST_TOKEN_ROWS:
        whole = int(np.searchsorted(np.cumsum(tokens), MOST_TOKEN_ROWS, side="right"))
        tokens = tokens[:whole]
        inputs = inputs[: sum(tokens)]
    return AnchorTaps(inputs, tuple(tokens), summaries)


def export_anchors(texts: list[object], data_directory: Path, fingerprint: str, plan: TapPlan) -> tuple[dict[str, np.ndarray], BackboneManifest]:
    """The tensors of `edge_agent.export_taps` for the texts on a kept artifact, before any codec, and the artifact's manifest.

    The forward runs in the device's own program, as a child process: the memory of a backbone is gone afterwards.

    Raises:
        AnchorError: no artifact, or it cannot run the texts.

    """
    artifact = find_artifact(data_directory, fingerprint)
    if artifact is None:
        raise AnchorError(f"backbone {fingerprint} has no artifact in {data_directory}")
    manifest = read_manifest(artifact)
    with tempfile.TemporaryDirectory(prefix="anchors-") as folder:
        samples, plan_file, out = (Path(folder) / name for name in ("texts.jsonl", "plan", "taps.safetensors"))
        rows = [{"text": t} if isinstance(t, str) else {"text_a": t[0], "text_b": t[1]} for t in texts]  # type: ignore[index]
        samples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        plan_file.write_bytes(plan.to_bytes())
        files = {"--backbone": artifact, "--plan": plan_file, "--samples": samples, "--out": out}
        command = [sys.executable, "-m", "edge_agent.export_taps", *(str(word) for pair in files.items() for word in pair)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=FORWARD_SECONDS, env=environment)
        except subprocess.TimeoutExpired as error:
            raise AnchorError(f"anchors took over {FORWARD_SECONDS:.0f} s on backbone {fingerprint}; give fewer texts") from error
        if done.returncode:
            raise AnchorError(f"anchors cannot run on backbone {fingerprint}: {done.stderr.strip()[-500:]}")
        return load_file(out), manifest


def main_directions(rows: np.ndarray, width: int) -> np.ndarray:
    """Each block's standardised rows along their `width` main directions (PCA), mean square 1 per block: (rows, B, r)."""
    mean, spread = _statistics(rows)
    standard = np.clip((rows - mean) / spread, -CLAMP, CLAMP)
    width = min(width, rows.shape[-1], len(rows) - 1)
    blocks = []
    for block in standard.transpose(1, 0, 2).astype(np.float64):
        _, directions = np.linalg.eigh(block.T @ block)
        reduced = block @ directions[:, ::-1][:, :width]
        blocks.append(reduced / np.sqrt(np.mean(reduced**2)))
    return np.stack(blocks, axis=1).astype(np.float32)


def fit_to(taps: AnchorTaps, target: AnchorTaps) -> AnchorMap:
    """The map from one backbone's taps into the shared space: by rows where these correspond, else by whole texts."""
    if taps.tokens == target.tokens:
        anchor_map = fit_anchor_map(taps.rows, target.rows)
    else:  # another tokenizer: only whole texts correspond, and each was cut at its own number of tokens
        texts = min(len(taps.tokens), len(target.tokens))
        anchor_map = fit_anchor_map(taps.per_text()[:texts], target.per_text()[:texts])
    if taps.summaries is not None and target.summaries is not None:
        anchor_map = anchor_map.with_summary(fit_anchor_map(taps.summaries, target.summaries))
    return anchor_map


def fit_anchor_map(rows: np.ndarray, target: np.ndarray) -> AnchorMap:
    """Ridge regression from standardised taps, all blocks to all: (n, B, d) to (n, B, r)."""
    n, blocks, width_in = rows.shape
    mean, spread = _statistics(rows)
    x = np.clip((rows - mean) / spread, -CLAMP, CLAMP).reshape(n, -1).astype(np.float64)
    y = target.reshape(n, -1).astype(np.float64)
    if n < x.shape[1]:  # the smaller of the two equivalent systems
        matrix = x.T @ np.linalg.solve(x @ x.T + RIDGE * n * np.eye(n), y)
    else:
        matrix = np.linalg.solve(x.T @ x + RIDGE * n * np.eye(x.shape[1]), x.T @ y)
    anchor_map = AnchorMap(width_in, target.shape[-1], blocks)
    anchor_map.mean.copy_(torch.from_numpy(mean))
    anchor_map.spread.copy_(torch.from_numpy(spread))
    anchor_map.matrix.copy_(torch.from_numpy(matrix))
    return anchor_map


def _statistics(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    variance = rows.var(axis=0)
    # The floor is relative, as in `Alignment`.
    return rows.mean(axis=0), np.sqrt(variance + 1e-5 * variance.mean(axis=-1, keepdims=True) + 1e-12)

