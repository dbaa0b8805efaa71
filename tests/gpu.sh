#!/bin/sh
# On a machine with a Hopper GPU and jax[cuda13]: are the kernels right, and only then, how fast are they?
#   tests/gpu.sh FOLDER     writes FOLDER/<case>/ for each case below, and of decoding
set -e
out=$(mkdir -p "${1:?give a folder for the tables}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export JAX_PLATFORMS=cuda,cpu

$python -c 'import jax; d = jax.devices()[0]; assert str(d.compute_capability).startswith("9."), f"{d} is no Hopper GPU"'
$python -m pytest -m gpu -q -rs tests/models/kernels

$python -m modicum.experiments.bench.decode_gpu --out "$out/decode"

bench() {
    name=$1
    shift
    $python -m modicum bench attention --dtype bfloat16 --rounds 7 --without "plain softmax" chunked \
        --out "$out/$name" "$@"
}
for width in 64 128; do
    for mask in causal full; do
        bench "$mask-$width" --width $width --heads 16 --mask $mask --lengths 2048 4096 8192 16384 32768
    done
    bench "groups-$width" --width $width --heads 32 --kv-heads 8 --lengths 4096 8192
    bench "window-$width" --width $width --heads 16 --mask window --lengths 4096 16384
    bench "packed-$width" --width $width --heads 16 --mask packed --lengths 4096 16384
    for bias in dense bucketed alibi; do
        bench "$bias-$width" --width $width --heads 16 --bias $bias --lengths 4096
    done
done
