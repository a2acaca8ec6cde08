"""
Finetuning: turn a GPT-2 into a classifier, or into an assistant that follows instructions, by
training all of it, the last block, or LoRA adapters.

    python train.py                                     first: makes out/stories, the default base
    python finetune.py classify                         data/messages.tsv -> out/spam
    python finetune.py predict out/spam "You have won a prize"
    python finetune.py instruct                         data/instructions.json -> out/assistant
    python finetune.py chat out/assistant
    python finetune.py judge out/assistant/responses.json --url http://localhost:11434/v1
    python finetune.py classify --init gpt2 --data reviews.csv --out out/reviews --lora-rank 16
"""

import copy
import csv
import functools
import io
import json
import math
import os
import random
import re
import shutil
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import requests
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import load_gpt2
from gpt import GPT, create_dataloader, eval_mode
from load_gpt2 import named_errors, print_line, read_json, save_gpt2, show_progress, write_json
from train import (
    TrainConfig,
    add_options,
    find_files,
    is_small,
    option,
    print_on_rank_0,
    process_rank,
    shuffled_rows,
    start_processes,
    train,
)

# --------------------------------------------------------------------------------------------------
# Classification: a linear layer reads the class from the hidden state of the last token, the only
# one that has attended to the whole text


class GPTClassifier(nn.Module):
    """GPT with a classification head. Parameter names are GPT2ForSequenceClassification's."""

    def __init__(self, gpt, n_classes):
        super().__init__()
        self.transformer = gpt
        self.score = nn.Linear(gpt.config.n_embd, n_classes, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, ids, lengths, labels=None):
        """
        ids (B, T), padded on the right; lengths (B,), the tokens of each text -> logits
        (B, n_classes); with labels (B,), the mean cross-entropy. Padding has no effect: the causal
        mask hides it from the text.
        """
        x = self.transformer.features(ids)  # (B, T, C)
        x = x[torch.arange(len(x), device=x.device), lengths - 1]  # (B, C), of the last tokens
        logits = self.score(x)
        return logits if labels is None else F.cross_entropy(logits, labels)


class ClassificationDataset(list):
    """
    (text, label) pairs -> (ids, index of the class). Of texts that are too long, the beginning is
    kept; n_truncated counts them.
    """

    def __init__(self, rows, tokenizer, classes, context_length):
        self.n_truncated = 0
        for text, label in rows:
            ids = tokenizer.encode(text)
            self.n_truncated += len(ids) > context_length
            self.append((torch.tensor(ids[:context_length]), classes.index(label)))


def collate_texts(batch):
    """Rows of a ClassificationDataset -> ids (B, T), lengths (B,), labels (B,)"""
    ids, labels = zip(*batch)
    lengths = torch.tensor([len(row) for row in ids])
    return pad_sequence(ids, batch_first=True), lengths, torch.tensor(labels)


def save_classifier(model, tokenizer, classes, folder):
    """Write a folder that `AutoModelForSequenceClassification.from_pretrained` opens."""
    config = load_gpt2.hf_config(model.transformer.config, tokenizer) | {
        "architectures": ["GPT2ForSequenceClassification"],
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
        "pad_token_id": tokenizer.eot,  # never in a text, so that transformers finds the last token
    }
    load_gpt2.save_folder(folder, model.state_dict(), tokenizer, config)


def load_classifier(folder):
    """A folder written by `save_classifier` -> (GPTClassifier in eval mode, Tokenizer, classes)"""
    folder = Path(folder)
    path = folder / "config.json"
    config = load_gpt2.read_config(path)
    labels = read_json(path).get("id2label")
    with named_errors(path):
        if labels is None:
            raise ValueError("not a classifier: it has no id2label")
        classes = [labels[str(i)] for i in range(len(labels))]
    with torch.device("meta"):
        model = GPTClassifier(GPT(config), len(classes))
    load_gpt2.assign_weights(model, load_gpt2.read_weights(folder), folder)
    return model.eval(), load_gpt2.read_tokenizer(folder, config.vocab_size), classes


@torch.no_grad()
def predict_all(model, loader):
    """-> logits (n_rows, n_classes) and labels (n_rows,) of all batches, on the CPU"""
    device = model.score.weight.device
    with eval_mode(model):
        batches = [(model(ids.to(device), n.to(device)).cpu(), labels) for ids, n, labels in loader]
    logits, labels = zip(*batches)
    return torch.cat(logits), torch.cat(labels)


def accuracy(logits, labels):
    return (logits.argmax(dim=1) == labels).float().mean().item()


# --------------------------------------------------------------------------------------------------
# Instruction tuning: language modeling on texts of one form, with the loss on the response only


def format_prompt(entry):
    """The prompt of Stanford Alpaca (Taori et al. 2023), up to where the response begins"""
    has_input = bool(entry.get("input"))
    prompt = "Below is an instruction that describes a task"
    prompt += ", paired with an input that provides further context. " if has_input else ". "
    prompt += "Write a response that appropriately completes the request.\n\n"
    prompt += f"### Instruction:\n{entry['instruction']}\n\n"
    if has_input:
        prompt += f"### Input:\n{entry['input']}\n\n"
    return prompt + "### Response:\n"


# The same prompt for `tokenizer.apply_chat_template` of transformers, and tools that use it
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    + format_prompt({"instruction": "{{ message.content }}"})
    + "{% elif message.role == 'assistant' %}{{ message.content + eos_token }}"
    + "{% endif %}{% endfor %}"
)


class InstructionDataset(list):
    """
    Entries {instruction, input, output} -> (ids, targets), (T,) each, of prompt, response and
    end-of-text. Targets in the prompt are -100. Rows that are too long lose their end (n_truncated
    counts them); those without room for a response are left out. `entries` are the kept ones.
    """

    def __init__(self, entries, tokenizer, context_length):
        self.entries = []
        self.n_truncated = 0
        for entry in entries:
            prompt = tokenizer.encode(format_prompt(entry))
            ids = prompt + tokenizer.encode(entry["output"]) + [tokenizer.eot]
            if len(prompt) > context_length:
                continue
            self.n_truncated += len(ids) > context_length + 1
            ids = torch.tensor(ids[: context_length + 1])
            targets = ids[1:].clone()
            # The target of the last prompt token is the first token of the response
            targets[: len(prompt) - 1] = -100
            self.append((ids[:-1], targets))
            self.entries.append(entry)


def collate_instructions(batch):
    """Rows of an InstructionDataset -> ids (B, T) and targets (B, T), -100 in the padding"""
    ids, targets = zip(*batch)
    targets = pad_sequence(targets, batch_first=True, padding_value=-100)
    return pad_sequence(ids, batch_first=True), targets


def respond(model, tokenizer, entries, max_new_tokens, batch_size=32):
    """Greedy responses to entries. A response ends at the latest where the context does."""
    context_length = model.config.context_length
    prompts = [tokenizer.encode(format_prompt(entry)) for entry in entries]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses = [""] * len(prompts)
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        # The last new token is not read again, so it needs no place in the context. A row with less
        # room than others goes on in a context that is cut; ids[:n] drops that.
        room = [context_length + 1 - len(prompts[i]) for i in rows]
        new_ids = model.generate(
            [prompts[i] for i in rows],
            min(max_new_tokens, max(room)),
            temperature=0,
            eos_id=tokenizer.eot,
        )
        for i, ids, n in zip(rows, new_ids, room):
            responses[i] = tokenizer.decode(ids[:n]).strip()
    return responses


# --------------------------------------------------------------------------------------------------
# LoRA (low-rank adaptation, Hu et al. 2021): the change that finetuning makes to a matrix W has a
# low rank. So W is frozen, and the product of two thin matrices is learned beside it:
# W x + (alpha / rank) B A x, with A (rank, in) and B (out, rank).

LORA_TARGETS = ("c_attn", "c_proj", "c_fc")


class LoRALinear(nn.Linear):
    """A frozen nn.Linear with a trained low-rank adapter. Its weight and bias keep their names."""

    def __init__(self, linear, rank, alpha, dropout=0.0):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, **like)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, **like)
        # The adapter starts as 0; A is random, so that B has a gradient
        nn.init.zeros_(self.lora_B.weight)
        self.lora_dropout = nn.Dropout(dropout)
        self.rank = rank
        self.alpha = alpha
        self.scale = alpha / rank  # the same learning rate suits every rank

    def forward(self, x):
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(self.lora_dropout(x)))


def add_lora(model, rank, alpha=16, dropout=0.0, targets=LORA_TARGETS):
    """
    Freeze a model in place and give each nn.Linear with a name in targets ("c_attn", or longer, as
    "h.0.attn.c_attn") an adapter. Raises ValueError for a target that no layer has.
    """
    if rank < 1:
        raise ValueError(f"the LoRA rank {rank} is not positive")
    if lora_layers(model):
        raise ValueError("the model has adapters already; merge_lora merges them")
    model.requires_grad_(False)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for target in targets:
        names = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not names:
            raise ValueError(f"no linear layer is called {target}; LoRA is for {LORA_TARGETS}")
        for name in names:
            model.set_submodule(name, LoRALinear(layers[name], rank, alpha, dropout))
    return model


@torch.no_grad()
def merge_lora(model):
    """Add the adapters to their matrices, in place. The result is an ordinary model."""
    for name, lora in lora_layers(model).items():
        linear = nn.Linear(lora.in_features, lora.out_features, device="meta")
        delta = lora.scale * lora.lora_B.weight @ lora.lora_A.weight
        linear.weight = nn.Parameter(lora.weight + delta)
        linear.bias = lora.bias
        model.set_submodule(name, linear)
    return model


def lora_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


# Names in PEFT's files begin with those of its wrappers: base_model.model.transformer.h.0...
PEFT_PREFIX = "base_model.model."

# What PEFT's adapter_config.json may hold besides r, lora_alpha and lora_dropout: keys that do not
# change what is computed (the names of the tensors say which layers have adapters), and values that
# leave other variants of LoRA off. Everything else is refused.
PEFT_IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "target_modules", "task_type"),
}
PEFT_ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
    "modules_to_save": (None, ["score"], ["classifier", "score"]),
}


def save_lora(model, folder, base, classes=None):
    """
    Write the adapters, and the head of a classifier, for `peft.PeftModel.from_pretrained`.
    base: the name or folder of the model without adapters. classes: of a classifier.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    is_classifier = isinstance(model, GPTClassifier)
    prefix = PEFT_PREFIX if is_classifier else f"{PEFT_PREFIX}transformer."
    tensors = model.state_dict().items()
    tensors = {name: t for name, t in tensors if ".lora_" in name or name == "score.weight"}
    layers = lora_layers(model)
    lora = next(iter(layers.values()))  # all have the same settings
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_classifier else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.lora_dropout.p,
        "target_modules": list(layers),
        "modules_to_save": ["score"] if is_classifier else None,
        "fan_in_fan_out": True,  # transformers stores GPT-2's matrices as (in, out)
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    load_gpt2.write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", config)
    if classes:
        context_length = model.transformer.config.context_length
        write_json(folder / "classes.json", {"classes": classes, "context_length": context_length})


def load_lora(model, folder):
    """
    Add the adapters that `save_lora` or PEFT wrote to a model, in place. Raises ValueError for a
    variant of LoRA that is not computed here, or tensors that do not fit the model.
    """
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    with named_errors(path):
        settings = [config.pop(name) for name in ("r", "lora_alpha", "lora_dropout")]
        for name in sorted(config.keys() - PEFT_IGNORED):
            if config[name] not in PEFT_ALLOWED.get(name, (None, False, {}, [])):
                raise ValueError(f"{name}={config[name]} is not supported, only plain LoRA")
    path = Path(folder) / "adapter_model.safetensors"
    tensors = load_gpt2.read_safetensors(path)
    with named_errors(path):
        prefix = PEFT_PREFIX if isinstance(model, GPTClassifier) else f"{PEFT_PREFIX}transformer."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        suffix = ".lora_A.weight"
        add_lora(model, *settings, [n.removesuffix(suffix) for n in tensors if n.endswith(suffix)])
        if not lora_layers(model):
            raise ValueError("no adapters in it")
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        misfits = unexpected + [n for n in missing if ".lora_" in n or n == "score.weight"]
        if misfits:
            raise ValueError(f"{misfits[0]} is missing, or has no place in the model")
    return model


# --------------------------------------------------------------------------------------------------
# Data


def read_rows(source, folder, columns, optional=()):
    """
    A file, or a URL (downloaded into `folder`) -> list of {column: text}. .json: a list of objects;
    .jsonl: an object in each line; .csv: with a header; any other name: columns separated by tabs,
    which are label and text if there is no header.
    Raises ValueError with the number of the row for a value that is missing or not a text or
    integer, or that is empty in a column that is not optional.
    """
    path, *more = find_files([source], Path(folder))
    if more:
        raise ValueError(f"{source}: one file is needed, not {1 + len(more)}")
    with named_errors(path):
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            rows = json.loads(text)
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        else:
            header = text.partition("\n")[0].rstrip("\r").split("\t")
            names = None if set(columns) & set(header) else ("label", "text")
            lines = io.StringIO(text, newline="")
            rows = list(csv.DictReader(lines, names, delimiter="\t", quoting=csv.QUOTE_NONE))
        if not isinstance(rows, list) or not rows:
            raise ValueError("no rows")
        for i, row in enumerate(rows, 1):
            if not isinstance(row, dict) or None in row:
                raise ValueError(f"row {i} does not have the columns of the others")
            for column in columns:
                value = row.get(column)
                is_text = isinstance(value, (str, int)) and str(value).strip()
                if not is_text and not (column in optional and value in (None, "")):
                    raise ValueError(f"row {i}: {column} is {value!r:.50}")
        rows = [{c: "" if row.get(c) is None else str(row[c]) for c in columns} for row in rows]
        # JSON can hold half characters (lone surrogates), which no file can
        return [{c: text.encode(errors="replace").decode() for c, text in r.items()} for r in rows]


def split_rows(rows, seed, n_val, n_test, key=lambda row: 0):
    """
    -> training, validation and test: of every 20 rows, n_val are for validation and n_test for the
    test. Rows with the same key are spread evenly (a stratified split).
    """
    rng = random.Random(seed)
    rows = rng.sample(rows, len(rows))
    rows.sort(key=key)  # is stable: rows with the same key stay shuffled
    parts = [], [], []
    for i, row in enumerate(rows):
        # 7 and 20 share no factor: 20 rows take each place once, and a few rows reach all parts
        place = 7 * i % 20
        parts[1 if place < n_val else 2 if place < n_val + n_test else 0].append(row)
    for part in parts:
        rng.shuffle(part)
    if not all(parts):
        raise ValueError(f"{len(rows)} rows are too few for training, validation and test")
    return parts


def order_by_length(lengths, batch_size, seed):
    """
    For `shuffled_rows`: a function, epoch -> the rows in random order, but each batch of rows with
    similar lengths. On short messages, this saves a third of the tokens, which would be padding.
    """
    n_rows = len(lengths)

    @functools.lru_cache(maxsize=2)
    def order(epoch):
        rng = np.random.default_rng([seed, epoch])
        # Lengths change by up to a fifth, so that the same rows do not meet in every epoch
        by_length = np.argsort(lengths * rng.uniform(1, 1.2, n_rows))
        # Batches do not end with an epoch: the first rows complete the last batch of the one before
        first = -epoch * n_rows % batch_size
        starts = range(first, n_rows - batch_size + 1, batch_size)
        result = by_length.copy()  # and now the other batches in random order
        for here, there in zip(starts, rng.permutation(starts)):
            result[here : here + batch_size] = by_length[there : there + batch_size]
        return result

    return order


# --------------------------------------------------------------------------------------------------
# One way to start, train and save, for both tasks


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    steps: int | None = option(None, "instead of --epochs")
    learning_rate: float | None = option(
        None, "peak (default: small models 2e-3, LoRA 1e-3, else 5e-5)"
    )
    eval_every: int | None = option(None, "steps between validations (default: an epoch)")
    epochs: float = option(4.0, "how often each row is seen")
    init: str = option("out/stories", "the base model: a folder, or a name on the hub")
    context_length: int | None = option(None, "cut rows to this length (default: the model's)")
    dropout: float | None = option(None, "default: 0.15 for small models, else 0.1")
    lora_rank: int = option(0, "train LoRA adapters of this rank; 0: no LoRA")
    lora_alpha: float = option(16.0, "adapters are scaled by alpha / rank")
    lora_dropout: float = option(0.05, "dropout before the adapters")
    lora_targets: list | None = option(None, f"layers with adapters (default: {LORA_TARGETS})")

    # Data may move, as its content is compared; epochs only set the number of steps
    may_change = TrainConfig.may_change | {"data", "epochs", "max_new_tokens"}


def load_base(config):
    """-> the model to be tuned, its tokenizer, the config with defaults that depend on the model"""
    if config.init == FinetuneConfig.init and not Path(config.init).exists():
        raise ValueError(
            f"{config.init} does not exist: make it with `python train.py`, or use --init"
        )
    base, tokenizer = load_gpt2.load_gpt2(config.init)
    # A small model has more to learn: a higher learning rate, and more dropout
    if config.dropout is None:
        config = replace(config, dropout=0.15 if is_small(base.config) else 0.1)
    if config.learning_rate is None:
        rate = 2e-3 if is_small(base.config) else 1e-3 if config.lora_rank else 5e-5
        config = replace(config, learning_rate=rate)
    context_length = base.config.context_length
    if config.context_length is None:
        config = replace(config, context_length=context_length)
    if not 0 < config.context_length <= context_length:
        raise ValueError(f"--context-length must be 1 to {context_length}, that of {config.init}")
    torch.manual_seed(config.seed)
    sizes = {"dropout": config.dropout, "context_length": config.context_length}
    model = GPT(replace(base.config, **sizes))
    weights = base.state_dict()
    weights["wpe.weight"] = weights["wpe.weight"][: config.context_length]
    model.load_state_dict(weights)
    if config.lora_rank:
        alpha, dropout = config.lora_alpha, config.lora_dropout
        add_lora(model, config.lora_rank, alpha, dropout, config.lora_targets or LORA_TARGETS)
    return model, tokenizer, config


def sorted_loader(rows, batch_size, collate_fn):
    """A loader of all rows for evaluation, short ones first, which saves padding"""
    rows = sorted(rows, key=lambda row: len(row[0]))
    return create_dataloader(rows, batch_size, collate_fn=collate_fn)


def finetune(config, model, datasets, collate_fn, content, *, save, report):
    """Train on datasets (training, validation). save(model) gets the model with merged adapters."""
    training, validation = datasets
    steps_per_epoch = len(training) / config.batch_size
    steps = config.steps or math.ceil(config.epochs * steps_per_epoch)
    eval_every = config.eval_every or math.ceil(steps_per_epoch)
    config = replace(config, steps=steps, eval_every=eval_every)
    lengths = np.array([len(ids) for ids, _ in training])
    order = order_by_length(lengths, config.batch_size, config.seed)

    def get_batch(step):
        rows = shuffled_rows(step, len(training), config.batch_size, order)
        return collate_fn([training[row] for row in rows])

    def save_best():
        # Files of an earlier run
        shutil.rmtree(config.out / "adapter", ignore_errors=True)
        (config.out / "responses.json").unlink(missing_ok=True)
        save(merge_lora(copy.deepcopy(model)) if config.lora_rank else model)

    get_batch(0)  # if it fails, then before anything is written
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print_on_rank_0(
        f"{len(training)} rows for training, {len(validation)} for validation; {trained:,} of "
        f"{total:,} parameters are trained; {config.device}"
    )
    val_loader = sorted_loader(validation, config.micro_batch_size or config.batch_size, collate_fn)
    train(model, get_batch, val_loader, config, save=save_best, report=report, content=content)


# --------------------------------------------------------------------------------------------------
# The commands

DATA = Path(__file__).with_name("data")


@dataclass(frozen=True)
class ClassifyConfig(FinetuneConfig):
    data: str = option(str(DATA / "messages.tsv"), "file or URL with texts and their classes")
    out: Path = option(Path("out/spam"), "output folder")
    text_column: str = option("text", "column of the texts")
    label_column: str = option("label", "column of the classes")
    train: str | None = option(
        None, "last: the head and the last block (default: last; all for small models)",
        choices=["head", "last", "all"],
    )  # fmt: skip


def classify(config):
    """Learn to classify texts."""
    columns = (config.text_column, config.label_column)
    rows = read_rows(config.data, config.out.parent, columns)
    rows = [(row[config.text_column], row[config.label_column]) for row in rows]
    counts = Counter(label for _, label in rows)
    classes = sorted(counts)
    parts = split_rows(rows, config.seed, n_val=2, n_test=4, key=lambda row: row[1])
    found = ", ".join(f"{counts[name]} {name}" for name in classes)
    if len(classes) < 2 or any({label for _, label in part} != set(classes) for part in parts):
        raise ValueError(
            f"{config.data}: needs two classes or more, and several rows of each, not {found}"
        )
    gpt, tokenizer, config = load_base(config)
    model = GPTClassifier(gpt, len(classes))
    if config.train and config.lora_rank:
        raise ValueError("--train and --lora-rank exclude each other: LoRA trains its adapters")
    if not config.lora_rank:
        what = config.train or ("all" if is_small(gpt.config) else "last")
        gpt.requires_grad_(what == "all")
        if what == "last":
            gpt.h[-1].requires_grad_()
            gpt.ln_f.requires_grad_()
    datasets = [
        ClassificationDataset(part, tokenizer, classes, config.context_length) for part in parts
    ]
    n_truncated = sum(dataset.n_truncated for dataset in datasets)
    print_on_rank_0(f"{found}; {n_truncated} truncated to {config.context_length} tokens")
    loaders = [sorted_loader(dataset, 32, collate_texts) for dataset in datasets]

    def save(merged):
        save_classifier(merged, tokenizer, classes, config.out)
        if config.lora_rank:
            save_lora(model, config.out / "adapter", config.init, classes)

    def report():
        sample = sorted_loader(datasets[0][: len(datasets[1])], 32, collate_texts)
        on_training = accuracy(*predict_all(model, sample))  # of as many rows as for validation
        on_validation = accuracy(*predict_all(model, loaders[1]))
        print(f"    accuracy: training {on_training:.1%}, validation {on_validation:.1%}")
        return {"train_accuracy": on_training, "val_accuracy": on_validation}

    content = (rows, tokenizer.vocab)
    finetune(config, model, datasets[:2], collate_texts, content, save=save, report=report)
    if process_rank()[0] == 0:
        best, _, _ = load_classifier(config.out)
        best.to(config.device)
        print("\n                loss  accuracy")
        for name, loader in zip(("training", "validation", "test"), loaders):
            logits, labels = predict_all(best, loader)
            loss = F.cross_entropy(logits, labels)
            print(f"  {name:12}{loss:6.3f}  {accuracy(logits, labels):8.2%}")
        text, _ = parts[2][0]
        print(f'\nfinished: python finetune.py predict {config.out} "{text[:40]}"')


@dataclass(frozen=True)
class InstructConfig(FinetuneConfig):
    data: str = option(str(DATA / "instructions.json"), "file or URL with instructions")
    out: Path = option(Path("out/assistant"), "output folder")
    epochs: float = option(6.0, "how often each row is seen")
    batch_size: int = option(8, "sequences per update, over all processes")
    max_new_tokens: int = option(256, "longest response")


def instruct(config):
    """Learn to follow instructions."""
    columns = ("instruction", "input", "output")
    entries = read_rows(config.data, config.out.parent, columns, optional=("input",))
    parts = split_rows(entries, config.seed, n_val=1, n_test=2)
    model, tokenizer, config = load_base(config)
    datasets = [InstructionDataset(part, tokenizer, config.context_length) for part in parts]
    if not all(datasets):
        raise ValueError(f"{config.data}: too few rows fit into {config.context_length} tokens")
    training, validation, test = datasets
    n_truncated = sum(dataset.n_truncated for dataset in datasets)
    print_on_rank_0(
        f"{len(entries)} rows, {sum(map(len, datasets))} prompts fit, {n_truncated} truncated to "
        f"{config.context_length} tokens"
    )

    def save(merged):
        save_gpt2(merged, tokenizer, config.out, chat_template=CHAT_TEMPLATE)
        if config.lora_rank:
            save_lora(model, config.out / "adapter", config.init)

    def show_sample():
        entry = validation.entries[0]
        (response,) = respond(model, tokenizer, [entry], config.max_new_tokens)
        text = f"{entry['instruction']} {entry['input']}\n-> {response}"
        print(textwrap.indent(text, "    "), end="\n\n", flush=True)

    content = (entries, tokenizer.vocab)
    finetune(
        config, model, [training, validation], collate_instructions, content,
        save=save, report=show_sample,
    )  # fmt: skip
    if process_rank()[0] == 0:
        dtype = load_gpt2.fast_dtype(config.device)
        best, _ = load_gpt2.load_gpt2(config.out, device=config.device, dtype=dtype)
        responses = respond(best, tokenizer, test.entries, config.max_new_tokens)
        results = [e | {"response": r} for e, r in zip(test.entries, responses)]
        write_json(config.out / "responses.json", results)
        for result in results[:3]:
            print("\n" + "\n".join(f"{key:>13}: {text}" for key, text in result.items()))
        print(f"\nall in {config.out}/responses.json; python finetune.py chat {config.out}")


def merge_adapter(model, folder, adapter):
    """Load adapters for the model of a folder, and merge them."""
    refuse_own_adapter(folder, adapter)
    return merge_lora(load_lora(model, adapter))


def refuse_own_adapter(folder, adapter):
    if Path(adapter).resolve().parent == Path(folder).resolve():
        raise ValueError(f"the weights in {folder} already contain {adapter}")


def predict(folder, texts, adapter, device):
    """Print the class of texts, or of the lines of standard input."""
    if adapter:
        refuse_own_adapter(folder, adapter)
        gpt, tokenizer = load_gpt2.load_gpt2(folder)
        path = Path(adapter) / "classes.json"
        content = read_json(path)
        with named_errors(path):
            classes = [str(name) for name in content["classes"]]
            context_length = min(content["context_length"], gpt.config.context_length)
        model = merge_adapter(GPTClassifier(gpt, len(classes)), folder, adapter)
    else:
        model, tokenizer, classes = load_classifier(folder)
        context_length = model.transformer.config.context_length
    texts = texts or sys.stdin.read().rstrip("\n").split("\n")
    if not all(text.strip() for text in texts):
        raise ValueError("a text is empty")
    rows = [(text, classes[0]) for text in texts]  # the class is not used
    dataset = ClassificationDataset(rows, tokenizer, classes, context_length)
    if dataset.n_truncated:
        print(f"{dataset.n_truncated} texts are truncated", file=sys.stderr)
    loader = create_dataloader(dataset, 32, collate_fn=collate_texts)
    logits, _ = predict_all(model.to(device), loader)
    for text, probs in zip(texts, logits.softmax(dim=1)):
        print(f"{classes[probs.argmax()]}\t{probs.max():.4f}\t{text}")


def chat(folder, adapter, temperature, top_k, max_new_tokens, device):
    """Give instructions to a model."""
    model, tokenizer = load_gpt2.load_gpt2(folder)
    if adapter:
        model = merge_adapter(model, folder, adapter)
    model.to(device, load_gpt2.fast_dtype(device)).eval()
    print("Each line is an instruction of its own. Ctrl-C stops a response, Ctrl-D ends the chat.")
    while True:
        try:
            instruction = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            continue
        if not instruction:
            continue
        prompt = format_prompt({"instruction": instruction})
        room = model.config.context_length + 1 - len(tokenizer.encode(prompt))
        if room < 1:
            print("The instruction is too long for the context of the model.")
            continue
        n_tokens = min(max_new_tokens, room)
        options = {"temperature": temperature, "top_k": top_k}
        try:
            for piece in load_gpt2.stream_text(model, tokenizer, prompt, n_tokens, **options):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" ...", end="")
        print()


JUDGE_PROMPT = """Score how well a response follows an instruction, from 0 (not at all) to 100.

Instruction: {instruction}
Input: {input}
A correct response: {output}
Response to be scored: {response}

Answer with the number alone."""


def judge(responses, url, model):
    """Score responses with a larger model on a server that has OpenAI's chat API."""
    columns = ("instruction", "input", "output", "response")
    rows = read_rows(responses, Path("."), columns, optional=("input", "response"))
    scores = []
    for i, row in enumerate(rows, 1):
        scores.append(ask_for_score(url, model, JUDGE_PROMPT.format(**row)))
        show_progress(f"{i} of {len(rows)}")
    valid = [score for score in scores if score is not None]
    if not valid:
        raise ValueError(f"{url}: none of {len(scores)} answers is a number from 0 to 100")
    print_line(f"mean score {sum(valid) / len(valid):.1f} of {len(valid)} (of {len(scores)} rows)")


def ask_for_score(url, model, prompt):
    """-> the number in the answer of the server, or None"""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{url.rstrip('/')}/chat/completions"
    response = requests.post(url, json=body, headers=headers, timeout=300)  # large models are slow
    with named_errors(url):
        if not response.ok:
            raise ValueError(f"{response.status_code} {response.reason}: {response.text}")
        # Not response.json(): its error is an OSError, which does not name the URL
        answer = str(json.loads(response.text)["choices"][0]["message"]["content"])
    # Without the thoughts of a reasoning model, the answer must hold one number, as 85 or 85/100,
    # and no minus sign before it
    answer = re.sub(r"(?s)<think>.*?(</think>|$)", "", answer)
    match = re.fullmatch(r"\D*?(?<!-)(\d+(?:\.\d+)?)(?:\s*/\s*100)?\D*", answer)
    return float(match[1]) if match and float(match[1]) <= 100 else None


def main():
    parser = load_gpt2.CommandLine(description="Finetune a GPT-2, and use the result.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    functions = {f.__name__: f for f in (classify, instruct, predict, chat, judge)}
    parsers = {
        name: commands.add_parser(name, help=f.__doc__, description=f.__doc__)
        for name, f in functions.items()
    }
    configs = {"classify": ClassifyConfig, "instruct": InstructConfig}
    for name, config_class in configs.items():
        add_options(parsers[name], config_class)

    parsers["predict"].add_argument("folder", help="of the model, such as out/spam")
    parsers["chat"].add_argument("folder", nargs="?", default="out/assistant", help="of the model")
    for name in ("predict", "chat"):
        add = parsers[name].add_argument
        add("--adapter", metavar="FOLDER", help="LoRA adapters for it, of save_lora or PEFT")
        device = load_gpt2.default_device()
        add("--device", type=load_gpt2.usable_device, default=device, help="cpu, cuda or mps")
    parsers["predict"].add_argument("texts", nargs="*", help="default: lines of standard input")
    add = parsers["chat"].add_argument
    add("--temperature", type=float, default=0.7, help="0 always takes the most likely token")
    add("--top-k", type=int, default=50, help="sample from the k most likely tokens")
    add("--max-new-tokens", type=int, default=256, help="longest response")
    add = parsers["judge"].add_argument
    add("responses", nargs="?", default="out/assistant/responses.json", help="written by instruct")
    add("--url", default="http://localhost:11434/v1", help="of the server; this is Ollama's")
    add("--model", default="llama3", help="name of the judge on the server")

    args = vars(parser.parse_args())
    command = args.pop("command")
    if command in configs:
        config = configs[command](**args)
        start_processes(config.device)
        functions[command](config)
    else:
        functions[command](**args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    with load_gpt2.one_line_errors():
        main()
