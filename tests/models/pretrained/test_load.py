"""Loading, without peers: types, layouts, stacked layers, other heads, and what does not fit."""

import json
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from modicum import InputError
from modicum.models import ClassifierHead, LanguageModelHead, Precision, stack_layers
from modicum.models.pretrained import load_pretrained, save_pretrained
from modicum.models.pretrained.container import Tensor, write_file
from modicum.models.pretrained.files import TensorFiles
from modicum.parallel import Layout, MeshShape, make_mesh


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        assert one.dtype == two.dtype and np.array_equal(np.asarray(one), np.asarray(two))


def rewrite(folder, change):
    """The tensors again, as `change(dictionary)` leaves them."""
    files = TensorFiles.open(folder)
    tensors = {name: np.array(files.read(name)) for name in files.names}
    tensors = change(tensors) or tensors
    path = folder / "model.safetensors"
    write_file(path, [Tensor(n, v.shape, v.dtype, lambda v=v: v) for n, v in tensors.items()])
    return folder


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def refused(folder, **options):
    with pytest.raises(InputError) as error:
        load_pretrained(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_was_saved_comes_back(tiny_gpt2):
    folder, model, params = tiny_gpt2
    loaded = load_pretrained(folder)
    assert loaded.architecture == "GPT2LMHeadModel" and loaded.folder == folder
    assert loaded.left_out == loaded.initialised == ()
    assert loaded.settings["n_layer"] == 2
    assert loaded.model.config.attention.heads == 2 and loaded.model.head == model.head
    same(loaded.params, params)


def test_a_string_is_a_path_too(tiny_gpt2):
    same(load_pretrained(str(tiny_gpt2[0])).params, tiny_gpt2[2])


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_files_and_parameters(tiny_gpt2, tmp_path, kind):
    """To half is numpy's rounding, from half is exact, and so is half to half."""
    folder, _, params = tiny_gpt2
    half = load_pretrained(folder, dtype=kind)
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    same(half.params, jax.tree.map(lambda x: np.asarray(x).astype(dtype), params))
    assert half.model.config.precision == Precision(param=kind, compute=kind)
    save_pretrained(tmp_path / "half", half.model, half.params, settings=half.settings)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == kind
    assert TensorFiles.open(tmp_path / "half").dtype("transformer.wte.weight") == dtype
    same(load_pretrained(tmp_path / "half", dtype=kind).params, half.params)
    wide = load_pretrained(tmp_path / "half", compute="bfloat16")
    same(wide.params, jax.tree.map(lambda x: np.asarray(x).astype(np.float32), half.params))
    assert wide.model.config.precision == Precision(param="float32", compute="bfloat16")


def test_values_beyond_half_precision(tiny_gpt2, copy_of):
    def change(tensors):
        tensors["transformer.wte.weight"][3, 3] = 1e6

    folder = rewrite(copy_of(tiny_gpt2[0]), change)
    assert "transformer.wte.weight: values beyond float16's ±65504" in refused(folder, dtype="float16")
    load_pretrained(folder, dtype="bfloat16")


def test_unknown_precisions(tiny_gpt2):
    assert "precision param='int8' is not one of" in refused(tiny_gpt2[0], dtype="int8")
    assert "needs JAX_ENABLE_X64=1" in refused(tiny_gpt2[0], dtype="float64")


def test_stacked_layers_are_those_of_stacking(tiny_gpt2):
    folder, _, params = tiny_gpt2
    loaded = load_pretrained(folder, scan=True)
    assert loaded.model.config.scan
    same(loaded.params, jax.tree.map(np.asarray, stack_layers(params)))


@pytest.mark.parametrize("mesh", ["tensor=2", "fsdp=4", "data=2,tensor=2", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_every_layout_has_the_same_numbers_where_it_wants_them(tiny_gpt2, mesh, scan):
    folder, _, params = tiny_gpt2
    layout = Layout(
        make_mesh(MeshShape.parse(mesh), jax.devices()[: MeshShape.parse(mesh).size]), zero=3, minimum=1
    )
    loaded = load_pretrained(folder, layout=layout, scan=scan, vocab_multiple=4)
    shardings = layout.parameters(loaded.params, loaded.model.axes)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, loaded.params, shardings))
    expected = stack_layers(params) if scan else params
    table = np.asarray(expected["embedding"]["table"])
    expected = {**expected, "embedding": {"table": np.pad(table, ((0, 2), (0, 0)))}}
    same(jax.tree.map(np.asarray, loaded.params), jax.tree.map(np.asarray, expected))


def test_loaded_arrays_may_be_donated(tiny_gpt2):
    """A CPU's arrays are the loader's own memory: XLA must not write to what devices share."""
    layout = Layout(make_mesh(MeshShape.parse("data=4"), jax.devices()[:4]))
    for given in (None, layout):
        params = load_pretrained(tiny_gpt2[0], layout=given).params
        before = jax.tree.map(np.array, params)
        twice = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)(params)
        for one, leaf in zip(jax.tree.leaves(before), jax.tree.leaves(twice)):
            assert all(np.array_equal(one[s.index] * 2 + 1, s.data) for s in leaf.addressable_shards)


def test_a_changed_file_changes_no_loaded_parameter(tiny_gpt2, copy_of):
    folder, _, params = copy_of(tiny_gpt2[0]), *tiny_gpt2[1:]
    loaded = load_pretrained(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-20_000, 2)
        file.write(b"\xff" * 20_000)
    same(loaded.params, params)


def test_other_heads(tiny_gpt2):
    folder, _, params = tiny_gpt2
    headless = load_pretrained(folder, head=None)
    assert headless.model.head is None and headless.left_out == headless.initialised == ()
    assert "classifier/bias, classifier/kernel; give rng=" in refused(folder, head=ClassifierHead(3))
    one, two = (load_pretrained(folder, head=ClassifierHead(3), rng=jax.random.key(i)) for i in (0, 1))
    assert one.initialised == ("classifier/bias", "classifier/kernel")
    kernels = [np.asarray(loaded.params["classifier"]["kernel"]) for loaded in (one, two)]
    assert kernels[0].shape == (16, 3) and kernels[0].std() > 0 and not np.array_equal(*kernels)
    same(one.params["layers_0"], params["layers_0"])


def test_a_head_of_its_own_that_the_file_of_a_headless_model_lacks(tiny_gpt2, tmp_path, random_parameters):
    _, model, _ = tiny_gpt2
    bare = replace(model, config=replace(model.config, tied=False), head=None)
    params = random_parameters(bare, np.zeros((1, 2), np.int32))
    save_pretrained(tmp_path / "bare", bare, params, architecture="GPT2Model")
    names = TensorFiles.open(tmp_path / "bare").names
    assert "wte.weight" in names and not any(name.startswith("transformer.") for name in names)
    assert load_pretrained(tmp_path / "bare").model.head is None
    same(load_pretrained(tmp_path / "bare", architecture="GPT2Model").params, params)
    message = refused(tmp_path / "bare", architecture="GPT2LMHeadModel")
    assert "missing tensors: lm_head.weight" in message
    loaded = load_pretrained(tmp_path / "bare", head=LanguageModelHead(), rng=jax.random.key(0))
    assert loaded.initialised == ("head/kernel",) and loaded.params["head"]["kernel"].shape == (16, 50)


def test_missing_unknown_misshapen_tensors_and_types_are_listed_at_once(tiny_gpt2, copy_of):
    def change(tensors):
        del tensors["transformer.h.0.mlp.c_fc.weight"], tensors["transformer.ln_f.bias"]
        tensors["transformer.h.1.mlp.c_fc.bias"] = np.zeros((24, 1), np.float32)
        tensors["transformer.h.1.ln_2.bias"] = np.zeros(16, np.int64)
        tensors["transformer.h.7.twist"] = tensors["stray"] = np.zeros(1, np.float32)

    message = refused(rewrite(copy_of(tiny_gpt2[0]), change))
    assert "does not fit its config.json (gpt2)" in message
    assert "missing tensors: transformer.h.0.mlp.c_fc.weight, transformer.ln_f.bias;" in message
    assert "unknown tensors: transformer.h.7.twist, stray;" in message
    assert "wrong shapes: transformer.h.1.mlp.c_fc.bias [24, 1] (valid: [24]);" in message
    assert message.endswith("types that are not floating-point: transformer.h.1.ln_2.bias int64")


def test_a_fused_tensor_of_the_wrong_shape(tiny_gpt2, copy_of):
    folder = set_config(copy_of(tiny_gpt2[0]), n_embd=32)
    message = refused(folder)
    assert "transformer.h.0.attn.c_attn.weight [16, 48] (valid: [32, 96])" in message
    assert "and 6 more" in message


def test_fewer_layers_in_the_configuration_than_in_the_file(tiny_gpt2, copy_of):
    message = refused(set_config(copy_of(tiny_gpt2[0]), n_layer=1))
    assert "unknown tensors: transformer.h.1.ln_1.weight, " in message


def test_one_tensor_under_two_names(tiny_gpt2, copy_of):
    def change(tensors):
        tensors["wte.weight"] = tensors["transformer.wte.weight"]

    message = refused(rewrite(copy_of(tiny_gpt2[0]), change))
    assert "holds both transformer.wte.weight and wte.weight, which are one tensor" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "dinosaur"}, "model_type 'dinosaur' is not supported; valid: gpt2, llama, "),
        (
            {"architectures": ["GPT2Dinosaur"]},
            "architecture 'GPT2Dinosaur' of gpt2 is not supported; valid: GPT2LM",
        ),
        ({"architectures": "GPT2LMHeadModel"}, "architectures='GPT2LMHeadModel'; a list of names is valid"),
        ({"model_type": ["gpt2"]}, "model_type ['gpt2'] is not supported; valid: gpt2"),
        ({"n_layer": -1}, "n_layer=-1; at least 0 is valid"),
        ({"n_head": None}, "has a value of the wrong kind: "),
        ({"n_head": None}, "; null are n_head"),
        (
            {"architectures": None},
            "names no architectures; give architecture=, one of GPT2LMHeadModel, GPT2M",
        ),
        ({"twist": 1}, "twist=1 (unknown key; ignore=('twist',) passes over it)"),
        ({"n_head": 3}, "width 16 is not a multiple of 3 heads"),
    ],
)
def test_configurations_that_cannot_be_had(tiny_gpt2, copy_of, changes, message):
    assert message in refused(set_config(copy_of(tiny_gpt2[0]), **changes))


def test_the_user_may_pass_over_a_key(tiny_gpt2, copy_of):
    folder = set_config(copy_of(tiny_gpt2[0]), twist=1)
    assert load_pretrained(folder, ignore=["twist"]).settings["twist"] == 1


def test_the_loaded_model_computes_what_the_saved_one_did(tiny_gpt2):
    folder, model, params = tiny_gpt2
    tokens = jnp.arange(10).reshape(2, 5)
    loaded = load_pretrained(folder)
    assert np.array_equal(loaded.model.apply(loaded.params, tokens), model.apply(params, tokens))
    assert flatten_dict(loaded.params).keys() == flatten_dict(params).keys()


def test_importing_models_loads_no_checkpoint_code_and_this_loads_no_peer():
    code = (
        "import sys, modicum.models as m; print('modicum.models.pretrained' in sys.modules);"
        "import modicum.models.pretrained.load as load; load.registry.family('llama');"
        "print(*{'torch', 'transformers', 'safetensors', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split() == ["False"]
