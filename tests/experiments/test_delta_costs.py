"""Memory and storage of deltas, from shapes."""

import pytest

from modicum import InputError
from modicum.experiments import delta_memory
from modicum.experiments.commands.bench_delta import MemoryBench, StorageBench
from modicum.experiments.delta_memory import MemoryCase, MemoryFound, memory_table
from modicum.experiments.delta_storage import Stored, count_stored, storage_table, storage_text
from modicum.research.training.memory import CompiledMemory

GIB = 1 << 30


def test_lora_on_the_10b_preset_is_exactly_as_large_as_the_talk_says():
    stored = count_stored("cpm-ant-10b")
    assert stored.deltas["LoRA, rank 8, query and value"] == 6_291_456
    assert set(stored.refused) == {"BitFit"}, "CPM-Ant has no biases"
    assert "Left out: BitFit (" in storage_text(stored, 100)


def test_lora_on_175b_saves_10000_times_only_without_the_backbone_and_at_rank_1():
    stored = count_stored("gpt3-175b")
    assert stored.deltas["LoRA, rank 8, query and value"] == 96 * 2 * 2 * 12_288 * 8
    text = storage_text(stored, 100)
    assert text.endswith("LoRA, rank 1, query and value, BitFit, prefix of 6, soft prompt of 100.\n")


def test_storage_in_numbers():
    table = storage_table(Stored("m", 1_000_000_000, {"d": 100_000}), 100)
    copies, delta = table.rows
    assert copies == ("full copies", 100.0, 2.0, 200.0, 1.0, None)
    assert delta == ("d", 0.02, 0.0004, 2.04, round(200 / 2.04, 1), 5000)


def test_memory_of_a_small_preset_and_what_is_kept_of_it(monkeypatch, capsys, tmp_path):
    kept = tmp_path / "found.jsonl"
    command = MemoryBench("quick", batch=(2,), length=(16,), method=("full", "lora"), kept=kept)
    assert command.run() == 0
    printed = capsys.readouterr().out
    assert "compiled for CPU" in printed
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    full, lora = ([cell.strip() for cell in line.split("|")] for line in rows[-2:])
    assert (full[4], lora[4]) == ("full", "lora")
    assert int(lora[5].replace(",", "")) == 4 * 2 * 2 * 128 * 8  # layers, sites, sides, width, rank
    assert 0 < float(lora[9]) < 100, "a delta saves memory, and not all of it"
    monkeypatch.setattr(delta_memory, "measure_memory", None)  # all is read from the file now
    assert command.run() == 0
    assert capsys.readouterr().out == printed


def test_a_step_that_does_not_fit_is_reported_with_the_compilers_figure(monkeypatch):
    class Lowered:
        def compile(self):
            raise delta_memory.jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory. Used 113.50G of 95.74G hbm. Exceeded by 17.76G."
            )

    monkeypatch.setattr(delta_memory, "_lowered", lambda case, layout: (Lowered(), 7))
    case = MemoryCase("quick", "full", 1, 8)
    found = delta_memory.measure_memory(case, delta_memory.devices_of(""))
    fits = MemoryFound(MemoryCase("quick", "lora", 1, 8), 3, 1, CompiledMemory(GIB, 0, GIB), 2.0 * GIB)
    table = memory_table([found, fits])
    assert table.rows[0][5:] == (None, None, "113.5 (does not fit)", None)
    assert table.rows[1][5:] == (1.0, 1.0, 2.0, round(100 * (1 - 2 / 113.5), 1))


@pytest.mark.parametrize(
    "command, message",
    [
        (MemoryBench(batch=(0,)), "batch=0 must be at least 1"),
        (MemoryBench("quick", topology="v9:2"), "topology 'v9:2'.*pip install libtpu"),
        (StorageBench(tasks=0), "tasks=0 must be at least 1"),
        (StorageBench("gpt4"), "preset 'gpt4' is unknown"),
    ],
    ids=["batch", "topology", "tasks", "preset"],
)
def test_what_cannot_be_is_refused(command, message):
    with pytest.raises(InputError, match=message):
        command.run()
