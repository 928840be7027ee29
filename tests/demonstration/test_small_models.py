"""The small language models come out as transformers loads them, learn, and are made only once; text rows of every form are read."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from coordinator.demonstration.data import DataError
from coordinator.demonstration.small_models import Recipe, make_models
from coordinator.demonstration.text_rows import TextRow, read_texts
from tests.backbones.models import stories_folder

SHORT = Recipe(steps=30, batch=8, tokens=32, warmup_steps=5)


@pytest.fixture
def stories(tmp_path):
    folder = tmp_path / "stories"
    folder.mkdir()
    row = json.dumps({"text": "Once upon a time there was a little dog. The dog liked to play in the sun with a red ball. " * 4}) + "\n"
    for split in ("train", "test"):
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress((row * 20).encode()))
    return folder


def test_models_learn_and_are_made_once(tmp_path, stories):
    """Every shape: the loss falls far below a uniform guess; a second call trains nothing; another recipe trains again."""
    said: list[str] = []
    tokenizer = stories_folder()
    made = make_models(tmp_path / "models", recipe=SHORT, tokenizer=tokenizer, stories=stories, say=said.append)
    widths = set()
    for name, folder in made.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        widths.add((model.config.hidden_size, model.config.num_hidden_layers))
        assert (folder / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
        final = next(line for line in said if line.startswith(f"{name}: held-out loss"))
        assert float(final.split()[3]) < 4.0  # ln(512) is 6.2
    assert len(widths) == 3

    said.clear()
    again = make_models(tmp_path / "models", recipe=SHORT, tokenizer=tokenizer, stories=stories, say=said.append)
    assert again == made
    assert not said
    make_models(tmp_path / "models", ["llama-48x3"], recipe=Recipe(steps=1, batch=2, tokens=16), tokenizer=tokenizer, stories=stories, say=said.append)
    assert any("step 1 of 1" in line for line in said)


def test_the_same_recipe_gives_the_same_weights(tmp_path, stories):
    recipe = Recipe(steps=3, batch=2, tokens=16)
    weights = []
    for folder in ("a", "b"):
        torch.manual_seed(len(folder) + len(weights))  # must not matter
        made = make_models(tmp_path / folder, ["opt-64x6"], recipe=recipe, tokenizer=stories_folder(), stories=stories, say=lambda _: None)
        weights.append((made["opt-64x6"] / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_text_rows_of_every_form(tmp_path):
    rows = [{"text": "plain", "user": "ann"}, {"text_a": "a", "text_b": "b"}, {"prompt": "p", "response": "r"}, {"mr": "name[X]", "ref": "X is."}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [TextRow("plain", "ann"), TextRow(("a", "b")), TextRow(("p", "r")), TextRow(("name[X]", "X is."))]
    assert read_texts(tmp_path, "train") == expected


@pytest.mark.parametrize("line", ['{"text": ""}', '{"mr": "a"}', "[1]", "{"])
def test_a_row_without_text_is_refused_with_its_place(tmp_path, line):
    (tmp_path / "test.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"line 2|after row 1"):
        read_texts(tmp_path, "test")


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="neither"):
        read_texts(tmp_path, "train")
