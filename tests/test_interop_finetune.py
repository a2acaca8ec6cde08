"""What finetune.py writes opens in transformers and PEFT, and what PEFT writes opens here."""

import copy
import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch

from finetune import (
    CHAT_TEMPLATE,
    GPTClassifier,
    LoRALinear,
    add_lora,
    format_prompt,
    load_classifier,
    load_lora,
    save_classifier,
    save_lora,
)
from load_gpt2 import load_gpt2, save_gpt2

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TINY = Path(__file__).parent / "tiny-gpt2"
IDS = torch.randint(0, 319, (3, 24), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([24, 3, 11])
PADDED = IDS.masked_fill(
    torch.arange(24) >= LENGTHS[:, None], 319
)  # transformers finds the end by the padding
CLASSES = ["eggs", "ham", "spam"]


def base(classes=None):
    """TINY in transformers"""
    if classes is None:
        return transformers.AutoModelForCausalLM.from_pretrained(TINY)
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        TINY, num_labels=len(classes), pad_token_id=319
    )


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
    assert type(theirs).__name__ == "GPT2ForSequenceClassification"
    assert theirs.config.num_labels == 3
    assert [theirs.config.id2label[i] for i in range(3)] == CLASSES
    ours = model(IDS, LENGTHS)
    assert torch.allclose(theirs(PADDED).logits, ours, atol=1e-5)
    mask = torch.arange(24) < LENGTHS[:, None]
    assert torch.allclose(theirs(PADDED, attention_mask=mask.long()).logits, ours, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    tokenizer.save(tmp_path / "again")
    again, _, classes = load_classifier(tmp_path / "again")
    assert classes == CLASSES
    assert torch.equal(again(IDS, LENGTHS), ours)


@torch.no_grad()
def test_adapter_opens_in_peft(tmp_path):
    model = add_lora(load_gpt2(TINY)[0], rank=4, alpha=12, dropout=0.1).eval()
    randomise(model)
    save_lora(model, tmp_path, TINY)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.allclose(theirs(IDS).logits, model(IDS), atol=1e-4)
    assert torch.allclose(theirs.merge_and_unload()(IDS).logits, model(IDS), atol=1e-4)


@torch.no_grad()
def test_classifiers_adapter_opens_in_peft(tmp_path):
    model, _ = classifier()
    add_lora(model, rank=4, alpha=12).eval()
    randomise(model)
    save_lora(model, tmp_path, TINY)
    theirs = peft.PeftModel.from_pretrained(base(CLASSES), tmp_path).eval()
    assert torch.allclose(theirs(PADDED).logits, model(IDS, LENGTHS), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"], r".*h\.1\.mlp\.c_(fc|proj)"]
)
def test_adapter_of_peft_loads(tmp_path, targets):
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base(), config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_lora(load_gpt2(TINY)[0], tmp_path).eval()
    assert torch.allclose(ours(IDS), theirs(IDS).logits, atol=1e-4)
    n = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert n == theirs.get_nb_trainable_parameters()[0]
    assert any(isinstance(module, LoRALinear) for module in ours.modules())


@torch.no_grad()
def test_classifiers_adapter_of_peft_loads(tmp_path):
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
        task_type="SEQ_CLS",
    )
    theirs = peft.get_peft_model(base(CLASSES), config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    model, _ = classifier()
    ours = load_lora(model, tmp_path).eval()
    assert torch.allclose(ours(IDS, LENGTHS), theirs(PADDED).logits, atol=1e-4)


def test_count_is_pefts():
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        config = peft.LoraConfig(
            r=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
        )
        assert peft.get_peft_model(theirs, config).get_nb_trainable_parameters()[0] == 2_359_296


# What PEFT's adapter_config.json can hold: each field of LoraConfig with values that make the model
# compute something else, or that must not disturb. Each is computed as PEFT does, or refused.
PLAIN = {
    "r": 4,
    "lora_alpha": 7,
    "target_modules": ["c_attn", "mlp.c_proj"],
    "fan_in_fan_out": True,
    "task_type": "CAUSAL_LM",
}
CHANGES = {
    "task_type": [None],
    "peft_type": ["ADALORA", "IA3", "VERA"],
    "auto_mapping": [{"base_model_class": "GPT2LMHeadModel"}],
    "peft_version": ["99.0"],
    "base_model_name_or_path": ["gpt2"],
    "revision": ["main"],
    "inference_mode": [True],
    "r": [2],
    "lora_alpha": [1, 0.5, 64],
    "lora_dropout": [0.5],
    "target_modules": [
        ["c_fc"],
        r".*h\.0\.attn\.c_proj",
        "all-linear",
        ["wte"],
        ["c_fc", "lm_head"],
    ],
    "exclude_modules": [["mlp.c_proj"], r".*h\.1\..*"],
    "fan_in_fan_out": [False],
    "bias": ["all", "lora_only"],
    "use_rslora": [True],
    "modules_to_save": [["wte"], ["wpe", "ln_f"], ["lm_head"]],
    "init_lora_weights": [
        *(False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "mica", "eva"),
        *("corda", "loftq", "lora_ga", "an init of tomorrow"),
    ],
    "layers_to_transform": [[1], 0],
    "layers_pattern": ["h"],
    "rank_pattern": [{"c_attn": 2}],
    "alpha_pattern": [{"c_attn": 64}],
    "megatron_config": [{"hidden_size": 24}],
    "megatron_core": ["megatron.other"],
    "trainable_token_indices": [[1, 2], {"wte": [3]}],
    "loftq_config": [{"loftq_bits": 4}],
    "eva_config": [{"rho": 2.0}],
    "corda_config": [{"corda_method": "kpm"}],
    "lora_ga_config": [{"direction": "ArB2r"}],
    "use_dora": [True],
    "velora_config": [{"num_groups": 4}],
    "alora_invocation_tokens": [[5], [int(IDS[0, 3])]],
    "use_qalora": [True],
    "qalora_group_size": [8],
    "monteclora_config": [{"num_samples": 2}],
    "layer_replication": [[[0, 2], [1, 2]]],
    "lora_bias": [True],
    "target_parameters": [["mlp.c_fc.weight"]],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 2}],
    "kasa_config": [{"beta": 0.1}],
    "ensure_weight_tying": [True],
}
# Fields of a later PEFT must be refused; runtime_config is not in the file
LATER = {f.name for f in dataclasses.fields(peft.LoraConfig)} - {*CHANGES, "runtime_config"}
CASES = [(name, value) for name, values in CHANGES.items() for value in values]
CASES += [(name, "a value") for name in sorted(LATER | {"a_setting_of_tomorrow"})]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model of transformers, and the folder of a plain adapter that PEFT wrote for it"""
    folder = tmp_path_factory.mktemp("plain")
    theirs = base()
    adapted = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(**PLAIN))
    randomise(adapted)
    adapted.save_pretrained(folder)
    return theirs, folder


@torch.no_grad()
@pytest.mark.parametrize("name, value", CASES, ids=lambda x: str(x)[:30])
def test_every_setting_of_peft_is_computed_or_refused(tmp_path, plain, name, value):
    theirs, folder = plain
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {name: value}))
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors)
    try:
        load_lora(load_gpt2(TINY)[0], tmp_path)
    except ValueError as error:
        if f"{name}=" in str(error):
            return  # refused by name
        if name != "r":  # whose tensors have other shapes
            raise
    # The setting is accepted. So a model for which PEFT used it must load, and compute the same;
    # or else its tensors are refused
    change = {"layers_to_transform": [0]} if name == "layers_pattern" else {}
    change |= {name: value}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(**PLAIN | change))
        torch.manual_seed(2)
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad or ".lora_" in key:  # with inference_mode, none is trained
                parameter.normal_(std=0.3)
        adapted.eval().save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != tensors
    try:
        ours = load_lora(load_gpt2(TINY)[0], tmp_path).eval()
    except ValueError as error:
        assert name in ("target_modules", "modules_to_save")
        assert "adapter_model.safetensors" in str(error)
        return
    assert torch.allclose(ours(IDS), adapted(IDS).logits, atol=1e-4)
    assert not torch.allclose(ours(IDS), theirs(IDS).logits, atol=1e-2)


def test_folder_of_an_assistant_serves_transformers_chat_and_padded_batches(tmp_path):
    gpt, tokenizer = load_gpt2(TINY)
    save_gpt2(gpt, tokenizer, tmp_path, chat_template=CHAT_TEMPLATE)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    entry = {"instruction": "Say  <b>hello</b>.\nTwice."}
    messages = [{"role": "user", "content": entry["instruction"]}]
    # The form has no place for a system message
    messages.insert(0, {"role": "system", "content": "Be brief."})
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == format_prompt(entry)
    answered = [*messages, {"role": "assistant", "content": "Hello, hello."}]
    text = theirs.apply_chat_template(answered, tokenize=False)
    assert text == format_prompt(entry) + "Hello, hello.<|endoftext|>"

    texts = ["The old", "The old man went home"]
    batch = theirs(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == [len(tokenizer.encode(t)) for t in texts]
    assert len(theirs("old " * 200, truncation=True)["input_ids"]) == gpt.config.context_length
