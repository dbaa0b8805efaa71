"""The same decoder, written plainly in PyTorch, and our parameters carried into it.

As a PyTorch user would write it: one fused projection for query, key and value, and
`scaled_dot_product_attention` for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .job import DecoderJob


class Attention(nn.Module):
    """Causal self-attention of `[B, T, D]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]`."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(attended.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a layer norm and added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]`."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Decoder(nn.Module):
    """Logits `[B, T, V]` of tokens `[B, T]`; the head is the embedding table."""

    def __init__(self, job: DecoderJob) -> None:
        super().__init__()
        self.embedding = nn.Embedding(job.vocab, job.width)
        self.positions = nn.Embedding(job.length, job.width)
        self.layers = nn.ModuleList(Block(job.width, job.heads) for _ in range(job.layers))
        self.final_norm = nn.LayerNorm(job.width)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, T, V]`."""
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return functional.linear(self.final_norm(x), self.embedding.weight)


def next_token_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of `targets [B, T]`."""
    return functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


@torch.no_grad()
def load_parameters(model: Decoder, params: Mapping[str, Any]) -> None:
    """Copy our parameter tree (unrolled layers), or any tree of its shapes, into `model`."""
    _copy(model.embedding.weight, params["embedding"]["table"])
    _copy(model.positions.weight, params["position_embedding"]["table"])
    _copy_norm(model.final_norm, params["final_norm"])
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        ours = params[f"layers_{index}"]
        _copy_norm(layer.attention_norm, ours["attention_norm"])
        _copy_norm(layer.mlp_norm, ours["mlp_norm"])
        attention = ours["attention"]
        _copy_linear(layer.attention.qkv, attention["query"], attention["key"], attention["value"])
        _copy_linear(layer.attention.output, attention["output"])
        _copy_linear(layer.up, ours["mlp"]["up"])
        _copy_linear(layer.down, ours["mlp"]["down"])


def _copy(target: Tensor, source: Any) -> None:
    target.copy_(torch.from_numpy(np.array(source)))


def _copy_norm(norm: nn.LayerNorm, ours: Mapping[str, Any]) -> None:
    _copy(norm.weight, ours["scale"])
    _copy(norm.bias, ours["bias"])


def _copy_linear(linear: nn.Linear, *ours: Mapping[str, Any]) -> None:
    """Our kernels are `[in, out]`, PyTorch's `[out, in]`; several stand side by side in a fused one."""
    _copy(linear.weight, np.concatenate([np.asarray(one["kernel"]).T for one in ours]))
    _copy(linear.bias, np.concatenate([np.asarray(one["bias"]) for one in ours]))
