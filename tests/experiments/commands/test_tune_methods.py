"""The subcommands of `modicum tune`: the methods' own options and defaults, and a run of each."""

import dataclasses
import json

import pytest
from safetensors.numpy import load_file

from modicum.experiments.commands.method_kinds import HEAD, NOT_HEAD, SiteOrLeaf
from modicum.experiments.commands.methods import METHODS
from modicum.research.delta import METHODS as STORED

COMMANDS = {each.command: each for each in METHODS}
DELTAS = [name for name, each in COMMANDS.items() if issubclass(each, SiteOrLeaf)]
NO_COMMAND = {"full", "sparse_offset", "flax_prefix", "shift_positions"}
"""Methods that are parts of others, or of exchange with other libraries."""
UNASKED = {"soft_prompt": {"embed", "tokens"}, "prompt_encoder": {"embed"}, "ia3": {"on"}}
"""Fields that a command line has no use for."""


def test_every_method_is_a_subcommand():
    assert {COMMANDS[name].stored for name in DELTAS} == set(STORED) - NO_COMMAND


@pytest.mark.parametrize("command", DELTAS)
def test_options_and_defaults_are_the_methods_own(command):
    kind = COMMANDS[command]
    method = STORED[kind.stored]
    asked, own = {each.name: each for each in dataclasses.fields(kind)}, dataclasses.fields(method)
    assert set(kind.own) == {each.name for each in own} - UNASKED.get(kind.stored, set())
    for each in own:
        if each.name in kind.own:
            assert asked[kind.own[each.name]].default == each.default, each.name
    assert kind().method() == method()
    kind().check(100)
    positions = method.positions
    address = positions[0] if len(positions) == 1 else f"({'|'.join(positions)})"
    assert kind().address(False) == address
    assert kind().address(True) == (address or (NOT_HEAD if "at" in asked else ""))


TINY = {
    "adalora": ["--rank", 4, "--target", 2],
    "vera": ["--rank", 8],
    "oft": ["--block-size", 8],
    "low-rank-adapter": ["--reduction", 4],
    "compacter": ["--reduction", 4, "--n", 2],
    "soft-prompt": ["--length", 3],
    "prompt-encoder": ["--length", 3],
    "prefix": ["--reparameterise", 8],
    "intrinsic": ["--dimension", 20, "--at", "layers_1/mlp"],  # each array is code of its own to compile
    "diff-pruning": ["--at", "layers_1"],
    "lora": ["--b-rate", 16, "--initialisation", "pissa"],
}
FAST = ("adalora", "diff-pruning", "prompt-encoder")
OPTIONS = ["--batch", 8, "--steps", 4, "--evaluate-every", 4, "--learning-rate", 0.01]


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in COMMANDS]
)
def test_a_run_measures_what_it_stores(modicum, tiny_published, data, tmp_path, command):
    model = tiny_published("bert")
    method = [command, *TINY.get(command, [])]
    often = ["--evaluate-every", 1] if command == "adalora" else []  # also before its budget is reached
    said = modicum("tune", model, "--data", data, "--out", tmp_path, *OPTIONS, *often, *method)
    assert said.code == 0, said.error
    folder = tmp_path / f"{command}-0.01"
    result = json.loads((folder / "result.json").read_text())
    tuned = [folder] if command == "full" else [model, "--delta", folder]
    again = modicum("evaluate", *tuned, "--data", data)
    expected = f"loss {result['test_loss']:.4f}  accuracy {result['test_accuracy']:.4f}\n"
    assert (again.code, again.out) == (0, expected), again.error
    if command != "full":
        check_stored(command, folder / "delta")


def check_stored(command, folder):
    """What a method makes of its delta in the end is what lies in the folder."""
    header = json.loads((folder / "delta.json").read_text())
    methods = [entry["method"] for entry in header["entries"]]
    kept = load_file(folder / header["tensors"]["file"])
    if command == "diff-pruning":
        assert methods == ["sparse_offset", "full"]
        assert not any(name.endswith("log_alpha") for name in kept)
    elif command == "prompt-encoder":
        assert methods == ["soft_prompt", "full"] and kept["delta/~soft_prompt/prompt"].shape == (3, 16)
    elif command == "prefix":
        assert header["entries"][0]["fields"]["reparameterise"] == 0
    elif command == "adalora":
        values = [value for name, value in kept.items() if name.endswith("~adalora/e")]
        assert sum((value != 0).sum() for value in values) == 2 * len(values) == 2 * 12
    elif command not in ("probe", "ia3", "last-layers"):
        assert methods == [COMMANDS[command].stored, "full"]
    assert header["entries"][-1]["address"] == HEAD


@pytest.mark.slow
@pytest.mark.parametrize("command", ["adalora", "lora", "prompt-encoder"])
def test_a_mesh_gives_the_same(modicum, tiny_published, data, tmp_path, command):
    arguments = ["tune", tiny_published("bert"), "--data", data, *OPTIONS]
    method = [command, *(option for option in TINY[command] if option not in ("--initialisation", "pissa"))]
    for name, mesh in {"one": [], "two": ["--mesh", "data=8", "--zero", 1]}.items():
        said = modicum(*arguments, "--out", tmp_path / name, *mesh, *method)
        assert said.code == 0, said.error
    one, two = (
        json.loads((tmp_path / name / f"{command}-0.01" / "result.json").read_text())
        for name in ("one", "two")
    )
    assert two["dev_loss"] == pytest.approx(one["dev_loss"], abs=1e-3)
    assert two["trained_parameters"] == one["trained_parameters"]
