"""The architecture of a backbone: where its transformer blocks are, and how to build it from an artifact.

Knows no model family by name. A model qualifies when its base class holds its transformer blocks in one list as long
as its configuration says. Used by the coordinator to prepare and by the device to load.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# A device has no business asking the hub anything; must be set before transformers is imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from safetensors import safe_open
from torch import Tensor, nn

from side_tuning.backbone_manifest import CONFIG, QUANTIZATION, WEIGHTS, BackboneError
from side_tuning.quantized_layers import Int4Linear, Int8Embedding, Int8Linear


def keep_layers(config: Any, layers: int) -> None:
    """Make `config` describe the first `layers` blocks only."""
    total = config.num_hidden_layers
    for name, value in vars(config).items():
        # Qwen2 and others state a kind of attention for every layer.
        if isinstance(value, list) and name == "layer_types" and len(value) == total:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers


def find_blocks(model: nn.Module, layers: int) -> tuple[str, nn.ModuleList]:
    """Name and list of the transformer blocks: the outermost list of `layers` modules of one class."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers and len({type(m) for m in module}) == 1:
            return name, module
    raise BackboneError(
        f"{type(model).__name__} keeps no list of its {layers} transformer blocks; "
        "use an encoder such as BERT or RoBERTa, or a decoder such as OPT, GPT-2, Llama or Qwen2"
    )


def build_empty(config: Any, attention: str) -> nn.Module:
    """The model of `config` without memory for its weights (on the meta device)."""
    from transformers import AutoModel

    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model.eval()


def read_config(folder: Path, last_layer: int) -> Any:
    """The artifact's configuration, cut to `last_layer` blocks."""
    from transformers import AutoConfig

    body = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config = AutoConfig.for_model(body.pop("model_type"), **body)
    keep_layers(config, last_layer)
    config.use_cache = False
    return config


def load_model(folder: Path, last_layer: int) -> tuple[nn.Module, str]:
    """Build the artifact's first `last_layer` blocks; returns the model and the name of its list of blocks.

    The weights are mapped from the file, so only pages in use take memory, and no float copy of a quantized weight
    ever exists as a whole.
    """
    layout = json.loads((folder / QUANTIZATION).read_text(encoding="utf-8"))
    config = read_config(folder, last_layer)
    model = build_empty(config, layout["attention"])
    blocks_name, _ = find_blocks(model, last_layer)
    for name in layout["tail"]:  # what would run after the last block; no tap looks at it
        model.set_submodule(name, nn.Identity())
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = set(file.keys())

        def tensor(name: str) -> Tensor:
            return file.get_tensor(name)

        def optional(name: str) -> Tensor | None:
            return tensor(name) if name in stored else None

        for name, weights in layout["linears"].items():
            if not _has(model, name):
                continue  # a block past the last one wanted
            data, scale, bias = tensor(f"{name}.data"), tensor(f"{name}.scale"), optional(f"{name}.bias")
            if weights == "int8":
                model.set_submodule(name, Int8Linear(data, scale, bias))
            else:
                shift = tensor(f"{name}.shift")
                model.set_submodule(name, Int4Linear(data, scale, shift, bias, layout["outputs"][name]))
        for name in layout["embeddings"]:
            model.set_submodule(name, Int8Embedding(tensor(f"{name}.data"), tensor(f"{name}.scale")))
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_meta:
                continue
            if name not in stored:
                raise BackboneError(
                    f"{folder}: {name} is not among the stored weights; the backbone was prepared with another "
                    "version of transformers: prepare it again"
                )
            owner, _, leaf = name.rpartition(".")
            found = tensor(name)
            if found.shape != value.shape:
                raise BackboneError(f"{folder}: {name} has shape {tuple(found.shape)}, not {tuple(value.shape)}; prepare it again")
            _assign(model.get_submodule(owner), leaf, found, isinstance(value, nn.Parameter))
    return model, blocks_name


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _assign(module: nn.Module, leaf: str, value: Tensor, parameter: bool) -> None:
    if parameter:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    else:
        module._buffers[leaf] = value
