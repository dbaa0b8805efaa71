#!/bin/sh
# On a machine with a Hopper GPU: are the kernels right, and only then, how fast are they?
#   tests/gpu.sh FOLDER [MINUTES]    writes FOLDER/<case>/, FOLDER/gates.md and FOLDER/decode/
# Needs Python >= 3.11, JAX with its CUDA plugin, NumPy, flax, pytest and hypothesis; takes pytest-xdist and PyTorch
# where they are. The checkout need not be installed. Ends within about 10 minutes; in MINUTES (5) measuring may begin.
set -e
out=$(mkdir -p "${1:?give a folder for the tables}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export JAX_PLATFORMS=cuda,cpu PYTHONUNBUFFERED=1

if ! $python -P -c 'import modicum' 2>/dev/null; then # the checkout is the package: give it its name
    links=$(mktemp -d)
    ln -s "$PWD" "$links/modicum"
    export PYTHONPATH="$links${PYTHONPATH:+:$PYTHONPATH}"
fi
$python -c '
import jax
d = jax.devices()[0]
assert str(d.compute_capability).startswith("9."), f"{d} is no Hopper GPU"
print("JAX", jax.__version__, "on", len(jax.devices("gpu")), d.device_kind)'

# many processes on one GPU: none may take all of its memory
if $python -c 'import xdist' 2>/dev/null; then parallel="-n 6"; else parallel=; fi
XLA_PYTHON_CLIENT_PREALLOCATE=false timeout 270 \
    $python -m pytest -m gpu -q -rs --durations=5 $parallel -p no:cacheprovider \
    tests/models/kernels/hopper/test_on_gpu.py tests/models/kernels/hopper/test_sparse.py

$python -m modicum.experiments.bench.attention_gpu "$out" --minutes "${2:-5}"
$python -m modicum.experiments.bench.decode_gpu --out "$out/decode"
