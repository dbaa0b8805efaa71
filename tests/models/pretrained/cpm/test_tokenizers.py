"""Tokenizers of CPM-Ant and CPM-Bee on small vocabularies; the longest match also against transformers'."""

import sys

import numpy as np
import pytest

from modicum import InputError
from modicum.models.pretrained.cpm import AntTokenizer, BeeTokenizer, Names, Vocabulary, longest_match
from modicum.models.pretrained.cpm.bee import Piece, Word

FIRST = ["<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>", "<option>"]
WORDS = ["今天", "天气", "今", "天", "好", "a", "ab", "abc", "<", "b <", "c"]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "bee.txt"
    path.write_text("\n".join(FIRST + WORDS) + "\n", "utf-8")
    return Vocabulary.read(path)


def test_a_file_has_a_token_a_line(vocabulary, tmp_path):
    assert vocabulary.size == 22 and vocabulary.ids["\n"] == 4 and vocabulary.ids[" "] == 5
    assert vocabulary.special() == frozenset(set(FIRST) - {"</n>", "</_>"})
    with pytest.raises(InputError, match="no such file"):
        Vocabulary.read(tmp_path / "ant.txt")
    (tmp_path / "short.txt").write_text("a\nb")
    with pytest.raises(InputError, match="the vocabulary of 2 tokens has no '<unk>'"):
        Vocabulary.read(tmp_path / "short.txt")


def test_the_longest_match_is_taken():
    words = {"a", "ab", "abcd"}
    assert list(longest_match("abcabcdx", words, 32)) == [
        ("ab", True),
        ("c", False),
        ("abcd", True),
        ("x", False),
    ]
    assert [piece for piece, _ in longest_match("abcd", words, 3)] == ["ab", "c", "d"]


@pytest.mark.peers
def test_the_longest_match_is_that_of_transformers():
    module = pytest.importorskip("transformers.models.cpmant.tokenization_cpmant")
    rng = np.random.default_rng(0)
    for _ in range(200):
        words = {"".join(rng.choice(list("abcd"), rng.integers(1, 5))) for _ in range(rng.integers(1, 12))}
        text = "".join(rng.choice(list("abcd"), rng.integers(1, 30)))
        theirs = module.WordpieceTokenizer(dict.fromkeys(words, 0)).tokenize(text)
        assert [piece if known else "<unk>" for piece, known in longest_match(text, words, 200)] == theirs


def test_ant_cuts_words_apart_first(vocabulary):
    tokenizer = AntTokenizer(vocabulary, words=lambda text: text.split("|"), keep_unknown=True)
    assert tokenizer.encode("ab|c今天|天x") == [6, 17, 21, 11, 14, 1]
    assert tokenizer.encode("ab|c", special=False) == [17, 21]
    assert tokenizer.pieces("a" * 201) == ["<unk>"]
    dropped = AntTokenizer(vocabulary, words=lambda text: [text])
    assert dropped.encode("x今天x") == [6, 11]
    assert dropped.decode([6, 11, 15, 7]) == "今天好" and dropped.decode([6, 11], special=True) == "<s>今天"
    assert (dropped.pad, dropped.bos, dropped.eos, dropped.vocab_size) == (0, 6, 7, 22)
    tokens, segments = dropped.encode_batch(["今天", "好好好"], side="left")
    assert tokens.tolist() == [[0, 0, 6, 11], [6, 15, 15, 15]] and segments.tolist() == [
        [0, 0, 1, 1],
        [1] * 4,
    ]


def test_ant_needs_jieba(vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(InputError, match="with jieba: pip install jieba"):
        AntTokenizer(vocabulary).encode("今天")


def test_bee_reads_brackets_and_escapes(vocabulary):
    tokenizer = BeeTokenizer(vocabulary)
    assert tokenizer.pieces("a<mask>b << c<foo_1>") == [
        Piece("a", False, True),
        Piece("<mask>", True, True),
        Piece("b <", False, True),  # the plain text is "b < c"
        Piece(" ", False, True),
        Piece("c", False, True),
        Piece("<foo_1>", True, False),
    ]
    # a token in brackets is none in plain text, and unknown neighbours are one piece
    assert [piece.text for piece in tokenizer.pieces("<<mask>xya")] == ["<", "m", "a", "sk>xy", "a"]
    assert tokenizer.encode("<ans>今天") == [6, 9, 11, 7] and tokenizer.decode([6, 11, 19, 7]) == "今天<<"


@pytest.mark.parametrize("text", ["a<mask", "<>", "a<b<c>", "<"])
def test_bee_refuses_what_nothing_closes(vocabulary, text):
    with pytest.raises(InputError, match="no > closes it; a plain < is written <<"):
        BeeTokenizer(vocabulary).pieces(text)


def test_words_without_an_id_are_numbered_by_name(vocabulary):
    tokenizer, names = BeeTokenizer(vocabulary), Names()
    words = tokenizer.words("<mask_7>xy<mask_0>a<mask_7>zz<ans_x>", names)
    assert words == [Word(2, 0), Word(1, 0), Word(2, 1), Word(16), Word(2, 0), Word(1, 1), Word(9, 0)]
    assert tokenizer.text(words, names) == "<mask_7>xy<mask_0>a<mask_7>zz<ans_x>"
    assert tokenizer.words("<mask_0><mask>", names) == [Word(2, 1), Word(2)]
    with pytest.raises(InputError, match=r"<foo_1> is numbered of <foo>, which the vocabulary lacks"):
        tokenizer.words("<foo_1>", names)
    with pytest.raises(InputError, match="no word has id 2 and number 5"):
        tokenizer.text([Word(2, 5)], names)


def test_plain_text_comes_back(vocabulary):
    tokenizer = BeeTokenizer(vocabulary)
    for text in ("今天 天气\n好 <<a>>", "<ans>a<<<<b", "x<mask>y"):
        names = Names()
        assert tokenizer.text(tokenizer.words(text, names), names) == text
