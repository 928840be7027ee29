"""What a decoder's artifact holds for tuning it as a language model: its frozen head, and maps fitted to a public sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from side_tuning.backbone_manifest import TOKENIZER, BackboneError, Weights
from side_tuning.language_head import PREFIX, TAILS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LANGUAGE_RANK = 128  # columns of a map
LAST_RANK = 256  # columns of the last layer's map: the head reads what goes through it
FEWEST_CALIBRATION_TOKENS = 1_000
MOST_CALIBRATION_TOKENS = 50_000
# Of the largest direction's spread: below it a column would be scaled-up noise.
FLOOR = 1e-4


def head_tensors(network: Any, lm_head: Any, config: Any, weights: Weights, quantize_from_rows: int) -> dict[str, Tensor]:
    """The tensors of the frozen head by name in the artifact; empty where this is no language model.

    Args:
        network: the base model.
        lm_head: its vocabulary's linear layer, None where the files hold none.
        config: the model's.
        weights: with int8 and int4, a vocabulary that is not the token table is stored as int8 rows.
        quantize_from_rows: smaller vocabularies stay floats.

    """
    from side_tuning.quantized_layers import Int8Embedding

    tail = TAILS.get(config.model_type)
    if tail is None or lm_head is None:
        return {}
    found: dict[str, Tensor] = {}
    modules = dict(network.named_modules())
    if (norm := modules.get(tail.norm)) is not None:
        found[f"{PREFIX}.norm.weight"] = norm.weight
        if getattr(norm, "bias", None) is not None:
            found[f"{PREFIX}.norm.bias"] = norm.bias
    if tail.projection and (projection := modules.get(tail.projection)) is not None:
        found[f"{PREFIX}.projection.weight"] = projection.weight
    if not config.tie_word_embeddings:
        if weights != "float" and lm_head.weight.shape[0] >= quantize_from_rows:
            data, scale = Int8Embedding.quantize(lm_head.weight.detach())
            found |= {f"{PREFIX}.vocabulary.data": data, f"{PREFIX}.vocabulary.scale": scale}
        else:
            found[f"{PREFIX}.vocabulary.weight"] = lm_head.weight
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def calibrated_maps(folder: Path, texts: Sequence[str], ranks: dict[int, int], max_tokens: int) -> dict[int, np.ndarray[Any, Any]]:
    """Maps of every layer along the main directions of its hidden states on `texts`, each scaled to unit spread.

    Not centred, so that the inverse restores the mean too. Scaled, so that one large direction does not take all of an
    integer codec's levels.

    Args:
        folder: the artifact.
        texts: public; a few hundred do.
        ranks: columns by layer.
        max_tokens: texts are cut to this.

    Raises:
        BackboneError: too few tokens.

    """
    import numpy as np
    import torch
    from tokenizers import Tokenizer

    from side_tuning.backbone_model import load_model

    last = max(ranks)
    model, blocks_name = load_model(folder, last)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    outputs: dict[int, Tensor] = {}
    for number, block in enumerate(model.get_submodule(blocks_name).children(), 1):
        block.register_forward_hook(
            lambda _m, _i, out, number=number: outputs.update({number: out[0] if isinstance(out, tuple) else out})
        )
    moments: dict[int, Any] = {}
    rows = 0
    for text in texts:
        ids = tokenizer.encode(text).ids[:max_tokens]
        if not ids:
            continue
        with torch.inference_mode():
            model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        for layer in ranks:
            # A first token with a hundred times the norm of the rest would be all that the map keeps.
            states = outputs[layer][0].double().numpy()
            states = states / np.linalg.norm(states, axis=1, keepdims=True) * np.sqrt(states.shape[1])
            moments[layer] = moments.get(layer, 0.0) + states.T @ states
        rows += len(ids)
        if rows >= MOST_CALIBRATION_TOKENS:
            break
    if rows < FEWEST_CALIBRATION_TOKENS:
        raise BackboneError(f"the calibration texts have {rows} tokens; give at least {FEWEST_CALIBRATION_TOKENS}, better 20,000")
    maps = {}
    for layer, rank in ranks.items():
        variances, directions = np.linalg.eigh(moments[layer] / rows)
        variances, directions = variances[::-1][:rank], directions[:, ::-1][:, :rank]
        # The signs make the result unique, whichever library computed it.
        directions = directions * np.sign(directions[np.abs(directions).argmax(0), np.arange(rank)])
        maps[layer] = np.ascontiguousarray((directions / np.sqrt(np.maximum(variances, FLOOR * variances[0]))).astype("<f4"))
    return maps
