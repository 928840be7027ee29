"""Anchors: the maths against a slow reference, the file of texts, and what they are worth on real backbones."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.backbone_library import keep_artifact
from coordinator.demonstration.data import load_dataset, set_anchors_aside, write_anchors
from coordinator.store.engine import Store
from coordinator.training.anchors import (
    RIDGE,
    AnchorError,
    Anchors,
    AnchorTaps,
    compute_anchor_taps,
    digest_of,
    fit_anchor_map,
    fit_to,
    main_directions,
    read_texts,
)
from coordinator.training.reference import Activations, AnchorMaps, train_centrally
from coordinator.training.settings import TrainingSettings
from coordinator.training.trainer import open_training
from side_tuning.backbone_manifest import read_manifest
from side_tuning.wire.messages import Mode, TapPlan
from tests.training.small_fleet import plan, prepare, settings

torch.set_num_threads(1)
TEXTS = [f"turn on lamp number {n}" for n in range(60)]


def texts_file(folder: Path, lines: list[str], name: str = "anchors.txt") -> Path:
    file = folder / name
    content = "".join(f"{line}\n" for line in lines).encode()
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return file


# The maths.


@pytest.mark.parametrize("rows", [9, 40])  # the dual system, and the primal one
def test_a_map_is_the_ridge_regression_of_its_definition(rows: int) -> None:
    generator = np.random.default_rng(rows)
    taps = generator.normal(3.0, 2.0, (rows, 2, 7)).astype(np.float32)
    target = generator.normal(size=(rows, 2, 3)).astype(np.float32)
    anchor_map = fit_anchor_map(taps, target)
    x = ((taps - taps.mean(0)) / taps.std(0)).reshape(rows, 14).astype(np.float64)
    # Ridge as least squares with rows of its own for the penalty.
    penalty = np.sqrt(RIDGE * rows) * np.eye(14)
    expected = np.linalg.lstsq(np.vstack([x, penalty]), np.vstack([target.reshape(rows, 6), np.zeros((14, 6))]), rcond=None)[0]
    assert np.allclose(anchor_map.matrix.float().numpy(), expected, atol=2e-3)
    shared = anchor_map(torch.from_numpy(taps)).numpy()
    assert np.allclose(shared.reshape(rows, 6), x @ expected, atol=2e-2)


def test_main_directions_are_those_of_the_largest_variance() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 2, 6)) @ np.random.default_rng(1).normal(size=(6, 6))
    reduced = main_directions(rows.astype(np.float32), 3)
    for b in range(2):
        x = (rows[:, b] - rows[:, b].mean(0)) / rows[:, b].std(0)
        _, values, directions = np.linalg.svd(x, full_matrices=False)
        expected = x @ directions[:3].T
        expected /= np.sqrt((expected**2).mean())
        assert np.isclose((reduced[:, b] ** 2).mean(), 1.0, atol=1e-4)
        assert np.allclose(np.abs(reduced[:, b]), np.abs(expected), atol=1e-2)
        assert values[0] > values[-1]
    assert main_directions(rows[:4].astype(np.float32), 6).shape == (4, 2, 3)  # no more directions than rows give


def test_means_per_text() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(6, 1, 2)
    means = AnchorTaps(rows, (1, 3, 2)).per_text()
    assert np.array_equal(means[:, 0], [rows[0, 0], rows[1:4, 0].mean(0), rows[4:, 0].mean(0)])


# The file.


@pytest.mark.parametrize("name", ["anchors.txt", "anchors.jsonl.gz"])
def test_texts_are_read_once_each_plain_or_as_rows(tmp_path: Path, name: str) -> None:
    rows = [json.dumps({"text_a": "is it on", "text_b": "yes"}), json.dumps({"text": "off", "label": 1}), "", TEXTS[0], *TEXTS]
    assert read_texts(texts_file(tmp_path, rows, name)) == [("is it on", "yes"), "off", *TEXTS]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (TEXTS[:49] * 3, "has 49 different texts; give at least 50"),
        ([*TEXTS, '{"text": '], "line 61: no text"),
        ([*TEXTS, '{"text": 5}'], "line 61: no text"),
        ([*TEXTS, '{"text": ["a"]}'], "line 61: no text"),
        ([*TEXTS, '{"text_a": "only one"}'], "line 61: no text"),
    ],
)
def test_files_without_enough_good_texts_are_refused(tmp_path: Path, lines: list[str], why: str) -> None:
    with pytest.raises(AnchorError, match=why):
        read_texts(texts_file(tmp_path, lines))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    cut = texts_file(tmp_path, TEXTS, "cut.gz")
    cut.write_bytes(cut.read_bytes()[:40])
    plain = tmp_path / "plain.gz"
    plain.write_text("no gzip")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9\n")
    for file in (tmp_path / "absent.txt", tmp_path, cut, plain, latin):
        with pytest.raises(AnchorError, match=f"{file.name} cannot be read"):
            digest_of(file)


def test_other_texts_begin_a_new_run_and_wrong_ones_leave_the_run_as_it_is(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(store)
    file = texts_file(tmp_path, TEXTS)
    chosen = settings(tmp_path, anchors_file=file)

    def run_name() -> str:
        training = open_training(store, chosen, plan())
        training.cache.close()
        return training.run.name

    first = run_name()
    assert "register them again" in caplog.text  # no artifact is at hand: trained as without anchors
    assert run_name() == first
    file.write_text("too few\n")
    with pytest.raises(AnchorError):
        run_name()
    texts_file(tmp_path, TEXTS)
    assert run_name() == first
    texts_file(tmp_path, [*TEXTS, "one more"])
    assert run_name() != first


def test_the_trainer_ends_with_78_and_one_line_where_the_file_is_wrong(store: Store, tmp_path: Path) -> None:
    prepare(store)
    config = tmp_path / "coordinator.toml"
    config.write_text(
        f'data_directory = "{tmp_path}/data"\ndatabase_url = "sqlite:///{tmp_path}/store.db"\n[broker]\nhost = "localhost"\n'
        f'[task]\nlabels = ["light", "music", "door"]\n[training]\nanchors_file = "{tmp_path}/absent.txt"\n'
    )
    command = [sys.executable, "-m", "coordinator.cli", "train", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 78
    assert "absent.txt cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


# Real backbones.


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two and three layers of MiniLM in unlike precision, by fingerprint."""
    from coordinator import backbones
    from tests.backbones.models import minilm_folder

    made = {}
    for layers, weights in ((2, "int8"), (3, "int4")):
        out = tmp_path_factory.mktemp("backbone") / f"minilm-{layers}"
        made[backbones.prepare(minilm_folder(), out, layers=layers, weights=weights, max_tokens=40).fingerprint] = out  # type: ignore[arg-type]
    return made


REAL_PLAN = TapPlan(version=1, labels=("a", "b"), blocks=2, codec="int4", group=32, max_tokens=40, rank=8)


@pytest.fixture
def opened(artifacts: dict[str, Path], tmp_path: Path) -> Callable[..., Anchors | None]:
    for folder in artifacts.values():
        keep_artifact(tmp_path / "data", folder)
    depths = {fingerprint: read_manifest(folder).layers for fingerprint, folder in artifacts.items()}
    return lambda file, tap_plan=REAL_PLAN: Anchors.open(file, tmp_path / "data", tap_plan, tmp_path / "run", width=32, depths=depths)


@pytest.mark.parametrize(("mode", "summary"), [("pooled", False), ("sequence", False), ("sequence", True)])
def test_space_and_maps_are_computed_once(
    artifacts: dict[str, Path], opened: Callable[..., Anchors | None], tmp_path: Path, mode: Mode, summary: bool
) -> None:
    tap_plan = TapPlan(version=1, labels=("a", "b"), blocks=2, codec="int8", mode=mode, max_tokens=40, rank=8, summary=summary)
    file = texts_file(tmp_path, TEXTS)
    first = opened(file, tap_plan)
    assert first is not None
    assert first.width == (32 if mode == "pooled" else 8)
    maps = {fingerprint: first.fit(fingerprint) for fingerprint in artifacts}
    shutil.rmtree(tmp_path / "data")  # from here on, nothing could be computed
    second = opened(file, tap_plan)
    assert second is not None
    for fingerprint, anchor_map in maps.items():
        again = second.fit(fingerprint)
        assert anchor_map is not None
        assert again is not None
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in anchor_map.state_dict().items())
        assert (anchor_map.config.summary_width, anchor_map.config.summary_width_out) == ((384, 32) if summary else (0, 0))
    assert second.fit("ee" * 16) is None


def test_the_summaries_of_anchors_are_their_pooled_taps_and_the_rest_their_tokens(artifacts: dict[str, Path], tmp_path: Path) -> None:
    for folder in artifacts.values():
        keep_artifact(tmp_path / "data", folder)
    plain = TapPlan(version=1, labels=("a", "b"), blocks=2, codec="fp16", mode="sequence", max_tokens=40, rank=20)
    texts: list[object] = list(TEXTS[:60])
    for fingerprint in artifacts:
        with_summary, tokens, pooled = (
            compute_anchor_taps(texts, tmp_path / "data", fingerprint, tap_plan)
            for tap_plan in (replace(plain, summary=True), plain, replace(plain, mode="pooled"))
        )
        assert with_summary.summaries is not None
        assert with_summary.tokens == tokens.tokens
        assert np.array_equal(with_summary.rows, tokens.rows)
        assert np.array_equal(with_summary.summaries, pooled.rows)


def test_unlike_tokenizers_are_fitted_by_the_texts_that_both_have() -> None:
    """Each is cut at a number of token rows, so one may have fewer texts."""
    random = np.random.default_rng(0)
    meaning = random.normal(size=(80, 4))
    views = random.normal(size=(2, 4, 10))
    many, few = random.integers(1, 5, 80), random.integers(1, 5, 60)
    taps, target = (
        AnchorTaps(np.repeat(meaning[: len(tokens)] @ view, tokens, axis=0)[:, None].astype(np.float32), tuple(tokens.tolist()))
        for tokens, view in ((many, views[0]), (few, views[1]))
    )
    whole = AnchorTaps(taps.per_text()[:60].astype(np.float32), (1,) * 60), AnchorTaps(target.per_text().astype(np.float32), (1,) * 60)
    assert torch.equal(fit_to(taps, target).matrix, fit_to(*whole).matrix)
    assert torch.equal(fit_to(target, taps).matrix, fit_to(*reversed(whole)).matrix)


def test_a_damaged_artifact_is_passed_over(
    artifacts: dict[str, Path], opened: Callable[..., Anchors | None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deepest = max(artifacts, key=lambda fingerprint: read_manifest(artifacts[fingerprint]).layers)
    (tmp_path / "data" / "backbones" / deepest / "model.safetensors").write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        anchors = opened(texts_file(tmp_path, TEXTS))
    assert anchors is not None
    assert f"anchors cannot run on backbone {deepest}" in caplog.text
    with pytest.raises(AnchorError, match=deepest):
        anchors.fit(deepest)
    (tmp_path / "run" / "anchor-target.safetensors").write_bytes(b"damaged")
    with pytest.raises(AnchorError, match=r"delete training-run\.json"):
        opened(texts_file(tmp_path, TEXTS))


@pytest.mark.slow
def test_anchors_let_unlike_backbones_teach_each_other_classes_that_they_lack(
    artifacts: dict[str, Path], opened: Callable[..., Anchors | None], tmp_path: Path
) -> None:
    """Each backbone's device holds half of the classes and is measured on all."""
    dataset, texts = set_anchors_aside(load_dataset(), 0)
    file = tmp_path / "anchors.jsonl"
    write_anchors(texts[:300], file)
    anchors = opened(file)
    assert anchors is not None
    number = {label: n for n, label in enumerate(dataset.labels)}
    rows = [*dataset.train[:1000], *dataset.test[:300]]
    labels = np.array([number[row.label] for row in rows])
    classes = len(dataset.labels)
    train, held_out = [], []
    for half, fingerprint in enumerate(artifacts):
        inputs = compute_anchor_taps([row.text for row in rows], tmp_path / "data", fingerprint, REAL_PLAN).rows
        own = np.flatnonzero(labels[:1000] % 2 == half)
        train.append(Activations(f"device-{half}", fingerprint, inputs[own], labels[own]))
        held_out.append(Activations(f"device-{half}", fingerprint, inputs[1000:], labels[1000:]))
    knobs = TrainingSettings(side_width=64, batch_size=64, replay_ratio=15)

    def accuracy(maps: AnchorMaps) -> float:
        return train_centrally(train, held_out, knobs, classes=classes, anchor_maps=maps).score

    fitted = {fingerprint: anchor_map for fingerprint in artifacts if (anchor_map := anchors.fit(fingerprint))}
    without, with_anchors = accuracy({}), accuracy(fitted)
    assert with_anchors > without + 0.15, (with_anchors, without)
