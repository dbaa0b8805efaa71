"""A process that loads a checkpoint and reports its peak of anonymous resident memory, in bytes, as JSON.

Usage: load_and_measure.py FOLDER DEVICES MESH ZERO OPTIONS, the last as JSON; an empty MESH is one device.
"""

import gc
import json
import sys
import threading
import time

import jax

DEVICES = int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", DEVICES)

from modicum.models.pretrained import load_pretrained  # noqa: E402
from modicum.parallel import Layout, MeshShape, make_mesh  # noqa: E402


def anonymous_bytes():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    """Samples as often as it can, until told to stop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.highest, self.samples, self.running = 0, 0, True

    def run(self):
        while self.running:
            self.highest = max(self.highest, anonymous_bytes())
            self.samples += 1
            time.sleep(0.0005)


def main():
    folder, mesh, zero, options = sys.argv[1], sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5])
    layout = Layout(make_mesh(MeshShape.parse(mesh)), zero=zero) if mesh else None
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    gc.collect()
    before, peak = anonymous_bytes(), Peak()
    peak.start()
    start = time.perf_counter()
    params = load_pretrained(folder, layout=layout, **options).params
    seconds = time.perf_counter() - start
    peak.running = False
    peak.join()
    shards = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    # Simulated devices share the memory of what is copied to all of them: it counts once.
    buffers = {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}
    found = {
        "final": sum(buffers.values()),
        "largest": max(buffers.values()),
        "peak": max(peak.highest, anonymous_bytes()) - before,
        "samples": peak.samples,
        "seconds": seconds,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
