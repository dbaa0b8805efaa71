"""CPM-Ant beside `transformers`' on the same files, and the files of CPM-Live, whose weights are unscaled."""

import json
from math import sqrt

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.models import Cache, Transformer, run_with_cache
from modicum.models.costs import parameter_count
from modicum.models.pretrained import cpm_ant, load_pretrained, save_pretrained
from modicum.models.pretrained.files import TensorFiles
from modicum.models.pretrained.settings import Settings

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "dim_head": 8,
    "dim_ff": 48,
    "num_hidden_layers": 3,
    "position_bias_num_buckets": 16,
    "position_bias_max_distance": 24,
    "prompt_types": 4,
    "prompt_length": 6,
    "segment_types": 5,
    "init_std": 0.3,
}
CONFIGURATIONS = {
    "untied": {"tie_word_embeddings": False},
    "tied": {"num_hidden_layers": 2, "dim_head": 16, "eps": 1e-3},
    "few buckets": {"position_bias_num_buckets": 8, "position_bias_max_distance": 10, "dim_ff": 20},
}
LENGTHS = (14, 9)


def ant(oracle, seed=0, **options):
    transformers, torch = oracle.transformers, oracle.torch
    torch.manual_seed(seed)
    model = oracle.perturbed(transformers.CpmAntForCausalLM(transformers.CpmAntConfig(**{**TINY, **options})))
    with torch.no_grad():
        if model.config.tie_word_embeddings:
            model.lm_head.weight.copy_(model.cpmant.input_embedding.weight[: model.config.vocab_size])
    return model


def rows(seed=0):
    """Two rows of ids without 0, which is padding in `transformers`."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 61, n).tolist() for n in LENGTHS]


def left_padded(lists):
    longest = max(map(len, lists))
    return np.array([[0] * (longest - len(row)) + list(row) for row in lists])


def outputs(pretrained, prepared, names):
    model = pretrained.model
    run = jax.jit(
        lambda params, given: run_with_cache(
            model, params, prepared.tokens, names=names, mask=prepared.mask(prepared.segments), **given
        )
    )
    given = {"segments": prepared.segments, "positions": prepared.positions}
    return run(pretrained.params, given)


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_parity(oracle, tmp_path, options):
    """Logits and hidden states of a batch with padding, at the tokens; and the way back."""
    model, ids = ant(oracle, **options), rows()
    model.save_pretrained(tmp_path / "theirs")
    pretrained = load_pretrained(tmp_path / "theirs")
    prepared = cpm_ant.prepare(ids, pretrained.model.config)
    inputs = {"input_ids": left_padded(ids)}
    expected, hidden = oracle.theirs(model, inputs)
    logits, found = outputs(pretrained, prepared, ["embedded", r"layers_\d+/residual", "final_norm"])
    real = inputs["input_ids"] > 0
    scale = np.abs(expected[real]).max()
    gap = np.abs(prepared.own(np.asarray(logits))[..., :61] - expected)[real].max()
    worst = {
        name: np.abs(prepared.own(np.asarray(found[name])) - state)[real].max()
        for name, state in hidden.items()
    }
    oracle.report(model, oracle.Parity(gap, max(worst.values()), scale, pretrained))
    assert len(hidden) == model.config.num_hidden_layers + 1
    assert gap <= 1e-4 * scale and max(worst.values()) <= 1e-4 * scale, worst
    assert ("head" in pretrained.params) == (not model.config.tie_word_embeddings)
    assert pretrained.model.config.tied == model.config.tie_word_embeddings
    oracle.check_the_way_back(tmp_path, pretrained, model, inputs, expected)


def test_parity_of_the_headless_model(oracle, tmp_path):
    oracle.torch.manual_seed(2)
    settings = oracle.transformers.CpmAntConfig(**{**TINY, "num_hidden_layers": 2})
    model, ids = oracle.perturbed(oracle.transformers.CpmAntModel(settings)), rows()
    model.save_pretrained(tmp_path / "theirs")
    pretrained = load_pretrained(tmp_path / "theirs")
    assert pretrained.model.head is None
    inputs = {"input_ids": left_padded(ids)}
    expected = oracle.theirs(model, inputs)[0]
    found, _ = outputs(pretrained, cpm_ant.prepare(ids, pretrained.model.config), [])
    gap = np.abs(np.asarray(found)[:, 6:] - expected)[inputs["input_ids"] > 0].max()
    assert gap <= 1e-4 * np.abs(expected).max()
    oracle.check_the_way_back(tmp_path, pretrained, model, inputs, expected)


def test_scanned_and_padded_models_compute_the_same(oracle, tmp_path):
    ant(oracle).save_pretrained(tmp_path / "theirs")
    one = load_pretrained(tmp_path / "theirs")
    two = load_pretrained(tmp_path / "theirs", scan=True, vocab_multiple=16)
    assert two.params["embedding"]["table"].shape == (96, 32)  # 61 words and 24 prompt tokens
    prepared = cpm_ant.prepare(rows(), one.model.config)
    first, second = (np.asarray(outputs(each, prepared, [])[0]) for each in (one, two))
    np.testing.assert_allclose(second[..., :61], first[..., :61], atol=1e-5 * np.abs(first[..., :61]).max())
    assert (first[..., 61:] < -1e8).all() and (second[..., 61:] < -1e8).all()
    save_pretrained(tmp_path / "back", two.model, two.params, settings=two.settings)
    oracle.assert_same_bits(load_pretrained(tmp_path / "back").params, one.params)


def test_a_tied_head_must_repeat_the_table(oracle, tmp_path):
    model = ant(oracle)
    with oracle.torch.no_grad():
        model.lm_head.weight[3, 3] += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lm_head.weight differs from cpmant.input_embedding.weight"):
        load_pretrained(tmp_path)


def live_files(oracle, model, folder, scale_up=True):
    """The same model as CPM-Live has it: a prompt table, and weights times the square root of their width."""
    from safetensors.torch import save_file

    config, tensors = model.config, {}
    for name, value in model.cpmant.state_dict().items():
        width = value.shape[-1] if value.ndim == 2 and "relative" not in name else 1
        tensors[name] = value.contiguous() * sqrt(config.hidden_size if "embedding" in name else width)
    table = tensors.pop("input_embedding.weight")
    tensors["input_embedding.weight"] = table[: config.vocab_size].clone()
    tensors["prompt_embedding.weight"] = table[config.vocab_size :].clone()
    settings = {
        "dim_model": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "half": True,
        "model_type": "cpm-live-ant",
        "architectures": ["CPMAnt"],
    }
    same = ("vocab_size", "dim_head", "dim_ff", "dropout_p", "prompt_types", "prompt_length", "segment_types")
    same += ("position_bias_num_buckets", "position_bias_max_distance", "eps")
    settings |= {key: getattr(config, key) for key in same}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return settings


def test_the_files_of_cpm_live_give_the_same_logits(oracle, tmp_path):
    model = ant(oracle)
    model.save_pretrained(tmp_path / "theirs")
    settings = live_files(oracle, model, tmp_path / "live")
    one, two = load_pretrained(tmp_path / "theirs"), load_pretrained(tmp_path / "live")
    assert two.model.config.scaled_linears and not one.model.config.scaled_linears
    prepared = cpm_ant.prepare(rows(), one.model.config)
    first, second = (outputs(each, prepared, [])[0] for each in (one, two))
    real = prepared.segments > 0
    gap = np.abs(np.asarray(first - second)[..., :61])[real].max()
    assert gap <= 1e-5 * np.abs(np.asarray(first)[real][:, :61]).max()
    save_pretrained(tmp_path / "back", two.model, two.params, settings=two.settings)
    oracle.assert_same_bits(load_pretrained(tmp_path / "back").params, two.params)
    before, after = (TensorFiles.open(tmp_path / name) for name in ("live", "back"))
    assert set(before.names) == set(after.names)
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.names)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert all(written[key] == value for key, value in settings.items())


def test_compressed_models_lack_sublayers(oracle, tmp_path):
    """Layers that `mask_modules` masks have no tensors, and the model is that without them."""
    from safetensors.torch import load_file, save_file

    live_files(oracle, ant(oracle), tmp_path / "live")
    tensors = load_file(tmp_path / "live" / "model.safetensors")
    tensors = {
        name: x for name, x in tensors.items() if "layers.1.ffn" not in name and "0.self_att" not in name
    }
    save_file(tensors, tmp_path / "live" / "model.safetensors")
    masks = [[True, False], [False, True], [False, False]]
    with pytest.raises(InputError, match=r"missing tensors: encoder.layers.0.self_att"):
        load_pretrained(tmp_path / "live")
    oracle.change_settings(tmp_path / "live", {"mask_modules": masks})
    pretrained = load_pretrained(tmp_path / "live")
    params = pretrained.params
    assert "attention" not in params["layers_0"] and "mlp_norm" not in params["layers_1"]
    prepared = cpm_ant.prepare(rows(), pretrained.model.config)
    _, hidden = outputs(pretrained, prepared, ["embedded", "layers_1/middle", "layers_1/residual"])
    np.testing.assert_array_equal(hidden["layers_1/middle"], hidden["layers_1/residual"])
    save_pretrained(tmp_path / "back", pretrained.model, params, settings=pretrained.settings)
    again = load_pretrained(tmp_path / "back")
    assert again.settings["mask_modules"] == masks and again.model == pretrained.model
    oracle.assert_same_bits(again.params, params)
    oracle.change_settings(tmp_path / "live", {"mask_modules": masks[:2]})
    with pytest.raises(InputError, match=r"mask_modules=.*valid: 3 pairs of true and false"):
        load_pretrained(tmp_path / "live")


def test_the_published_model_has_its_parameters():
    settings = {"dim_model": 4096, "num_layers": 48, "num_heads": 32, "vocab_size": 30720}
    assert parameter_count(Transformer(cpm_ant.read_live(Settings(settings)))) == 9_391_624_192
    assert parameter_count(Transformer(cpm_ant.read(Settings({})))) == 9_391_624_192


def test_tokens_are_those_of_generate(oracle, tmp_path):
    """Greedy tokens after left-padded prompts, and their logits, one by one as `transformers` has them."""
    model, ids = ant(oracle), rows()
    model.save_pretrained(tmp_path)
    options = {"do_sample": False, "max_new_tokens": 6, "output_logits": True, "eos_token_id": None}
    inputs = oracle.torch.as_tensor(left_padded(ids))
    expected = model.generate(inputs, return_dict_in_generate=True, pad_token_id=0, **options)
    pretrained = load_pretrained(tmp_path)
    ours, params = pretrained.model, pretrained.params
    prepared = cpm_ant.prepare(ids, ours.config)
    read, positions = jax.jit(ours.apply, static_argnames=("last",)), prepared.positions
    cache = Cache.empty(2, prepared.tokens.shape[1] + 6)
    logits, cache = ours.apply(params, prepared.tokens, cache=cache, last=True, **prepared.arguments)
    for step, wanted in enumerate(expected.logits):
        np.testing.assert_allclose(logits[:, 0, :61], wanted, atol=1e-4 * float(abs(wanted).max()))
        token = np.asarray(logits[:, -1, :61]).argmax(-1)
        np.testing.assert_array_equal(token, expected.sequences[:, inputs.shape[1] + step])
        positions = ours.config.positions.advance(positions)
        logits, cache = read(params, token[:, None], positions=positions, cache=cache, last=True)


def test_what_is_not_given_is_read_as_it_is_generated(oracle, tmp_path):
    """With `given`, one pass has the logits of decoding those tokens one by one."""
    ant(oracle).save_pretrained(tmp_path)
    pretrained = load_pretrained(tmp_path)
    model, params, ids = pretrained.model, pretrained.params, rows()
    more = np.array([[5, 9, 30], [7, 7, 2]])
    whole = [[*row, *new] for row, new in zip(ids, more.tolist())]
    prepared = cpm_ant.prepare(whole, model.config, given=LENGTHS)
    logits = np.asarray(model.apply(params, prepared.tokens, **prepared.arguments))
    start = cpm_ant.prepare(ids, model.config)
    cache, positions = Cache.empty(2, start.tokens.shape[1] + 3), start.positions
    one, cache = model.apply(params, start.tokens, cache=cache, last=True, **start.arguments)
    read = jax.jit(model.apply, static_argnames=("last",))
    for step in range(4):
        np.testing.assert_allclose(logits[:, step - 4, :61], one[:, 0, :61], atol=1e-4)
        if step < 3:
            positions = model.config.positions.advance(positions)
            one, cache = read(params, more[:, step, None], positions=positions, cache=cache, last=True)
    with pytest.raises(InputError, match=r"given is \[20, 3\] for rows of \[14, 9\] tokens"):
        cpm_ant.prepare(ids, model.config, given=[20, 3])


@pytest.mark.parametrize(
    ("ids", "task", "message"),
    [
        ([], 2, "rows is empty"),
        ([[1], []], 2, r"rows\[1\] is \[\]; it must be a list of whole numbers"),
        ([[1.5]], 2, r"rows\[0\] is \[1.5\]"),
        ([[1]], 32, "task=32; the model has prompts of 32 tokens for tasks 0 to 31"),
    ],
)
def test_prompts_that_cannot_be_had(ids, task, message):
    with pytest.raises(InputError, match=message):
        cpm_ant.prepare(ids, cpm_ant.read(Settings({})), task=task)
