"""How fast our TPU attention can be at most, beside jax's own splash attention, from compiled programs alone.

libtpu writes down the instruction bundles of each kernel. A chip issues one bundle a cycle, so their number
bounds the rate of a kernel from above: copies and waiting for the matrix unit come on top. Each kernel is
compiled for a mask without holes and counted whole, with what it does at the start and the end of a row.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import InputError

if TYPE_CHECKING:
    from .attention_tpu import CompiledCase

BLOCKS = (1024, 1024, 512)
# Bundles a second and TensorCores a chip. The clocks are those at which four matrix units a core (128 x 128,
# v6e 256 x 256) reach the published peaks of 197, 459 and 918 TFLOP/s (cloud.google.com/tpu/docs).
CHIPS = {"v5e": (1.5e9, 1), "v5p": (1.75e9, 2), "v6e": (1.75e9, 1)}
PEAKS = {"v5e": 197, "v5p": 459, "v6e": 918}
KERNELS = {"forward": 2, "dq": 3, "dk, dv": 4, "dq, dk, dv": 5}  # and its matrix products
PATTERNS = {
    False: {
        "forward": ("attention_forward", "splash_mha_fwd"),
        "dq": ("attention_query_gradient", "splash_mha_dq"),
        "dk, dv": ("attention_key_gradients", "splash_mha_dkv"),
    },
    True: {"dq, dk, dv": ("attention_all_gradients", "splash_mha_dkv")},  # one kernel for all gradients
}


class Bound(NamedTuple):
    """Bundles of a kernel for one tile, ours and splash's."""

    chip: str
    width: int
    kernel: str
    ours: int
    splash: int

    def rate(self, bundles: int) -> float:
        """The bound in TFLOP/s a chip."""
        clock, cores = CHIPS[self.chip]
        work = 2 * KERNELS[self.kernel] * BLOCKS[0] * BLOCKS[1] * self.width
        return min(work / (bundles / clock) * cores / 1e12, PEAKS[self.chip])


def measure(chips: tuple[str, ...], widths: tuple[int, ...], report: Callable[[str], None]) -> list[Bound]:
    """The bounds of the chips and widths."""
    bounds = [Bound(*each) for each in apart("attention_bounds", [*chips, *map(str, widths)])]
    for bound in bounds:
        report(f"{bound.chip} {bound.width} {bound.kernel}: {bound.ours} bundles, splash {bound.splash}")
    return bounds


def apart(module: str, arguments: Sequence[str]) -> list[Any]:
    """What a module here prints as JSON, in a process whose compiler writes its schedules to a folder.

    The folder comes before the other arguments.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        flags += " --xla_jf_dump_llo_pass_label_regex=final_bundles"
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": flags,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is touched: others may compile at the same time
        }
        given = [sys.executable, "-m", f"modicum.experiments.bench.{module}", folder, *arguments]
        done = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and said nothing"])[-1]
        raise InputError(f"compiling for {' '.join(arguments)} failed: {told}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def document(bounds: list[Bound], biases: Sequence[str] = ()) -> str:
    """The table as a page; `biases` are the lines of what biases cost."""
    rows, columns, chunk = BLOCKS
    lines = [
        "# Static bounds of the TPU attention kernels",
        "",
        "`modicum bench attention-bounds` compiles our kernels and jax's own splash attention for chips",
        "that are not there and counts the instruction bundles of one whole kernel (bfloat16, no mask, "
        f"{rows} queries x {columns} keys a tile, {chunk} keys at once, both alike).",
        "The bound is the rate at one bundle a cycle, at most the published peak: a gradient may have fewer",
        "bundles than its products take, and a width of 64 fills half of the matrix unit. Rates on a chip",
        "are lower: copies and waiting are not in the count.",
        "",
        "`dq, dk, dv` is one kernel for all three, taken where the gradient of all queries of a key head",
        "fits (splash's writes a part of dq for each block of keys, which XLA adds up: that is not in the",
        "count; ours keeps dq in VMEM). The second table has its bundles over those of two.",
        "",
        "| chip | width | kernel | bundles, ours | splash | bound, ours (TFLOP/s) | splash | ours / splash |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for b in bounds:
        rates = b.rate(b.ours), b.rate(b.splash)
        cells = [b.chip, b.width, b.kernel, b.ours, b.splash, *(f"{r:.0f}" for r in rates)]
        lines.append("| " + " | ".join(map(str, [*cells, f"{rates[0] / rates[1]:.2f}"])) + " |")
    return "\n".join([*lines, "", *_backward(bounds), *_biases(biases)]) + "\n"


def _biases(lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield ""
        yield "Biases that no memory holds: bundles of one tile of 512 queries x 512 keys, width 64, of"
        yield "Bucketed with 32 buckets, of Relations with 512 and 32 relations to 20 segments."
        yield from ("", *lines)


def _backward(bounds: list[Bound]) -> Iterator[str]:
    """One kernel beside two, a line a chip and width."""
    found = {(b.chip, b.width, b.kernel): b.ours for b in bounds}
    yield "| chip | width | bundles, one kernel | two kernels | one / two |"
    yield "|---|---|---|---|---|"
    for chip, width in dict.fromkeys((b.chip, b.width) for b in bounds if b.kernel == "dq, dk, dv"):
        one = found[chip, width, "dq, dk, dv"]
        two = found[chip, width, "dq"] + found[chip, width, "dk, dv"]
        yield f"| {chip} | {width} | {one} | {two} | {one / two:.2f} |"


def bundles(folder: Path) -> dict[str, int]:
    """The bundles of each kernel whose schedule lies in a folder, by the compiler's name for it."""
    found = {}
    for path in folder.glob("**/*schedule-analysis_final_bundles.txt"):
        name = re.sub(r"^\d+-|(\.\d+)?-\d+-schedule.*$", "", path.name)
        if total := re.search(r"total scheduled bundles:\s+(\d+)", path.read_text()):
            found[name] = int(total[1])
    return found


def _counted(folder: Path, chips: list[str], widths: list[int]) -> Iterator[Bound]:
    for chip in chips:
        for width in widths:
            for fused, patterns in PATTERNS.items():
                both = _ours(fused), _splash(fused)
                ours, splash = (bundles_of(folder, chip, width, each) for each in both)
                for kernel, names in patterns.items():
                    counts = [named(found, name) for found, name in zip((ours, splash), names)]
                    yield Bound(chip, width, kernel, *counts)


def named(found: dict[str, int], name: str) -> int:
    """The bundles of the kernels whose name has this in it."""
    return sum(count for key, count in found.items() if name in key)


def bundles_of(folder: Path, chip: str, width: int, implementation: Any) -> dict[str, int]:
    """The bundles of each kernel of forward and backward pass, 2048 tokens and two heads."""
    from ...models.kernels import Full, Terms
    from .attention_tpu import CompiledCase

    case = CompiledCase(lambda _: Terms(Full(), scale=1.0), 2048, width=width, heads=2, kv_heads=2, batch=1)
    return bundles_of_case(folder, case, chip, implementation)


def bundles_of_case(folder: Path, case: CompiledCase, chip: str, implementation: Any) -> dict[str, int]:
    """The bundles of each kernel of a case, compiled by a process that dumps its schedules to the folder."""
    from .attention_tpu import compile_case

    for path in folder.glob("**/*.txt"):
        path.unlink()
    compile_case(case, chip, implementation)
    return bundles(folder)


def _ours(fused: bool) -> Any:
    from ...models.kernels.tpu import Blocks, Tpu

    return Tpu(forward=Blocks(*BLOCKS), backward=Blocks(*BLOCKS), fused=fused)


def _splash(fused: bool) -> Any:
    """jax's kernel in the form of an implementation; of its log-sum-exp nothing is asked."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    rows, columns, chunk = BLOCKS
    sizes = kernel.BlockSizes(
        block_q=rows, block_kv=columns, block_kv_compute=chunk,
        block_q_dkv=rows, block_kv_dkv=columns, block_kv_dkv_compute=chunk,
        block_q_dq=None if fused else rows, block_kv_dq=None if fused else columns,
        use_fused_bwd_kernel=fused,
    )  # fmt: skip

    def run(q: Any, k: Any, v: Any, terms: Any) -> Any:
        heads, lengths = q.shape[2], (q.shape[1], k.shape[1])
        mask = masks.MultiHeadMask([masks.FullMask(lengths)] * heads)
        attend = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
        out = jax.vmap(attend)(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)
        return out, jnp.zeros(q.shape[:3], jnp.float32).swapaxes(1, 2)

    return run


if __name__ == "__main__":
    where, *rest = sys.argv[1:]
    for bound in _counted(
        Path(where), [x for x in rest if x in CHIPS], [int(x) for x in rest if x.isdigit()]
    ):
        print(json.dumps(bound), flush=True)
