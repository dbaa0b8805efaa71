"""What is said about compiled kernels; compiling them is the tier `gpu_aot` of the kernels' own tests."""

import os
from pathlib import Path

import pytest

from modicum import InputError
from modicum.experiments.bench import attention_compiled
from modicum.experiments.bench.attention_compiled import CompiledKernel, as_text, compile_all, shapes

REPORT = """ptxas info    : Compiling entry function 'attention_forward_mosaic_gpu_kernel' for 'sm_90a'
    72 bytes stack frame, 76 bytes spill stores, 108 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 72 bytes cumulative stack size, 1 bytes smem
"""
LAUNCH = "%4 = call ptr @mosaic_gpu_get_function(ptr %3, ptr @attention_forward_name, i32 167000, i32 1)\n"


def test_a_report_is_read_from_what_the_compiler_leaves(tmp_path):
    (tmp_path / "attention_forward_7.ptxas").write_text(REPORT)
    (tmp_path / "attention_forward_7.ll").write_text(LAUNCH)
    found = attention_compiled._read("full", tmp_path / "attention_forward_7.ptxas")
    assert found == CompiledKernel("full", "attention_forward", 168, 76, 108, 167000)


def test_kernels_go_by_the_name_of_their_shape_and_the_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", "before")
    monkeypatch.delenv("MOSAIC_GPU_DUMP_PTXAS", raising=False)

    def compile_them():
        folder = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
        for number in (10, 9):
            (folder / f"attention_forward_{number}.ptxas").write_text(REPORT)
            (folder / f"attention_forward_{number}.ll").write_text(LAUNCH)

    found = attention_compiled.compiled_kernels("full", compile_them)
    assert [kernel.shape for kernel in found] == ["full", "full"]
    assert os.environ["MOSAIC_GPU_DUMP_TO"] == "before" and "MOSAIC_GPU_DUMP_PTXAS" not in os.environ


def test_the_table_has_a_row_a_kernel():
    text = as_text([CompiledKernel("causal, K=64", "attention_forward", 168, 4, 8, 65536)])
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells == ["causal, K=64", "attention_forward", "168", "12", "64"]


def test_without_the_plugin_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(attention_compiled, "NEEDED", ("no_such_plugin", "nor.this_one"))
    with pytest.raises(InputError, match=r"no_such_plugin, nor.this_one is not installed: pip install"):
        compile_all()


def test_an_unknown_shape_is_named(monkeypatch):
    monkeypatch.setattr(attention_compiled, "NEEDED", ())
    with pytest.raises(InputError, match="no shape is called 'triangular'; there are full, K=64"):
        compile_all("triangular")


def test_shapes_have_names_of_their_own():
    names = [shape.name for shape in shapes()]
    assert len(names) == len(set(names)) > 1
