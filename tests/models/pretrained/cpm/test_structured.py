"""CPM-Bee's JSON to arrays: vectors that the published code gave, and rules in words.

The vectors (research page, §5.4) were made with the published vocabulary, which is not here: this one has the
few tokens that occur in them, under their published ids.
"""

import numpy as np
import pytest

from modicum import InputError
from modicum.models.kernels.spans import Span
from modicum.models.pretrained.cpm import BeeTokenizer, Vocabulary, encode, left_padded, pack
from modicum.models.pretrained.cpm.batch import extra_words
from modicum.models.pretrained.cpm.bee import Word
from modicum.models.pretrained.cpm.sample import targets
from modicum.models.pretrained.cpm.tree import nodes_of, relations_of, with_answers

IDS = {"<pad>": 0, "<unk>": 1, "<mask>": 2, "<sep>": 3, "\n": 4, " ": 5, "<s>": 6, "</s>": 7, "<root>": 8}
IDS |= {"<ans>": 9, "<option>": 10, "input": 65678, "options": 38805, "question": 56976, "last": 86582}
IDS |= {"今天": 9803, "天气": 14963, "，": 246, "我们": 18040, "去": 455, "好": 832, "公园": 10957}
IDS |= {"a": 78, " <": 68011, " b": 42473, "yes": 7607, "no": 7405, "?": 43}
A = {"input": "今天天气<mask_0>，我们去<mask_1>", "<ans>": {"<mask_0>": "好", "<mask_1>": "公园"}}
B = {"input": "a << b", "options": {"<option_0>": "yes", "<option_1>": "no"}}
B |= {"question": "?", "<ans>": "<option_1>"}


@pytest.fixture(scope="module")
def bee():
    return BeeTokenizer(Vocabulary(IDS))


def targets_of(sample):
    found = targets(sample, extra_words([sample]), 86583, 6, 7)
    return {int(place): int(found[place]) for place in np.flatnonzero(found != -100)}


def test_golden_vector_a(bee):
    sample = encode(A, bee)
    ids = "6,8,7, 6,65678,7, 6,9803,14963,2,246,18040,455,2,7, 6,9,7, 6,2,7, 6,832, 6,2,7, 6,10957"
    assert sample.ids.tolist() == [int(part) for part in ids.split(",")]
    assert {int(i): int(sample.sub[i]) for i in np.flatnonzero(sample.sub)} == {13: 1, 24: 1}
    assert np.flatnonzero(~sample.context).tolist() == [21, 22, 26, 27]
    lengths = (3, 3, 9, 3, 3, 2, 3, 2)
    assert sample.segment.tolist() == np.repeat(np.arange(8), lengths).tolist()
    assert sample.relations[0].tolist() == [
        [0, 2, 3, 2, 3, 4, 3, 4],
        [9, 0, 2, 10, 11, 12, 11, 12],
        [17, 9, 0, 18, 19, 20, 19, 20],
        [9, 10, 11, 0, 2, 3, 2, 3],
        [17, 18, 19, 9, 0, 2, 10, 11],
        [25, 26, 27, 17, 9, 0, 18, 19],
        [17, 18, 19, 9, 10, 11, 0, 2],
        [25, 26, 27, 17, 18, 19, 9, 0],
    ]
    assert targets_of(sample) == {21: 832, 22: 7, 26: 10957, 27: 7}


def test_golden_vector_b(bee):
    sample = encode(B, bee)
    ids = "6,8,7,6,65678,7,6,78,68011,42473,7,6,38805,7,6,10,7,6,7607,7,6,10,7,6,7405,7,6,56976,7,6,43,7"
    ids += ",6,9,7,6,10"
    assert sample.ids.tolist() == [int(part) for part in ids.split(",")]
    assert {int(i): int(sample.sub[i]) for i in np.flatnonzero(sample.sub)} == {21: 1, 36: 1}
    assert targets_of(sample) == {35: 86583, 36: 7}
    assert extra_words([sample]) == {Word(10, 1): 0}


def test_depths_beyond_seven_count_as_seven():
    data = "x"
    for depth in range(9):
        data = {f"k{depth}": data}
    nodes = nodes_of(data)
    table = relations_of(nodes)
    assert len(nodes) == 11 and table.max() == 57  # 7 up, none down
    assert table[0].tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8]
    assert table[:, 0].tolist() == [0, 9, 17, 25, 33, 41, 49, 57, 57, 57, 57]


def test_answers_are_shuffled_only_with_an_rng(bee):
    data = {"<mask_2>": "a", "<ans>": {f"<mask_{i}>": "好" for i in range(6)}}
    orders = set()
    for seed in range(8):
        nodes = nodes_of(data, np.random.default_rng(seed))
        assert [node.text for node in nodes[:4]] == ["<root>", "<mask_2>", "a", "<ans>"]
        orders.add(tuple(node.path[-1] for node in nodes if node.predicted))
    assert len(orders) > 4 and {frozenset(order) for order in orders} == {frozenset(data["<ans>"])}
    assert encode(data, bee).ids.tolist() == encode(data, bee).ids.tolist()


def test_examples_come_after_and_share_names(bee):
    sample = encode(A, bee, examples=[{"q": "<mask_1>", "<ans>": "<mask_5>"}])
    alone = encode(A, bee)
    count = len(alone)
    assert sample.ids[:count].tolist() == alone.ids.tolist() and set(sample.tree[count:]) == {1}
    assert sample.context[count:].all() and len(sample.relations) == 2
    more = [(int(id), int(sub)) for id, sub in zip(sample.ids[count:], sample.sub[count:]) if id == 2]
    assert more == [(2, 1), (2, 2)]  # <mask_1> is what it was, <mask_5> the third of its name
    assert targets_of(sample) == targets_of(alone)


def test_unknown_text_is_a_name_of_unk(bee):
    sample = encode({"input": "龘龘好龘", "<ans>": "龘"}, bee)
    assert [(int(i), int(s)) for i, s in zip(sample.ids, sample.sub) if i == 1] == [(1, 0), (1, 1), (1, 1)]
    assert bee.text([Word(1, 1), Word(832)], sample.names) == "龘好"


def test_open_answers_are_left_out(bee):
    sample, whole = encode(A, bee, open_answers=True), encode(A, bee)
    assert [(node.number, node.path) for node in sample.open] == [
        (5, ("<ans>", "<mask_0>")),
        (7, ("<ans>", "<mask_1>")),
    ]
    assert sample.context.all() and sample.ids.tolist() == whole.ids[whole.context].tolist()
    assert sample.segment.tolist() == whole.segment[whole.context].tolist()
    np.testing.assert_array_equal(sample.relations[0], whole.relations[0])
    assert with_answers(A, {("<ans>", "<mask_1>"): "家"}) == {
        **A,
        "<ans>": {"<mask_0>": "好", "<mask_1>": "家"},
    }


def test_packing_puts_samples_where_they_fit_best(bee):
    long, short = encode(A, bee), encode({"input": "a", "<ans>": "好"}, bee)
    assert (len(long), len(short)) == (28, 14)
    batch = pack([long, short, long, short, long], bee, length=57)  # the second short one fills the first row
    spans = [[1] * 28 + [2] * 14 + [3] * 14 + [0], [1] * 28 + [2] * 28 + [0]]
    assert batch.segments.tolist() == spans
    assert batch.tokens[0].tolist() == [*long.ids, *short.ids, *short.ids, 0]
    assert batch.targets[0, 42:].tolist() == [-100] * 12 + [832, 7, -100]
    with pytest.raises(InputError, match="sample 1 has 28 tokens; length=20 must be at least that"):
        pack([short, long], bee, length=20)


def test_masks_and_groups_of_a_packed_row(bee):
    """Pair by pair: given text is seen, examples see themselves, a task its examples, none another span."""
    one = encode(A, bee, examples=[{"input": "a", "<ans>": "好"}, {"input": "好", "<ans>": "a"}])
    two = encode(B, bee)
    batch = pack([one, two], bee, length=len(one) + len(two) + 3)
    length = batch.tokens.shape[1]
    found = np.asarray((batch.mask).predicate(Span(0, length), Span(0, length)))[0, 0]
    span = np.concatenate([np.full(len(one), 1), np.full(len(two), 2), np.zeros(3, int)])
    tree = np.concatenate([one.tree, two.tree])
    context = np.concatenate([one.context, two.context])
    real = len(tree)
    np.testing.assert_array_equal(batch.segments[0], span)
    for q, k in np.ndindex(real, real):
        if span[q] != span[k]:
            assert batch.positions.group[0, q] != batch.positions.group[0, k]
            continue
        allowed = (context[k] or (not context[q] and k <= q)) and (tree[q] == 0 or tree[q] == tree[k])
        assert found[q, k] == allowed, (q, k)
        assert (batch.positions.group[0, q] == batch.positions.group[0, k]) == (tree[q] == tree[k])
    assert (batch.targets[0] != -100).sum() == 4 + 2
    assert batch.extra.words.tolist() == [2, 10] and batch.extra.sub.tolist() == [1, 1]


def test_a_batch_has_an_extra_word_at_least(bee):
    batch = left_padded([encode({"input": "a", "<ans>": "好"}, bee)] * 2, bee, length=20, nodes=9)
    assert batch.extra.words.tolist() == [0] and batch.extra.sub.tolist() == [1]
    assert batch.positions.relations.shape == (2, 20, 9)
    assert batch.segments.tolist() == [[0] * 6 + [1] * 14] * 2 and (batch.targets[:, :6] == -100).all()
    with pytest.raises(InputError, match="samples is empty"):
        pack([], bee)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": 3}, "a is a int; strings, and objects of these, are valid"),
        ({"a": {"b": ["x"]}}, "a/b is a list"),
        ("a", "the task is a str; a JSON object is valid"),
        ({"a": "<mask"}, "no > closes it"),
    ],
)
def test_what_is_no_task(bee, data, message):
    with pytest.raises(InputError, match=message):
        encode(data, bee)
