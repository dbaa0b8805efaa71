"""Training: one visible step, one loop that reads as chapters.

* `config` what to ask for, without importing jax; `optimizers` makes optax transformations of it
* `objectives` losses of `(trainable, frozen, batch, rng)`; `state` and `step` the pure update
* `loss_scale` dynamic scaling for float16; `metrics` throughput and MFU; `memory` compiled bytes
* `job` what is trained, `program` compiled for a layout, `loop` the run: resume, step, evaluate,
  checkpoint, stop; `recorder`, `stopping` and `evaluation` are its parts
* `tasks` makes jobs of models and rows, `tuning` tunes a classifier, `model_folder` stores models
* `checkpoints` and `fingerprint` what is on disk, and whether it is still what was written
"""
