"""Writes the full-precision taps of a file of samples: `python -m edge_agent.export_taps --help`.

For comparing and auditing on the machine that holds the samples; the agent never sends these. The plan comes as the
bytes of its message, so that what is exported is exactly what the agent would encode.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edge_agent.exit_codes import CONFIG_ERROR
from edge_agent.samples import Refusal, RowError, Sample, label_index, open_sources, target_of
from edge_agent.settings import FileSourceSettings
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import TapPlan

BATCH_SAMPLES = 32


def export_taps(backbone_folder: Path, plan: TapPlan, samples: Path, out: Path, *, limit: int | None = None) -> int:
    """Write taps, labels, splits and token counts of the first `limit` samples to `out` (safetensors); returns how many.

    Tensors: `layer.N` float32 (rows, width), each sample's being `plan.summary_rows(width of the backbone)` and its tokens in sequence
    mode, `label` int64 (-1 for none), `held_out` bool, `tokens` int64; of a regression
    also `target` float64 (NaN for none); of a language model `token_ids` int64 (sum of tokens + 1 per sample) and `supervised_from`
    int64, as in a frame.
    """
    import numpy as np
    from safetensors.numpy import save_file

    from edge_agent.backbone import Backbone, read_manifest
    from edge_agent.taps import compute_taps

    layers = plan.taps(read_manifest(backbone_folder).layers)
    backbone = Backbone.load(backbone_folder, last_layer=max(layers))
    rows = _read(samples, limit)
    values: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    tokens: list[int] = []
    token_ids: list[np.ndarray] = []
    supervised_from: list[int] = []
    for start in range(0, len(rows), BATCH_SAMPLES):
        matrices = compute_taps(backbone, [row.text for row in rows[start : start + BATCH_SAMPLES]], plan)
        tokens += matrices.tokens
        token_ids += matrices.token_ids or []
        supervised_from += matrices.supervised_from or []
        for layer, vectors in matrices.values.items():
            values[layer].append(vectors)
    labels = [label_index(row.label, plan.labels) if plan.task == "classification" else None for row in rows]
    tensors = {f"layer.{layer}": np.concatenate(parts) for layer, parts in values.items()}
    tensors["label"] = np.array([-1 if label is None else label for label in labels], np.int64)
    tensors["held_out"] = np.array([row.split == "held-out" for row in rows])
    tensors["tokens"] = np.array(tokens, np.int64)
    if plan.task == "regression":
        targets = [target_of(row.label) for row in rows]
        tensors["target"] = np.array([np.nan if target is None else target for target in targets], np.float64)
    if token_ids:
        tensors["token_ids"] = np.concatenate(token_ids)
        tensors["supervised_from"] = np.array(supervised_from, np.int64)
    save_file(tensors, out)
    return len(rows)


def _read(path: Path, limit: int | None) -> list[Sample]:
    source = open_sources([FileSourceSettings(kind="file", path=path)], lambda _: False, state_directory=path.parent)[0]
    rows: list[Sample] = []
    try:
        while not source.exhausted and (limit is None or len(rows) < limit):
            polled = source.poll(1024)
            for item in polled:
                if isinstance(item, Refusal):
                    raise RowError(item.reason, item.detail)
                rows.append(item)
            if not polled and not source.exhausted:
                raise RowError("no file", f"{path} cannot be read; give a file with one sample per line")
    finally:
        source.close()
    if not rows:
        raise RowError("no text", f"{path} holds no samples")
    return rows[:limit]


def main() -> int:
    parser = argparse.ArgumentParser(prog="edge_agent.export_taps", description="Write the full-precision taps of a file of samples.")
    parser.add_argument("--backbone", type=Path, required=True, help="folder of a prepared backbone")
    parser.add_argument("--plan", type=Path, required=True, help="file with the bytes of a tap plan message")
    parser.add_argument("--samples", type=Path, required=True, help="rows as the agent reads them")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many samples")
    arguments = parser.parse_args()
    try:
        plan = TapPlan.from_bytes(arguments.plan.read_bytes())
        export_taps(arguments.backbone, plan, arguments.samples, arguments.out, limit=arguments.limit)
    except (OSError, ValueError, FrameError) as error:
        print(error, file=sys.stderr)
        return CONFIG_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
