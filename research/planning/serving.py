"""What serving costs: rooflines of prefill and decoding, memory of the cache, dollars and joules a token.

The bounds of scaling-book, "All About Transformer Inference": a decoding step reads each row's cache, and
reads all weights or multiplies them, whichever takes longer; prefill multiplies. Communication between the
chips, sampling and batching's own losses are left out: real servers reach a part of this (`efficiency`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ... import InputError
from ...models.config import TransformerConfig
from ...parallel.plan import Chip
from .training import HOUR


@dataclass(frozen=True)
class Serving:
    """A model on some chips that share it.

    parameters    numbers that multiply each token
    weight_bytes  bytes of a weight;  cache_bytes: of one token's keys and values in all layers
    dtype         type of the products
    efficiency    share of bandwidth and peak that is reached; 1 gives the bound
    """

    parameters: float
    weight_bytes: float
    cache_bytes: float
    chip: Chip
    chips: int = 1
    dtype: str = "bfloat16"
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        if self.chips < 1:
            raise InputError(f"chips={self.chips} must be at least 1")
        if not 0 < self.efficiency <= 1:
            raise InputError(f"efficiency={self.efficiency} must be above 0 and at most 1")

    @property
    def bandwidth(self) -> float:
        """Bytes/s of all chips."""
        return self.chips * self.chip.bandwidth * self.efficiency

    @property
    def flops(self) -> float:
        """Operations per second of all chips."""
        return self.chips * self.chip.flops(self.dtype) * self.efficiency

    def memory(self, rows: int, length: int) -> float:
        """Bytes of weights and of the cache of `rows` sequences of `length` tokens."""
        return self.parameters * self.weight_bytes + rows * length * self.cache_bytes

    def largest_batch(self, length: int) -> int:
        """How many sequences of `length` tokens fit beside the weights; 0 where not even these do."""
        free = self.chips * self.chip.memory - self.parameters * self.weight_bytes
        if not self.cache_bytes:
            return 0 if free < 0 else 2**31
        return max(0, math.floor(free / (length * self.cache_bytes)))

    @property
    def critical_batch(self) -> float:
        """Rows from which a step's products take longer than reading the weights."""
        return self.flops * self.weight_bytes / (2 * self.bandwidth)

    def prefill_seconds(self, rows: int, length: int) -> float:
        """Seconds to read prompts: 2 N operations a token, or the weights once."""
        products = 2 * self.parameters * rows * length / self.flops
        return max(products, self.parameters * self.weight_bytes / self.bandwidth)

    def step_seconds(self, rows: int, length: int) -> float:
        """Seconds to decode one token of each row with `length` tokens in the cache."""
        cache = rows * length * self.cache_bytes / self.bandwidth
        weights = self.parameters * self.weight_bytes / self.bandwidth
        return cache + max(weights, 2 * self.parameters * rows / self.flops)

    def tokens_per_second(self, rows: int, length: int) -> float:
        """Decoded tokens of all rows together."""
        return rows / self.step_seconds(rows, length)

    def dollars_per_million(self, rows: int, length: int, price: float) -> float:
        """US dollars a million decoded tokens at `price` a chip-hour."""
        return price * self.chips / (self.tokens_per_second(rows, length) * HOUR) * 1e6

    def joules_per_token(self, rows: int, length: int, power: float) -> float:
        """Energy a decoded token at `power` watts a chip."""
        return power * self.chips / self.tokens_per_second(rows, length)


def cache_bytes_per_token(config: TransformerConfig, number: float) -> float:
    """Bytes of the keys and values of one token in all layers: 2 L G K numbers of `number` bytes.

    Raises InputError for what is no decoder.
    """
    if config.kind != "decoder":
        raise InputError(f"serving is estimated for decoders; this model is an {config.kind}")
    total = 0
    for index in range(config.layers):
        if not config.lacks(index % config.period, "attention"):
            attention, _ = config.layer(index)
            total += 2 * attention.groups * attention.width_of_head(config.width)
    return total * number


def serving_of(
    config: TransformerConfig, parameters: int, chip: Chip, chips: int, number: float, efficiency: float = 1.0
) -> Serving:
    """A configuration served with weights and cache in numbers of `number` bytes."""
    cache = cache_bytes_per_token(config, number)
    return Serving(parameters, number, cache, chip, chips, chip.half, efficiency)


def electricity_dollars(
    servers: float, kilowatts: float, hours: float, price: float, overhead: float
) -> float:
    """US dollars of electricity: servers x kW x hours x PUE (`overhead`) x dollars a kWh."""
    return servers * kilowatts * hours * overhead * price
