"""lm-eval on our models: against its own Hugging Face model on the same weights, and a whole task."""

import logging

import numpy as np
import pytest

from modicum import InputError
from modicum.models import Transformer, TransformerConfig, preset
from modicum.models.generation import GREEDY, Sampling
from modicum.research.evaluation import harness_model
from modicum.research.evaluation.harness import wanted

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval.api.model")
pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import LM, TemplateLM  # noqa: E402

logging.getLogger("lm_eval").setLevel(logging.ERROR)
torch.set_num_threads(1)
LETTERS = "abcdefghijklmnopqrstuvwxyz .,?ABCDEFGH"
CONTEXT = 24


def encode(text):
    return [LETTERS.index(letter) + 2 for letter in text]


def decode(ids):
    return "".join(LETTERS[i - 2] for i in ids if i >= 2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The adapter of a tiny GPT-2, and lm-eval's adapter of transformers' model with the same weights."""
    from modicum.models.pretrained import load_pretrained

    theirs = gpt2()
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    loaded = load_pretrained(folder)
    adapter = harness_model(loaded.model, loaded.params, encode=encode, decode=decode, end=1, rows=3)
    return adapter, theirs


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, vocab_size=40, bos_token_id=1, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        model.transformer.wte.weight[:2] *= 0.3  # the end does not come at once
    return model.eval()


def instances(kind, *arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


PAIRS = [
    ("ab", " cd."),
    ("", "hello"),
    ("the quick ", "fox"),
    ("a" * 40, "bcd"),
    ("why?", " " + "no" * 8),
    ("x", "y"),
    ("ab", " ce."),
]
TEXTS = ["", "a", "the fox.", "abcdefgh" * 7, "z" * CONTEXT, "z" * (CONTEXT + 1)]


class Slow:
    """What the protocol asks for, from its definition, one text at a time in PyTorch."""

    def __init__(self, theirs):
        self.theirs = theirs

    def logs(self, ids):
        with torch.no_grad():
            return torch.log_softmax(self.theirs(torch.tensor([ids])).logits[0].double(), -1).numpy()

    def pair(self, context, continuation):
        whole = [*context, *continuation][-(CONTEXT + 1) :]
        logs, n = self.logs(whole[:-1]), len(continuation)
        rows = logs[len(logs) - n :]
        total = sum(row[token] for row, token in zip(rows, whole[-n:]))
        return total, rows.argmax(-1).tolist() == whole[-n:]

    def until(self, context, strings, new):
        ids, out = list(context)[-(CONTEXT - new) :], []
        for _ in range(new):
            out.append(int(self.logs(ids + out)[-1].argmax()))
            if out[-1] == 1 or any(string in decode(out) for string in strings):
                break
        text = decode(out)
        for string in strings:
            text = text.split(string)[0]
        return text


def test_it_is_a_model_of_lm_eval(pair):
    assert isinstance(pair[0], TemplateLM) and isinstance(pair[0], LM)
    assert (pair[0].eot_token_id, pair[0].prefix_token_id, pair[0].rank, pair[0].world_size) == (1, 1, 0, 1)


def test_log_likelihoods_are_those_of_the_definition(pair):
    adapter, slow = pair[0], Slow(pair[1])
    got = adapter.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(PAIRS, got):
        spaces = len(context) - len(context.rstrip())
        first = encode(context[: len(context) - spaces]) or [1]
        expected = slow.pair(first, encode(" " * spaces + continuation))
        np.testing.assert_allclose(total, expected[0], rtol=1e-5)
        assert greedy is expected[1]


def test_a_greedy_continuation_is_called_greedy(pair):
    adapter, slow = pair[0], Slow(pair[1])
    best = slow.until(encode("ab"), ["\n"], 6)
    got = adapter.loglikelihood(instances("loglikelihood", ("ab", best)), disable_tqdm=True)
    assert best and got[0][1] is True


def test_rolling_likelihoods_score_each_token_once(pair):
    adapter, slow = pair[0], Slow(pair[1])
    got = adapter.loglikelihood_rolling(instances("loglikelihood_rolling", *[(text,) for text in TEXTS]))
    for text, total in zip(TEXTS, got):
        ids, expected = [1, *encode(text)], 0.0
        for at in range(1, len(ids)):
            # Whole windows first; the last one reaches back for a full context.
            window = (at - 1) // CONTEXT
            last = window == (len(ids) - 2) // CONTEXT and window > 0
            start = len(ids) - 1 - CONTEXT if last else window * CONTEXT
            expected += slow.logs(ids[start:at])[-1][ids[at]]
        np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)


def test_continuations_end_where_they_are_told_to(pair):
    adapter, slow = pair[0], Slow(pair[1])
    contexts = ["ab", "the quick fox.", "a" * 40, "?", "HAD"]
    free = [slow.until(encode(text), [], 10) for text in contexts]
    longest = max(free, key=len)
    until = [longest[3:5], longest[6]]
    arguments = [(text, {"until": until, "max_gen_toks": 10, "do_sample": False}) for text in contexts]
    arguments.append((contexts[free.index(longest)], {"until": [], "max_gen_toks": 4}))
    got = adapter.generate_until(instances("generate_until", *arguments), disable_tqdm=True)
    assert got == [*(slow.until(encode(text), until, 10) for text in contexts), longest[:4]]
    assert len({len(text) for text in got}) > 1


def test_samples_do_not_depend_on_their_batch(pair):
    arguments = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 2.0}
    one = pair[0].generate_until(instances("generate_until", ("ab", arguments)))
    many = pair[0].generate_until(
        instances("generate_until", *[(t, arguments) for t in ("ab", "c", "dd", "e")])
    )
    assert many[0] == one[0] and len(set(many)) > 1


def test_likelihoods_agree_with_lm_evals_own_model(pair, tmp_path):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    theirs = huggingface.HFLM(
        pretrained=pair[1], tokenizer=letters(tmp_path), backend="causal", batch_size=2, max_length=CONTEXT
    )
    for kind, arguments in (("loglikelihood", PAIRS), ("loglikelihood_rolling", [(t,) for t in TEXTS[1:]])):
        expected = getattr(theirs, kind)(instances(kind, *arguments), disable_tqdm=True)
        got = getattr(pair[0], kind)(instances(kind, *arguments), disable_tqdm=True)
        np.testing.assert_allclose(np.asarray(got, float), np.asarray(expected, float), rtol=1e-5)
    asked = [(text, {"until": ["a", "q"], "max_gen_toks": 9}) for text in ("ab", "the fox", "?", "zzz")]
    kind = "generate_until"
    assert pair[0].generate_until(instances(kind, *asked)) == theirs.generate_until(
        instances(kind, *asked), disable_tqdm=True
    )


def letters(folder):
    """Our letters as a tokenizer of transformers."""
    import tokenizers as hf

    vocab = {"<pad>": 0, "<end>": 1, **{letter: index + 2 for index, letter in enumerate(LETTERS)}}
    inner = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = hf.pre_tokenizers.Split("", "isolated")
    inner.decoder = hf.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", bos_token="<end>"
    )


def test_a_task_of_lm_eval_runs(pair, tmp_path):
    """A task of two choices a question from a local file, without network."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    tasks = pytest.importorskip("lm_eval.tasks")
    rows = [("ab", " cd", " ce"), ("why", " no", " x"), ("the", " fox", " q"), ("zz", " b", " aaa")]
    lines = [f'{{"q": "{q}", "choices": ["{a}", "{b}"], "answer": 0}}' for q, a, b in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "letters.yaml").write_text(
        f"""
task: letters
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "rows.jsonl"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = evaluator.simple_evaluate(
        pair[0], tasks=["letters"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
    )
    slow = Slow(pair[1])
    scores = [[slow.pair(encode(q), encode(choice))[0] for choice in (a, b)] for q, a, b in rows]
    expected = np.mean([first > second for first, second in scores])
    assert results["results"]["letters"]["acc,none"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"until": "x"}, (("x",), 256, GREEDY)),
        ({"until": ["x", "y"], "max_new_tokens": 5, "temperature": 0.0}, (("x", "y"), 5, GREEDY)),
        ({"temperature": 0.7, "top_p": 0.9, "num_beams": 1}, ((), 256, Sampling(0.7, top_p=0.9))),
        ({"do_sample": False, "temperature": 0.7}, ((), 256, GREEDY)),
        ({"do_sample": True}, ((), 256, Sampling())),
        ({"repetition_penalty": 1.2}, ((), 256, Sampling(0.0, repetition_penalty=1.2))),
    ],
)
def test_generation_arguments_are_understood(arguments, expected):
    assert tuple(wanted(arguments)) == expected


@pytest.mark.parametrize("arguments", [{"num_beams": 4}, {"until": [], "typical_p": 0.3}])
def test_arguments_without_a_meaning_here_are_refused(arguments):
    with pytest.raises(InputError, match=r"num_beams|typical_p"):
        wanted(arguments)


def test_models_that_lm_eval_cannot_use_are_refused():
    text = {"encode": encode, "decode": decode, "end": 1}
    with pytest.raises(InputError, match="'encoder'"):
        harness_model(Transformer(TransformerConfig(kind="encoder")), {}, **text)
    with pytest.raises(InputError, match="give max_length"):
        harness_model(Transformer(preset("modern-tiny")), {}, **text)
    with pytest.raises(InputError, match="exceeds the model's 1024"):
        harness_model(Transformer(preset("gpt2")), {}, **text, max_length=1025)
