"""One process of a run of several, started by `test_processes.py`.

    python two_processes.py JOB COORDINATOR COUNT INDEX RESULT CASE...

JOB is a file beside this one with a function `train`. A CASE is MESH:ZERO:DTYPE. Writes JSON to the file
RESULT (gloo prints to the standard output): what this process saw of the run, and per case the losses and a
hash of the initial parameters.
"""

import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

STEPS = 20


def outcome(train, mesh, zero, dtype):
    """(losses, hash of the initial parameters) of a training on this mesh."""
    from modicum.parallel import Layout, MeshShape, make_mesh

    layout = Layout(make_mesh(MeshShape.parse(mesh)), zero=int(zero), minimum=0)
    with jax.enable_x64(dtype == "float64"):
        result = train(layout, STEPS, dtype)
    initial, losses = (result.initial, result.losses) if hasattr(result, "losses") else (result[0], result[2])
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(initial)))
    return {"losses": losses, "initial": digest.hexdigest()}


def main(job, coordinator, count, index, result, *cases):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // int(count))
    jax.config.update("jax_disable_most_optimizations", True)  # as `quick_compile` for the one process beside
    from modicum.parallel import MeshShape, barrier, initialize, is_main, local_rows, make_mesh

    initialize(coordinator, int(count), int(index))
    initialize(coordinator, int(count), int(index))  # a second call does nothing
    import runpy

    train = runpy.run_path(str(Path(__file__).with_name(job)))["train"]
    rows = {mesh: local_rows(16, make_mesh(MeshShape.parse(mesh))) for mesh in ("data=8", "tensor=8")}
    seen = {
        "processes": jax.process_count(),
        "devices": [jax.local_device_count(), jax.device_count()],
        "main": is_main(),
        "rows": {mesh: [part.start, part.stop] for mesh, part in rows.items()},
        "cases": {case: outcome(train, *case.split(":")) for case in cases},
    }
    barrier("done")
    Path(result).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
