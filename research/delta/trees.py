"""Where a delta's variables lie in a tree: below the path that they act on, under the method's `~name`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Tree = dict[str, Any]
Place = tuple[str, str]  # (path of the module or leaf, `~name`)

# What all arrays of an entry have in common lies at the root, `~said/shared/vector`.
SHARED = "shared"


def node_at(tree: Mapping[str, Any], path: str) -> Any:
    """The subtree or leaf at `path`, None where there is none."""
    node: Any = tree
    for part in path.split("/") if path else ():
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def own_params(node: Any) -> Tree:
    """A module's parameters without the deltas that live among them."""
    if not isinstance(node, Mapping):
        return {}
    return {name: value for name, value in node.items() if not name.startswith("~")}


def places(tree: Mapping[str, Any]) -> dict[Place, Tree]:
    """The variables of each delta in a `delta` or `delta_state` tree."""
    found: dict[Place, Tree] = {}
    for keys, value in flatten_dict(dict(tree)).items():
        index = next(i for i, key in enumerate(keys) if key.startswith("~"))
        found.setdefault(("/".join(keys[:index]), keys[index]), {})[keys[index + 1 :]] = value
    return {place: unflatten_dict(leaves) for place, leaves in found.items()}


def variables_by_place(variables: Mapping[str, Any]) -> dict[Place, Tree]:
    """Trained variables and state of each delta together, as its method gets them."""
    trained, fixed = (places(variables.get(part, {})) for part in ("delta", "delta_state"))
    common = {
        name: trained.pop((path, name))[SHARED]
        for path, name in list(trained)
        if path == "" and SHARED in trained[path, name]
    }
    own = {place: {**trained.get(place, {}), **fixed.get(place, {})} for place in {**trained, **fixed}}
    return {place: {**common.get(place[1], {}), **each} for place, each in own.items()}


def from_places(found: Mapping[Place, Mapping[str, Any]]) -> Tree:
    """The tree that `places` takes apart; deltas without variables leave no trace in it."""
    tree: Tree = {}
    for (path, name), variables in found.items():
        if variables:
            tree = with_node(tree, f"{path}/{name}".strip("/"), dict(variables))
    return tree


def with_node(tree: Mapping[str, Any], path: str, node: Any) -> Tree:
    """A copy of `tree` that has `node` at `path`; everything beside the path is shared."""
    head, _, rest = path.partition("/")
    below = tree.get(head, {})
    return {**tree, head: with_node(below, rest, node) if rest else node}
