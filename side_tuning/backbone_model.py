"""Build the model of a backbone artifact from its files, without ever holding it in full precision.

The weights are mapped from the file, so only pages in use take memory. Two runners give the same activations: "plain"
for the common families, "transformers" for any model whose base class holds its transformer blocks in one list as
long as its configuration says. Used by the coordinator to prepare and check, and by the device to load.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from side_tuning.backbone_manifest import CONFIG, QUANTIZATION, WEIGHTS, BackboneError
from side_tuning.plain_transformer import PlainTransformer
from side_tuning.quantized_layers import Int4Linear, Int8Embedding, Int8Linear, Scratch


def load_model(folder: Path, last_layer: int, runner: str | None = None) -> tuple[nn.Module, str]:
    """Build the first `last_layer` blocks; returns the model and the name of its list of blocks.

    Args:
        folder: the artifact.
        last_layer: later blocks are not built, their weights not read.
        runner: "plain" or "transformers"; None takes what the artifact says.

    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    layout = json.loads((folder / QUANTIZATION).read_text(encoding="utf-8"))
    with _open(folder, layout) as stored:
        if (runner or layout["runner"]) == "plain":
            return PlainTransformer(stored, config, last_layer).eval(), "blocks"
        return _load_with_transformers(stored, config, layout, last_layer)


class StoredLayers:
    """The layers of an artifact by name, each in the form it is stored in."""

    def __init__(self, folder: Path, file: Any, layout: dict[str, Any]) -> None:
        self.folder = folder
        self._file = file
        self._names = set(file.keys())
        self._linears: dict[str, str] = layout["linears"]
        self._outputs: dict[str, int] = layout["outputs"]
        self._tables = set(layout["embeddings"])
        self._scratch = Scratch()

    def has(self, name: str) -> bool:
        return name in self._names

    def tensor(self, name: str) -> Tensor:
        if name not in self._names:
            raise BackboneError(
                f"{self.folder}: {name} is not among the stored weights; the backbone was prepared with other versions of "
                "the libraries: prepare it again"
            )
        found: Tensor = self._file.get_tensor(name)
        return found

    def linear(self, name: str, transposed: bool = False) -> nn.Module:
        """A linear layer; `transposed` says that a float weight is stored as (in, out)."""
        bias = self.tensor(f"{name}.bias") if self.has(f"{name}.bias") else None
        how = self._linears.get(name)
        if how is None:
            weight = self.tensor(f"{name}.weight")
            return _linear(weight.t() if transposed else weight, bias)
        data, scale = self.tensor(f"{name}.data"), self.tensor(f"{name}.scale")
        if how == "int8":
            return Int8Linear(data, scale, bias, self._scratch)
        return Int4Linear(data, scale, self.tensor(f"{name}.shift"), bias, self._outputs[name], self._scratch)

    def embedding(self, name: str) -> nn.Module:
        if name in self._tables:
            return Int8Embedding(self.tensor(f"{name}.data"), self.tensor(f"{name}.scale"))
        weight = self.tensor(f"{name}.weight")
        return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight, _freeze=True)


@contextmanager
def _open(folder: Path, layout: dict[str, Any]) -> Iterator[StoredLayers]:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        yield StoredLayers(folder, file, layout)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return layer


def keep_layers(config: Any, layers: int) -> None:
    """Make a transformers configuration describe the first `layers` blocks only."""
    total = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)  # Qwen2 and others state a kind of attention for every layer
    if isinstance(kinds, list) and len(kinds) == total:
        config.layer_types = kinds[:layers]
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


def _load_with_transformers(
    stored: StoredLayers, body: dict[str, Any], layout: dict[str, Any], last_layer: int
) -> tuple[nn.Module, str]:
    from transformers import AutoConfig, AutoModel

    body = dict(body)
    config = AutoConfig.for_model(body.pop("model_type"), **body)
    keep_layers(config, last_layer)
    config.use_cache = False
    with torch.device("meta"):  # without memory for the weights
        model: nn.Module = AutoModel.from_config(config, attn_implementation=layout["attention"], dtype=torch.float32)
    model.eval()
    blocks_name, _ = find_blocks(model, last_layer)
    for name in layout["tail"]:  # what would run after the last block; no tap looks at it
        model.set_submodule(name, nn.Identity())
    modules = dict(model.named_modules())
    for name in layout["linears"]:
        if name in modules:  # else it is of a block past the last one wanted
            model.set_submodule(name, stored.linear(name))
    for name in layout["embeddings"]:
        model.set_submodule(name, stored.embedding(name))
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_meta:
            continue
        found = stored.tensor(name)
        if found.shape != value.shape:
            raise BackboneError(f"{stored.folder}: {name} has shape {tuple(found.shape)}, not {tuple(value.shape)}; prepare it again")
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(value, nn.Parameter):
            setattr(module, leaf, nn.Parameter(found, requires_grad=False))
        else:
            module._buffers[leaf] = found
    return model, blocks_name
