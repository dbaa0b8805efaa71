"""A batch is a function of the seed and the step, for any number of processes."""

import itertools
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest

from modicum import InputError
from modicum.research.data.batches import Batches, evaluation_batches
from modicum.research.data.packing import pack


class Numbers:
    """Rows that say which row they are."""

    def __init__(self, count: int, weight: str = "weight") -> None:
        self.count, self.weight = count, weight

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        weight = np.float32(1) if self.weight == "weight" else np.ones(2, np.float32)
        return {"row": np.int32(index), "tokens": np.full(3, index, np.int32), self.weight: weight}


def drawn(batches: Batches, steps: range) -> list[int]:
    return [int(row) for step in steps for row in batches[step]["row"]]


def test_every_pass_is_another_permutation_also_across_batches() -> None:
    batches = Batches(Numbers(10), 4, seed=3)
    rows = drawn(batches, range(10))  # four passes
    passes = [tuple(rows[at : at + 10]) for at in range(0, 40, 10)]
    assert all(sorted(each) == list(range(10)) for each in passes)
    assert len(set(passes)) == 4
    assert batches.steps_per_pass() == 2.5


def test_shapes_and_types() -> None:
    batch = Batches(Numbers(10), 4)[7]
    assert {name: (field.shape, field.dtype.name) for name, field in batch.items()} == {
        "row": ((4,), "int32"),
        "tokens": ((4, 3), "int32"),
        "weight": ((4,), "float32"),
    }


def test_any_step_can_be_asked_for_in_any_order() -> None:
    forwards = drawn(Batches(Numbers(17), 3, seed=5), range(20))
    again = Batches(Numbers(17), 3, seed=5)
    backwards = [drawn(again, range(step, step + 1)) for step in reversed(range(20))]
    assert list(itertools.chain(*reversed(backwards))) == forwards
    assert drawn(Batches(Numbers(17), 3, seed=6), range(20)) != forwards


def test_the_order_is_pinned() -> None:
    """A run resumed under another version of grain must read the same batches."""
    assert drawn(Batches(Numbers(10), 5, seed=3), range(4)) == PINNED


PINNED = [4, 7, 0, 8, 2, 5, 3, 6, 1, 9, 6, 0, 4, 3, 2, 1, 9, 8, 7, 5]


def test_without_shuffling_the_order_is_the_rows() -> None:
    assert drawn(Batches(Numbers(5), 2, shuffle=False), range(5)) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_parts_of_the_processes_are_the_global_batch(count: int) -> None:
    whole = Batches(Numbers(20), 6, seed=1)
    for step in (0, 3, 11):
        parts = [whole.process_slice(index, count)[step] for index in range(count)]
        for name, field in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), field)


def test_iterating_resumes_at_any_step() -> None:
    batches = Batches(Numbers(11), 4, seed=2)
    found = [batch["row"].tolist() for batch in itertools.islice(batches.iterate(7), 9)]
    assert found == [batches[step]["row"].tolist() for step in range(7, 16)]


def test_iterating_reports_errors_and_stops_its_thread() -> None:
    class Failing(Numbers):
        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            if index == 3:
                raise OSError("disk gone")
            return super().__getitem__(index)

    iterator = Batches(Failing(4), 1, shuffle=False).iterate()
    with pytest.raises(OSError, match="disk gone"):
        list(iterator)
    running = Batches(Numbers(4), 1).iterate()
    next(running)
    running.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("weight", ["weight", "weights"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9])
def test_evaluation_sees_every_row_once(rows: int, count: int, weight: str) -> None:
    parts = [list(evaluation_batches(Numbers(rows, weight), 4, (index, count))) for index in range(count)]
    assert {len(part) for part in parts} == {-(-rows // 4)}
    seen: Counter[int] = Counter()
    order = []
    for shares in zip(*parts):
        batch: dict[str, Any] = {name: np.concatenate([s[name] for s in shares]) for name in shares[0]}
        assert batch["tokens"].shape == (4, 3)
        counted = batch[weight].reshape(4, -1).any(axis=1)
        seen.update(batch["row"][counted].tolist())
        order += batch["row"][counted].tolist()
    assert seen == Counter(range(rows)) and order == list(range(rows))


def test_packed_rows_make_batches() -> None:
    packed = pack([np.arange(2, 40)], 8, eos=1)
    batch = Batches(packed, 2, seed=0)[0]
    assert batch["tokens"].shape == batch["weights"].shape == (2, 8)
    last = list(evaluation_batches(packed, 2))[-1]
    assert last["weights"][1].sum() == 0 < last["segments"][1].sum()


def test_bad_input() -> None:
    for match, make in {
        "there are no rows": lambda: Batches(Numbers(0), 4),
        "size is 0": lambda: Batches(Numbers(4), 0),
        "seed is -1": lambda: Batches(Numbers(4), 2, seed=-1),
        "4 rows does not divide among 3 processes": lambda: Batches(Numbers(9), 4).process_slice(0, 3),
    }.items():
        with pytest.raises(InputError, match=match):
            make()
    rows = [{"tokens": np.zeros(3)}] * 3
    with pytest.raises(InputError, match="no field weight or weights"):
        list(evaluation_batches(rows, 2))
