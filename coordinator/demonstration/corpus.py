"""Generates the demonstration's corpus: original spoken smart-home commands, noisy, by twenty people with unlike habits.

`python -m coordinator.demonstration.corpus` rewrites the two shipped files; a test checks that they are what this
module makes. Every random choice comes from `Random.random()`, whose sequence for a seed Python guarantees.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

from coordinator.demonstration.phrases import PHRASES, SLOTS, UNSEEN_SLOTS

SEED = 20_250
TRAIN_ROWS = 4_000
TEST_ROWS = 800
USERS = 20
FOLDER = Path(__file__).parent
TRAIN_FILE = FOLDER / "home_commands_train.jsonl.gz"
TEST_FILE = FOLDER / "home_commands_test.jsonl.gz"
INTENTS = tuple(PHRASES)

# Share of test rows whose phrasing, and of those with a slot whose words, training has never seen.
UNSEEN_PHRASINGS = 0.2
UNSEEN_WORDS = 0.6

_OPENERS = ("hey home", "okay house", "home", "listen", "hello", "right", "so", "well", "alright then", "oh and")
_POLITE_BEFORE = ("please", "would you please", "be so kind and", "could you maybe", "i'd be glad if you could")
_POLITE_AFTER = ("please", "thank you", "thanks", "if you don't mind", "would you", "if that's alright")
_FILLERS = ("um", "uh", "er", "like", "you know", "i mean", "hmm", "let me think", "sort of")
_ASIDES = (
    "before i forget", "just quickly", "when you get a chance", "as always", "one more thing", "for a change",
    "right now", "and be quick about it", "i think", "that would be nice", "we talked about it yesterday",
)

# What a speech recogniser makes of a word now and then.
_MISHEARD = {
    "light": "lite", "lights": "lice", "lamp": "lump", "blinds": "blind", "shades": "shapes", "curtains": "certain",
    "lock": "look", "unlock": "and look", "door": "dough", "alarm": "a lamb", "timer": "time are", "wake": "way",
    "play": "plate", "volume": "volumes", "louder": "ladder", "dim": "them", "heating": "eating", "warmer": "warm her",
    "to": "two", "for": "four", "at": "it", "the": "a", "in": "and", "off": "of", "on": "and", "up": "a", "set": "said",
    "eight": "ate", "remind": "rewind", "milk": "mill", "vacuum": "back you", "clean": "keen", "weather": "whether",
    "rain": "train", "degrees": "the grease", "room": "broom", "kitchen": "chicken", "stop": "shop", "music": "muse",
}
_DROPPED = {"the", "a", "to", "in", "at", "is", "please", "of", "for", "it", "i", "my"}

T = TypeVar("T")


@dataclass(frozen=True)
class Speaker:
    """One person: how they speak, and what they mostly ask for (descending by weight)."""

    name: str
    favourites: tuple[tuple[str, float], ...]
    rooms: tuple[str, ...]
    opener: str
    uses_opener: float
    polite: float
    hesitant: float
    talkative: float
    misheard: float
    clipped: float  # drops small words
    rearranges: float


def _pick(random: Random, choices: Sequence[T]) -> T:
    return choices[int(random.random() * len(choices))]


def _shuffled(random: Random, items: Sequence[T]) -> list[T]:
    left = list(items)
    return [left.pop(int(random.random() * len(left))) for _ in items]


def _speaker(random: Random, index: int) -> Speaker:
    # Weight 1/rank^1.1 over a personal order: a few intents make half of what a person says, none is impossible.
    order = _shuffled(random, INTENTS)
    return Speaker(
        name=f"speaker-{index + 1:02d}",
        favourites=tuple((intent, (rank + 1) ** -1.1) for rank, intent in enumerate(order)),
        rooms=tuple(_shuffled(random, SLOTS["room"].split("|"))[:4]),
        opener=_pick(random, _OPENERS),
        uses_opener=random.random() * 0.6,
        polite=random.random() * 0.6,
        hesitant=random.random() * 0.4,
        talkative=random.random() * 0.3,
        misheard=0.05 + random.random() * 0.35,
        clipped=random.random() * 0.5,
        rearranges=random.random() * 0.2,
    )


def _phrasings(intent: str, *, unseen: bool) -> tuple[str, ...]:
    lines = [line.strip() for line in PHRASES[intent].strip().splitlines()]
    return tuple(line.removeprefix("~") for line in lines if line.startswith("~") == unseen)


def _expand(random: Random, phrasing: str, speaker: Speaker, *, unseen_words: bool) -> str:
    def choose(match: re.Match[str]) -> str:
        return _pick(random, match[1].split("|"))

    def fill(match: re.Match[str]) -> str:
        slot = match[1]
        if unseen_words and slot in UNSEEN_SLOTS:
            return _pick(random, UNSEEN_SLOTS[slot].split("|"))
        if slot == "room" and random.random() < 0.6:
            return _pick(random, speaker.rooms)
        return _pick(random, SLOTS[slot].split("|"))

    # Slots first: a choice may hold a slot.
    return re.sub(r"\(([^()]*)\)", choose, re.sub(r"\{(\w+)\}", fill, phrasing))


def _mishear(random: Random, word: str, speaker: Speaker) -> str:
    if word in _MISHEARD and random.random() < speaker.misheard * 0.3:
        return _MISHEARD[word]
    if word in _DROPPED and random.random() < speaker.clipped * 0.35:
        return ""
    if len(word) > 4 and random.random() < speaker.misheard * 0.06:
        return word[:-1]  # the end was swallowed
    if random.random() < speaker.hesitant * 0.06:
        return f"{word} {word}"
    return word


def _speak(random: Random, text: str, speaker: Speaker) -> str:
    """The command as this person says it and a recogniser writes it down."""
    words = text.split()
    if len(words) > 5 and random.random() < speaker.rearranges:
        # "in the kitchen" and the like come first
        for start in range(2, len(words) - 1):
            if words[start] in ("in", "at", "on", "for", "by", "to") and words[start - 1] not in ("turn", "put", "switch"):
                words = words[start:] + words[:start]
                break
    words = [_mishear(random, word, speaker) for word in words]
    if random.random() < speaker.hesitant:
        words.insert(int(random.random() * (len(words) + 1)), _pick(random, _FILLERS))
    if random.random() < speaker.polite:
        if random.random() < 0.5:
            words.insert(0, _pick(random, _POLITE_BEFORE))
        else:
            words.append(_pick(random, _POLITE_AFTER))
    if random.random() < speaker.talkative:
        aside = _pick(random, _ASIDES)
        words = [aside, *words] if random.random() < 0.5 else [*words, aside]
    if random.random() < speaker.uses_opener:
        words.insert(0, speaker.opener)
    return re.sub(r"\s+", " ", " ".join(words)).strip()


def _choose_intent(random: Random, speaker: Speaker) -> str:
    point = random.random() * sum(weight for _, weight in speaker.favourites)
    for intent, weight in speaker.favourites:
        point -= weight
        if point < 0:
            return intent
    return speaker.favourites[-1][0]


def generate(seed: int = SEED) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The train and the test rows: `text`, `label`, `user`. No text comes twice, within a set or across them."""
    random = Random(seed)  # noqa: S311 - made to be repeatable, not secret
    speakers = [_speaker(random, index) for index in range(USERS)]
    said: set[str] = set()
    sets: list[list[dict[str, str]]] = []
    for rows, is_test in ((TRAIN_ROWS, False), (TEST_ROWS, True)):
        chosen: list[dict[str, str]] = []
        while len(chosen) < rows:
            speaker = speakers[len(chosen) % USERS]
            intent = _choose_intent(random, speaker)
            phrasing = _pick(random, _phrasings(intent, unseen=is_test and random.random() < UNSEEN_PHRASINGS))
            unseen_words = is_test and random.random() < UNSEEN_WORDS
            text = _speak(random, _expand(random, phrasing, speaker, unseen_words=unseen_words), speaker)
            if text not in said:
                said.add(text)
                chosen.append({"text": text, "label": intent, "user": speaker.name})
        sets.append(_shuffled(random, chosen))
    return sets[0], sets[1]


def _compressed(rows: Sequence[dict[str, str]]) -> bytes:
    raw = io.BytesIO()
    # No time and no name in the gzip header: the same rows give the same file.
    with gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=9, mtime=0) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return raw.getvalue()


def main() -> None:
    """Write the two shipped files."""
    for path, rows in zip((TRAIN_FILE, TEST_FILE), generate(), strict=True):
        path.write_bytes(_compressed(rows))
        print(f"{path.name}: {len(rows)} rows, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
