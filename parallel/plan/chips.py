"""What the chips can do, each number with where it was read.

A figure that was not read anywhere is absent (None), or, where nothing could be estimated without it, it is
there and its source begins with "remembered". `Chip.remembered` lists those, and whoever prints one says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ... import InputError

GB, MIB, GIB, TERA = 1e9, 2**20, 2**30, 1e12
LANES = 128  # numbers that a row of a TPU's tile holds (8 x 128, the T(8,128) of compiled programs)


@dataclass(frozen=True)
class Chip:
    """One accelerator, per chip.

    peak     floating-point (or integer) operations per second by type, dense
    memory   bytes of device memory;  bandwidth: its bytes/s
    link     bytes/s one way: of one of a torus's links (two for each of its `torus` dimensions), or of all a
             GPU's links to the switch of its host
    network  bytes/s one way of a chip's share of its host's network
    host     chips of one host;  pcie: bytes/s one way between a chip and its host's memory
    pod      chips of the largest slice (0: hosts are joined by the network alone)
    power    watts, the most;  price: US dollars an hour, list price on demand
    sources  for each field where its figure was read
    """

    name: str
    kind: Literal["tpu", "gpu"]
    peak: Mapping[str, float] = field(hash=False)
    memory: float
    bandwidth: float
    link: float
    network: float
    host: int
    pcie: float
    torus: int = 0
    pod: int = 0
    power: float | None = None
    price: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def remembered(self) -> tuple[str, ...]:
        """Fields whose figure was not read in a source."""
        return tuple(name for name, source in self.sources.items() if source.startswith("remembered"))

    @property
    def half(self) -> str:
        """The 16-bit type that it multiplies fast."""
        return "bfloat16" if "bfloat16" in self.peak else "float16"

    @property
    def lanes(self) -> int:
        """The last axis of an array that a kernel reads takes memory up to a multiple of this."""
        return LANES if self.kind == "tpu" else 1

    def flops(self, dtype: str) -> float:
        """Peak operations per second in a type; raises InputError where it has no units for it."""
        if dtype not in self.peak:
            raise InputError(f"chip {self.name} has no fast {dtype}; it has {', '.join(self.peak)}")
        return self.peak[dtype]


BOOK = "jax-ml/scaling-book tpus.md, tables of chips and of links"
TPU7X = "docs.cloud.google.com/tpu/docs/tpu7x, table of v5p, v6e and 7x"
PRICES = "jax-ml/scaling-book applied-inference.md, quoting cloud.google.com/tpu/pricing"
LOCKWOOD = "glennklockwood.com/garden/processors/A100, quoting NVIDIA's data sheet"
HOPPER = "glennklockwood.com/garden/processors/h100: BF16 989.4, FP8 1978.9 TFLOP/s, dense"
ACE = "acecloud.ai, table of A100, H100, H200"
AWS = "datareceipts/data-receipts 109-gpu-pricing, AWS us-east-1 on demand, 2026-11-09"
SMI = "nvidia-smi in public logs, such as «0MiB / 81251MiB» for an A100-SXM 80 GB"
DELL = "Dell EMC Ready Solutions for AI reference guide, p. 17"

TPUS = (
    Chip(
        "v4",
        "tpu",
        {"bfloat16": 275 * TERA, "int8": 275 * TERA},
        memory=32 * GIB,
        bandwidth=1200 * GB,
        link=45 * GB,
        network=6.25 * GB,
        host=4,
        pcie=15 * GB,
        torus=3,
        pod=4096,
        power=192,
        sources={
            "peak, memory, bandwidth, power, pod": "cloud.google.com/tpu/docs/v4",
            "link, host, pcie": BOOK,
            "network": f"{BOOK}: 25 GB/s a host",
        },
    ),
    Chip(
        "v5e",
        "tpu",
        {"bfloat16": 197 * TERA, "int8": 393 * TERA},
        memory=16 * GB,
        bandwidth=819 * GB,
        link=50 * GB,
        network=3.125 * GB,
        host=8,
        pcie=15 * GB,
        torus=2,
        pod=256,
        price=1.2,
        sources={
            "peak, memory, bandwidth, pod, host": "docs.cloud.google.com/tpu/docs/v5e",
            "network": "docs.cloud.google.com/tpu/docs/v5e: 6.4 Tb/s a pod of 256",
            "link, pcie": BOOK,
            "price": PRICES,
        },
    ),
    Chip(
        "v5p",
        "tpu",
        {"bfloat16": 459 * TERA, "int8": 918 * TERA},
        memory=95 * GIB,
        bandwidth=2765 * GB,
        link=100 * GB,
        network=6.25 * GB,
        host=4,
        pcie=15 * GB,
        torus=3,
        pod=6144,  # of the 8960 chips of a whole pod
        price=4.2,
        sources={
            "peak (bfloat16), memory, bandwidth, network": TPU7X,
            "pod": "cloud.google.com/tpu/docs/v5p-training: the largest job is 16x16x24, 6144 of 8960 chips",
            "peak (int8), link, host, pcie": BOOK,
            "price": PRICES,
        },
    ),
    Chip(
        "v6e",
        "tpu",
        {"bfloat16": 918 * TERA, "int8": 1836 * TERA},
        memory=32 * GB,
        bandwidth=1638 * GB,
        link=100 * GB,
        network=12.5 * GB,
        host=8,
        pcie=32 * GB,
        torus=2,
        pod=256,
        sources={
            "peak, memory, bandwidth, host, pod": "docs.cloud.google.com/tpu/docs/v6e",
            "network": TPU7X,
            "link, pcie": BOOK,
        },
    ),
    Chip(
        "7x",
        "tpu",
        {"bfloat16": 2307 * TERA, "float8": 4614 * TERA},
        memory=192 * GIB,
        bandwidth=7380 * GB,
        link=100 * GB,
        network=12.5 * GB,
        host=4,
        pcie=32 * GB,
        torus=3,
        pod=9216,
        sources={
            "peak, memory, bandwidth, network, host, pod": TPU7X,
            "link": f"{TPU7X}: 1200 GB/s both ways over six links",
            "pcie": "remembered: not read for this chip; v6e's is taken",
        },
    ),
)

GPUS = (
    Chip(
        "v100",
        "gpu",
        {"float16": 125 * TERA},
        memory=32_510 * MIB,
        bandwidth=900 * GB,
        link=150 * GB,
        network=6.25 * GB,
        host=8,
        pcie=16 * GB,
        power=300,
        sources={
            "peak": "besthub.dev, NVIDIA data-centre GPU evolution",
            "bandwidth, link, power, pcie": DELL,
            "memory": f"{SMI}; of the larger of two models",
            "network": "remembered: 4 x 100 Gb/s for the 8 GPUs of a DGX-1",
            "host": "infoq.cn j629I8X512fg8tuKd6ke, p3.16xlarge",
        },
    ),
    Chip(
        "a100-40",
        "gpu",
        {"bfloat16": 312 * TERA, "float16": 312 * TERA, "int8": 624 * TERA},
        memory=40_536 * MIB,
        bandwidth=1555 * GB,
        link=300 * GB,
        network=25 * GB,
        host=8,
        pcie=32 * GB,
        power=400,
        price=2.7447,
        sources={
            "peak, bandwidth, link, power, pcie": LOCKWOOD,
            "memory": SMI,
            "network": "remembered: 8 x 200 Gb/s for the 8 GPUs of a DGX A100",
            "price, host": f"{AWS}, p4d.24xlarge",
        },
    ),
    Chip(
        "a100-80",
        "gpu",
        {"bfloat16": 312 * TERA, "float16": 312 * TERA, "int8": 624 * TERA},
        memory=81_251 * MIB,
        bandwidth=2039 * GB,
        link=300 * GB,
        network=25 * GB,
        host=8,
        pcie=32 * GB,
        power=400,
        price=3.4309,
        sources={
            "peak, bandwidth, link, power, pcie": LOCKWOOD,
            "memory": SMI,
            "network": "remembered: 8 x 200 Gb/s for the 8 GPUs of a DGX A100",
            "price, host": f"{AWS}, p4de.24xlarge",
        },
    ),
    Chip(
        "h100",
        "gpu",
        {"bfloat16": 989 * TERA, "float16": 989 * TERA, "float8": 1979 * TERA},
        memory=81_559 * MIB,
        bandwidth=3350 * GB,
        link=450 * GB,
        network=50 * GB,
        host=8,
        pcie=64 * GB,
        power=700,
        price=6.88,
        sources={
            "peak": HOPPER,
            "bandwidth, link, power, pcie": ACE,
            "memory": SMI,
            "network": "datareceipts/data-receipts 109-gpu-pricing: 400 Gb/s a GPU (Azure ND H100 v5)",
            "price, host": f"{AWS}, p5.48xlarge",
        },
    ),
    Chip(
        "h200",
        "gpu",
        {"bfloat16": 989 * TERA, "float16": 989 * TERA, "float8": 1979 * TERA},
        memory=143_771 * MIB,
        bandwidth=4800 * GB,
        link=450 * GB,
        network=50 * GB,
        host=8,
        pcie=64 * GB,
        power=700,
        price=7.912,
        sources={
            "peak": f"{HOPPER}; the same processor",
            "bandwidth, link, power, pcie": ACE,
            "memory": SMI,
            "network": "remembered: 400 Gb/s a GPU, as H100",
            "price, host": "dstackai/dstack pull request 4110: p5en.48xlarge, 8 for $63.296",
        },
    ),
)

CHIPS: dict[str, Chip] = {chip.name: chip for chip in (*TPUS, *GPUS)}


def chip(name: str) -> Chip:
    """The chip called `name`; raises InputError with near misses for an unknown one."""
    known = name.lower()
    if known not in CHIPS:
        near = difflib.get_close_matches(known, CHIPS, 3) or list(CHIPS)
        raise InputError(f"chip {name!r} is unknown; did you mean {', '.join(near)}?")
    return CHIPS[known]
