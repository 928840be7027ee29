"""Samples from files and folders: identities that survive re-reading, clear refusals, bounded reading."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.sample_files import FileSource, FolderSource
from edge_agent.samples import Refusal, RowError, Sample, label_index, open_sources, target_of
from edge_agent.settings import FileSourceSettings, FolderSourceSettings


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def unseen(_: str) -> bool:
    return False


def write_rows(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def read_all(source: FileSource | FolderSource) -> tuple[list[Sample], list[Refusal]]:
    items: list[Sample | Refusal] = []
    for _ in range(100_000):
        items += source.poll(64)
        if source.exhausted:
            break
    else:
        raise AssertionError("the source does not end")
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Refusal)]


def read_file(path: Path, seen: Any = unseen, **options: Any) -> tuple[list[Sample], list[Refusal]]:
    return read_all(FileSource(FileSourceSettings(kind="file", path=path, **options), path.name, seen))


ROWS = [
    {"text": "turn on the light", "label": "light_on"},
    {"text": "turn on the light", "label": "light_on"},
    {"text_a": "it is warm", "text_b": "it is cold", "label": 0},
    {"text": "no label"},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz"])
def test_json_lines_become_samples(tmp_path: Path, name: str) -> None:
    samples, refusals = read_file(write_rows(tmp_path / name, ROWS))
    assert [(s.text, s.label) for s in samples] == [
        ("turn on the light", "light_on"), ("turn on the light", "light_on"), (("it is warm", "it is cold"), 0), ("no label", None),
    ]
    assert refusals == []
    assert len({s.id for s in samples}) == 4
    assert all(len(s.id) == 32 and int(s.id, 16) >= 0 for s in samples)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_becomes_samples(tmp_path: Path, name: str, delimiter: str) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["label", "text"], ["a", "one, two; three\tfour"], ["", 'quoted "word"\nsecond line'], ["b", "last"]])
    path = tmp_path / name
    path.write_bytes(gzip.compress(out.getvalue().encode()) if name.endswith("gz") else b"\xef\xbb\xbf" + out.getvalue().encode())
    samples, refusals = read_file(path)
    assert [(s.text, s.label) for s in samples] == [("one, two; three\tfour", "a"), ('quoted "word"\nsecond line', None), ("last", "b")]
    assert refusals == []


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5).filter(lambda t: t.strip() != "")
rows = st.lists(st.fixed_dictionaries({"text": st.sampled_from(["a", "b"]) | texts, "label": st.none() | st.integers(0, 3)}), max_size=40)


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(0, 40), st.booleans())
def test_identical_rows_are_distinct_and_reading_again_gives_the_same_ids(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], stopped_after: int, grows: bool,
) -> None:
    path = write_rows(tmp_path_factory.mktemp("rows") / "a.jsonl", rows)
    first, _ = read_file(path)
    ids = [s.id for s in first]
    assert len(ids) == len(set(ids)) == len(rows)
    assert [s.id for s in read_file(path)[0]] == ids
    taken = set(ids[:stopped_after])
    if grows:
        write_rows(path, [*rows, *rows[:3]])
    rest = [s.id for s in read_file(path, taken.__contains__)[0]]
    assert not taken & set(rest)
    assert len(taken) + len(rest) == len(rows) + (len(rows[:3]) if grows else 0)
    assert rest[: len(ids) - len(taken)] == ids[stopped_after:]


def test_own_ids_stay_when_the_content_moves_and_repeats_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"id": "x", "text": "one"}, {"id": 7, "text": "two"}, {"id": "x", "text": "three"}])
    samples, refusals = read_file(path)
    assert [s.text for s in samples] == ["one", "two"]
    assert refusals[0].reason == "repeated id"
    assert f"{path}:3" in refusals[0].detail
    other, _ = read_file(write_rows(tmp_path / "b.jsonl", [{"id": "x", "text": "changed"}]))
    assert other[0].id == samples[0].id


BAD_ROWS = [
    ('{"text": "half', "broken row", "JSON"),
    ("[1, 2]", "broken row", "object"),
    ("[" * 100_000, "broken row", "JSON"),
    ('{"label": 1}', "no text", "columns"),
    ('{"text": "  "}', "no text", "empty"),
    ('{"text": 5}', "wrong field", "quotation marks"),
    ('{"text": "\\ud800"}', "wrong field", "surrogate"),
    ('{"text_a": "only one"}', "wrong field", "text_b"),
    ('{"text": "x", "text_a": "y", "text_b": "z"}', "wrong field", "both"),
    ('{"text": "x", "label": [1]}', "wrong field", "label"),
    ('{"text": "x", "label": true}', "wrong field", "label"),
    ('{"text": "x", "split": "test"}', "wrong field", "held-out"),
    ('{"text": "x", "id": []}', "wrong field", "id"),
    ('{"text": "' + "x" * 1_100_000 + '"}', "row too long", "cut it"),
    ('{"text": "x", "label": ' + "9" * 5000 + "}", "broken row", "JSON"),
]


@pytest.mark.parametrize(("bad", "reason", "cure"), BAD_ROWS)
def test_a_bad_row_is_refused_once_and_the_rest_is_read(tmp_path: Path, bad: str, reason: str, cure: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "before"}, bad, {"text": "after"}])
    samples, refusals = read_file(path)
    assert [s.text for s in samples] == ["before", "after"]
    assert [r.reason for r in refusals] == [reason]
    assert f"{path}:2" in refusals[0].detail
    assert cure in refusals[0].detail
    assert len(refusals[0].detail) < 400
    assert read_file(path, {refusals[0].id}.__contains__)[1] == []


def test_wrong_encodings_are_refused_with_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n{"text": "fine"}\n')
    samples, refusals = read_file(path)
    assert [s.text for s in samples] == ["ok", "fine"]
    assert refusals[0].reason == "not UTF-8"
    assert "iconv" in refusals[0].detail
    wide = tmp_path / "wide.csv"
    wide.write_bytes("text,label\nx,y\n".encode("utf-16"))
    samples, refusals = read_file(wide)
    assert samples == []
    assert "UTF-16" in refusals[0].detail


def test_csv_troubles_are_refused_with_line_and_cure(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\nok,1\ntoo,many,fields\n"never closed,1\nstill fine,2\n"abc"def,3\nend,4\n')
    samples, refusals = read_file(path)
    assert [s.text for s in samples] == ["ok", "still fine", "end"]
    assert sorted(r.detail.split(" ", 1)[0] for r in refusals) == [f"{path}:3:", f"{path}:4:", f"{path}:6:"]
    path.write_text("turn on the light,light_on\nturn it off,light_off\n")
    samples, refusals = read_file(path)
    assert samples == []
    assert refusals[0].reason == "no header"
    assert "add a header" in refusals[0].detail


def test_a_forgotten_quote_does_not_swallow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text\n"open\n' + "".join(f"row {n}\n" for n in range(500)))
    samples, refusals = read_file(path)
    assert [s.text for s in samples] == [f"row {n}" for n in range(500)]
    assert len(refusals) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_damaged_gz_gives_the_rows_before_and_one_message(tmp_path: Path, damage: str) -> None:
    path = write_rows(tmp_path / "a.jsonl.gz", [{"text": f"row {n} {n * 7919}"} for n in range(5000)])
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-6] ^= 0xFF
    else:
        data = bytearray(b"plain text\n")
    path.write_bytes(data)
    samples, refusals = read_file(path)
    assert [s.text for s in samples] == [f"row {n} {n * 7919}" for n in range(len(samples))]
    assert len(samples) == {"cut": len(samples), "flipped": 5000, "not gzip": 0}[damage]
    assert [r.reason for r in refusals] == ["file damaged"]
    assert "copy the file again" in refusals[0].detail


def test_a_missing_file_is_told_once_and_read_when_it_comes(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "a.jsonl"
    source = FileSource(FileSourceSettings(kind="file", path=path), "a", unseen, monotonic=clock)
    told: list[Any] = []
    for _ in range(10):
        told += source.poll(10)
        clock.now += 6
    assert [t.reason for t in told] == ["file missing"]
    assert str(path) in told[0].detail
    assert not source.exhausted
    write_rows(path, [{"text": "here"}])
    assert [s.text for s in read_all(source)[0]] == ["here"]


def test_a_followed_file_is_read_as_it_grows_and_through_truncation_and_rotation(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "a.jsonl"
    source = FileSource(FileSourceSettings(kind="file", path=path, follow=True), "a", unseen, monotonic=clock)

    def new_texts() -> list[Any]:
        found: list[Any] = []
        for _ in range(5):
            clock.now += 6
            found += [item.text if isinstance(item, Sample) else item.reason for item in source.poll(10)]
        return found

    write_rows(path, [{"text": "one"}])
    assert new_texts() == ["one"]
    with path.open("a") as file:
        file.write('{"text": "tw')
        file.flush()
        assert new_texts() == []
        file.write('o"}\n')
    assert new_texts() == ["two"]
    write_rows(path, [{"text": "3"}])
    assert new_texts() == ["3"]
    path.unlink()
    assert new_texts() == ["file missing"]
    write_rows(path, [{"text": "3"}, {"text": "four"}])
    assert new_texts() == ["four"]
    assert not source.exhausted


def test_a_folder_gives_new_and_changed_files_once_they_stand_still(tmp_path: Path) -> None:
    clock = Clock()
    source = FolderSource(FolderSourceSettings(kind="folder", path=tmp_path / "in"), "in", unseen, monotonic=clock)

    def new_texts() -> list[Any]:
        found: list[Any] = []
        for _ in range(20):
            clock.now += 6
            found += [item.text if isinstance(item, Sample) else item.reason for item in source.poll(10)]
        return found

    assert new_texts() == ["file missing"]
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "b.jsonl", [{"text": "b1"}])
    write_rows(tmp_path / "in" / "a.csv", ["text", "a1"])
    (tmp_path / "in" / "notes.txt").write_text("not samples")
    write_rows(tmp_path / "in" / ".c.jsonl.tmp", [{"text": "hidden"}])
    assert new_texts() == ["a1", "b1"]
    write_rows(tmp_path / "in" / "0.jsonl.gz", [{"text": "b1"}])
    write_rows(tmp_path / "in" / "b.jsonl", [{"text": "b1"}, {"text": "b2"}])
    assert new_texts() == ["b1", "b2"]
    assert not source.exhausted


def test_a_folder_that_is_not_followed_ends(tmp_path: Path) -> None:
    for n in range(3):
        write_rows(tmp_path / f"{n}.jsonl", [{"text": f"{n}"}, {"text": "same in all"}])
    options = FolderSourceSettings(kind="folder", path=tmp_path, follow=False)
    samples, _ = read_all(FolderSource(options, "in", unseen))
    assert len(samples) == len({s.id for s in samples}) == 6
    empty = tmp_path / "empty"
    empty.mkdir()
    assert read_all(FolderSource(FolderSourceSettings(kind="folder", path=empty, follow=False), "in", unseen)) == ([], [])


def test_splits_come_from_the_row_or_the_settings_or_a_stable_fraction(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"t{n}"} for n in range(2000)] + [{"text": "x", "split": "held-out"}])
    assert {s.split for s in read_file(path)[0][:-1]} == {"train"}
    assert read_file(path)[0][-1].split == "held-out"
    assert {s.split for s in read_file(path, split="held-out")[0]} == {"held-out"}
    held_out = [s.id for s in read_file(path, held_out_fraction=0.2)[0] if s.split == "held-out"]
    assert 320 < len(held_out) < 480
    assert held_out == [s.id for s in read_file(path, held_out_fraction=0.2)[0] if s.split == "held-out"]


def test_columns_and_labels_can_be_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"sentence": "good", "y": 1}, {"sentence": "bad", "y": "neg"}, {"sentence": "?", "y": 2}])
    samples, refusals = read_file(path, columns={"text": "sentence", "label": "y"}, labels=("neg", "pos"))
    assert [(s.text, s.label) for s in samples] == [("good", "pos"), ("bad", "neg")]
    assert refusals[0].reason == "unknown label"
    samples, _ = read_file(path, columns={"text": "sentence", "label": "y"}, send_labels=False)
    assert [s.label for s in samples] == [None, None, None]


def test_labels_resolve_by_name_first_then_by_number() -> None:
    assert label_index(None, ("a",)) is None
    assert label_index("b", ("a", "b")) == 1
    assert label_index(1, ("a", "b")) == 1
    assert label_index("1", ("a", "b")) == 1
    assert label_index("1", ("5", "1", "x")) == 1
    for unknown in ("c", 2, -1, "99999999999999999999"):
        with pytest.raises(RowError, match="not among"):
            label_index(unknown, ("a", "b"))


def test_targets_of_a_regression_are_finite_numbers():
    assert [target_of(label) for label in (None, 4, 4.5, "4.5", "-1e3")] == [None, 4.0, 4.5, 4.5, -1000.0]
    for wrong in ("high", "nan", float("inf"), 1e7, ""):
        with pytest.raises(RowError, match="columns = ") as found:
            target_of(wrong)
        assert found.value.reason == "no number"
    with pytest.raises(RowError, match="not among the plan's"):
        label_index(4.5, ("a", "b", "c", "d", "e"))


def test_a_number_may_stand_in_a_column_of_its_own_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text_a": "a man runs", "text_b": "he is running", "score": 4.6}\n')
    [source] = open_sources([FileSourceSettings(kind="file", path=tmp_path / "rows.jsonl", columns={"label": "score"})], lambda _: False, state_directory=tmp_path)
    [sample] = source.poll(10)
    assert (sample.text, sample.label) == (("a man runs", "he is running"), 4.6)
    source.close()


def test_a_source_keeps_its_pace(tmp_path: Path) -> None:
    clock, path = Clock(), write_rows(tmp_path / "a.jsonl", [{"text": f"t{n}"} for n in range(1000)])
    source = FileSource(FileSourceSettings(kind="file", path=path, rate_per_second=4.0), "a", unseen, monotonic=clock)
    taken = 0
    for _ in range(100):
        clock.now += 0.1
        taken += len(source.poll(16))
    assert 38 <= taken <= 42
    clock.now += 3600
    assert len(source.poll(16)) <= 4


def test_polls_stay_short_while_old_rows_are_skipped(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"t{n}"} for n in range(9000)] + [{"text": "new"}])
    ids = {s.id for s in read_file(path)[0][:-1]}
    source = FileSource(FileSourceSettings(kind="file", path=path), "a.jsonl", ids.__contains__)
    polls = 0
    found: list[Any] = []
    while not source.exhausted:
        found += source.poll(64)
        polls += 1
    assert [s.text for s in found] == ["new"]
    assert polls >= 5


def test_two_files_of_one_name_hold_different_samples(tmp_path: Path) -> None:
    entries = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        entries.append(FileSourceSettings(kind="file", path=write_rows(tmp_path / folder / "a.jsonl", [{"text": "same"}])))
    sources = open_sources(entries, unseen, state_directory=tmp_path)
    ids = {item.id for source in sources for item in source.poll(4)}
    assert len(ids) == 2
    for source in sources:
        source.close()


MEMORY_PROGRAM = """
import resource, sys
from pathlib import Path
from edge_agent.sample_files import FileSource
from edge_agent.settings import FileSourceSettings
source = FileSource(FileSourceSettings(kind="file", path=Path(sys.argv[1])), "a", lambda _: False)
rows = 0
source.poll(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
while not source.exhausted:
    rows += len(source.poll(64))
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in kilobytes, as Linux gives it")
def test_a_large_file_streams_in_little_memory(tmp_path: Path) -> None:
    """60 MB of rows (and one line of 30 MB) cost a few MB: the file is never held."""
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for n in range(60_000):
            file.write(json.dumps({"text": f"row {n} " + "x" * 1000}) + "\n")
        file.write("y" * 30_000_000 + "\n")
    done = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM, str(path)], capture_output=True, text=True, check=True)
    rows, kilobytes = map(int, done.stdout.split())
    assert rows == 60_000
    assert kilobytes < 16_000


def test_an_empty_file_is_told_and_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_file(write_rows(tmp_path / "a.jsonl", [])) == ([], [])
    assert [record.message for record in caplog.records if record.levelname == "WARNING" and "is empty; put rows in it" in record.message]


def test_a_sample_knows_its_place(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    assert [sample.where for sample in read_file(path)[0]] == [f"{path}:1", f"{path}:2"]
