"""Tiny base models in both libraries, one of a family for all tests of a file."""

import pytest


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`(family) -> Case`; needs torch, transformers and PEFT."""
    made = {}

    def get(name):
        from .oracle import build

        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get
