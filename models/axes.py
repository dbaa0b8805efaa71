"""Logical names of the Transformer's parameter axes.

Rows are searched from the first; a pattern fits the end of a `/` path. `parallel.AxisRules` then says
which logical axis lies on which mesh axis. Leaves of scanned layers have one more axis in front, `layers`.
"""

from __future__ import annotations

AxisTable = tuple[tuple[str, tuple[str, ...]], ...]

TRANSFORMER_AXES: AxisTable = (
    (r"embedding/table", ("vocab", "width")),
    (r"position_embedding/table", ("positions", "width")),
    (r"type_embedding/table", ("types", "width")),
    (r"embedding_projection/kernel", ("embedding", "width")),
    (r"relative_bias/table", ("buckets", "heads")),
    (r"query/kernel", ("width", "heads")),
    (r"query/bias", ("heads",)),
    (r"(key|value)/kernel", ("width", "kv_heads")),
    (r"(key|value)/bias", ("kv_heads",)),
    (r"output/kernel", ("heads", "width")),
    (r"output/bias", ("width",)),
    (r"mlp/(up|gate)/kernel", ("width", "mlp")),
    (r"mlp/(up|gate)/bias", ("mlp",)),
    (r"mlp/down/kernel", ("mlp", "width")),
    (r"mlp/down/bias", ("width",)),
    (r"mlp/router/kernel", ("width", "choices")),
    (r"mlp/experts/(up|gate)/kernel", ("experts", "width", "mlp")),
    (r"mlp/experts/down/kernel", ("experts", "mlp", "width")),
    (r"mlp/shared/(up|gate)/kernel", ("width", "mlp")),
    (r"mlp/shared/down/kernel", ("mlp", "width")),
    (r"(query|key)_norm/(scale|bias)", ("head_width",)),
    (r"mlp/experts/(up|gate|down)", ("experts", "mlp", "width")),
    (r"mlp/experts/(up|gate)_bias", ("experts", "mlp")),
    (r"mlp/experts/down_bias", ("width",)),
    (r"mlp/selection/centres", ("experts", "width")),
    (r"mlp/selection/first", ("width", "pooled")),
    (r"mlp/selection/second", ("pooled", "experts")),
    (r"mlp/selection/bias", ("experts",)),
    (r"\w*norm/(scale|bias)", ("width",)),
    (r"head/kernel", ("width", "vocab")),
    (r"head/bias", ("vocab",)),
    (r"head/projection/kernel", ("width", "embedding")),
    (r"head/transform/kernel", ("width", "pooled")),
    (r"head/transform/bias", ("pooled",)),
    (r"pooler/kernel", ("width", "pooled")),
    (r"pooler/bias", ("pooled",)),
    (r"classifier/kernel", ("width", "labels")),
    (r"classifier/bias", ("labels",)),
)
