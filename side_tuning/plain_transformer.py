"""The six common architectures in plain torch, so that a device need not import transformers (130 MB and 2 s).

BERT, RoBERTa, OPT, GPT-2, Llama and Qwen2 differ in a few ways only: where the norms are, how positions come in, how
the layers are named. Preparation compares this with transformers on the very artifact and uses transformers where the
two differ (unusual rotary scaling, sliding windows ...), so nothing here guesses about configurations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Names:
    """What a family calls its parts; `{}` is the block's number."""

    tokens: str
    block: str
    query: str  # or query, key and value in one
    key: str
    value: str
    attention_out: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str
    gate: str = ""
    positions: str = ""
    types: str = ""
    embedding_norm: str = ""
    projection: str = ""


_BERT = Names(
    tokens="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    types="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    block="encoder.layer.{}",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    mlp_norm="output.LayerNorm",
)
_LLAMA = Names(
    tokens="embed_tokens",
    block="layers.{}",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_out="self_attn.o_proj",
    attention_norm="input_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    mlp_norm="post_attention_layernorm",
)
FAMILIES: dict[str, Names] = {
    "bert": _BERT,
    "roberta": _BERT,
    "opt": Names(
        tokens="decoder.embed_tokens",
        positions="decoder.embed_positions",
        projection="decoder.project_in",
        block="decoder.layers.{}",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        attention_out="self_attn.out_proj",
        attention_norm="self_attn_layer_norm",
        up="fc1",
        down="fc2",
        mlp_norm="final_layer_norm",
    ),
    "gpt2": Names(
        tokens="wte",
        positions="wpe",
        block="h.{}",
        query="attn.c_attn",
        key="",
        value="",
        attention_out="attn.c_proj",
        attention_norm="ln_1",
        up="mlp.c_fc",
        down="mlp.c_proj",
        mlp_norm="ln_2",
    ),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
}

# In place: what they work on is the widest tensor of a block.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_new": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "relu": torch.relu_,
    "silu": lambda x: F.silu(x, inplace=True),
}


class Stored(Protocol):
    """The artifact's layers by name."""

    def has(self, name: str) -> bool: ...
    def tensor(self, name: str) -> Tensor: ...
    def linear(self, name: str, transposed: bool = False) -> nn.Module: ...
    def embedding(self, name: str) -> nn.Module: ...


class Norm(nn.Module):
    """Layer norm, or root-mean-square norm where no bias is stored."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, stored: Stored, name: str, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.register_buffer("weight", stored.tensor(f"{name}.weight"))
        self.register_buffer("bias", stored.tensor(f"{name}.bias") if stored.has(f"{name}.bias") else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class RealTokens:
    """Between padded (B, T, C), which attention needs, and the real tokens alone (N, C), which are enough for all else."""

    def __init__(self, attention_mask: Tensor) -> None:
        self.shape = attention_mask.shape
        self.places = attention_mask.flatten().nonzero().flatten()
        self.padded = len(self.places) < attention_mask.numel()

    def pack(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        return rows.index_select(0, self.places) if self.padded else rows

    def pad(self, rows: Tensor) -> Tensor:
        """Inverse of `pack`; padding becomes zeros."""
        B, T = self.shape
        if self.padded:
            rows = rows.new_zeros(B * T, rows.shape[1]).index_copy_(0, self.places, rows)
        return rows.reshape(B, T, -1)


class KeyValues:
    """The keys and values of one block for the tokens of one text so far, (key heads, tokens, head width) each."""

    def __init__(self) -> None:
        self.length = 0
        self._keys = self._values = torch.empty(0, 0, 0)

    def add(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of the next tokens; returns all of them."""
        heads, T, head_width = keys.shape
        if self.length + T > self._keys.shape[1]:  # twice the room, so that a token seldom costs a copy of all before it
            room = max(64, 2 * (self.length + T))
            for name in ("_keys", "_values"):
                larger = keys.new_empty(heads, room, head_width)
                if self.length:
                    larger[:, : self.length] = getattr(self, name)[:, : self.length]
                setattr(self, name, larger)
        end = self.length + T
        self._keys[:, self.length : end], self._values[:, self.length : end] = keys, values
        self.length = end
        return self._keys[:, :end], self._values[:, :end]


class Block(nn.Module):
    """One transformer block, the norms before (`pre_norm`) or after its two halves."""

    def __init__(self, stored: Stored, names: Names, number: int, config: dict[str, Any]) -> None:
        super().__init__()
        prefix = names.block.format(number)
        transposed = config["model_type"] == "gpt2"

        def linear(name: str) -> nn.Module | None:
            return stored.linear(f"{prefix}.{name}", transposed) if name else None

        self.query, self.key, self.value = linear(names.query), linear(names.key), linear(names.value)
        self.attention_out = stored.linear(f"{prefix}.{names.attention_out}", transposed)
        self.gate, self.up, self.down = linear(names.gate), linear(names.up), linear(names.down)
        epsilon = _first(config, "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", default=1e-5)
        self.attention_norm = Norm(stored, f"{prefix}.{names.attention_norm}", epsilon)
        self.mlp_norm = Norm(stored, f"{prefix}.{names.mlp_norm}", epsilon)
        self.pre_norm = config["model_type"] not in ("bert", "roberta") and config.get("do_layer_norm_before", True)
        self.heads = _first(config, "num_attention_heads", "n_head")
        self.activation = ACTIVATIONS[_first(config, "hidden_act", "activation_function")]

    def forward(self, x: Tensor, real: RealTokens, mask: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        x = real.pack(x)
        if self.pre_norm:
            x = self._attention(self.attention_norm(x), real, mask, rotary).add_(x)
            x = self._mlp(self.mlp_norm(x)).add_(x)
        else:
            x = self.attention_norm(self._attention(x, real, mask, rotary).add_(x))
            x = self.mlp_norm(self._mlp(x).add_(x))
        return real.pad(x)

    def _attention(self, x: Tensor, real: RealTokens, mask: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        B, T = real.shape
        q, k, v = self._project(x)
        head_width = q.shape[-1] // self.heads
        q, k, v = (real.pad(part).view(B, T, -1, head_width).transpose(1, 2) for part in (q, k, v))  # (B, heads, T, head_width)
        if rotary is not None:
            q, k = _rotate(q, rotary), _rotate(k, rotary)
        if k.shape[1] != self.heads:  # several query heads share a key head
            k, v = (part.repeat_interleave(self.heads // part.shape[1], dim=1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.attention_out(real.pack(out.transpose(1, 2).reshape(B, T, -1)))

    def step(self, x: Tensor, seen: KeyValues, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """(T, C) of the next tokens of one text to the same; their keys and values are added to `seen`."""
        if self.pre_norm:
            x = x + self._attend(self.attention_norm(x), seen, rotary)
            return x + self._mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self._attend(x, seen, rotary))
        return self.mlp_norm(x + self._mlp(x))

    def _attend(self, x: Tensor, seen: KeyValues, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        T = len(x)
        q, k, v = self._project(x)
        head_width = q.shape[-1] // self.heads
        q, k, v = (part.view(T, -1, head_width).transpose(0, 1) for part in (q, k, v))  # (heads, T, head_width)
        if rotary is not None:
            q, k = _rotate(q, rotary), _rotate(k, rotary)
        k, v = seen.add(k, v)
        sharing = self.heads // len(k)  # query heads that share a key head: their queries are rows of it
        mask = None
        if T > 1:  # token t of the new ones sees all before them, and the new ones up to itself
            mask = torch.ones(T, k.shape[1], dtype=torch.bool).tril(k.shape[1] - T).repeat(sharing, 1)
        out = F.scaled_dot_product_attention(q.reshape(1, len(k), sharing * T, head_width), k[None], v[None], attn_mask=mask)
        return self.attention_out(out.reshape(self.heads, T, head_width).transpose(0, 1).reshape(T, -1))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.query is not None
        if self.key is None or self.value is None:
            q, k, v = self.query(x).chunk(3, dim=-1)
            return q, k, v
        return self.query(x), self.key(x), self.value(x)

    def _mlp(self, x: Tensor) -> Tensor:
        assert self.up is not None
        assert self.down is not None
        if self.gate is not None:
            return self.down(self.activation(self.gate(x)).mul_(self.up(x)))
        return self.down(self.activation(self.up(x)))


class PlainTransformer(nn.Module):
    """Embeddings and the first blocks of one of `FAMILIES`; takes the inputs that transformers' models take."""

    frequencies: Tensor | None

    def __init__(self, stored: Stored, config: dict[str, Any], layers: int) -> None:
        super().__init__()
        family: str = config["model_type"]
        names = FAMILIES[family]
        pad: int = config.get("pad_token_id") or 0
        self.config = SimpleNamespace(pad_token_id=pad, type_vocab_size=config.get("type_vocab_size", 0), num_hidden_layers=layers)
        self.causal = family not in ("bert", "roberta")
        # RoBERTa counts positions from behind the padding's own, OPT from 2.
        self.position_offset = pad + 1 if family == "roberta" else 2 if family == "opt" else 0
        self.tokens = stored.embedding(names.tokens)
        self.positions = stored.embedding(names.positions) if names.positions else None
        self.types = stored.embedding(names.types) if names.types else None
        epsilon = config.get("layer_norm_eps", 1e-5)
        self.embedding_norm = Norm(stored, names.embedding_norm, epsilon) if names.embedding_norm else None
        projected = names.projection and (stored.has(f"{names.projection}.data") or stored.has(f"{names.projection}.weight"))
        self.projection = stored.linear(names.projection) if projected else None
        rotary = "rotary_emb.inv_freq"
        self.register_buffer("frequencies", stored.tensor(rotary) if stored.has(rotary) else None)
        self.blocks = nn.ModuleList(Block(stored, names, number, config) for number in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> None:
        """Run the blocks; their outputs are taken by hooks. Padding must be on the right."""
        T = input_ids.shape[1]
        positions = torch.arange(T)
        x = self._embed(input_ids, token_type_ids, positions)
        rotary = self._rotary(positions)
        mask = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
        if self.causal:
            mask = mask & torch.ones(T, T, dtype=torch.bool).tril()
        real = RealTokens(attention_mask)
        for block in self.blocks:
            x = block(x, real, mask, rotary)

    def step(self, ids: Tensor, seen: list[KeyValues]) -> list[Tensor]:
        """Run the next tokens of one text, for causal families.

        Args:
            ids: (T,).
            seen: each block's keys and values of the tokens before, to which those of these are added; new ones at the beginning.

        Returns:
            Each block's output, (T, width).

        """
        positions = torch.arange(seen[0].length, seen[0].length + len(ids))
        x = self._embed(ids[None], None, positions)[0]
        rotary = self._rotary(positions)
        outputs = []
        for block, block_seen in zip(self.blocks, seen, strict=True):
            assert isinstance(block, Block)
            x = block.step(x, block_seen, rotary)
            outputs.append(x)
        return outputs

    def _embed(self, input_ids: Tensor, token_type_ids: Tensor | None, positions: Tensor) -> Tensor:
        x: Tensor = self.tokens(input_ids)
        if self.projection is not None:
            x = self.projection(x)
        if self.types is not None:
            x = x + self.types(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        if self.positions is not None:
            x = x + self.positions(positions + self.position_offset)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return x

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.frequencies is None:
            return None
        angles = positions.float()[:, None] * self.frequencies[None, :]
        angles = torch.cat((angles, angles), dim=-1)  # (T, head_width)
        return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat((-high, low), dim=-1) * rotary[1]


def _first(config: dict[str, Any], *names: str, default: Any = None) -> Any:
    """The first of `names` that the configuration states."""
    found = next((config[name] for name in names if config.get(name) is not None), default)
    if found is None:
        raise KeyError(names[0])
    return found
