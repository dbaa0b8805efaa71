"""Ours beside its peers, on one machine in one run.

`job`, `tuning_job` and `generation_job` say what everybody does; `ours`, `tuning_ours`, `generation_ours` and
`torch_training` (with `torch_decoder`), `tuning_torch`, `generation_torch` are the contenders. `worker` is
the process each of them runs in and `processes` the other end of its pipe; `training`, `tuning` and
`generation` measure, and their reports say what came out. Nothing here is imported by the library.
"""
