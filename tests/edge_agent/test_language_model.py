"""A language model's checkpoint on the device: losses as in training, text from the command line, misfits refused."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coordinator.backbones import prepare
from edge_agent.backbone import Backbone, TextError, read_manifest
from edge_agent.checkpoint_store import CheckpointError, CheckpointStore
from edge_agent.inference import open_predictor
from edge_agent.language_model import open_generator, open_language_model
from edge_agent.taps import compute_taps
from side_tuning.language_head import LanguageHead
from side_tuning.network.files import save_alignment, save_ladder
from side_tuning.network.language import (
    LanguageAlignment,
    LanguageAlignmentConfig,
    LanguageLadder,
    LanguageLadderConfig,
)
from side_tuning.signatures import sign_manifest
from side_tuning.wire.codecs import round_trip
from side_tuning.wire.messages import Blob, CheckpointManifest, TapPlan
from tests.backbones.models import save_random_model, stories_folder, tiny_stories
from tests.edge_agent.artifacts import Checkpoint
from tests.edge_agent.test_cli import edge_agent, install_checkpoint, write_config

PLAN = TapPlan(
    1, (), 3, mode="sequence", codec="int4", rank=16, max_tokens=48, task="causal-lm", last_rank=48, last_codec="int8", context_every=2,
)
SIDE = 32


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "stories"
    prepare(stories_folder(), out, weights="int8", max_tokens=64, calibrate=tiny_stories(60))
    return out


class LanguageCheckpoint(Checkpoint):
    """A side network that says something, signed; `changes` are of the alignment's shape, to make it wrong."""

    def __init__(self, folder: Path, key: Any, generation: int, plan: TapPlan = PLAN, **changes: int):
        backbone, head = read_manifest(folder), LanguageHead.load(folder)
        self.plan = plan
        torch.manual_seed(generation)
        self.language_ladder = LanguageLadder(LanguageLadderConfig(SIDE, plan.blocks)).eval()
        shape = {"width_in": plan.rank, "token_width": head.token_width, "width": head.width, "side_width": SIDE, "blocks": plan.blocks}
        self.language_alignment = LanguageAlignment(LanguageAlignmentConfig(**{**shape, **changes})).eval()
        self.language_alignment.reset_projection(torch.Generator().manual_seed(1))
        torch.nn.init.normal_(self.language_alignment.up.weight)
        self.files = {"ladder": save_ladder(self.language_ladder), "alignment": save_alignment(self.language_alignment)}
        blobs = {name: Blob(name, hashlib.sha256(content).hexdigest(), len(content), 4096) for name, content in self.files.items()}
        self.manifest = CheckpointManifest(
            generation, "run", 7, time.time(), backbone.fingerprint, plan, SIDE, blobs["ladder"], blobs["alignment"]
        )
        self.signed = sign_manifest(self.manifest, key).to_bytes()


@torch.inference_mode()
def by_hand(folder: Path, checkpoint: LanguageCheckpoint, text: str | tuple[str, str]) -> tuple[float, float, int, str]:
    """Nats, the backbone's nats, tokens and the text of what is predicted: one text alone, through codec and back."""
    backbone, head = Backbone.load(folder), LanguageHead.load(folder)
    taps = compute_taps(backbone, [text], PLAN)
    assert taps.token_ids is not None
    assert taps.supervised_from is not None
    codecs: dict[int, Any] = {2: "int4", 4: "int4", 5: "int8"}
    sent = {layer: torch.from_numpy(round_trip(rows, codecs[layer], PLAN.group)) for layer, rows in taps.values.items()}
    ids, first = torch.from_numpy(taps.token_ids[0]), taps.supervised_from[0]
    x = torch.stack([sent[layer][:, :16] for layer in (2, 4, 5)])[None]
    z, _ = checkpoint.language_ladder(*checkpoint.language_alignment.enter(x, head.embed(ids[:-1])[None]))
    last = head.restore(sent[5])
    nats = []
    for h in (checkpoint.language_alignment.leave(z[0], last), last):
        logits = head.before_vocabulary(h) @ head.vocabulary.rows(0, head.vocabulary.size).T
        nats.append(float(F.cross_entropy(logits[first:], ids[first + 1 :], reduction="sum")))
    said = backbone.tokenizer.decode([*ids[first : first + 1].tolist(), *ids[first + 1 :].tolist()])
    return nats[0], nats[1], len(ids) - 1 - first, said


def test_losses_are_those_of_each_text_alone_through_the_codecs(stories: Path, signing_key: Any, tmp_path: Path) -> None:
    checkpoint = LanguageCheckpoint(stories, signing_key, 4)
    install_checkpoint(tmp_path, checkpoint)
    model = open_language_model(stories, tmp_path, batch_size=3)
    texts: list[Any] = [story[: 40 + 30 * n] for n, story in enumerate(tiny_stories(5))]
    texts[1:1] = [(texts[2][:30], texts[2][30:60]), ("once upon", " a time")]
    found = model.losses(texts)
    assert model.generation == 4
    for text, loss in zip(texts, found, strict=True):
        nats, backbone_nats, tokens, said = by_hand(stories, checkpoint, text)
        assert loss.tokens == tokens
        assert loss.nats == pytest.approx(nats, rel=2e-3)
        assert loss.backbone_nats == pytest.approx(backbone_nats, rel=2e-3)
        assert loss.nats != pytest.approx(loss.backbone_nats, rel=1e-2)
        predicted = text if isinstance(text, str) else text[1]
        cut = said.removeprefix(text[0]).removeprefix("\n") if isinstance(text, tuple) else said
        assert predicted.startswith(cut.strip("\n"))
        assert loss.text_bytes in range(len(cut.encode()) - 1, len(cut.encode()) + 3)
    with pytest.raises(TextError, match="text 4 of the batch is empty"):
        model.losses([*texts[:4], " "])


def test_the_backbones_own_bits_per_byte_are_those_of_a_model_of_stories(stories: Path, signing_key: Any, tmp_path: Path) -> None:
    """Of 260,000 parameters on the kind of text that it was made for: between 0.5 and 1.3 bits per byte of plain English."""
    install_checkpoint(tmp_path, LanguageCheckpoint(stories, signing_key, 1))
    found = open_language_model(stories, tmp_path).losses(tiny_stories(80)[60:])
    bits = sum(loss.backbone_nats for loss in found) / np.log(2) / sum(loss.text_bytes for loss in found)
    assert 0.5 < bits < 1.3


def test_what_does_not_fit_is_refused(stories: Path, minilm: Path, signing_key: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_generator(stories, tmp_path)
    assert "".join(open_generator(stories, tmp_path, backbone_only=True).write("Once", max_new_tokens=3)) != ""
    install_checkpoint(tmp_path, LanguageCheckpoint(stories, signing_key, 1, width_in=12))
    with pytest.raises(CheckpointError, match="contradicts itself: width of the alignment's input is 12, expected 16"):
        open_generator(stories, tmp_path)
    install_checkpoint(tmp_path, LanguageCheckpoint(stories, signing_key, 2))
    with pytest.raises(CheckpointError, match="is a language model's, which has no labels: use `edge-agent generate`"):
        open_predictor(stories, tmp_path)
    other = tmp_path / "other"
    prepare(save_random_model("gpt2", tmp_path / "model"), other, max_tokens=40)
    with pytest.raises(CheckpointError, match="wait for the agent to fetch the one for its backbone"):
        open_language_model(other, tmp_path)
    install_checkpoint(tmp_path, Checkpoint(minilm, signing_key, 3))
    with pytest.raises(CheckpointError, match="is of the task classification, which writes no text: use `edge-agent infer`"):
        open_language_model(minilm, tmp_path)


def test_text_from_the_command_line(stories: Path, signing_key: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path, stories)
    missing = edge_agent("generate", "Once upon a time", "--config", str(config))
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "no checkpoint" in missing.stderr
    install_checkpoint(tmp_path / "state", LanguageCheckpoint(stories, signing_key, 2))

    def write(*options: str, **environment: str) -> str:
        done = edge_agent("generate", "Once upon a time", "--max-new-tokens", "20", *options, "--config", str(config), **environment)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    alone = write("--backbone-only", "--temperature", "0")
    assert alone.startswith(", there was a little")
    assert write("--temperature", "0") != alone
    daring = ("--temperature", "3", "--top-p", "1", "--seed", "5")
    assert write(*daring, PYTHONIOENCODING="utf-8") == write(*daring, PYTHONIOENCODING="utf-8")
    assert edge_agent("generate", "a", "--top-p", "0", "--config", str(config)).returncode == 2
    too_long = edge_agent("generate", "word " * 600, "--config", str(config))
    assert too_long.returncode == 2
    assert "shorten it" in too_long.stderr


def test_a_files_bits_per_byte_from_the_command_line(stories: Path, signing_key: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path, stories)
    install_checkpoint(tmp_path / "state", LanguageCheckpoint(stories, signing_key, 2))
    rows = [{"prompt": story[:50], "response": story[50:150]} for story in tiny_stories(70)]
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join([*map(json.dumps, rows), '{"text": ""}', json.dumps({"prompt": "word " * 60, "response": "too late"})]))
    done = edge_agent("infer", "--file", str(file), "--json", "--config", str(config))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["samples"], report["refused"], report["checkpoint"]) == (70, 2, 2)
    found = open_language_model(stories, tmp_path / "state").losses([(row["prompt"], row["response"]) for row in rows])
    text_bytes = sum(loss.text_bytes for loss in found)
    assert (report["text_bytes"], report["metric"]) == (text_bytes, "bits per byte")
    assert report["score"] == pytest.approx(sum(loss.nats for loss in found) / np.log(2) / text_bytes, rel=1e-6)
    assert report["backbone_score"] < report["score"], "random weights help nobody"
    assert "leaves none of the plan's 48 for the response" in done.stderr
    said = edge_agent("infer", "--file", str(file), "--config", str(config)).stdout
    assert f"{report['score']:.3f} bits per byte" in said
    label = edge_agent("infer", "a text", "--config", str(config))
    assert label.returncode == 1
    assert "use `edge-agent generate`" in label.stderr


def test_a_checkpoint_whose_plan_the_backbone_cannot_carry_out_is_refused(stories: Path, signing_key: Any, tmp_path: Path) -> None:
    from edge_agent.taps import PlanError

    install_checkpoint(tmp_path, LanguageCheckpoint(stories, signing_key, 1, replace(PLAN, max_tokens=500)))
    with pytest.raises(PlanError, match="keeps 500 tokens"):
        open_language_model(stories, tmp_path)
    assert CheckpointStore(tmp_path).generation() == 1
