"""One text through a decoder piece by piece, keys and values of what came before kept: what generation needs.

Both runners give what a forward pass over the whole text gives, up to the order of additions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from side_tuning.plain_transformer import PlainTransformer


class TextRun(Protocol):
    def step(self, ids: Sequence[int]) -> list[Tensor]:
        """Each block's output (T, width) for the next tokens of the text."""


def start_text(model: nn.Module, blocks: Sequence[nn.Module]) -> TextRun:
    """A new text through `model`, whose transformer blocks are `blocks`."""
    from side_tuning.plain_transformer import PlainTransformer

    return _PlainRun(model) if isinstance(model, PlainTransformer) else _TransformersRun(model, blocks)


class _PlainRun:
    def __init__(self, model: PlainTransformer) -> None:
        from side_tuning.plain_transformer import KeyValues

        self._model = model
        self._seen = [KeyValues() for _ in model.blocks]

    def step(self, ids: Sequence[int]) -> list[Tensor]:
        import torch

        return self._model.step(torch.tensor(ids), self._seen)


class _TransformersRun:
    """For artifacts that need transformers on the device: its own cache, the blocks' outputs through hooks."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        from transformers import DynamicCache

        self._model, self._blocks = model, blocks
        self._cache = DynamicCache()

    def step(self, ids: Sequence[int]) -> list[Tensor]:
        import torch

        outputs: dict[int, Tensor] = {}

        def keep(number: int, _module: Any, _inputs: Any, output: Any) -> None:
            outputs[number] = (output[0] if isinstance(output, tuple) else output)[0]

        hooks = [block.register_forward_hook(partial(keep, number)) for number, block in enumerate(self._blocks)]
        try:
            with warnings.catch_warnings():  # the argument's new name, `cache`, is unknown to earlier versions
                warnings.simplefilter("ignore", FutureWarning)
                self._model(input_ids=torch.tensor([ids]), past_key_values=self._cache, use_cache=True)
        finally:
            for hook in hooks:
                hook.remove()
        return [outputs[number] for number in range(len(self._blocks))]
