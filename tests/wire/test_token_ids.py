"""Token ids beside the taps of a language model: packing, and lies about them."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from side_tuning.wire.bounded import FrameError
from side_tuning.wire.frame import decode_frame, encode_frame
from side_tuning.wire.messages import TapPlan
from side_tuning.wire.token_ids import TokenIds
from tests.wire.examples import changed, changed_samples, language_frame, pooled_frame


@given(st.lists(st.lists(st.integers(0, 150_000), min_size=1, max_size=20), max_size=8), st.sampled_from([512, 65_536, 151_936]))
def test_ids_come_back_as_they_were(sequences: list[list[int]], vocabulary: int) -> None:
    arrays = [np.array(ids) % vocabulary for ids in sequences]
    packed = TokenIds.of(arrays, vocabulary)
    assert packed.bytes_each == (2 if vocabulary <= 65_536 else 4)
    found = packed.sequences([len(ids) - 1 for ids in sequences])
    assert len(found) == len(arrays)
    for ids, wanted in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(ids, wanted)


@pytest.mark.parametrize("ids", [[512], [-1]])
def test_an_id_outside_the_vocabulary_is_refused(ids: list[int]) -> None:
    with pytest.raises(FrameError, match="in a vocabulary of 512"):
        TokenIds.of([np.array(ids)], 512)


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FrameError, match="3 token ids do not fit samples of 3 tokens"):
        TokenIds.of([np.array([1, 2, 3])], 512).sequences([3])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"token_bytes": 3}, "token ids of 3 bytes, not 2 or 4"),
        ({"token_bytes": 4}, "inflates to"),
        ({"token_bytes": ...}, "inflates to"),
        ({"token_bytes": True}, "token_bytes is True"),
    ],
)
def test_lies_about_token_ids_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(FrameError, match=complaint):
        decode_frame(changed(encode_frame(language_frame()), **changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"supervised_from": [0, 3]}, "supervised_from is not a whole number below"),
        ({"supervised_from": [0]}, "not one of each per sample"),
        ({"supervised_from": [0, -1]}, "supervised_from is not a whole number below"),
        ({"supervised_from": [0, True]}, "supervised_from is not a whole number below"),
        ({"targets": [0.5]}, "not one of each per sample"),
        ({"targets": [float("nan"), None]}, "a target is neither empty nor a number"),
        ({"targets": [1e7, None]}, "a target is neither empty nor a number"),
        ({"targets": ["1", None]}, "a target is neither empty nor a number"),
    ],
)
def test_lies_about_targets_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(FrameError, match=complaint):
        decode_frame(changed_samples(encode_frame(language_frame()), **changes))


def test_pooled_taps_have_no_token_ids() -> None:
    frame = replace(pooled_frame(), token_ids=TokenIds.of([np.array([1] * 148)], 512))
    with pytest.raises(FrameError, match="token ids in pooled mode"):
        encode_frame(frame)


LANGUAGE = TapPlan(1, (), 3, mode="sequence", rank=32, task="causal-lm", last_rank=48, last_codec="int8", context_every=4)


def test_the_last_layer_has_a_width_and_a_codec_of_its_own() -> None:
    assert TapPlan.from_bytes(LANGUAGE.to_bytes()) == LANGUAGE
    assert [(LANGUAGE.width_at(layer, 6, 768), LANGUAGE.codec_at(layer, 6)) for layer in LANGUAGE.taps(6)] == [
        (32, "int4"), (32, "int4"), (48, "int8"),
    ]  # fmt: skip
    assert [LANGUAGE.width_at(layer, 6, 40) for layer in LANGUAGE.taps(6)] == [32, 32, 40]
    assert LANGUAGE.width_at(6, 6, 16) == 16


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"labels": ("a", "b")}, "2 labels, but the task causal-lm has none"),
        ({"mode": "pooled"}, "causal-lm needs mode sequence and a last_rank, not mode pooled"),
        ({"last_rank": 0}, "not mode sequence and last_rank 0"),
        ({"task": "poetry"}, "task is 'poetry'"),
        ({"context_every": -1}, "context_every is -1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(FrameError, match=re.escape(complaint)):
        TapPlan.from_bytes(replace(LANGUAGE, **changes).to_bytes())  # type: ignore[arg-type]
