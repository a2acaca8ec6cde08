"""
Finetuning: turn a GPT-2 into a classifier, or into an assistant that follows instructions, by
training all of it, or LoRA adapters. The default base is out/stories, which train.py makes.

    python finetune.py classify                     # data/messages.tsv -> out/spam
    python finetune.py predict out/spam "You have won a prize"
    python finetune.py instruct                     # data/instructions.json -> out/assistant
    python finetune.py chat out/assistant
    python finetune.py judge out/assistant/responses.json --url http://localhost:11434/v1
    python finetune.py classify --init gpt2 --data reviews.csv --out out/reviews --lora-rank 16
"""

import copy
import csv
import json
import math
import os
import random
import re
import shutil
import sys
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
import train
from gpt import GPT, create_dataloader, eval_mode
from load_gpt2 import named_errors, print_line, read_json, save_gpt2, show_progress, write_json
from train import TrainConfig, add_options, find_files, is_small, option, process_rank

# --------------------------------------------------------------------------------------------------
# Classification: a linear layer reads the class from the hidden state of the last token, the only
# one that attends to the whole text


class GPTClassifier(nn.Module):
    """GPT with a classification head. Parameter names are GPT2ForSequenceClassification's."""

    def __init__(self, gpt, n_classes):
        super().__init__()
        self.transformer = gpt
        self.score = nn.Linear(gpt.config.n_embd, n_classes, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, ids, lengths, labels=None):
        """
        ids (B, T), padded on the right; lengths (B,) without padding -> logits (B, n_classes), or
        with labels (B,) the mean cross-entropy. The causal mask hides the padding from the text.
        """
        x = self.transformer.features(ids)  # (B, T, C)
        x = x[torch.arange(len(x), device=x.device), lengths - 1]  # (B, C), of the last tokens
        logits = self.score(x)
        return logits if labels is None else F.cross_entropy(logits, labels)


class ClassificationDataset(list):
    """(text, label) pairs -> (ids, index of the class). n_truncated: texts that lost their end"""

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
    path = Path(folder) / "config.json"
    config = load_gpt2.read_config(path)
    labels = read_json(path, "id2label")
    with named_errors(path), torch.device("meta"):
        classes = [labels[str(i)] for i in range(len(labels))]
        model = GPTClassifier(GPT(config), len(classes))
    load_gpt2.assign_weights(model, load_gpt2.read_weights(folder), folder)
    return model.eval(), load_gpt2.read_tokenizer(folder, config.vocab_size), classes


@torch.no_grad()
def predict_all(model, dataset):
    """Rows of a ClassificationDataset -> logits (n_rows, n_classes), on the CPU"""
    device = model.score.weight.device
    loader = create_dataloader(dataset, 32, collate_fn=collate_texts)
    with eval_mode(model):
        return torch.cat([model(ids.to(device), n.to(device)).cpu() for ids, n, _ in loader])


def accuracy(model, dataset):
    predicted = predict_all(model, dataset).argmax(dim=1).tolist()
    return sum(i == label for i, (_, label) in zip(predicted, dataset)) / len(dataset)


# --------------------------------------------------------------------------------------------------
# Instruction tuning: language modeling on texts of one form, with the loss on the response only


def format_prompt(entry):
    """The prompt, after Stanford Alpaca's (Taori et al. 2023), up to where the response begins"""
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
    end-of-text. Targets in the prompt are -100. Rows that are too long lose their end; those with
    no room for a response are left out. n_truncated counts both. `entries` are the kept ones.
    """

    def __init__(self, entries, tokenizer, context_length):
        self.entries = []
        self.n_truncated = 0
        for entry in entries:
            prompt = tokenizer.encode(format_prompt(entry))
            ids = torch.tensor(prompt + tokenizer.encode(entry["output"]) + [tokenizer.eot])
            targets = ids.clone()
            targets[: len(prompt)] = -100
            self.n_truncated += len(ids) > context_length + 1
            if len(prompt) <= context_length:
                self.append((ids[:-1][:context_length], targets[1:][:context_length]))
                self.entries.append(entry)


def collate_instructions(batch):
    """Rows of an InstructionDataset -> ids (B, T) and targets (B, T), -100 in the padding"""
    ids, targets = zip(*batch)
    targets = pad_sequence(targets, batch_first=True, padding_value=-100)
    return pad_sequence(ids, batch_first=True), targets


def respond(model, tokenizer, entries, max_new_tokens, batch_size=32):
    """Greedy responses to entries. A response ends at the latest where the context does."""
    responses = []
    for start in range(0, len(entries), batch_size):
        batch = entries[start : start + batch_size]
        prompts = [tokenizer.encode(format_prompt(entry)) for entry in batch]
        # The last new token needs no position, hence + 1. generate shortens a text that outgrows
        # the context and goes on with it; ids[:n] drops these tokens.
        room = [model.config.context_length + 1 - len(prompt) for prompt in prompts]
        n_new = min(max_new_tokens, max(room))
        new_ids = model.generate(prompts, n_new, temperature=0, eos_id=tokenizer.eot)
        responses += [tokenizer.decode(ids[:n]).strip() for ids, n in zip(new_ids, room)]
    return responses


# --------------------------------------------------------------------------------------------------
# LoRA (low-rank adaptation, Hu et al. 2021): the change that finetuning makes to a matrix W has a
# low rank. So W is frozen, and the product of two thin matrices is learned beside it:
# W x + (alpha / rank) B A x, with A (rank, in) and B (out, rank).


class LoRALinear(nn.Module):
    """A frozen nn.Linear with a trained low-rank adapter"""

    def __init__(self, linear, rank, alpha, dropout=0.0):
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        # The adapter starts as 0; A is random, so that B has a gradient
        nn.init.zeros_(self.lora_B.weight)
        self.lora_dropout = nn.Dropout(dropout)
        self.alpha = alpha
        self.scale = alpha / rank  # the same learning rate suits every rank
        self.to(linear.weight)  # its device and dtype

    def forward(self, x):
        return self.linear(x) + self.scale * self.lora_B(self.lora_A(self.lora_dropout(x)))


def add_lora(model, rank, alpha=16, dropout=0.0, targets=("c_attn", "c_proj", "c_fc")):
    """
    Freeze a model in place, and give an adapter to each nn.Linear whose name ends in one of targets
    ("c_attn", or longer, as "h.0.attn.c_attn"). Raises ValueError for a target that none has.
    """
    if rank < 1:
        raise ValueError(f"the LoRA rank {rank} is not positive")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already; merge_lora merges them")
    model.requires_grad_(False)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for target in targets:
        names = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not names:
            raise ValueError(f"no linear layer is called {target}")
        for name in names:
            model.set_submodule(name, LoRALinear(layers[name], rank, alpha, dropout))
    return model


@torch.no_grad()
def merge_lora(model):
    """Add the adapters to their matrices, in place. The result is an ordinary model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            module.linear.weight += module.scale * module.lora_B.weight @ module.lora_A.weight
            model.set_submodule(name, module.linear)
    return model


# Hugging Face's PEFT library keeps LoRA's settings in adapter_config.json. These are accepted:
# name=value only with this value, name with any value, because it changes nothing here (the names
# of the tensors say which layers have adapters)
PEFT_ALLOWED = {
    *("peft_type=LORA", "bias=none", "init_lora_weights=True", "init_lora_weights=gaussian"),
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "megatron_core"),
    *("modules_to_save", "peft_version", "qalora_group_size", "revision"),
    *("target_modules", "task_type"),
}


def peft_names(model):
    """-> {name in PEFT's files: name here} of the adapters, and of the head of a classifier"""
    # PEFT's names begin with those of its modules; transformer. is in a GPTClassifier's own names
    prefix = "base_model.model." + ("" if isinstance(model, GPTClassifier) else "transformer.")
    names = [name for name in model.state_dict() if ".lora_" in name or name == "score.weight"]
    return {prefix + name: name for name in names}


def save_lora(model, folder, base, classes=None):
    """
    Write the adapters, and the head of a classifier, for `peft.PeftModel.from_pretrained`.
    base: the name or folder of the model without adapters. classes: of a classifier.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    lora = next(iter(layers.values()))  # all have the same settings
    config = {
        "peft_type": "LORA",
        # For SEQ_CLS, PEFT loads the head too
        "task_type": "SEQ_CLS" if isinstance(model, GPTClassifier) else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.lora_A.out_features,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.lora_dropout.p,
        "target_modules": list(layers),
        "fan_in_fan_out": True,  # transformers stores GPT-2's matrices as (in, out)
        "bias": "none",
        "inference_mode": True,
    }
    state = model.state_dict()
    tensors = {peft_name: state[name] for peft_name, name in peft_names(model).items()}
    load_gpt2.write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", config)
    if classes:
        write_json(folder / "classes.json", {"classes": classes})


def load_lora(model, folder):
    """
    Add to a model, in place, the adapters that `save_lora` or PEFT wrote. Raises ValueError for
    another variant of LoRA, or tensors that do not fit the model.
    """
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    with named_errors(path):
        settings = [config.pop(name) for name in ("r", "lora_alpha", "lora_dropout")]
        for name, value in config.items():
            if value and not PEFT_ALLOWED & {name, f"{name}={value}"}:
                raise ValueError(f"{name}={value} is not supported, only plain LoRA")
    path = Path(folder) / "adapter_model.safetensors"
    tensors = load_gpt2.read_safetensors(path)
    with named_errors(path):
        # base_model.model.transformer.h.0.attn.c_attn.lora_A.weight -> h.0.attn.c_attn
        layers = re.findall(r"transformer\.(\S+)\.lora_A\.weight", " ".join(tensors))
        if not layers:
            raise ValueError("no adapters in it")
        add_lora(model, *settings, layers)
        names = peft_names(model)
        misfits = names.keys() ^ tensors.keys()
        if misfits:
            raise ValueError(f"{min(misfits)} is missing, or has no place in the model")
        model.load_state_dict({names[name]: t for name, t in tensors.items()}, strict=False)
    return model


def merge_adapter(model, folder, adapter):
    """Load adapters for the model of a folder, and merge them."""
    # `finetune` writes the merged model to a folder, and its adapters to folder/adapter
    if Path(adapter).resolve().parent == Path(folder).resolve():
        raise ValueError(f"the weights in {folder} already contain {adapter}")
    return merge_lora(load_lora(model, adapter))


# --------------------------------------------------------------------------------------------------
# What both tasks share: rows, batches, and one way to start, train and save


def read_rows(source, folder, columns, optional=()):
    """
    A file, or a URL (downloaded into `folder`) -> list of {column: text}. .json holds a list of
    objects, .jsonl one in each line, .csv has a header, other files have tabs and a header, or else
    label and text. Raises ValueError with the number of a row whose value is not text or integer.
    """
    (path,) = find_files([source], Path(folder))
    with open(path, encoding="utf-8-sig", newline="") as file, named_errors(path):
        if path.suffix == ".json":
            rows = json.load(file)
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in file if line.strip()]
        elif path.suffix == ".csv":
            rows = list(csv.DictReader(file, strict=True))
        else:
            header = file.readline().rstrip("\r\n").split("\t")
            names = None if set(columns) & set(header) else ("label", "text")
            file.seek(0)
            rows = list(csv.DictReader(file, names, delimiter="\t", quoting=csv.QUOTE_NONE))
        if not isinstance(rows, list) or not rows:
            raise ValueError("no rows")
        result = []
        for i, row in enumerate(rows, 1):
            if not isinstance(row, dict) or None in row:
                raise ValueError(f"row {i} does not have the columns of the others")
            values = {c: "" if row.get(c) is None else row[c] for c in columns}
            for column, value in values.items():
                is_empty = not str(value).strip() and column not in optional
                if is_empty or not isinstance(value, (str, int)):
                    raise ValueError(f"row {i}: {column} is {value!r:.50}")
            # JSON can hold half characters (lone surrogates), which no file can
            result.append({c: str(v).encode(errors="replace").decode() for c, v in values.items()})
        return result


def split_rows(rows, seed, key=lambda row: 0):
    """
    -> 80 % of the rows for training, 10 % for validation, 10 % for the test, at random. Rows with
    the same key are spread evenly (a stratified split).
    """
    rows = random.Random(seed).sample(rows, len(rows))
    rows.sort(key=key)  # is stable: rows with the same key stay shuffled
    training = [row for i, row in enumerate(rows) if i % 5]
    return training, rows[0::10], rows[5::10]


def batches_by_length(lengths, batch_size, n_epochs, seed):
    """
    -> batches, each an array of indices of rows, in random order. The rows of a batch have similar
    lengths: on short messages, this saves a third of the tokens, which would be padding. In each
    epoch, the rows that do not fill a batch are left out.
    """
    rng = np.random.default_rng(seed)
    n_full = len(lengths) // batch_size * batch_size
    batches = []
    for _ in range(n_epochs):
        rows = rng.permutation(len(lengths))[:n_full]
        # Lengths change by up to a fifth, so that the same rows do not meet in every epoch
        rows = rows[np.argsort(lengths[rows] * rng.uniform(1, 1.2, n_full))]
        batches += list(rng.permutation(rows.reshape(-1, batch_size)))
    return batches


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    steps: int | None = option(None, "instead of --epochs")
    learning_rate: float | None = option(None, "peak (default: 5e-5; LoRA 1e-3; small model 2e-3)")
    eval_every: int | None = option(None, "steps between validations (default: an epoch)")
    epochs: float = option(4.0, "passes over the training rows")
    init: str = option("out/stories", "the base model: a folder, or a name on the hub")
    dropout: float | None = option(None, "also of adapters' inputs (default: 0.1; small: 0.15)")
    lora_rank: int = option(0, "train LoRA adapters of this rank; 0: no LoRA")
    lora_alpha: float = option(16.0, "adapters are scaled by alpha / rank")

    # Data may move, as its content is compared; epochs only set the number of steps
    may_change = TrainConfig.may_change | {"data", "epochs", "max_new_tokens"}


def load_base(config):
    """-> the model to be tuned, its tokenizer, the config with defaults that depend on the model"""
    if config.init == FinetuneConfig.init and not Path(config.init).exists():
        raise ValueError(f"{config.init} is missing: run `python train.py`, or use --init")
    base, tokenizer = load_gpt2.load_gpt2(config.init)
    # A small model has more to learn: a higher learning rate, and more dropout
    small = is_small(base.config)
    config = train.with_defaults(
        config,
        dropout=0.15 if small else 0.1,
        learning_rate=2e-3 if small else 1e-3 if config.lora_rank else 5e-5,
    )
    torch.manual_seed(config.seed)
    model = GPT(replace(base.config, dropout=config.dropout))
    model.load_state_dict(base.state_dict())
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha, config.dropout)
    return model, tokenizer, config


def finetune(config, model, datasets, collate_fn, content, *, save, report, classes=None):
    """
    Train. datasets: for training, validation, test. save(model): called with adapters merged.
    content, report: see `train`. classes: of a classifier.
    """
    training, validation, _ = datasets
    sizes = "{} rows for training, {} for validation, {} for the test; ".format(*map(len, datasets))
    sizes += f"{sum(d.n_truncated for d in datasets)} were too long for the context of the model"
    steps_per_epoch = len(training) // config.batch_size
    if steps_per_epoch == 0 or not all(datasets):
        raise ValueError(f"{config.data} is too small for batches of {config.batch_size}: {sizes}")
    steps = math.ceil(config.epochs * steps_per_epoch)
    config = train.with_defaults(config, steps=steps, eval_every=steps_per_epoch)
    lengths = np.array([len(ids) for ids, _ in training])
    n_epochs = math.ceil(config.steps / steps_per_epoch)
    batches = batches_by_length(lengths, config.batch_size, n_epochs, config.seed)
    validation = sorted(validation, key=lambda row: len(row[0]))  # saves padding
    val_batch_size = config.micro_batch_size or config.batch_size
    val_loader = create_dataloader(validation, val_batch_size, collate_fn=collate_fn)

    def get_batch(step):
        return collate_fn([training[row] for row in batches[step]])

    def save_all():
        # These belong to earlier weights, of this run or of another
        shutil.rmtree(config.out / "adapter", ignore_errors=True)
        (config.out / "responses.json").unlink(missing_ok=True)
        if config.lora_rank:
            save_lora(model, config.out / "adapter", config.init, classes)
            save(merge_lora(copy.deepcopy(model)))
        else:
            save(model)

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"{sizes}; {trained:,} of {total:,} parameters trained; {config.device}")
    train.train(model, get_batch, val_loader, config, save=save_all, report=report, content=content)


# --------------------------------------------------------------------------------------------------
# The commands

DATA = Path(__file__).with_name("data")


@dataclass(frozen=True)
class ClassifyConfig(FinetuneConfig):
    data: str = option(str(DATA / "messages.tsv"), "file or URL with texts and their classes")
    out: Path = option(Path("out/spam"), "output folder")
    text_column: str = option("text", "column of the texts")
    label_column: str = option("label", "column of the classes")


def classify(config):
    """Learn to classify texts."""
    columns = (config.text_column, config.label_column)
    rows = read_rows(config.data, config.out.parent, columns)
    rows = [tuple(row[column] for column in columns) for row in rows]
    counts = Counter(label for _, label in rows)
    classes = sorted(counts)
    if len(classes) < 2 or min(counts.values()) < 10:
        raise ValueError(f"{config.data}: needs two classes with ten rows each, not {dict(counts)}")
    print(f"{len(rows)} rows: {dict(counts)}")
    gpt, tokenizer, config = load_base(config)
    model = GPTClassifier(gpt, len(classes))
    datasets = [
        ClassificationDataset(part, tokenizer, classes, gpt.config.context_length)
        for part in split_rows(rows, config.seed, key=lambda row: row[1])
    ]

    def report():
        val_accuracy = accuracy(model, datasets[1])
        print(f"    accuracy {val_accuracy:.1%} (validation)")
        return {"val_accuracy": val_accuracy}

    finetune(
        config, model, datasets, collate_texts, (rows, tokenizer.vocab), classes=classes,
        save=lambda merged: save_classifier(merged, tokenizer, classes, config.out), report=report,
    )  # fmt: skip
    if process_rank()[0] == 0:
        best, _, _ = load_classifier(config.out)
        best.to(config.device)
        for name, dataset in zip(("training", "validation", "test"), datasets):
            print(f"{name:>10} accuracy {accuracy(best, dataset):.2%}")
        print(f'finished: python finetune.py predict {config.out} "{rows[0][0][:40]}"')


@dataclass(frozen=True)
class InstructConfig(FinetuneConfig):
    data: str = option(str(DATA / "instructions.json"), "file or URL with instructions")
    out: Path = option(Path("out/assistant"), "output folder")
    epochs: float = option(6.0, "passes over the training rows")
    batch_size: int = option(8, "sequences per update, over all processes")
    max_new_tokens: int = option(256, "longest response")


def instruct(config):
    """Learn to follow instructions."""
    columns = ("instruction", "input", "output")
    entries = read_rows(config.data, config.out.parent, columns, optional=("input",))
    model, tokenizer, config = load_base(config)
    datasets = [
        InstructionDataset(part, tokenizer, model.config.context_length)
        for part in split_rows(entries, config.seed)
    ]
    _, validation, test = datasets

    def show_sample():
        entry = validation.entries[0]
        (response,) = respond(model, tokenizer, [entry], config.max_new_tokens)
        print(f"{entry['instruction']} {entry['input']}\n-> {response}\n", flush=True)

    finetune(
        config, model, datasets, collate_instructions, (entries, tokenizer.vocab),
        save=lambda merged: save_gpt2(merged, tokenizer, config.out, chat_template=CHAT_TEMPLATE),
        report=show_sample,
    )  # fmt: skip
    if process_rank()[0] == 0:
        dtype = load_gpt2.fast_dtype(config.device)
        best, _ = load_gpt2.load_gpt2(config.out, device=config.device, dtype=dtype)
        responses = respond(best, tokenizer, test.entries, config.max_new_tokens)
        results = [e | {"response": r} for e, r in zip(test.entries, responses)]
        write_json(config.out / "responses.json", results)
        for result in results[:3]:
            print("\n".join(f"{key:>13}: {text}" for key, text in result.items()), end="\n\n")
        print(f"all in {config.out}/responses.json; python finetune.py chat {config.out}")


def predict(folder, texts, adapter, device):
    """Print the class of texts, or of the lines of standard input."""
    if adapter:
        gpt, tokenizer = load_gpt2.load_gpt2(folder)
        path = Path(adapter) / "classes.json"
        classes = read_json(path, "classes")
        with named_errors(path):
            classes = [str(name) for name in classes]
        model = merge_adapter(GPTClassifier(gpt, len(classes)), folder, adapter)
    else:
        model, tokenizer, classes = load_classifier(folder)
    texts = texts or sys.stdin.read().rstrip("\n").split("\n")
    if not all(text.strip() for text in texts):
        raise ValueError("a text is empty")
    rows = [(text, classes[0]) for text in texts]  # the class is not used
    context_length = model.transformer.config.context_length
    dataset = ClassificationDataset(rows, tokenizer, classes, context_length)
    if dataset.n_truncated:
        print(f"{dataset.n_truncated} texts are truncated", file=sys.stderr)
    probs = predict_all(model.to(device), dataset).softmax(dim=1)
    for text, p in zip(texts, probs):
        print(f"{classes[p.argmax()]}\t{p.max():.4f}\t{text}")


def chat(folder, adapter, max_new_tokens, device, **sampling):
    """Give instructions to a model."""
    model, tokenizer = load_gpt2.load_gpt2(folder)
    if adapter:
        model = merge_adapter(model, folder, adapter)
    model.to(device, load_gpt2.fast_dtype(device))
    print("Each line is an instruction of its own. Ctrl-C stops a response, Ctrl-D ends the chat.")
    while True:
        try:
            instruction = input("\n> ").strip()
            prompt = format_prompt({"instruction": instruction})
            room = model.config.context_length + 1 - len(tokenizer.encode(prompt))
            if room < 1:
                print("The instruction is too long for the context of the model.")
            elif instruction:
                n_tokens = min(max_new_tokens, room)
                for piece in load_gpt2.stream_text(model, tokenizer, prompt, n_tokens, **sampling):
                    print(piece, end="", flush=True)
                print()
        except KeyboardInterrupt:
            print(" ...")
        except EOFError:
            print()
            return


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
    url = f"{url.rstrip('/')}/chat/completions"
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    scores = []
    for i, row in enumerate(rows, 1):
        message = {"role": "user", "content": JUDGE_PROMPT.format(**row)}
        body = {"model": model, "messages": [message], "temperature": 0}
        response = requests.post(url, json=body, headers=headers, timeout=300)  # seconds
        with named_errors(url):
            if not response.ok:
                raise ValueError(f"{response.status_code} {response.reason}: {response.text}")
            # Not response.json(): it raises an OSError, and named_errors adds no URL to that
            answer = str(json.loads(response.text)["choices"][0]["message"]["content"])
        # After removing the thoughts of a reasoning model, there must be one number: 85 or 85/100
        answer = re.sub(r"(?s)<think>.*?(</think>|$)", "", answer)
        numbers = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"\s*/\s*100\b", "", answer))
        if len(numbers) == 1 and 0 <= float(numbers[0]) <= 100:
            scores.append(float(numbers[0]))
        show_progress(f"{i} of {len(rows)}")
    if not scores:
        raise ValueError(f"{url}: none of {len(rows)} answers is a number from 0 to 100")
    print_line(f"mean score {sum(scores) / len(scores):.1f} of {len(scores)} (of {len(rows)} rows)")


def main():
    parser = load_gpt2.CommandLine(description="Finetune a GPT-2, and use the result.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(function):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        return command

    configs = {classify: ClassifyConfig, instruct: InstructConfig}
    for function, config_class in configs.items():
        add_options(add_command(function), config_class)
    device = {"type": load_gpt2.usable_device, "default": load_gpt2.default_device()}

    add = add_command(predict).add_argument
    add("folder", help="of the model, such as out/spam")
    add("texts", nargs="*", help="default: lines of standard input")
    add("--adapter", metavar="FOLDER", help="LoRA adapters for it, written by classify")
    add("--device", help="cpu, cuda or mps", **device)

    add = add_command(chat).add_argument
    add("folder", nargs="?", default="out/assistant", help="of the model")
    add("--adapter", metavar="FOLDER", help="LoRA adapters for it, of save_lora or PEFT")
    add("--temperature", type=float, default=0.7, help="0 always takes the most likely token")
    add("--top-k", type=int, default=50, help="sample from the k most likely tokens")
    add("--max-new-tokens", type=int, default=256, help="longest response")
    add("--device", help="cpu, cuda or mps", **device)

    add = add_command(judge).add_argument
    add("responses", nargs="?", default="out/assistant/responses.json", help="written by instruct")
    add("--url", default="http://localhost:11434/v1", help="of the server; this is Ollama's")
    add("--model", default="llama3", help="name of the judge on the server")

    args = vars(parser.parse_args())
    function = args.pop("function")
    if function in configs:
        config = configs[function](**args)
        train.start_processes(config.device)
        function(config)
        if dist.is_initialized():
            dist.destroy_process_group()
    else:
        function(**args)


if __name__ == "__main__":
    with load_gpt2.one_line_errors():
        main()
