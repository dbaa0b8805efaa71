"""`modicum bench`: ours beside its peers, measured on this machine in one run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .bench_attention import AttentionBench
from .bench_bounds import BoundsBench
from .bench_compiled import AttentionCompiledBench
from .bench_delta import MemoryBench, StorageBench
from .bench_ffn import FeedForwardBench
from .options import require_folder


@dataclass(frozen=True)
class TrainBench:
    """Measure our train step beside the same decoder in PyTorch, eager and compiled, on this machine's CPU.

    Each contender has a process of its own and they take turns, round by round. Reported are medians, wall
    and CPU seconds (the latter say more on a shared machine), and which part of the machine's matrix product
    rate the model's arithmetic reaches.
    """

    layers: int = 6
    width: int = 384
    heads: int = 6
    length: int = 512
    """Tokens of a row."""
    batch: int = 8
    """Rows of a step."""
    vocab: int = 8192
    rounds: int = 5
    """Turns of each contender."""
    steps: int = 1
    """Train steps of one turn."""
    contenders: tuple[Literal["ours", "eager", "compiled"], ...] = ("ours", "eager", "compiled")
    """Who takes part: ours, PyTorch eager, PyTorch compiled."""
    threads: int = 0
    """Processors for each contender; 0: all."""
    out: Path | None = None
    """Folder for the tables and for every single timing."""

    def run(self) -> int:
        """Print the tables."""
        from ..bench.job import DecoderJob
        from ..bench.training import measure_training
        from ..bench.training_report import summary, write
        from .progress import notice

        require_folder(self.out)
        job = DecoderJob(self.layers, self.width, self.heads, self.length, self.batch, self.vocab)
        seen = measure_training(
            job,
            rounds=self.rounds,
            steps=self.steps,
            contenders=self.contenders,
            threads=self.threads,
            report=notice,
        )
        print(summary(seen))
        if self.out is not None:
            write(seen, self.out)
        return 0


@dataclass(frozen=True)
class GenerateBench:
    """Measure greedy generation beside transformers' on the same weights, on this machine's CPU.

    Each contender has a process of its own and they take turns, round by round. Reported are prefill and
    decoding rates, and which part they reach of the bound that the memory sets: the bytes of the weights that
    a token reads over the rate of a large matrix-vector product in the same run.
    """

    model: tyro.conf.Positional[str] = "gpt2"
    """A checkpoint's folder; or a preset of GPT-2's kind, of which one with random weights is made."""
    batch: tuple[int, ...] = (1, 8)
    """Rows that are generated together; each number is measured."""
    prompt: int = 128
    """Tokens of a prompt."""
    new: int = 64
    """Tokens decoded after the first."""
    rounds: int = 5
    """Turns of each contender."""
    contenders: tuple[Literal["ours", "transformers"], ...] = ("ours", "transformers")
    """Who takes part."""
    kv_heads: tuple[int, ...] = ()
    """Instead: ours on random LLaMA-shaped models of GPT-2 small's size with so many key/value heads."""
    threads: int = 0
    """Processors for each contender; 0: all."""
    out: Path | None = None
    """Folder for the tables and for every single timing."""

    def run(self) -> int:
        """Print the tables."""
        from ..bench.checkpoints import grouped, peers
        from ..bench.generation import measure_generation, require_peers
        from ..bench.generation_report import summary, write
        from .progress import notice

        require_folder(self.out)
        lengths = self.prompt, self.new
        if self.kv_heads:
            entering = grouped(self.kv_heads, *lengths)
        else:
            require_peers(self.contenders)
            entering = peers(self.model, self.contenders, *lengths)
        with entering as entrants:
            seen = measure_generation(
                entrants, batches=self.batch, rounds=self.rounds, threads=self.threads, report=notice
            )
        print(summary(seen))
        if self.out is not None:
            write(seen, self.out)
        return 0


@dataclass(frozen=True)
class TuneBench:
    """Measure our delta tuning beside PyTorch and PEFT's, on the same weights and texts, on this CPU.

    MiniLM under a classifier; all start at the same numbers and must have the same losses. Each contender
    has a process of its own and they take turns, round by round. Reported are medians, wall and CPU seconds,
    peak memory, and which part of the machine's matrix product rate the arithmetic reaches.
    """

    data: tyro.conf.Positional[Path]
    """Lines of JSON with `text` and `label` (0 or 1), such as sst2's train split."""
    method: Literal["lora", "bitfit", "full"] = "lora"
    """What is trained beside the classifier: LoRA on query and value, all biases, or everything."""
    batch: int = 16
    """Rows of a step."""
    length: int = 128
    """Tokens of a row; all rows are full."""
    rank: int = 8
    """LoRA's rank."""
    rounds: int = 5
    """Turns of each contender."""
    steps: int = 3
    """Train steps of one turn."""
    contenders: tuple[Literal["ours-tuning", "ours-tuning-wide", "peft", "peft-compiled"], ...] = (
        *("ours-tuning", "ours-tuning-wide", "peft"),
    )
    """Who takes part; ours as `modicum tune` computes, the last mlp for the token alone that the classifier
    reads, and for every token, as PEFT does. Under torch.compile PEFT needs a C++ compiler."""
    threads: int = 0
    """Processors for each contender; 0: all."""
    checkpoint: Path | None = None
    """Another checkpoint of BERT's kind."""
    out: Path | None = None
    """Folder for the tables and for every single timing."""

    def run(self) -> int:
        """Print the tables."""
        from ..bench.tuning import measure_tuning, require_peers, tuning_job
        from ..bench.tuning_report import summary, write
        from .progress import notice

        require_folder(self.out)
        require_peers(self.contenders)
        sizes = {"batch": self.batch, "length": self.length, "rank": self.rank}
        with tuning_job(self.data, method=self.method, checkpoint=self.checkpoint, **sizes) as job:
            seen = measure_tuning(
                job,
                rounds=self.rounds,
                steps=self.steps,
                contenders=self.contenders,
                threads=self.threads,
                report=notice,
            )
        print(summary(seen))
        if self.out is not None:
            write(seen, self.out)
        return 0


Attention = Annotated[AttentionBench, tyro.conf.subcommand("attention")]
AttentionBounds = Annotated[BoundsBench, tyro.conf.subcommand("attention-bounds")]
AttentionCompiled = Annotated[AttentionCompiledBench, tyro.conf.subcommand("attention-compiled")]
Train = Annotated[TrainBench, tyro.conf.subcommand("train")]
Tune = Annotated[TuneBench, tyro.conf.subcommand("tune")]
Generate = Annotated[GenerateBench, tyro.conf.subcommand("generate")]
FeedForward = Annotated[FeedForwardBench, tyro.conf.subcommand("ffn")]
Memory = Annotated[MemoryBench, tyro.conf.subcommand("tune-memory")]
Storage = Annotated[StorageBench, tyro.conf.subcommand("tune-storage")]


@dataclass(frozen=True)
class Bench:
    """Measure ours beside its peers, on this machine in one run."""

    what: (
        Attention
        | AttentionBounds
        | AttentionCompiled
        | Train
        | Tune
        | Generate
        | FeedForward
        | Memory
        | Storage
    )

    def run(self) -> int:
        """Print the tables."""
        return self.what.run()
