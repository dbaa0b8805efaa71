"""Training: one visible step, one loop that reads as chapters.

* `config` what to ask for, without importing jax; `optimizers` makes optax transformations of it
* `objectives` losses of `(trainable, frozen, batch, rng)`; `state` and `step` the pure update
* `loss_scale` dynamic scaling for float16; `metrics` throughput and MFU; `memory` compiled bytes
* `loop` the run: resume, step, evaluate, checkpoint, stop; `evaluation` means over a data set
* `checkpoints` and `fingerprint` what is on disk, and whether it is still what was written
"""
