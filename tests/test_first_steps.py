"""The table of limits: each fires once its time is over, with a hint, and not before."""

from __future__ import annotations

import pytest

from side_tuning.first_steps import LIMITS, ORDER, WORDS, Limit, in_words, overdue


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: f"{limit.step}-after-{limit.after}")
def test_a_step_is_overdue_once_its_time_is_over(limit: Limit):
    times = {limit.after: 1000.0}
    assert overdue(times, {limit.step}, 1000.0 + limit.seconds, "kitchen") == []
    (late,) = overdue(times, {limit.step}, 1001.0 + limit.seconds, "kitchen")
    assert (late.step, late.after, late.waited_seconds) == (limit.step, limit.after, limit.seconds + 1)
    assert late.words.startswith(f"“{WORDS[limit.step]}” did not come within {in_words(limit.seconds)} after “{WORDS[limit.after]}”: ")
    assert "{" not in late.hint
    assert overdue({**times, limit.step: None}, {limit.step}, 1e9, "kitchen") == [], "it came"
    assert overdue(times, set(), 1e9, "kitchen") == [], "nobody waits for it"
    assert overdue({limit.after: None}, {limit.step}, 1e9, "kitchen") == [], "nobody knows since when"


def test_the_nearest_step_before_is_what_counts():
    """Approved just now after a week of waiting: the device has its ten minutes."""
    times = {"claimed": 0.0, "asked": 100.0, "approved": 600_000.0}
    assert overdue(times, {"enrolled"}, 600_100.0, "kitchen") == []
    assert overdue(times, {"enrolled"}, 600_601.0, "kitchen")[0].after == "approved"


def test_the_steps_before_one_that_is_waited_for_stand_before_it():
    other_way = {("backbone", "seen")}  # a backbone that is fetched comes after the first message, one on the card before it
    assert {(limit.step, limit.after) for limit in LIMITS if ORDER.index(limit.after) >= ORDER.index(limit.step)} == other_way


def test_limits_in_words():
    assert [in_words(seconds) for seconds in (60, 300, 3600, 86_400)] == ["1 minute", "5 minutes", "1 hour", "24 hours"]
