"""What finetune.py writes opens in transformers and PEFT, and the other way round: `pip install transformers peft`"""

from pathlib import Path

import pytest
import torch

from finetune import (
    GPTClassifier,
    LoRALinear,
    add_lora,
    load_classifier,
    load_lora,
    save_classifier,
    save_lora,
)
from load_gpt2 import load_gpt2

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TINY = Path(__file__).parent / "tiny-gpt2"
IDS = torch.randint(0, 319, (3, 24), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([24, 3, 11])
PADDED = IDS.masked_fill(
    torch.arange(24) >= LENGTHS[:, None], 319
)  # transformers finds the end by the padding
CLASSES = ["eggs", "ham", "spam"]


def classifier():
    torch.manual_seed(1)
    gpt, tokenizer = load_gpt2(TINY)
    return GPTClassifier(gpt, 3).eval(), tokenizer


def randomise(model, name="lora_B"):
    torch.manual_seed(2)
    for key, parameter in model.named_parameters():
        if name in key:
            torch.nn.init.normal_(parameter, std=0.3)


@torch.no_grad()
def test_classifier_opens_in_transformers(tmp_path):
    model, tokenizer = classifier()
    save_classifier(model, tokenizer, CLASSES, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert (
        type(theirs).__name__ == "GPT2ForSequenceClassification" and theirs.config.num_labels == 3
    )
    assert [theirs.config.id2label[i] for i in range(3)] == CLASSES
    ours = model(IDS, LENGTHS)
    assert torch.allclose(theirs(PADDED).logits, ours, atol=1e-5)
    mask = torch.arange(24) < LENGTHS[:, None]
    assert torch.allclose(theirs(PADDED, attention_mask=mask.long()).logits, ours, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    tokenizer.save(tmp_path / "again")
    again, _, classes = load_classifier(tmp_path / "again")
    assert classes == CLASSES and torch.equal(again(IDS, LENGTHS), ours)


@torch.no_grad()
def test_adapter_opens_in_peft(tmp_path):
    model = add_lora(load_gpt2(TINY)[0], rank=4, alpha=12, dropout=0.1).eval()
    randomise(model)
    save_lora(model, tmp_path, TINY)
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(theirs(IDS).logits, model(IDS), atol=1e-4)
    assert torch.allclose(theirs.merge_and_unload()(IDS).logits, model(IDS), atol=1e-4)


@torch.no_grad()
def test_classifiers_adapter_opens_in_peft(tmp_path):
    model, _ = classifier()
    add_lora(model, rank=4, alpha=12).eval()
    randomise(model)
    save_lora(model, tmp_path, TINY)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        TINY, num_labels=3, pad_token_id=319
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(theirs(PADDED).logits, model(IDS, LENGTHS), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"], r".*h\.1\.mlp\.c_(fc|proj)"]
)
def test_adapter_of_peft_loads(tmp_path, targets):
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base, config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_lora(load_gpt2(TINY)[0], tmp_path).eval()
    assert torch.allclose(ours(IDS), theirs(IDS).logits, atol=1e-4)
    n = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert n == theirs.get_nb_trainable_parameters()[0]
    assert any(isinstance(module, LoRALinear) for module in ours.modules())


@torch.no_grad()
def test_classifiers_adapter_of_peft_loads(tmp_path):
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        TINY, num_labels=3, pad_token_id=319
    )
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
        task_type="SEQ_CLS",
    )
    theirs = peft.get_peft_model(base, config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    model, _ = classifier()
    ours = load_lora(model, tmp_path).eval()
    assert torch.allclose(ours(IDS, LENGTHS), theirs(PADDED).logits, atol=1e-4)


def test_count_is_pefts():
    with torch.device("meta"):
        base = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        config = peft.LoraConfig(
            r=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
        )
        assert peft.get_peft_model(base, config).get_nb_trainable_parameters()[0] == 2_359_296
