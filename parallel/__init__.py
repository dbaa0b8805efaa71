"""Where arrays lie and which devices compute: meshes, axis rules, ZeRO, batches, processes.

Nothing here knows a model: it is given trees of arrays, tables of axis names and functions.

    mesh.py       MeshShape ("data=4,tensor=2") and make_mesh
    rules.py      logical axes of every array (axis_names) and where they lie (AxisRules)
    zero.py       ZeRO 0 to 3: shardings of parameters, gradients and optimizer state; bytes per device
    batches.py    rows of a batch over the mesh, from every process's own rows
    layout.py     Layout: all of it in one value, which is what a training loop takes
    processes.py  several machines

    layout = Layout(make_mesh(MeshShape.parse("data=4,tensor=2")), zero=1)
    shardings = layout.state(jax.eval_shape(init, rng), axis_table)
    state = jax.jit(init, out_shardings=shardings)(rng)
"""

from .batches import batch_sharding, local_rows, place_batch, replicated
from .layout import Layout
from .mesh import MESH_AXES, MeshShape, make_mesh
from .processes import any_process, barrier, initialize, is_main
from .rules import DEFAULT_RULES, AxisRules, AxisTable, Names, axis_names, unnamed_delta
from .zero import (
    Placement,
    bytes_per_device,
    gradient_shardings,
    optimizer_shardings,
    parameter_shardings,
)

__all__ = [
    "DEFAULT_RULES",
    "MESH_AXES",
    "AxisRules",
    "AxisTable",
    "Layout",
    "MeshShape",
    "Names",
    "Placement",
    "any_process",
    "axis_names",
    "barrier",
    "batch_sharding",
    "bytes_per_device",
    "gradient_shardings",
    "initialize",
    "is_main",
    "local_rows",
    "make_mesh",
    "optimizer_shardings",
    "parameter_shardings",
    "place_batch",
    "replicated",
    "unnamed_delta",
]
