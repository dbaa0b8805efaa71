"""Where a delta's variables lie in a tree: below the path that they act on, under the method's `~name`.

A delta's tree is a nested dictionary. The backbone's may also have lists and tuples, whose numbers are names
in a path, and names with `/` in them (Haiku's `mlp/~/linear_0`), which count as several in a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from ... import InputError

Tree = dict[str, Any]
Place = tuple[str, str]  # (path of the module or leaf, `~name`)

# What all arrays of an entry have in common lies at the root, `~said/shared/vector`.
SHARED = "shared"

PARTS = "delta", "delta_state"


def node_at(tree: Any, path: str) -> Any:
    """The subtree or leaf at `path`, None where there is none."""
    if not path:
        return tree
    head, rest = _split(tree, path)
    if isinstance(tree, Mapping):
        return node_at(tree[head], rest) if head in tree else None
    if isinstance(tree, list | tuple) and head.isdigit() and int(head) < len(tree):
        return node_at(tree[int(head)], rest)
    return None


def own_params(node: Any) -> Tree:
    """A module's parameters without the deltas that live among them."""
    if not isinstance(node, Mapping):
        return {}
    return {name: value for name, value in node.items() if not name.startswith("~")}


def places(tree: Mapping[str, Any]) -> dict[Place, Tree]:
    """The variables of each delta in a `delta` or `delta_state` tree."""
    found: dict[Place, Tree] = {}
    for keys, value in flatten_dict(dict(tree)).items():
        # The last: names of the backbone may begin so too, as Haiku's do.
        index = max(i for i, key in enumerate(keys) if key.startswith("~"))
        found.setdefault(("/".join(keys[:index]), keys[index]), {})[keys[index + 1 :]] = value
    return {place: unflatten_dict(leaves) for place, leaves in found.items()}


def variables_by_place(variables: Mapping[str, Any]) -> dict[Place, Tree]:
    """Trained variables and state of each delta together, as its method gets them."""
    require_variables(variables)
    trained, fixed = (places(variables.get(part, {})) for part in PARTS)
    common = {
        name: trained.pop((path, name))[SHARED]
        for path, name in list(trained)
        if path == "" and SHARED in trained[path, name]
    }
    own = {place: {**trained.get(place, {}), **fixed.get(place, {})} for place in {**trained, **fixed}}
    return {place: {**common.get(place[1], {}), **each} for place, each in own.items()}


def require_variables(variables: Mapping[str, Any]) -> None:
    """Raise `InputError` for another tree than a delta's variables, which would act as no delta at all."""
    if not isinstance(variables, Mapping) or "delta" not in variables or set(variables) - set(PARTS):
        names = list(variables)[:4] if isinstance(variables, Mapping) else type(variables).__name__
        raise InputError(
            f"a delta's variables are {{'delta': ..., 'delta_state': ...}}, as init returns them, not "
            f"{names}; apply takes them before the parameters, merge behind them"
        )


def from_places(found: Mapping[Place, Mapping[str, Any]]) -> Tree:
    """The tree that `places` takes apart; deltas without variables leave no trace in it."""
    tree: Tree = {}
    for (path, name), variables in found.items():
        if variables:
            tree = with_node(tree, f"{path}/{name}".strip("/"), dict(variables))
    return tree


def with_node(tree: Any, path: str, node: Any) -> Any:
    """A copy of `tree` that has `node` at `path`; everything beside the path is shared."""
    head, rest = _split(tree, path)
    if isinstance(tree, list | tuple):
        changed = list(tree)
        changed[int(head)] = with_node(tree[int(head)], rest, node) if rest else node
        return type(tree)(changed)
    return {**tree, head: with_node(tree.get(head, {}), rest, node) if rest else node}


def leaf_paths(params: Any) -> list[str]:
    """The paths of all arrays, which `node_at` finds again.

    Raises `InputError` for a tree of other nodes than dictionaries, lists and tuples, and for arrays of
    which an address could not say which is meant.
    """
    if not isinstance(params, Mapping):
        raise InputError(f"parameters are a dictionary of arrays, not a {type(params).__name__}")
    paths = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if node_at(params, path) is not leaf:
            raise InputError(
                f"parameter {path}: a delta's addresses need nested dictionaries, lists and tuples of "
                f"arrays, with text as names, and no two arrays of one path"
            )
        paths.append(path)
    return paths


def _split(tree: Any, path: str) -> tuple[str, str]:
    """The name in `tree` that `path` begins with, and the rest of the path."""
    head, _, rest = path.partition("/")
    if isinstance(tree, Mapping) and rest and head not in tree:
        longer = [name for name in tree if "/" in str(name) and f"{path}/".startswith(f"{name}/")]
        if longer:
            head = max(longer, key=len)
            rest = path[len(head) + 1 :]
    return head, rest
