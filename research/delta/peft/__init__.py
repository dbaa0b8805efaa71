"""Adapters of Hugging Face PEFT, both ways: `adapter_config.json` with `adapter_model.safetensors`.

`load_peft` reads one on a model of `models.pretrained`, `save_peft` writes one that
`PeftModel.from_pretrained` loads. Rooms: `modules` (which of their modules are which of ours), `config` and
`files` (the two files), `places` (addresses and delta trees), `kinds` (a file for each `peft_type`), `whole`
(modules trained in full).
"""

from .load import load_peft
from .save import save_peft

__all__ = ["load_peft", "save_peft"]
