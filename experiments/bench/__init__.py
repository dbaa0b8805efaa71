"""Ours beside its peers, on one machine in one run.

`job`, `tuning_job`, `generation_job` and `attention_job` say what everybody does; `ours`, `tuning_ours`,
`generation_ours`, `attention_jax` and `torch_training` (with `torch_decoder`), `tuning_torch`,
`generation_torch`, `attention_torch` are the contenders. `worker` is the process each of them runs in and
`processes` the other end of its pipe; `training`, `tuning`, `generation` and `attention` measure, and their
reports say what came out; `attention_tuning` finds block sizes. Nothing here is imported by the library.
"""
