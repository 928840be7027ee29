"""A frame is taken only as its tap plan and its backbone say; the reason for any other names what is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coordinator.ingest import Registry, refusal
from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.wire.codecs import encode_vectors
from side_tuning.wire.frame import Frame, SampleInfo, Tap, encode_frame
from side_tuning.wire.messages import TapPlan

FINGERPRINT, MAP = "ab" * 16, "cd" * 16
BACKBONE = BackboneManifest(
    fingerprint=FINGERPRINT, source="test", family="bert", kind="encoder", layers=2, layers_total=6, width=20, weights="int8",
    max_tokens=16, vocabulary=100, maps={1: MAP, 2: MAP}, map_rank=8,
)  # fmt: skip
PLAN = TapPlan(3, ("no", "yes"), 2, mode="sequence", codec="int8", group=8, rank=8, max_tokens=16, summary=True)


def frame(plan: TapPlan, tokens: tuple[int, ...] = (3, 16)) -> Frame:
    """Two samples as an agent would send them under `plan`."""
    summary_rows = plan.summary_rows(20)
    rows = len(tokens) if plan.mode == "pooled" else sum(tokens) + summary_rows * len(tokens)
    width = 20 if plan.mode == "pooled" else 8
    data = encode_vectors(np.ones((rows, width), np.float32), plan.codec, plan.group)
    taps = tuple(Tap(layer, rows, width, plan.codec, plan.group, MAP if plan.mode == "sequence" else None, data) for layer in (1, 2))
    samples = tuple(SampleInfo(f"{n:02x}" * 16, n, "train", count) for n, count in enumerate(tokens))
    made = Frame("attic", "5b00", 1, 1e9, FINGERPRINT, 3, plan.mode, "mean", len(tokens), samples, taps, summary_rows=summary_rows)
    encode_frame(made)
    return made


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, summary=False), replace(PLAN, mode="pooled", summary=False)])
def test_what_the_plan_asks_for_is_taken(plan: TapPlan) -> None:
    assert refusal(frame(plan), Registry({FINGERPRINT: BACKBONE}, {3: plan})) is None


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (frame(replace(PLAN, summary=False)), "0 rows of a summary, tap plan 3 wants 3 of this backbone"),
        (replace(frame(PLAN), summary_rows=2), "2 rows of a summary, tap plan 3 wants 3"),
        (frame(PLAN, (3, 17)), "17 tokens, tap plan 3 allows 16"),
        (frame(replace(PLAN, mode="pooled", summary=False)), "mode pooled/mean, tap plan 3 says sequence/mean"),
        (replace(frame(PLAN), taps=frame(PLAN).taps[:1]), "layers 1, tap plan 3 wants 1, 2 of this backbone"),
        (frame(replace(PLAN, codec="int4")), "layer 1: codec int4 group 8, tap plan 3 says int8 group 8"),
        (replace(frame(PLAN), backbone="ee" * 16), "is not registered"),
        (replace(frame(PLAN), plan_version=4), "tap plan 4 was never given out"),
    ],
)
def test_anything_else_is_refused_with_its_reason(sent: Frame, reason: str) -> None:
    found = refusal(sent, Registry({FINGERPRINT: BACKBONE}, {3: PLAN}))
    assert found is not None
    assert reason in found


def test_a_plan_without_a_summary_takes_none() -> None:
    found = refusal(frame(PLAN), Registry({FINGERPRINT: BACKBONE}, {3: replace(PLAN, summary=False)}))
    assert found is not None
    assert "3 rows of a summary, tap plan 3 wants 0" in found
