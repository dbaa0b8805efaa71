"""Pictures for docs/parallel.md of how the arrays of a training lie on eight devices.

    python -m modicum.experiments.bench.mesh_pictures docs/parallel.svg

Eight simulated devices; the shardings are those that `Layout` gives a training, drawn by `parallel.drawing`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax

from ...models.axes import TRANSFORMER_AXES
from ...parallel.drawing import Drawn, draw
from ...parallel.layout import Layout
from ...parallel.mesh import MeshShape, make_mesh

BATCH, LENGTH, WIDTH, MLP, VOCAB, EXPERTS = 16, 64, 64, 256, 512, 8
MESHES = (
    ("data=8", 0),
    ("data=8", 1),
    ("data=8", 3),
    ("fsdp=8", 0),
    ("tensor=8", 0),
    ("data=4,tensor=2", 3),
    ("data=2,context=4", 1),
    ("fsdp=2,context=2,tensor=2", 0),
)
PATHS = {
    "embedding/table": ((VOCAB, WIDTH), "VD"),
    "layers_0/mlp/up/kernel": ((WIDTH, MLP), "DF"),
    "layers_0/mlp/down/kernel": ((MLP, WIDTH), "FD"),
}


def pictures() -> str:
    """The SVG: a row for each mesh and ZeRO level, with a batch, two kernels and a moment of one of them."""
    rows = {}
    for text, zero in MESHES:
        layout = Layout(make_mesh(MeshShape.parse(text), jax.devices()[:8]), zero=zero, minimum=0)
        rows[f"{text}, ZeRO {zero}"] = drawn_row(layout)
    return draw(rows)


def drawn_row(layout: Layout) -> list[Drawn]:
    """What is drawn for one layout."""
    abstract = {path: jax.ShapeDtypeStruct(shape, "float32") for path, (shape, _) in PATHS.items()}
    parameters = layout.parameters(abstract, TRANSFORMER_AXES)
    moments = layout.optimizer(abstract, abstract, TRANSFORMER_AXES)
    batch = layout.batch({"tokens": jax.ShapeDtypeStruct((BATCH, LENGTH), "int32")})["tokens"]
    drawn = [Drawn("batch", (BATCH, LENGTH), "BT", batch)]
    for path, (shape, letters) in PATHS.items():
        name = "/".join(path.split("/")[-3:-1] if path.endswith("kernel") else path.split("/"))
        drawn.append(Drawn(name, shape, letters, parameters[path]))
    up = "layers_0/mlp/up/kernel"
    return [*drawn, Drawn("moments of mlp/up", PATHS[up][0], PATHS[up][1], moments[up])]


def main() -> None:
    """Write the file named on the command line."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    Path(sys.argv[1]).write_text(pictures())


if __name__ == "__main__":
    main()
