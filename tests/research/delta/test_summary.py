"""What is frozen, tuned and added, with layers folded."""

import jax
import jax.numpy as jnp

from modicum.research.delta import Adapter, BitFit, Full, LoRA, attach, byte_count, parameter_count, summary


def rows_of(model, spec, *args, **options):
    params = model.init(jax.random.key(0), *args)
    tuned = attach(model, spec, **options)
    variables = tuned.init(jax.random.key(1), params, *args)
    return (
        params,
        variables,
        {(row.path, row.status, row.method): row for row in summary(tuned, params, variables)},
    )


def test_rows_fold_layers_and_add_up(decoder, tokens):
    spec = {"attention/(query|value)": LoRA(2), "final_norm": Full(), "mlp": BitFit(), "mlp/down": Adapter(2)}
    params, variables, rows = rows_of(decoder(), spec, tokens)
    frozen = sum(row.parameters for row in rows.values() if row.status == "frozen")
    tuned = sum(row.parameters for row in rows.values() if row.status == "tuned")
    added = sum(row.parameters for row in rows.values() if row.status == "added")
    assert tuned + added == parameter_count(variables["delta"])
    assert frozen + tuned == parameter_count(params)
    assert sum(row.bytes for row in rows.values() if row.status != "frozen") == byte_count(variables["delta"])
    query = rows["layers_{0-3}/attention/query", "added", "~lora"]
    assert query.parameters == 4 * (16 * 2 + 2 * 16) and query.bytes == 4 * query.parameters
    assert ("layers_{0-3}/mlp/up/bias", "tuned", "~bitfit") in rows
    assert ("layers_{0-3}/mlp/up/bias", "frozen", "") not in rows
    assert ("layers_{0-3}/mlp/up/kernel", "frozen", "") in rows


def test_counts_take_shapes_too():
    shapes = {"a": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), "b": jnp.ones(5)}
    assert parameter_count(shapes) == 17
    assert byte_count(shapes) == 44
