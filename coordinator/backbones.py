"""Pre-scale and quantize a Hugging Face model into a backbone artifact that devices load.

Main flow: `prepare`. The artifact is a folder: `model.safetensors` (kept weights), `quantization.json` (which layers
are quantized and how; a decoder's head too), `config.json`, `tokenizer.json`, `maps.safetensors` (the fixed low-rank maps of `sequence`
mode) and `manifest.json`. Preparing the same model with the same options and library versions gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from coordinator.backbone_language import LANGUAGE_RANK, LAST_RANK, calibrated_maps, head_tensors
from coordinator.backbone_source import kind_of, quiet, read_config, read_model, read_tokenizer, source_name
from side_tuning.backbone_manifest import (
    CONFIG,
    MANIFEST,
    MAPS,
    QUANTIZATION,
    TOKENIZER,
    WEIGHTS,
    BackboneError,
    BackboneManifest,
    Weights,
    fingerprint_of,
    read_manifest,
)

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]

MAP_RANK = 64
# Smaller tables (positions, token types) are not worth the error.
QUANTIZED_TABLE_ROWS = 8192
# Entries of a model's configuration that cannot change an activation; left out so they do not change the fingerprint.
IMMATERIAL = (
    "_name_or_path", "architectures", "dtype", "finetuning_task", "id2label", "label2id", "problem_type", "torch_dtype",
    "transformers_version", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "task_specific_params",
)  # fmt: skip
# Relative error that the order of additions explains.
SAME = 1e-4
PROBE = "The quick brown fox jumps over the lazy dog, twice."


def prepare(
    model: str | Path,
    out: Path,
    *,
    layers: int | None = None,
    weights: Weights = "int8",
    max_tokens: int = 128,
    seed: int = 0,
    calibrate: Sequence[str] = (),
    progress: Progress | None = None,
) -> BackboneManifest:
    """Write the artifact for the first `layers` blocks of `model` (all of them if None) to the folder `out`.

    Args:
        model: a folder with a model in Hugging Face's layout, or a name on the hub.
        layers: how many blocks to keep, counted from the input.
        out: replaced if it holds an artifact already; refused if it holds anything else.
        weights: what the linear layers, and with int8 and int4 also the token table, are stored as.
        max_tokens: longest text; a tap plan may ask for less.
        seed: of the orthogonal maps of `sequence` mode.
        calibrate: public texts; the maps then follow the main directions of this backbone's hidden states on them.
        progress: called with a sentence at each step.

    Raises:
        BackboneError: a value or a model that cannot be used, with the cure.

    """
    out = Path(out)
    say = progress or (lambda text: logger.info("%s", text))
    if weights not in get_args(Weights):
        raise BackboneError(f"weights {weights!r} are unknown: use one of {', '.join(get_args(Weights))}")
    if max_tokens < 2:
        raise BackboneError(f"max_tokens {max_tokens} leaves no room for a text: use 2 or more, usually 128")
    _check_out(out)
    say(f"reading {model}")
    quiet()
    config, total = read_config(model, layers)
    kept = config.num_hidden_layers
    tokenizer = read_tokenizer(model)
    network, lm_head = read_model(model, config)
    vocabulary = network.get_input_embeddings().num_embeddings
    if tokenizer.get_vocab_size() > vocabulary:
        raise BackboneError(
            f"the tokenizer of {model} has {tokenizer.get_vocab_size()} tokens, the model only {vocabulary}: "
            "use the tokenizer that the model was trained with"
        )
    probe = _probe(tokenizer, config, max_tokens)
    blocks_name, tail, expected = _run_original(network, kept, probe)
    head = head_tensors(network, lm_head, config, weights, QUANTIZED_TABLE_ROWS)

    say(f"quantizing {kept} of {total} layers to {weights}" if weights != "float" else f"keeping {kept} of {total} layers")
    linears, outputs = _quantize(network, blocks_name, tail, weights)
    tensors, embeddings = _tensors(network, linears, tail, weights)
    layout = {
        "runner": "transformers",
        "attention": config._attn_implementation,
        "embeddings": embeddings,
        "linears": linears,
        "outputs": outputs,
        "tail": tail,
    }
    map_rank = min(MAP_RANK if lm_head is None else LANGUAGE_RANK, config.hidden_size)
    ranks = dict.fromkeys(range(1, kept + 1), map_rank)
    if lm_head is not None:
        ranks[kept] = min(LAST_RANK, config.hidden_size)
    maps = _maps(ranks, config.hidden_size, seed)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "artifact"
        folder.mkdir()
        _write_files(folder, config=config, layout=layout, tensors=tensors | head, tokenizer=tokenizer, maps=maps)
        found = _run_artifact(folder, kept, probe, "transformers")
        error = _check_error(found, expected, weights)
        if _plain_agrees(folder, config.model_type, kept, probe, found):
            layout["runner"] = "plain"
            _write_json(folder / QUANTIZATION, layout)
        if calibrate:
            say(f"fitting the maps to {len(calibrate)} texts")
            maps = calibrated_maps(folder, calibrate, ranks, max_tokens)
            _write_maps(folder, maps)
        manifest = BackboneManifest(
            fingerprint=fingerprint_of(folder),
            source=source_name(model),
            family=config.model_type,
            kind=kind_of(config),
            layers=kept,
            layers_total=total,
            width=config.hidden_size,
            weights=weights,
            max_tokens=max_tokens,
            vocabulary=vocabulary,
            maps={layer: hashlib.sha256(m.tobytes()).hexdigest()[:32] for layer, m in maps.items()},
            map_rank=map_rank,
            last_rank=ranks[kept] if lm_head is not None else 0,
            created_with={name: version(name) for name in ("torch", "transformers", "optimum-quanto", "tokenizers")},
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        say(f"backbone {manifest.fingerprint}: layer {kept} differs from the original by {error:.2%} (relative L2)")
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    return manifest


def _check_out(out: Path) -> None:
    if out.is_file():
        raise BackboneError(f"{out} is a file: name a folder to write the backbone to")
    if out.is_dir() and any(out.iterdir()):
        try:
            read_manifest(out)
        except BackboneError as error:
            raise BackboneError(f"{out} holds something that is not a backbone: name a new or empty folder") from error


def _probe(tokenizer: Tokenizer, config: Any, max_tokens: int) -> dict[str, Tensor]:
    """A batch that shows what goes wrong: one text as long as allowed, one short and padded on the right."""
    import torch

    ids = tokenizer.encode(PROBE).ids[: max_tokens - 1]
    pad = config.pad_token_id if isinstance(config.pad_token_id, int) and config.pad_token_id >= 0 else 0
    longest = (ids * max_tokens)[:max_tokens]
    short = ids + [pad] * (max_tokens - len(ids))
    mask = [[1] * max_tokens, [1] * len(ids) + [0] * (max_tokens - len(ids))]
    return {"input_ids": torch.tensor([longest, short]), "attention_mask": torch.tensor(mask)}


def _output_of(block: Any, real: Tensor) -> list[Tensor]:
    """A list that gets the block's output at the real tokens whenever the block runs."""
    found: list[Tensor] = []
    block.register_forward_hook(lambda _m, _i, out: found.append((out[0] if isinstance(out, tuple) else out)[real]))
    return found


def _run_original(network: Any, kept: int, probe: dict[str, Tensor]) -> tuple[str, list[str], Tensor]:
    """Where the blocks are, what runs only after them, and the last block's output."""
    import torch

    from side_tuning.backbone_model import find_blocks

    blocks_name, blocks = find_blocks(network, kept)
    inside = {id(m) for m in blocks.modules()}
    found = _output_of(blocks[-1], probe["attention_mask"].bool())
    ran_before: set[int] = set()
    hooks = [
        module.register_forward_pre_hook(lambda m, _: None if found else ran_before.add(id(m)))
        for module in network.modules()
        if id(module) not in inside
    ]
    try:
        with torch.inference_mode():
            network(**probe)
    except (IndexError, RuntimeError) as error:
        limit = getattr(network.config, "max_position_embeddings", "fewer")
        raise BackboneError(
            f"{network.config.model_type} with {limit} positions cannot run {probe['input_ids'].shape[1]} tokens: "
            f"use a smaller max_tokens ({error})"
        ) from error
    for hook in hooks:
        hook.remove()
    tail = [
        name
        for name, module in network.named_modules()
        if id(module) not in inside and id(module) not in ran_before and any(True for _ in module.parameters())
    ]
    # Only the outermost: their parts go with them.
    tail = [name for name in tail if not any(name.startswith(f"{other}.") for other in tail)]
    return blocks_name, tail, found[0]


def _quantize(network: nn.Module, blocks_name: str, tail: list[str], weights: Weights) -> tuple[dict[str, str], dict[str, int]]:
    """Quantize the linear layers with quanto in place; their names with how, and their widths."""
    if weights == "float":
        return {}, {}
    from optimum.quanto import freeze, qint4, qint8, quantize
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, module in list(network.named_modules()):
        if isinstance(module, Conv1D):  # GPT-2's linear layer with its weight transposed, which quanto leaves alone
            linear = nn.Linear(module.weight.shape[0], module.weight.shape[1], device="meta")
            linear.weight = nn.Parameter(module.weight.detach().t().contiguous(), requires_grad=False)
            linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
            network.set_submodule(name, linear)
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and not any(name == t or name.startswith(f"{t}.") for t in tail)
    ]
    if not any(name.startswith(f"{blocks_name}.") for name in names):
        raise BackboneError(f"the blocks in {blocks_name} have no linear layers that can be quantized: prepare with weights float")
    quantize(network, weights=qint8 if weights == "int8" else qint4, include=names)
    freeze(network)
    outputs: dict[str, int] = {name: network.get_submodule(name).get_parameter("weight").shape[0] for name in names}
    return dict.fromkeys(names, str(weights)), outputs


def _tensors(network: Any, linears: dict[str, str], tail: list[str], weights: Weights) -> tuple[dict[str, Tensor], list[str]]:
    """Everything that the artifact stores, by name, and the names of the token tables stored as int8 rows."""
    from torch import nn

    from side_tuning.quantized_layers import Int8Embedding

    tensors: dict[str, Tensor] = {}
    embeddings = []
    for name, module in network.named_modules():
        if any(name == t or name.startswith(f"{t}.") for t in tail):
            continue
        if name in linears:
            state: dict[str, Tensor] = {}
            module.weight.save_to_state_dict(state, "", False)
            parts = {"_data": "data", "_data._data": "data", "_scale": "scale", "_shift": "shift"}
            tensors |= {f"{name}.{parts[key]}": value for key, value in state.items()}
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias
        elif type(module) is nn.Embedding and weights != "float" and module.num_embeddings >= QUANTIZED_TABLE_ROWS:
            embeddings.append(name)
            tensors[f"{name}.data"], tensors[f"{name}.scale"] = Int8Embedding.quantize(module.weight.detach())
        else:
            # Buffers that the model would compute when built (positions, rotary frequencies) are stored too: a
            # model built without memory cannot compute them.
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            tensors |= {f"{name}.{leaf}" if name else leaf: value for leaf, value in own}
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}, embeddings


def _maps(ranks: dict[int, int], width: int, seed: int) -> dict[int, np.ndarray[Any, Any]]:
    """Per layer a (width, rank) matrix with orthonormal columns: any first columns of it are orthonormal too."""
    import numpy as np

    maps = {}
    for layer, rank in ranks.items():
        gaussian = np.random.Generator(np.random.PCG64([seed, layer])).standard_normal((width, rank))
        q, r = np.linalg.qr(gaussian)
        # The signs make the result unique, whichever library computed it.
        maps[layer] = np.ascontiguousarray((q * np.sign(np.diag(r))).astype("<f4"))
    return maps


def _write_files(
    folder: Path,
    *,
    config: Any, layout: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Tokenizer, maps: dict[int, Any]
) -> None:
    from safetensors.torch import save_file

    body = {name: value for name, value in config.to_dict().items() if name not in IMMATERIAL}
    body["model_type"] = config.model_type
    _write_json(folder / CONFIG, body)
    _write_json(folder / QUANTIZATION, layout)
    (folder / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    save_file(tensors, folder / WEIGHTS)
    _write_maps(folder, maps)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner only; the agent runs as a user of its own


def _write_maps(folder: Path, maps: dict[int, Any]) -> None:
    from safetensors.numpy import save_file as save_arrays

    save_arrays({f"layer.{layer}": m for layer, m in maps.items()}, folder / MAPS)
    (folder / MAPS).chmod(0o644)


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _run_artifact(folder: Path, kept: int, probe: dict[str, Tensor], runner: str) -> Tensor:
    """The last block's output as a device gets it."""
    import torch

    from side_tuning.backbone_model import load_model

    model, blocks_name = load_model(folder, kept, runner)
    found = _output_of(list(model.get_submodule(blocks_name).children())[-1], probe["attention_mask"].bool())
    with torch.inference_mode():
        model(**probe)
    return found[0]


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _check_error(found: Tensor, expected: Tensor, weights: Weights) -> float:
    error = _relative_error(found, expected)
    if not error < (SAME if weights == "float" else 1.0):
        raise BackboneError(
            f"the prepared backbone gives other activations than the original (relative error {error:.3g}): "
            + ("this architecture is not supported" if weights == "float" else f"{weights} is too coarse for it, try int8 or float")
        )
    return error


def _plain_agrees(folder: Path, family: str, kept: int, probe: dict[str, Tensor], expected: Tensor) -> bool:
    """Whether a device can run this backbone without transformers."""
    from side_tuning.plain_transformer import FAMILIES

    if family not in FAMILIES:
        return False
    try:
        error = _relative_error(_run_artifact(folder, kept, probe, "plain"), expected)
    except (BackboneError, LookupError, RuntimeError, TypeError, ValueError) as reason:
        logger.info("this %s needs transformers on the device: %s", family, reason)
        return False
    logger.info("the plain runner differs by %.2g from transformers for this %s", error, family)
    return error < SAME
