"""The library's own sources: held-out modules, every part everywhere, no snippet that says its label."""

import re
from collections import Counter
from pathlib import Path

import pytest

from modicum import InputError
from modicum.research.data.standard_library import (
    PARTS,
    Document,
    _without_imports,
    corpus_fingerprint,
    library_documents,
    mask_names,
    snippets,
)

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return library_documents()


def test_every_part_is_in_every_split_in_about_its_share(documents: list[Document]) -> None:
    for part in [*PARTS, "other"]:
        sizes = Counter(dict.fromkeys(SPLITS, 0))
        modules: Counter[str] = Counter()
        for document in documents:
            if document.part == part:
                sizes[document.split] += len(document.text)
                modules[document.split] += 1
        total = sizes.total()
        assert 0.08 < sizes["test"] / total < 0.3, part
        assert 0.05 < sizes["dev"] / total < 0.25, part
        assert min(modules[split] for split in SPLITS) >= 3, (part, modules)
    assert sum(len(document.text) for document in documents) > 5e6


def test_tests_and_tables_are_left_out(documents: list[Document]) -> None:
    paths = {document.path for document in documents}
    assert len(paths) == len(documents)
    assert {"asyncio/tasks.py", "email/header.py", "json/decoder.py", "statistics.py"} <= paths
    assert not [path for path in paths if re.search(r"(^|/)(tests?|encodings|site-packages)/", path)]


def test_the_same_every_time(documents: list[Document]) -> None:
    assert library_documents() == documents
    assert corpus_fingerprint(documents) == corpus_fingerprint(library_documents())
    assert corpus_fingerprint(documents[1:]) != corpus_fingerprint(documents)
    one, two = (snippets(documents, "test", 5, seed=3) for _ in range(2))
    assert list(one.texts()) == list(two.texts()) and one.fingerprint == two.fingerprint
    assert list(snippets(documents, "test", 5, seed=4).texts()) != list(one.texts())


def test_snippets_are_balanced_held_out_and_silent_about_their_part(documents: list[Document]) -> None:
    split_of = {document.path: document.split for document in documents}
    names = "|".join([*PARTS, *(name for names in PARTS.values() for name in names)])
    named = re.compile(rf"\b({names})\b", re.IGNORECASE)
    texts: dict[str, set[str]] = {}
    for split in SPLITS:
        found = snippets(documents, split, 40)
        assert set(Counter(found.labels()).values()) == {40} and set(found.labels()) == set(PARTS)
        assert {split_of[path] for path in found.rows["path"]} == {split}
        assert min(Counter(zip(found.labels(), found.rows["path"])).values()) >= 1
        for text in found.texts():
            assert len(text.splitlines()) == 12
            assert not re.search(r"^\s*(import \w+$|from [\w.]+ import)", text, re.MULTILINE)
            assert not named.search(text), text
        texts[split] = set(found.texts())
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["dev"]


def test_a_part_gives_as_many_as_the_smallest(documents: list[Document]) -> None:
    found = Counter(snippets(documents, "test", 10**6).labels())
    assert len(set(found.values())) == 1 and min(found.values()) > 50


def test_modules_take_turns(documents: list[Document]) -> None:
    found = snippets(documents, "train", 10)
    for part in PARTS:
        paths = [path for path, label in zip(found.rows["path"], found.labels()) if label == part]
        modules = {d.path for d in documents if (d.part, d.split) == (part, "train")}
        assert len(set(paths)) >= min(5, len(modules)), part


def test_masking_takes_words_and_leaves_longer_names() -> None:
    text = "email.message and Email, http_version, HTTPServer, json, _markupbase, asyncio's, pdb"
    assert mask_names(text) == "NAME.message and NAME, http_version, HTTPServer, NAME, NAME, NAME's, NAME"


def test_imports_are_left_out_over_several_lines() -> None:
    text = "a\nimport os, \\\n  sys\nfrom x import (\n  y,\n  z)\n  from . import q\nb = 1\n"
    text += "__all__ = [\n 'c',\n]\nd"
    assert _without_imports(text) == "a\nb = 1\nd"


def test_another_folder_is_no_library(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no standard library"):
        library_documents(tmp_path)
