"""Every way to name data, and the one line that each mistake gets."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from modicum import InputError
from modicum.research.data import hub
from modicum.research.data.sources import load_source, load_splits

ROWS = [{"text": "good film", "label": "positive"}, {"text": 'a "bad"\tone é', "label": "negative"}]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def load(tmp_path: Path, name: object, **options: Any) -> Any:
    return load_source(str(name), cache=tmp_path / "cache", **options)


def message(tmp_path: Path, name: object, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(tmp_path, name, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_jsonl_csv_tsv_parquet_and_json_give_the_same_rows(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv", index=False)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    for suffix in ("parquet", "csv", "jsonl", "json"):
        source = load(tmp_path, tmp_path / f"a.{suffix}", label_column="label")
        assert list(source.texts()) == [row["text"] for row in ROWS], suffix
        assert source.labels() == ["positive", "negative"], suffix
        assert len(source) == 2 and source.split == "train"


def test_tabs_separate_and_quotes_are_letters_in_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\nan "odd quote\t1\nplain\t0\n')
    source = load(tmp_path, tmp_path / "a.tsv", label_column="label")
    assert list(source.texts()) == ['an "odd quote', "plain"] and source.labels() == [1, 0]


def test_a_text_file_is_one_document_and_a_pattern_one_each(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "one.txt").write_text("first\n\nline two\n")
    (tmp_path / "deep" / "two.txt").write_text("second")
    (tmp_path / "deep" / "three.cfg").write_text("third")
    assert list(load(tmp_path, tmp_path / "one.txt").texts()) == ["first\n\nline two\n"]
    assert sorted(load(tmp_path, tmp_path / "**/*.txt").texts()) == ["first\n\nline two\n", "second"]
    assert list(load(tmp_path, tmp_path / "deep/*.cfg").texts()) == ["third"]


def test_folders_name_their_splits_in_many_ways(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    write_jsonl(tmp_path / "mapping.json", [{"other": 1}])
    assert [next(load(tmp_path, tmp_path, split=s).texts()) for s in ("dev", "valid", "test")] == [
        "validation",
        "validation",
        "test",
    ]
    assert load(tmp_path, tmp_path).split == "train"
    assert list(load_splits(tmp_path, cache=tmp_path / "cache")) == ["train", "dev", "test"]


def test_the_fingerprint_is_of_contents_and_columns(tmp_path: Path) -> None:
    one = load(tmp_path, write_jsonl(tmp_path / "one.jsonl", ROWS))
    copy = load(tmp_path, write_jsonl(tmp_path / "copy.jsonl", ROWS))
    changed = load(tmp_path, write_jsonl(tmp_path / "changed.jsonl", [ROWS[0], {**ROWS[1], "text": "?"}]))
    labelled = load(tmp_path, tmp_path / "one.jsonl", label_column="label")
    assert one.fingerprint == copy.fingerprint == "aa74a745ebef550f"
    assert len({one.fingerprint, changed.fingerprint, labelled.fingerprint}) == 3


def test_a_table_fingerprint_does_not_depend_on_its_chunks() -> None:
    rows = [{"text": str(number), "label": number} for number in range(2500)]
    whole = datasets.Dataset.from_list(rows)
    parts = [datasets.Dataset.from_list(part) for part in (rows[:7], rows[7:])]
    joined = datasets.concatenate_datasets(parts)
    assert hub.table_fingerprint(whole) == hub.table_fingerprint(joined)
    assert hub.table_fingerprint(whole) != hub.table_fingerprint(whole.select(range(2499)))


def test_missing_things(tmp_path: Path) -> None:
    assert message(tmp_path, tmp_path / "no.jsonl") == f"{tmp_path}/no.jsonl: no such file or folder"
    assert "no such file" in message(tmp_path, "data.jsonl")
    assert "no file matches" in message(tmp_path, tmp_path / "*.txt")
    assert "no file named train, dev or test" in message(tmp_path, tmp_path)
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    assert message(tmp_path, tmp_path, split="test") == f"{tmp_path}: no test split; there is: train"
    assert message(tmp_path, tmp_path, split="best") == "split 'best' is unknown; valid: train, dev, test"
    absent = message(tmp_path, tmp_path, text_column="sentence")
    assert absent == f"{tmp_path}/train.jsonl: no column 'sentence'; the columns are: text, label"
    assert "no column 'class'" in message(tmp_path, tmp_path, label_column="class")
    write_jsonl(tmp_path / "train.json", ROWS)
    assert "more than one file is its train split: train.json, train.jsonl" in message(tmp_path, tmp_path)
    (tmp_path / "a.docx").write_text("x")
    assert "cannot read '.docx' files; valid: .jsonl" in message(tmp_path, tmp_path / "a.docx")
    assert "different kinds (json, text)" in message(tmp_path, tmp_path / "*")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', "line 2 is not JSON: Expecting ',' delimiter at column 13"),
        ('["text"]', "line 2 is a JSON array; each line must be an object"),
        ("null", "line 2 is a JSON null"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n{{"text": "fine"}}\n')
    assert message(tmp_path, path).startswith(f"{path}: {said}")


def test_unusable_contents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"")
    assert message(tmp_path, path) == f"{path}: the file is empty"
    path.write_bytes(b"\n  \n")
    assert message(tmp_path, path) == f"{path}: the file has no rows"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert message(tmp_path, path) == f"{path}: line 2 is not UTF-8 (invalid start byte)"
    write_jsonl(path, [*ROWS, {"text": "no label"}, {"label": "no text"}])
    assert message(tmp_path, path, label_column="label") == f"{path}: row 4 has no text in column 'text'"
    write_jsonl(path, [*ROWS, {"text": "no label"}])
    assert message(tmp_path, path, label_column="label") == f"{path}: row 3 has no label in column 'label'"
    write_jsonl(path, [{"text": 3, "label": 0.5}])
    assert message(tmp_path, path) == f"{path}: column 'text' holds int64, not text"
    assert "holds double, not names" in message(
        tmp_path, write_jsonl(path, [{"text": "a", "label": 0.5}]), label_column="label"
    )
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,2,3,4\n")
    assert "cannot be read as csv" in message(tmp_path, tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("text,label\n")
    assert "b.csv: " in message(tmp_path, tmp_path / "b.csv")


def test_labels_without_a_label_column(tmp_path: Path) -> None:
    source = load(tmp_path, write_jsonl(tmp_path / "a.jsonl", ROWS))
    with pytest.raises(InputError, match="no label column was named; the columns are: text, label"):
        source.labels()


def test_the_hub_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_resolves", lambda host: False)
    text = message(tmp_path, "nobody/nothing")
    assert text.startswith("nobody/nothing: no such file or folder here, and the hub has not given it: ")


def test_a_hub_name_is_split_and_its_configuration_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fake(repository: str, configuration: str | None, cache_dir: str) -> datasets.DatasetDict:
        asked.append((repository, configuration, cache_dir))
        rows = datasets.Dataset.from_list(ROWS)
        return datasets.DatasetDict({"train": rows, "validation": rows.select([1])})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    source = load(tmp_path, "glue:sst2", split="dev", label_column="label")
    assert asked == [("glue", "sst2", str(tmp_path / "cache"))]
    assert source.labels() == ["negative"] and source.split == "dev"
    assert list(load_splits("glue:sst2", cache=tmp_path)) == ["train", "dev"]
    assert "no split test or testing; there is: train, validation" in message(
        tmp_path, "glue:sst2", split="test"
    )


def test_reading_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(tmp_path, write_jsonl(tmp_path / "quiet.jsonl", ROWS))
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_real_sst2(shared_data: Path, tmp_path: Path) -> None:
    splits = load_splits(shared_data / "sst2", label_column="label", cache=tmp_path)
    assert {name: len(source) for name, source in splits.items()} == {"train": 6920, "dev": 872, "test": 1821}
    assert set(splits["train"].labels()) == {0, 1}
