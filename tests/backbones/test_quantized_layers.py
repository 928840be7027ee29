"""Our quantized layers against optimum-quanto's own: the same but for float noise."""

from __future__ import annotations

import pytest
import torch
from optimum.quanto import QLinear, qint4, qint8

from side_tuning.quantized_layers import Int4Linear, Int8Embedding, Int8Linear


@pytest.mark.timeout(900)  # quanto compiles its own kernels the first time, if there is a compiler
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 32), (384, 1536), (1536, 384), (172, 65), (7, 3), (96, 33)])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_equal_to_quanto(inputs: int, outputs: int, bias: bool, weights: str) -> None:
    torch.manual_seed(inputs)
    layer = QLinear.from_module(torch.nn.Linear(inputs, outputs, bias), weights=qint8 if weights == "int8" else qint4)
    layer.freeze()
    state: dict[str, torch.Tensor] = {}
    layer.weight.save_to_state_dict(state, "", False)
    ours: torch.nn.Module
    if weights == "int8":
        ours = Int8Linear(state["_data"], state["_scale"], layer.bias)
    else:
        ours = Int4Linear(state["_data._data"], state["_scale"], state["_shift"], layer.bias, outputs)
    x = torch.randn(3, 5, inputs)
    with torch.no_grad():  # quanto's int4 fails under inference_mode
        expected = layer(x)
    with torch.inference_mode():
        found = ours(x)
    # The order of additions differs (scales and bias go onto the product), so the last bits may.
    assert torch.allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_embedding_rows_are_near_and_zeros_stay_zeros() -> None:
    table = torch.randn(50, 64) * torch.logspace(-4, 2, 50).unsqueeze(1)
    table[7] = 0
    rows = Int8Embedding(*Int8Embedding.quantize(table))(torch.arange(50))
    assert torch.equal(rows[7], torch.zeros(64))
    assert ((rows - table).abs().amax(1) <= table.abs().amax(1) / 254 * 1.001).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="int8 weights"):
        Int8Linear(torch.zeros(4, 4), torch.ones(4, 1), None)
    with pytest.raises(ValueError, match="int4 weights"):
        Int4Linear(torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4, 1), torch.ones(4, 1), None, 4)
    with pytest.raises(ValueError, match="int8 rows"):
        Int8Embedding(torch.zeros(4, 4, dtype=torch.int8), torch.ones(3, 1))
