"""Read a Hugging Face model for preparation, and refuse what cannot become a backbone.

Nothing here runs code that came with a model or unpickles its weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from side_tuning.backbone_manifest import TOKENIZER, BackboneError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SMALLEST_VOCABULARY = 32


def quiet() -> None:
    """No progress bars and load reports of transformers between our own lines; what matters is checked here."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def source_name(model: str | Path) -> str:
    """A name for people: what the hub calls it, or else the folder's name."""
    if not Path(model).is_dir():
        return str(model)
    named = json.loads((Path(model) / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    return str(named) if named else Path(model).resolve().name


def read_config(model: str | Path, layers: int | None) -> tuple[Any, int]:
    from transformers import AutoConfig

    from side_tuning.backbone_model import keep_layers

    if isinstance(model, Path) or str(model).startswith((".", "/", "~")):
        if not Path(model).is_dir():
            raise BackboneError(f"model folder {model} does not exist: give a folder with config.json, or a name on the hub")
        if not (Path(model) / "config.json").is_file():
            raise BackboneError(f"model folder {model} has no config.json: give the folder that a model was saved to")
    try:
        config = AutoConfig.from_pretrained(str(model), trust_remote_code=False)
    except Exception as error:  # the hub and the parser raise many types
        raise BackboneError(
            f"model {str(model)!r} cannot be read: it is neither a folder with a known model nor a name that the hub "
            f"gives ({_first_line(error)})"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise BackboneError(
            f"{model} is a {config.model_type} encoder-decoder: use an encoder (BERT, RoBERTa ...) or a decoder "
            "(OPT, GPT-2, Llama, Qwen2 ...)"
        )
    total = getattr(config, "num_hidden_layers", None)
    if not isinstance(total, int) or not isinstance(getattr(config, "hidden_size", None), int):
        raise BackboneError(
            f"{model} is of architecture {config.model_type!r}, which states no number of layers and no width: "
            "use a text encoder (BERT, RoBERTa ...) or decoder (OPT, GPT-2, Llama, Qwen2 ...)"
        )
    if layers is not None and not 1 <= layers <= total:
        raise BackboneError(f"layers {layers} is not possible: {model} has {total}; use 1 to {total}")
    keep_layers(config, total if layers is None else layers)
    config.use_cache = False
    return config, total


def read_tokenizer(model: str | Path) -> Tokenizer:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    tokenizer: Tokenizer
    try:
        stored = cached_file(str(model), TOKENIZER, _raise_exceptions_for_missing_entries=False)
        if stored is not None:
            # The file as it is: AutoTokenizer rebuilds parts of it for some families (seen with Qwen2).
            tokenizer = Tokenizer.from_file(stored)
        else:  # vocabulary files only, as OPT
            tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False, use_fast=True).backend_tokenizer
    except Exception as error:
        raise BackboneError(
            f"{model} has no tokenizer that can be stored as tokenizer.json ({_first_line(error)}): "
            "save a fast tokenizer beside the model"
        ) from error
    if tokenizer.get_vocab_size() < SMALLEST_VOCABULARY:
        # Without any tokenizer file, AutoTokenizer makes one that knows the special tokens only.
        raise BackboneError(f"{model} has no tokenizer: save tokenizer.json beside the model")
    # Length and padding are the agent's choice at run time, never the file's.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_model(model: str | Path, config: Any) -> tuple[Any, Any]:
    """The base model, and the linear layer from its last hidden state to the vocabulary where its files hold one."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from side_tuning.language_head import TAILS

    kind: Any = AutoModelForCausalLM if config.model_type in TAILS else AutoModel

    def read(attention: str) -> Any:
        return kind.from_pretrained(
            str(model),
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True,  # never unpickle
            trust_remote_code=False,
            output_loading_info=True,
        )

    try:
        try:
            network, loading = read("sdpa")
        except ValueError:  # an architecture without it
            network, loading = read("eager")
    except Exception as error:
        raise BackboneError(
            f"the weights of {model} ({config.model_type}) cannot be read ({_first_line(error)}): "
            "give a model with model.safetensors of a supported architecture"
        ) from error
    missing = sorted(name for name in loading["missing_keys"] if "pooler" not in name and name != "lm_head.weight")
    if missing:
        raise BackboneError(f"the weights of {model} lack {', '.join(missing[:3])} ({len(missing)} in all): download it again")
    network.eval()
    if kind is AutoModel:
        return network, None
    return network.base_model, None if "lm_head.weight" in loading["missing_keys"] else network.get_output_embeddings()


def kind_of(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return "encoder" if masked else "decoder"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
