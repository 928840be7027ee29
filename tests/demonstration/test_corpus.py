"""The shipped corpus is what its generator makes, and it asks for more than counting words."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from coordinator.demonstration import corpus
from coordinator.demonstration.phrases import PHRASES, SLOTS, UNSEEN_SLOTS


def read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return corpus.generate()


def test_the_shipped_files_are_what_the_generator_makes(rows):
    assert read(corpus.TRAIN_FILE) == rows[0]
    assert read(corpus.TEST_FILE) == rows[1]


def test_another_seed_makes_another_corpus(rows):
    assert corpus.generate(seed=1)[0] != rows[0]


def test_no_text_comes_twice(rows):
    texts = [row["text"] for part in rows for row in part]
    assert len(set(texts)) == len(texts) == corpus.TRAIN_ROWS + corpus.TEST_ROWS


def test_every_intent_is_trained_and_measured(rows):
    assert len(corpus.INTENTS) >= 14
    for part, least in zip(rows, (80, 10), strict=True):
        count = Counter(row["label"] for row in part)
        assert set(count) == set(corpus.INTENTS)
        assert min(count.values()) >= least


def test_people_have_unlike_habits(rows):
    by_user: dict[str, Counter[str]] = {}
    for row in rows[0]:
        by_user.setdefault(row["user"], Counter())[row["label"]] += 1
    assert len(by_user) == corpus.USERS
    favourites = {user: count.most_common(1)[0] for user, count in by_user.items()}
    assert all(times > 30 for _, times in favourites.values())
    assert len({intent for intent, _ in favourites.values()}) >= 8


def test_some_phrasings_and_words_are_only_in_the_test_rows(rows):
    known = {word for row in rows[0] for word in row["text"].split()}
    new = sum(any(word not in known for word in row["text"].split()) for row in rows[1])
    assert 0.2 < new / len(rows[1]) < 0.6


def test_every_slot_in_a_phrasing_is_defined():
    for text in PHRASES.values():
        for part in text.split("{")[1:]:
            assert part.split("}")[0] in SLOTS
    assert set(UNSEEN_SLOTS) <= set(SLOTS)
    assert not any(set(UNSEEN_SLOTS[slot].split("|")) & set(SLOTS[slot].split("|")) for slot in UNSEEN_SLOTS)


def test_counting_words_is_not_enough(rows):
    """A naive Bayes classifier over words stays well below what a sentence encoder reaches (about 91 %)."""
    import math

    words = {intent: Counter(w for r in rows[0] if r["label"] == intent for w in set(r["text"].split())) for intent in corpus.INTENTS}
    seen = Counter(row["label"] for row in rows[0])

    def guess(text: str) -> str:
        return max(
            corpus.INTENTS,
            key=lambda i: math.log(seen[i]) + sum(math.log((words[i][w] + 0.2) / (seen[i] + 0.4)) for w in text.split()),
        )

    accuracy = sum(guess(row["text"]) == row["label"] for row in rows[1]) / len(rows[1])
    assert 0.7 < accuracy < 0.88
