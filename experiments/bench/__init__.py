"""Ours beside its peers, on one machine in one run.

`job` is what everybody trains; `ours`, `torch_training` (with `torch_decoder`) are the contenders; `worker`
is the process each of them runs in and `processes` the other end of its pipe; `training` measures, and
`training_report` says what came out. Nothing here is imported by the library.
"""
