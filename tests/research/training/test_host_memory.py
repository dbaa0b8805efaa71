"""Freed memory stays with the process, and is not cleared by the kernel again."""

import platform
import subprocess
import sys

import pytest

COUNTED = """
import resource, sys
if sys.argv[1] == "kept":
    from modicum.research.training.host_memory import keep_freed_memory
    assert keep_freed_memory()
import numpy as np
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(50_000_000 // 8)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(after - before)
"""


def faults(kind):
    command = [sys.executable, "-c", COUNTED, kind]
    environment = {"PATH": "", "GLIBC_TUNABLES": ""}
    return int(subprocess.run(command, capture_output=True, check=True, text=True, env=environment).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_a_block_that_is_freed_and_asked_for_again_causes_no_page_faults():
    assert faults("freed") > 100 * (1 + faults("kept"))
