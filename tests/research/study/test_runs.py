"""Run folders: what was asked names them, finding them again changes nothing, strangers are left alone."""

import json
import logging
from dataclasses import dataclass, replace

import pytest

from modicum import InputError
from modicum.research.study.records import read_records
from modicum.research.study.runs import Run, run_folders, run_id


@dataclass(frozen=True)
class Question:
    rate: float = 1e-3
    layers: tuple[int, ...] = (1, 2)


def test_equal_questions_have_one_identity_and_any_difference_another():
    base = run_id(Question(), seed=1, data_fingerprint="d")
    assert base == run_id(Question(layers=(1, 2)), seed=1, data_fingerprint="d")
    others = [
        run_id(Question(2e-3), 1, "d"),
        run_id(Question(), 2, "d"),
        run_id(Question(), 1, "e"),
        run_id(Question(), 1, "d", revision=2),
    ]
    assert len({base, *others}) == 5


def test_a_run_is_new_then_resumed_then_finished_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = Run.open(tmp_path, Question())
    assert first.state == "new" and Run.open(tmp_path, Question()).state == "resumed"
    first.finish({"accuracy": 0.5})
    again = Run.open(tmp_path, Question())
    assert again.state == "finished" and again.result == {"accuracy": 0.5}
    assert "already finished, nothing to do" in caplog.text
    assert list(run_folders(tmp_path)) == [first.folder]


def test_a_folder_with_another_question_is_refused_and_left_as_it_was(tmp_path):
    run = Run.open(tmp_path, Question(), name="mine")
    before = (run.folder / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"rate is 0\.001 there and 0\.002 here"):
        Run.open(tmp_path, replace(Question(), rate=2e-3), name="mine")
    assert (run.folder / "config.json").read_bytes() == before


def test_a_folder_with_somebody_elses_files_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        Run.open(tmp_path, Question(), name="mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_an_unfinished_run_has_no_result(tmp_path):
    with pytest.raises(InputError, match="not finished"):
        Run.open(tmp_path, Question()).result  # noqa: B018


def test_metrics_are_cut_back_to_the_checkpoint_and_a_torn_line_is_dropped(tmp_path):
    run = Run.open(tmp_path, Question())
    with run.metrics() as log:
        for step in range(1, 6):
            log.append(step, {"loss": 1 / step})
    path = run.folder / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 6, "lo')
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4, 5]
    with run.metrics(resume_step=3) as log:
        for step in range(4, 6):
            log.append(step, {"loss": 1 / step})
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        read_records(path)


def test_processes_that_do_not_write_leave_nothing(tmp_path):
    run = Run.open(tmp_path, Question(), write=False)
    with run.metrics() as log:
        log.append(1, {"loss": 1.0})
    run.finish({"loss": 1.0})
    assert not any(tmp_path.iterdir())


def test_the_environment_is_recorded(tmp_path):
    run = Run.open(tmp_path, Question(), devices={"kind": "cpu", "count": 8})
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["devices"] == {"kind": "cpu", "count": 8} and "python" in str(environment).lower()
