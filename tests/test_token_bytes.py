"""The bytes of a text's tokens add up to the text, whatever the kind of tokenizer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from side_tuning.backbone_manifest import BackboneError
from side_tuning.token_bytes import bits_per_byte, token_bytes
from tests.backbones.models import stories_folder

TEXTS = ["Once upon a time, there was a café called “Zoë” ☕.", "naïve  double spaces\n\tand a tab", "한국어 텍스트와 emoji 🎉🎉"]


def counted(tokenizer: Tokenizer, folder: Path, text: str, vocabulary: int = 5000) -> int:
    return int(token_bytes(folder, vocabulary)[tokenizer.encode(text).ids].sum())


def byte_level(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["wörd"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("text", [*TEXTS, "wörd is one token"])
def test_byte_level_pieces_count_their_bytes(text, tmp_path):
    tokenizer = byte_level(tmp_path)
    assert counted(tokenizer, tmp_path, text) == len(text.encode())
    assert token_bytes(tmp_path, 5000)[tokenizer.token_to_id("<|endoftext|>")] == 0


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_writes_one_more_space_before_a_text(text):
    folder = stories_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert counted(tokenizer, folder, text) == len(text.encode()) + 1
    table = token_bytes(folder, 600)
    assert table[:3].tolist() == [0, 0, 0]  # <unk>, <s>, </s>
    assert table[3:259].tolist() == [1] * 256
    assert (table[512:] == 0).all()  # entries of the model's table that are no token


def test_pieces_of_a_list_with_odds_count_too(tmp_path):
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁hello", -1.0), ("▁wörld", -1.0), ("s", -2.0)], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert counted(tokenizer, tmp_path, "hello wörlds") == len(" hello wörlds".encode())


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(BackboneError, match="copy or prepare the backbone again"):
        token_bytes(tmp_path, 10)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(BackboneError, match="copy or prepare the backbone again"):
        token_bytes(tmp_path, 10)


def test_bits_per_byte():
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    assert math.isnan(bits_per_byte(1.0, 0))
