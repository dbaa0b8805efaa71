"""A small table of layers that knows no model."""

import pytest

from modicum.parallel.plan import RECIPES, Job, Layer, LayerTable, Remat


def layer(width=1024, name="layer"):
    parameters = 12 * width**2
    remats = (
        Remat("none", 8 * width, 24 * width, 0.0),
        Remat("dots", 6 * width, 14 * width, 4.0 * width * 512),
        Remat("full", 2 * width, 0.0, 2.0 * parameters, 2),
    )
    return Layer(
        *(name, parameters + 4 * width, parameters, 2.0 * parameters, 2.0 * width, remats),
        reductions=2,
        keys=4.0 * width,
        traffic=20.0 * width,
        whole=12.0 * width,
        split=32.0 * width,
    )


@pytest.fixture
def table():
    ends = (Layer("embedding", 2**20, 2**20, 0.0, 2048.0, (Remat("none", 0.0, 0.0, 0.0),)),)
    return LayerTable("toy", (layer(),) * 8, ends, 6.0 * 12 * 1024**2 * 8, {"tensor": {"heads": 16}})


@pytest.fixture
def job(table):
    return Job(table, RECIPES["mixed"], 64, 1024)
