"""Any folder of rows loads or says why not, and dealing it out loses and repeats nothing."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import numpy as np
import pytest

from coordinator.demonstration.data import (
    DataError,
    Dataset,
    Partition,
    Row,
    deal,
    held_out_among,
    load_dataset,
    write_share,
)
from coordinator.demonstration.overlap_rows import write_overlaps


def write(folder, train, test, *, meta=None, compressed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
        if compressed:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.jsonl").write_text(text)
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


ROW = {"text": "hello", "label": 0}


def test_the_shipped_corpus_loads():
    dataset = load_dataset()
    assert len(dataset.train) == 4000
    assert {row.label for row in dataset.train} == set(dataset.labels)
    assert all(row.user for row in dataset.train)


@pytest.mark.parametrize("compressed", [False, True])
def test_numbers_get_the_names_that_meta_gives_them(tmp_path, compressed):
    rows = [{"text": "a", "label": 1, "user": 7}, {"text_a": "b", "text_b": "c", "label": 0}]
    dataset = load_dataset(write(tmp_path / "d", rows, rows, meta={"classes": ["no", "yes"]}, compressed=compressed))
    assert dataset.labels == ("no", "yes")
    assert dataset.train == (Row("a", "yes", "7"), Row(("b", "c"), "no"))


def test_without_names_numbers_sort_as_numbers(tmp_path):
    rows = [{"text": "a", "label": n} for n in (10, 2, 0)]
    assert load_dataset(write(tmp_path, rows, rows, meta={"classes": "none"})).labels == ("0", "2", "10")


def test_names_in_rows_need_no_meta(tmp_path):
    rows = [{"text": "a", "label": name} for name in ("stop", "go")]
    assert load_dataset(write(tmp_path, rows, rows)).labels == ("go", "stop")


@pytest.mark.parametrize(
    ("train", "meta", "said"),
    [
        ([], None, "holds no rows"),
        ([ROW, "{broken\n"], None, "line 2: not JSON"),
        ([ROW, {"label": 0}], None, "line 2: no text"),
        ([ROW, {"text": "  ", "label": 0}], None, "line 2: no text"),
        ([ROW, {"text_a": "x", "label": 0}], None, "line 2: no text"),
        ([ROW, {"text": "x"}], None, "needs a class for every row"),
        ([ROW, "[1]\n"], None, "must be an object"),
        ([ROW, {"text": "x", "label": "a"}], None, "some are names"),
        ([{"text": "x", "label": 5}], {"classes": ["a", "b"]}, "labels reach from 0 to 5"),
        ([ROW], {"classes": ["a", "a"]}, "repeat"),
    ],
)
def test_bad_data_names_the_place_and_the_cure(tmp_path, train, meta, said):
    with pytest.raises(DataError, match=said):
        load_dataset(write(tmp_path, train, [ROW], meta=meta))


def test_an_unknown_class_name_is_told(tmp_path):
    with pytest.raises(DataError, match="'maybe' is not among the classes"):
        load_dataset(write(tmp_path, [{"text": "x", "label": "maybe"}], [{"text": "x", "label": "no"}], meta={"classes": ["no"]}))


def test_a_missing_folder_or_file_is_told(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(DataError, match=r"neither test\.jsonl nor"):
        load_dataset(tmp_path)


def test_a_damaged_archive_is_told(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode())[:-9])
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("text", ["iid", "user", "dirichlet:0.1"])
def test_known_partitions(text):
    assert Partition.parse(text).kind == text.partition(":")[0]


@pytest.mark.parametrize("text", ["", "dirichlet", "dirichlet:", "dirichlet:-1", "dirichlet:nan", "iid:3", "random"])
def test_unknown_partitions_are_told(text):
    with pytest.raises(DataError, match=r"use iid, user, or dirichlet:ALPHA"):
        Partition.parse(text)


@pytest.mark.parametrize("partition", ["iid", "user", "dirichlet:0.1", "dirichlet:100"])
@pytest.mark.parametrize("devices", [1, 4, 8])
def test_every_row_goes_to_exactly_one_device(partition, devices):
    dataset = load_dataset()
    shares = deal(dataset, Partition.parse(partition), devices, seed=3)
    assert len(shares) == devices
    assert Counter(row for share in shares for row in share.train) == Counter(dataset.train)
    assert Counter(row for share in shares for row in share.test) == Counter(dataset.test)
    assert shares == deal(dataset, Partition.parse(partition), devices, seed=3)
    assert devices == 1 or shares != deal(dataset, Partition.parse(partition), devices, seed=4)


def test_users_stay_whole():
    shares = deal(load_dataset(), Partition.parse("user"), 4, seed=0)
    users = [{row.user for row in (*share.train, *share.test)} for share in shares]
    assert sum(map(len, users)) == len(set.union(*users))
    assert {len(share.train) for share in shares} == {1000}


def test_a_small_alpha_skews_the_labels_and_leaves_the_test_rows_alone():
    dataset = load_dataset()

    def rare(rows):
        """Classes of which a device has next to nothing."""
        count = Counter(row.label for row in rows)
        return sum(count[label] < len(rows) / 200 for label in dataset.labels)

    skewed = deal(dataset, Partition.parse("dirichlet:0.1"), 4, seed=0)
    equal = deal(dataset, Partition.parse("iid"), 4, seed=0)
    assert min(rare(share.train) for share in skewed) >= 5
    assert max(rare(share.train) for share in equal) == 0
    assert max(rare(share.test) for share in skewed) <= 1


def test_too_many_devices_are_told():
    rows = tuple(Row(f"row {n}", "a", "one") for n in range(40))
    dataset = Dataset("few", ("a",), rows, rows)
    for partition, said in (("iid", "fewer than 5"), ("dirichlet:0.01", "larger alpha"), ("user", "at most 1 devices")):
        with pytest.raises(DataError, match=said):
            deal(dataset, Partition.parse(partition), 5, seed=0)
    with pytest.raises(DataError, match="at least one"):
        deal(dataset, Partition.parse("iid"), 0, seed=0)


def test_partition_by_user_needs_users():
    rows = tuple(Row(f"row {n}", "a") for n in range(40))
    with pytest.raises(DataError, match="rows without a user"):
        deal(Dataset("few", ("a",), rows, rows), Partition.parse("user"), 2, seed=0)


def test_test_rows_come_up_in_the_first_part_of_the_file(tmp_path):
    share = deal(load_dataset(), Partition.parse("iid"), 4, seed=0)[0]
    samples, held_out = write_share(share, tmp_path, np.random.default_rng(0))
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == len(share.train) + len(share.test)
    assert Counter(row["split"] for row in rows[:450]) == {"train": 250, "held-out": 200}
    assert [json.loads(line)["text"] for line in held_out.read_text().splitlines()] == [row.text for row in share.test]


def test_a_run_cut_short_is_measured_on_the_held_out_rows_that_were_read(tmp_path):
    dataset = load_dataset()
    samples, _ = write_share(deal(dataset, Partition.parse("iid"), 4, 1)[0], tmp_path, np.random.default_rng(1))
    lines = samples.read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines[:100] if '"split": "held-out"' in line]
    assert 0 < len(wanted) < 100
    assert held_out_among(samples, 100, tmp_path / "read.jsonl") == len(wanted)
    assert (tmp_path / "read.jsonl").read_text(encoding="utf-8").splitlines() == wanted
    assert held_out_among(samples, 10**6, tmp_path / "read.jsonl") == sum('"split": "held-out"' in line for line in lines)


def test_pairs_with_numbers_are_a_data_set_for_a_regression(tmp_path):
    """And the numbers that are computed for pairs are what their description says."""
    pairs = [{"text_a": "A man runs home.", "text_b": "a man runs"}, {"text_a": "Rain", "text_b": "Snow"}]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({**pair, "label": 1}) + "\n" for pair in pairs * 20))
    assert write_overlaps(tmp_path, tmp_path / "rated") == 80
    dataset = load_dataset(tmp_path / "rated", "regression")
    assert dataset.labels == ()
    assert {row.label for row in dataset.train} == {3.75, 0.0}
    row = json.loads(dataset.train[1].as_json("train"))
    assert row == {"text_a": "Rain", "text_b": "Snow", "label": 0.0, "split": "train"}, "nought is a number too"
    assert len(deal(dataset, Partition("iid"), 2, 0)) == 2
    with pytest.raises(DataError, match="no labels that could be skewed"):
        deal(dataset, Partition.parse("dirichlet:0.1"), 2, 0)
    with pytest.raises(DataError, match="--task regression learns numbers"):
        load_dataset(tmp_path / "rated")
    with pytest.raises(DataError, match="give --data DIR"):
        load_dataset(None, "regression")


def test_a_word_is_no_number(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "x", "label": "high"}\n')
    with pytest.raises(DataError, match="'high' is no number"):
        load_dataset(tmp_path, "regression")
