"""The methods, as a functional library.

* `training` state, step, loop, optimizers, checkpoints, metrics
* `data` sources, tokenizers, packing, deterministic batches
* `delta` tuning a small part of a model; `sparsity` running a small part of it
* `study` runs, sweeps, tables, figures, reports

Import from the rooms (`modicum.research.training.step`): the packages load nothing by themselves, so
that the command line starts at once and a library user pays for what is used.
"""
