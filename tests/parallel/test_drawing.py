"""What is drawn is what `jax` says of a sharding."""

from xml.etree import ElementTree

from jax.sharding import NamedSharding, PartitionSpec

from modicum.parallel import MeshShape, make_mesh
from modicum.parallel.drawing import Drawn, draw, tiles

MESH = make_mesh(MeshShape.parse("data=4,tensor=2"))


def test_tiles_cover_the_array_and_name_every_device():
    found = tiles(NamedSharding(MESH, PartitionSpec("tensor", None)), (8, 8))
    assert [tile.rows for tile in found] == [(0, 0.5), (0.5, 1)]
    assert [tile.devices for tile in found] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    split = tiles(NamedSharding(MESH, PartitionSpec("data", "tensor")), (8, 8))
    assert [tile.devices for tile in split] == [(index,) for index in range(8)]
    assert sum((t.rows[1] - t.rows[0]) * (t.columns[1] - t.columns[0]) for t in split) == 1
    whole = tiles(NamedSharding(MESH, PartitionSpec()), (8, 8))
    assert [tile.devices for tile in whole] == [tuple(range(8))]


def test_the_picture_is_one_svg_with_all_titles():
    sharding = NamedSharding(MESH, PartitionSpec("data"))
    text = draw({"a < b": [Drawn("kernel", (8, 8), "DF", sharding)] * 2, "c": []})
    root = ElementTree.fromstring(text)
    words = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("kernel  [D=8, F=8]") == 2
    assert {"a < b", "c", "0 1", "6 7"} <= set(words)
