"""
Finetuning: a GPT-2 becomes a classifier or an assistant, whole, in its last layers, or by LoRA, written out by hand.

    python train.py                                              first: out/stories, the model to start from
    python finetune.py classify                                  data/messages.tsv -> out/spam
    python finetune.py predict out/spam "You have won a prize"
    python finetune.py instruct                                  data/instructions.json -> out/assistant
    python finetune.py chat out/assistant
    python finetune.py judge out/assistant/responses.json --url http://localhost:11434/v1 --model llama3

    python finetune.py classify --init gpt2 --data reviews.csv --out out/reviews --lora-rank 16
"""

import copy
import csv
import importlib.util
import io
import json
import lzma
import math
import random
import re
import sys
import textwrap
import time
import zipfile
import zlib
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import requests
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from gpt import GPT, GPTConfig, ShuffledBatches, Tokenizer, create_dataloader
from load_gpt2 import (
    CommandLine,
    default_device,
    fast_dtype,
    hf_config,
    load_gpt2,
    one_line_errors,
    print_line,
    put_weights,
    read_config,
    read_json,
    read_safetensors,
    read_tokenizer,
    read_weights,
    save_folder,
    save_gpt2,
    show_progress,
    usable_device,
    write_json,
    write_safetensors,
)
from train import (
    NOT_SETTINGS,
    TrainConfig,
    find_files,
    plot_losses,
    read_checkpoint,
    read_losses,
    refuse_to_replace,
    sole_run,
    train,
)

DATA = Path(__file__).with_name("data")
BASE = "out/stories"

# ---------------------------------------------------------------------------------------------------------------------
# Classification: what the model knows at the last token of a text, it knows of the whole text; a small matrix reads the
# class from there.


class GPTClassifier(nn.Module):
    """A GPT whose last features are scored for each class. Parameter names are those of GPT2ForSequenceClassification."""

    def __init__(self, gpt, n_classes):
        super().__init__()
        self.transformer = gpt
        self.score = nn.Linear(gpt.config.n_embd, n_classes, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, ids, lengths, labels=None):
        """
        ids (B, T), of which each row's first `lengths` (B,) are text -> logits (B, classes); with labels (B,), the mean
        cross-entropy. What stands after a text makes no difference: no token looks ahead, and the last one of the text is read.
        """
        x = self.transformer.features(ids)  # (B, T, C)
        x = x[torch.arange(len(x), device=x.device), lengths - 1]  # (B, C)
        logits = self.score(x)
        return logits if labels is None else F.cross_entropy(logits, labels)


class ClassificationDataset(list):
    """(text, class) pairs -> (ids, class number); of a text that is too long, the beginning is kept. n_cut counts those."""

    def __init__(self, rows, tokenizer, classes, context_length):
        texts = [tokenizer.encode(text) for text, _ in rows]
        super().__init__((torch.tensor(ids[:context_length]), classes.index(label)) for ids, (_, label) in zip(texts, rows))
        self.n_cut = sum(len(ids) > context_length for ids in texts)


def collate_texts(batch):
    """Rows -> ids (B, T), padded on the right to the longest, lengths (B,), labels (B,)"""
    ids, labels = zip(*batch)
    return pad_sequence(ids, batch_first=True), torch.tensor([len(row) for row in ids]), torch.tensor(labels)


def save_classifier(model, tokenizer, classes, folder):
    """Write what `AutoModelForSequenceClassification.from_pretrained(folder)` opens."""
    config = hf_config(model.transformer.config, tokenizer, torch.float32) | {
        "architectures": ["GPT2ForSequenceClassification"],
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
        "pad_token_id": tokenizer.eot,  # never in a text, so transformers finds where each text ends
    }
    save_folder(folder, model.state_dict(), tokenizer, config)


def load_classifier(folder):
    """A folder that `save_classifier` wrote -> (GPTClassifier in eval mode, Tokenizer, names of the classes)"""
    path = folder / "config.json"
    config, names = read_config(path), read_json(path).get("id2label")
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise ValueError(f'{path}: no classifier: "id2label" does not name its classes')
    with torch.device("meta"):
        model = GPTClassifier(GPT(config), len(names)).eval()
    put_weights(model, read_weights(folder, torch.float32), folder)
    return model, read_tokenizer(folder, config), [names[str(i)] for i in range(len(names))]


@torch.no_grad()
def logits_and_labels(model, loader):
    """(logits, labels) over all batches: (rows, classes) and (rows,), on the CPU"""
    device = model.score.weight.device
    model.eval()
    batches = [(model(ids.to(device), lengths.to(device)).cpu(), labels) for ids, lengths, labels in loader]
    model.train()
    return [torch.cat(parts) for parts in zip(*batches)]


def accuracy(logits, labels):
    return (logits.argmax(dim=1) == labels).float().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Instructions: a text with a form, of which the model learns to write the last part


def format_prompt(entry):
    """What the model reads before it answers, in the form of Stanford Alpaca (Taori et al. 2023)"""
    context = ", paired with an input that provides further context" if entry.get("input") else ""
    prompt = f"Below is an instruction that describes a task{context}. "
    prompt += "Write a response that appropriately completes the request.\n\n"
    prompt += f"### Instruction:\n{entry['instruction']}\n\n"
    if entry.get("input"):
        prompt += f"### Input:\n{entry['input']}\n\n"
    return prompt + "### Response:\n"


class InstructionDataset(list):
    """
    Entries -> (ids, targets) of prompt, response and end-of-text, both (T,). The prompt is no target: what is asked is given.
    Of a row that is too long the end is cut (n_cut), and one whose prompt leaves no room to answer is left out (n_left_out).
    """

    def __init__(self, entries, tokenizer, context_length, train_on_prompt=False):
        self.entries, self.n_cut, self.n_left_out = [], 0, 0
        for entry in entries:
            prompt = tokenizer.encode(format_prompt(entry))
            ids = prompt + tokenizer.encode(entry["output"]) + [tokenizer.eot]
            if len(prompt) > context_length:
                self.n_left_out += 1
                continue
            self.n_cut += len(ids) > context_length + 1
            ids = torch.tensor(ids[: context_length + 1])
            inputs, targets = ids[:-1], ids[1:].clone()
            if not train_on_prompt:
                targets[: len(prompt) - 1] = -100  # the last token of the prompt has the first of the response as its target
            self.append((inputs, targets))
            self.entries.append(entry)


def collate_instructions(batch):
    """Rows -> ids (B, T), padded on the right to the longest, and targets (B, T), -100 in the padding"""
    ids, targets = zip(*batch)
    return pad_sequence(ids, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=-100)


def answer(model, tokenizer, entries, max_new_tokens, batch_size=32):
    """The likeliest response to each entry, in batches of like lengths; an answer ends where the context does."""
    limit = model.config.context_length
    prompts = [tokenizer.encode(format_prompt(entry)) for entry in entries]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [None] * len(prompts)
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        room = min(max_new_tokens, limit + 1 - len(prompts[rows[0]]))  # the last token is not read, and takes no place
        batch = model.generate([prompts[i] for i in rows], room, temperature=0, eos_id=tokenizer.eot)
        for i, ids in zip(rows, batch):
            answers[i] = tokenizer.decode(ids[: limit + 1 - len(prompts[i])]).strip()
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# LoRA (Hu et al. 2021): what finetuning adds to a matrix is nearly of low rank. So the matrix stays as it is, and beside it
# the product of two thin ones is learned: W x + (alpha / rank) B A x, with A (rank, in) and B (out, rank).

LORA_TARGETS = ("c_attn", "c_proj", "c_fc")


class LoRALinear(nn.Linear):
    """A frozen nn.Linear with a trained detour of low rank. Its weight and bias keep their names."""

    def __init__(self, linear, rank, alpha, dropout=0.0):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=self.weight.device, dtype=self.weight.dtype)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=self.weight.device, dtype=self.weight.dtype)
        nn.init.zeros_(self.lora_B.weight)  # at first the detour adds nothing; A is random, so that B has a gradient
        self.lora_dropout = nn.Dropout(dropout)
        self.rank, self.alpha = rank, alpha
        self.scale = alpha / rank  # so that a good learning rate stays good at another rank

    def forward(self, x):
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(self.lora_dropout(x)))


def add_lora(model, rank, alpha=16, dropout=0.0, targets=LORA_TARGETS):
    """Freeze the model, and give every nn.Linear with one of these names ("c_attn", or longer "h.0.attn.c_attn") a LoRA."""
    if not 1 <= rank < 2**16 or not 0 <= dropout <= 1:
        raise ValueError(f"LoRA with rank={rank}, dropout={dropout}: they must be 1 to 65535, and 0 to 1")
    model.requires_grad_(False)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        names = [name for name in linears if ("." + name).endswith("." + target)]
        if not names:
            raise ValueError(f"LoRA is for {', '.join(LORA_TARGETS)}, not {target}")
        for name in names:
            model.set_submodule(name, LoRALinear(linears[name], rank, alpha, dropout))
    return model


@torch.no_grad()
def merge_lora(model):
    """Add every detour to its matrix and take it away: the same function, as an ordinary model."""
    for name, lora in [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]:
        linear = nn.Linear(lora.in_features, lora.out_features, device="meta")
        linear.weight = nn.Parameter(lora.weight + lora.scale * lora.lora_B.weight @ lora.lora_A.weight)
        linear.bias = lora.bias
        model.set_submodule(name, linear)
    return model


# In PEFT's files a name is base_model.model.transformer.h.0 ...: PEFT's wrapper, the model with a head, the GPT
PEFT_PREFIX = "base_model.model."


def save_lora(model, folder, base):
    """Write what `peft.PeftModel.from_pretrained(base_model, folder)` opens: the adapter alone, and a classifier's head."""
    folder.mkdir(parents=True, exist_ok=True)
    is_classifier = isinstance(model, GPTClassifier)
    prefix = PEFT_PREFIX + ("" if is_classifier else "transformer.")
    trained = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name or name == "score.weight"}
    write_safetensors(folder / "adapter_model.safetensors", {prefix + name: tensor for name, tensor in trained.items()})
    loras = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    lora = next(iter(loras.values()))  # all are alike
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_classifier else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.lora_dropout.p,
        "target_modules": list(loras),
        "modules_to_save": ["score"] if is_classifier else None,
        "fan_in_fan_out": True,  # transformers holds GPT-2's matrices as (in, out)
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)


def load_lora(model, folder):
    """Put an adapter that `save_lora` or PEFT wrote onto a model. Raises ValueError for kinds that are not computed here."""
    path = folder / "adapter_config.json"
    config = read_json(path)
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if not all(type(number) in (int, float) for number in (rank, alpha, dropout)):
        raise ValueError(f"{path}: r, lora_alpha or lora_dropout is missing, or no number")
    variants = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or any(map(config.get, variants)):
        raise ValueError(f"{path}: only plain LoRA is computed here: no biases, one rank, none of {', '.join(variants)}")

    path = folder / "adapter_model.safetensors"
    tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in read_safetensors(path).items()}
    if not isinstance(model, GPTClassifier):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    targets = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    try:
        add_lora(model, rank, alpha, dropout, targets)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    for name in unexpected + [name for name in missing if ".lora_" in name]:
        raise ValueError(f"{path}: {name} is missing, or has no place in this model")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Data: files of rows, checked row by row, for a wrong row is better met by name than by a loss that does not fall

TEXT_COLUMNS = ("text", "message", "sentence", "review", "content")
LABEL_COLUMNS = ("label", "class", "category", "target", "sentiment")


def read_records(source, folder, columns=()):
    """
    A file, or a URL (fetched once, into `folder`), or a zip with one of them -> list of (where it stands, {column: value}).
    .json: a list of objects; .jsonl: one on each line; .csv; and what is none of these has tabs, as the UCI collection has. A
    table whose first line holds none of `columns` has no header, and is label and text.
    """
    path, *more = find_files([source], folder)
    if more:
        raise ValueError(f"{source}: one file is needed, and here are {1 + len(more)}")
    name, data = path.name, path.read_bytes()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                member = max(archive.infolist(), key=lambda info: info.file_size)  # the rest are readmes
                name, data = member.filename, archive.read(member)
        text = data.decode("utf-8-sig")
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or not a UTF-8 text ({error})") from None
    suffix = re.search(r"\.(jsonl?|csv)(?![a-z])", name.lower())
    if suffix is None or suffix[1] == "csv":
        rows = read_table(text, path, columns, has_commas=suffix is not None)
    elif suffix[1] == "jsonl":
        rows = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(where, parse_json(line, where)) for where, line in rows]
    else:
        rows = parse_json(text, path)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: not a list of rows")
        rows = [(f"{path}, row {n}", record) for n, record in enumerate(rows, 1)]
    if not rows:
        raise ValueError(f"{path}: no rows")
    for where, record in rows:
        if not isinstance(record, dict):
            raise ValueError(f"{where}: not an object with named values")
        if re.search(r"[\ud800-\udfff]", "".join(map(str, record.values()))):
            raise ValueError(f"{where}: half a character, which is no text")
    return rows


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: damaged JSON ({error})") from None


def read_table(text, path, columns, has_commas):
    csv.field_size_limit(2**31 - 1)  # texts may be long
    # In a file with tabs, quotes are part of the text
    style = {} if has_commas else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **style)
    try:
        lines = [(reader.line_num, cells) for cells in reader if any(cells)]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    header = ["label", "text"]
    if lines and any(cell.lower() in columns for cell in lines[0][1]):
        header = lines.pop(0)[1]
    if len(set(header)) < len(header):
        raise ValueError(f"{path}, line 1: two columns have the same name")
    for n, cells in lines:
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {n}: {len(cells)} columns, not the {len(header)} of {', '.join(header)}")
    return [(f"{path}, line {n}", dict(zip(header, cells))) for n, cells in lines]


def read_texts(source, folder, text_column=None, label_column=None):
    """-> list of (where, text, label), all str"""
    text_columns = [text_column.lower()] if text_column else TEXT_COLUMNS
    label_columns = [label_column.lower()] if label_column else LABEL_COLUMNS
    rows = []
    for where, record in read_records(source, folder, (*text_columns, *label_columns)):
        values = []
        for what, columns, kinds in [("text", text_columns, str), ("label", label_columns, (str, int))]:
            found = [value for name, value in record.items() if name.lower() in columns]
            if len(found) != 1:
                raise ValueError(f"{where}: {len(found)} columns are named {' or '.join(columns)}; --{what}-column says which")
            if not isinstance(found[0], kinds) or not str(found[0]).strip():
                raise ValueError(f"{where}: {found[0]!r:.50} is no {what}")
            values.append(str(found[0]))
        rows.append((where, *values))
    return rows


def read_instructions(source, folder):
    """-> list of {instruction, input, output}, all str"""
    entries = []
    for where, record in read_records(source, folder, ("instruction", "output")):
        entry = {"instruction": record.get("instruction"), "input": record.get("input") or "", "output": record.get("output")}
        for key, value in entry.items():
            if not isinstance(value, str):
                raise ValueError(f"{where}: {key!r} is {'missing' if value is None else 'not a text'}")
            if key != "input" and not value.strip():
                raise ValueError(f"{where}: {key!r} is empty")
        entries.append(entry)
    return entries


def split_by_class(rows, classes, seed, balance):
    """(where, text, label) rows -> 70, 10 and 20 % of each class for training, validation and test, as (text, label) pairs"""
    rng = random.Random(seed)
    groups = [[row for row in rows if row[2] == name] for name in classes]
    for group in groups:
        if len(group) < 3:
            where, _, label = group[0]
            raise ValueError(f"{where}: the class {label!r} has less than 3 rows, one each for training, validation and test")
        rng.shuffle(group)
    if balance:
        groups = [group[: min(map(len, groups))] for group in groups]
    parts = [], [], []
    for group in groups:
        n_val, n_test = max(1, len(group) // 10), max(1, len(group) // 5)
        parts[0].extend(group[n_val + n_test :])
        parts[1].extend(group[:n_val])
        parts[2].extend(group[n_val : n_val + n_test])
    for part in parts:
        rng.shuffle(part)
    return [[(text, label) for _, text, label in part] for part in parts]


# ---------------------------------------------------------------------------------------------------------------------
# The commands

# What --init random is: so small that a thousand short messages do not suffice to learn them by heart at once
RANDOM = GPTConfig(1024, context_length=128, n_layer=2, n_head=4, n_embd=128)


def fill_in(args, config):
    """What the command line left open, by the size of the model"""
    # Smaller than any published GPT-2, it knows little: all of it has to learn, and be kept from learning the rows by heart
    is_small = config.n_embd < GPTConfig.n_embd
    if args.dropout is None:
        args.dropout = 0.3 if is_small else 0.1
    if args.learning_rate is None:  # at which a large model would forget what it knows, but adapters do not
        args.learning_rate = 1e-3 if is_small or args.lora_rank else 5e-5
    if args.command == "classify" and args.train is None:
        args.train = "all" if is_small else "last"
    if args.context_length is None:
        args.context_length = config.context_length
        if args.command == "instruct" and not args.lora_rank:  # which cannot learn new positions
            args.context_length = max(256, config.context_length)  # in a small vocabulary the prompt alone takes a hundred


def load_base(args, texts):
    """
    The model to start from; it decides what `args` leave open. Positions that it does not know are random, and `texts` teach
    random weights their vocabulary.
    """
    if args.init == BASE and not Path(BASE).exists():
        raise ValueError(f"{BASE}: no such folder; `python train.py` makes it, or name another model with --init")
    torch.manual_seed(args.seed)
    if args.init == "random":
        tokenizer = Tokenizer.train("\n".join(texts), RANDOM.vocab_size)
        config, weights = replace(RANDOM, vocab_size=tokenizer.vocab_size), None
    else:
        base, tokenizer = load_gpt2(args.init)
        config, weights = base.config, base.state_dict()
    fill_in(args, config)
    known = config.context_length
    if args.lora_rank and args.context_length > known:
        raise ValueError(f"--context-length {args.context_length}: {args.init} has {known} positions, and LoRA learns no more")
    model = GPT(replace(config, dropout=args.dropout, context_length=args.context_length))
    if weights is not None:
        weights["wpe.weight"] = torch.cat([weights["wpe.weight"], model.wpe.weight[known:].detach()])[: args.context_length]
        model.load_state_dict(weights)
    return model, tokenizer


def load_model(args, texts, checkpoint):
    """The model to train: the base, or its like for a run that goes on (`train` gives it its weights); and its adapters"""
    if checkpoint is None:
        model, tokenizer = load_base(args, texts)
    else:
        model, tokenizer = GPT(replace(read_config(args.out / "config.json"), dropout=args.dropout)), Tokenizer.load(args.out)
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    return model, tokenizer


def check_unchanged(rows, args):
    """A new run notes the checksum of its rows; one that goes on must have the same, or it may be tested on what it learned."""
    checksum = zlib.crc32(repr(rows).encode())
    if vars(args).setdefault("checksum", checksum) != checksum:
        raise ValueError(f"{args.data} is not what it was when the run in {args.out} began; start anew, with --overwrite")


class LikeLengths(ShuffledBatches):
    """ShuffledBatches, but each group of `group_size` rows, those of one step, is of like lengths, which saves padding."""

    def __init__(self, lengths, batch_size, seed, group_size):
        super().__init__(len(lengths), batch_size, seed)
        self.lengths, self.group_size = np.asarray(lengths), group_size

    def order(self, epoch):
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.n_rows)
        # Lengths count up to a fifth more, by chance, or the same rows would meet in every epoch
        by_length = order[np.argsort(self.lengths[order] * rng.uniform(1, 1.2, self.n_rows))]
        order = by_length.copy()
        # Where an epoch ends amid a group, the next begins with the rows that fill it: of 10 rows in groups of 4, with 2
        first = -epoch * self.n_rows % self.group_size
        groups = range(first, self.n_rows - self.group_size + 1, self.group_size)
        for here, there in zip(groups, rng.permutation(groups)):
            order[here : here + self.group_size] = by_length[there : there + self.group_size]
        return order


def measuring_loader(rows, batch_size, collate_fn):
    """All rows once, the short ones first, so that little is padded"""
    return create_dataloader(sorted(rows, key=lambda row: len(row[0])), batch_size, collate_fn=collate_fn)


def finetune(model, training, validation, collate_fn, args, checkpoint, *, save, report):
    """Train what asks for a gradient, by train.train; `save` gets the model with its adapters merged. If stopped, end here."""
    n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    n_all = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(training)} rows to learn from, {len(validation)} for validation; {args.device}")
    print(f"{n_trained:,} of {n_all:,} parameters are trained")

    steps_per_epoch = len(training) / max(1, args.batch_size)  # TrainConfig refuses what is below 1
    args.steps = math.ceil(args.epochs * steps_per_epoch)
    args.eval_every = args.eval_every or math.ceil(steps_per_epoch)
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}

    batch_size = args.micro_batch_size or args.batch_size
    batches = LikeLengths([len(ids) for ids, _ in training], batch_size, args.seed, group_size=args.batch_size)
    train_loader = DataLoader(training, batch_sampler=batches, collate_fn=collate_fn, pin_memory=torch.cuda.is_available())
    val_loader = measuring_loader(validation, batch_size, collate_fn)

    def save_best():
        save(merge_lora(copy.deepcopy(model)) if args.lora_rank else model)
        if args.lora_rank:
            save_lora(model, args.out / "adapter", args.init)

    options = {"save": save_best, "report": report, "settings": settings, "checkpoint": checkpoint}
    stopped_by = train(model, train_loader, val_loader, config, args.out, **options)
    print(f"peak memory {peak_memory(args.device):.2f} GB")
    if stopped_by:
        print(f"stopped; go on with: python finetune.py {args.command} --resume {args.out}")
        sys.exit(128 + stopped_by)


def peak_memory(device):
    """GB that the program held at most, on the GPU where it ran there, else in all"""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if importlib.util.find_spec("resource") is None:  # Windows
        return math.nan
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def classify(args, checkpoint):
    """Learn to put texts into classes."""
    rows = read_texts(args.data, args.out.parent, args.text_column, args.label_column)
    check_unchanged([row[1:] for row in rows], args)
    n_rows = Counter(label for _, _, label in rows)
    classes = sorted(n_rows, key=lambda name: (int(name) if name.isdecimal() else math.inf, name))  # 2 before 10
    if len(classes) < 2:
        raise ValueError(f"{args.data}: one class only, {classes[0]!r}")
    parts = split_by_class(rows, classes, args.seed, args.balance)

    gpt, tokenizer = load_model(args, [text for text, _ in parts[0]], checkpoint)
    if not args.lora_rank:
        gpt.requires_grad_(args.train == "all")
        if args.train == "last":  # what makes the features that the head reads
            gpt.h[-1].requires_grad_()
            gpt.ln_f.requires_grad_()
    model = GPTClassifier(gpt, len(classes)).to(args.device)  # the head is trained in any case

    limit = gpt.config.context_length
    datasets = [ClassificationDataset(part, tokenizer, classes, limit) for part in parts]
    training, validation, _ = datasets
    counts = ", ".join(f"{n_rows[name]} {name}" for name in classes)
    balanced = f"; {min(n_rows.values())} of each are used" if args.balance else ""
    print(f"{counts}{balanced}; {sum(d.n_cut for d in datasets)} longer than {limit} tokens, and cut there")
    loaders = [measuring_loader(dataset, 32, collate_texts) for dataset in datasets]
    training_sample = measuring_loader(training[: len(validation)], 32, collate_texts)
    curve_loaders = {"train_accuracy": training_sample, "val_accuracy": loaders[1]}

    def save(model_to_save):
        save_classifier(model_to_save, tokenizer, classes, args.out)

    def report():
        row = {name: accuracy(*logits_and_labels(model, loader)) for name, loader in curve_loaders.items()}
        print(f"    accuracy: training {row['train_accuracy']:.1%}, validation {row['val_accuracy']:.1%}")
        return row

    if checkpoint is None:
        print_scores("before", [logits_and_labels(model, loader) for loader in loaders])
    finetune(model, training, validation, collate_texts, args, checkpoint, save=save, report=report)
    plot_losses(read_losses(args.out / "losses.csv"), args.out / "accuracies.png", ("train_accuracy", "val_accuracy"))

    best = load_classifier(args.out)[0].to(args.device)
    scores = [logits_and_labels(best, loader) for loader in loaders]
    print_scores("after", scores)
    print_confusion(*scores[2], classes)
    print(f'{args.out} is a classifier: python finetune.py predict {args.out} "{parts[2][0][0][:40]}"')


def print_scores(when, scores):
    print(f"\n{when:12}    loss  accuracy")
    for name, (logits, labels) in zip(("training", "validation", "test"), scores):
        print(f"  {name:12}{F.cross_entropy(logits, labels):6.3f}  {accuracy(logits, labels):8.2%}")
    print()


def print_confusion(logits, labels, classes):
    """Which class was taken for which, and how far each can be trusted"""
    n = len(classes)
    matrix = torch.bincount(n * labels + logits.argmax(dim=1), minlength=n * n).view(n, n)  # [class, what it was taken for]
    n_there, n_guessed, n_right = matrix.sum(dim=1), matrix.sum(dim=0), matrix.diag()
    print(f"always {classes[n_there.argmax()]!r} would be right in {n_there.max() / n_there.sum():.2%} of the test\n")
    width = max(8, *(len(name) + 3 for name in classes))
    print(" " * width + "".join(f"{'as ' + name:>{width + 2}}" for name in classes) + "  precision  recall")
    for i, name in enumerate(classes):
        cells = "".join(f"{count:{width + 2}}" for count in matrix[i].tolist())
        print(f"{name:>{width}}{cells}  {n_right[i] / n_guessed[i].clamp(min=1):9.1%}  {n_right[i] / n_there[i]:6.1%}")
    print()


def predict(args):
    """Say the class of texts."""
    model, tokenizer, classes = load_classifier(args.folder)
    texts = args.texts or sys.stdin.read().rstrip("\n").split("\n")
    for n, text in enumerate(texts, 1):
        if not text.strip():
            raise ValueError(f"text {n} is empty")
    rows = [(text, classes[0]) for text in texts]  # any class; it is not looked at
    dataset = ClassificationDataset(rows, tokenizer, classes, model.transformer.config.context_length)
    if dataset.n_cut:
        print(f"{dataset.n_cut} of {len(texts)} texts are too long, and read only in part", file=sys.stderr)
    logits, _ = logits_and_labels(model.to(args.device), create_dataloader(dataset, 32, collate_fn=collate_texts))
    for text, probs in zip(texts, logits.softmax(dim=1)):
        print(f"{classes[probs.argmax()]}\t{probs.max():.4f}\t{text}")


def instruct(args, checkpoint):
    """Learn to answer instructions."""
    entries = read_instructions(args.data, args.out.parent)
    check_unchanged(entries, args)
    if len(entries) < 3:
        raise ValueError(f"{args.data}: {len(entries)} rows, but training, validation and test need one each")
    random.Random(args.seed).shuffle(entries)
    n_val, n_test = max(1, len(entries) // 20), max(1, len(entries) // 10)
    parts = entries[n_val + n_test :], entries[:n_val], entries[n_val : n_val + n_test]
    texts = [format_prompt(entry) + entry["output"] for entry in parts[0]]
    model, tokenizer = load_model(args, texts, checkpoint)
    model.to(args.device)

    limit = model.config.context_length
    datasets = [InstructionDataset(part, tokenizer, limit, args.train_on_prompt) for part in parts]
    n_cut, n_left_out = sum(d.n_cut for d in datasets), sum(d.n_left_out for d in datasets)
    print(f"{len(entries)} rows; of {limit} tokens that fit, {n_cut} had more and were cut, {n_left_out} had no room to answer")
    if not all(datasets):
        raise ValueError(f"{args.data}: too few rows fit into {limit} tokens; --context-length takes more")
    training, validation, test = datasets

    def save(model_to_save):
        save_gpt2(model_to_save, tokenizer, args.out)

    def show_sample():
        entry = validation.entries[0]
        (response,) = answer(model, tokenizer, [entry], args.max_new_tokens)
        print(textwrap.indent(f"{entry['instruction']} {entry['input']}\n-> {response}", "    "), end="\n\n", flush=True)

    finetune(model, training, validation, collate_instructions, args, checkpoint, save=save, report=show_sample)

    dtype = fast_dtype(args.device)
    best, start = load_gpt2(args.out, device=args.device, dtype=dtype)[0], time.perf_counter()
    responses = answer(best, tokenizer, test.entries, args.max_new_tokens)
    results = [entry | {"response": response} for entry, response in zip(test.entries, responses)]
    print(f"{len(results)} answers in {time.perf_counter() - start:.1f} s")
    if args.compare:
        base = load_base(args, texts)[0].to(args.device, dtype)
        for result, response in zip(results, answer(base, tokenizer, test.entries, args.max_new_tokens)):
            result["base_response"] = response
    write_json(args.out / "responses.json", results)
    for result in results[:3]:
        print()
        for key, value in result.items():
            print(f"{key:>13}: {value}")
    print(f"\n{args.out / 'responses.json'} has all of them; to talk: python finetune.py chat {args.out}")


JUDGE_PROMPT = """Score how well a response follows an instruction, from 0 (not at all) to 100 (perfectly).

Instruction: {instruction}
Input: {input}
A correct response: {output}
Response to be scored: {response}

Answer with the number alone."""


def judge(args):
    """Have a model on a server score answers."""
    records = read_records(args.responses, Path())
    kinds = [kind for kind in ("response", "base_response") if kind in records[0][1]] or ["response"]
    for where, record in records:
        for key in ("instruction", "input", "output", *kinds):
            if not isinstance(record.get(key), str):
                raise ValueError(f"{where}: {key!r} is missing, or not a text")
    for kind in kinds:
        scores = []
        for n, (where, record) in enumerate(records, 1):
            prompt = JUDGE_PROMPT.format(**record | {"response": record[kind]})
            scores.append(ask(args.url, args.model, prompt, where))
            show_progress(f"{kind}: {n} of {len(records)}")
        given = [number for number in scores if number is not None]
        if not given:
            raise ValueError(f"{args.url}: none of {len(scores)} replies was a number from 0 to 100")
        print_line(f"{kind}: mean {sum(given) / len(given):.1f} of {len(given)} scores, {len(scores)} asked for")


def ask(url, model, prompt, where):
    """One question to a server that speaks OpenAI's language -> the number in its reply, or None where there is none"""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "seed": 1}
    try:
        response = requests.post(url.rstrip("/") + "/chat/completions", json=body, timeout=300)  # large judges are slow
        response.raise_for_status()
        reply = response.json()["choices"][0]["message"]["content"]
        reply = re.sub(r"(?s)<think>.*?(</think>|$)", "", str(reply))
        number = re.fullmatch(r"\D*?(?<!-)(\d+(?:\.\d+)?)(?:\s*/\s*100)?\D*", reply)  # such as "85", "Score: 85/100."
    except (requests.RequestException, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{url}: {error!r:.200}, at {where}") from None
    return float(number[1]) if number and float(number[1]) <= 100 else None


def chat(args):
    """Talk to a model."""
    model, tokenizer = load_gpt2(args.folder, device=args.device, dtype=fast_dtype(args.device))
    limit = model.config.context_length
    print("Ctrl-C stops an answer, Ctrl-D ends the talk.")
    turns = []  # [question, answer]
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            continue
        if not question:
            continue
        turns.append([question, ""])
        # The oldest turns are forgotten where they leave too little room for an answer
        while len(ids := tokenizer.encode(talk(turns))) > limit - min(args.max_new_tokens, limit // 4) and len(turns) > 1:
            del turns[0]
        if len(ids) > limit:
            print(f"That is too long: with its form it has {len(ids)} tokens, and {limit} fit.")
            turns.clear()
            continue
        options = {"temperature": args.temperature, "top_k": args.top_k, "eos_id": tokenizer.eot}
        new_ids = model.stream(ids, min(args.max_new_tokens, limit + 1 - len(ids)), **options)
        try:
            for piece in tokenizer.decode_stream(new_ids):
                turns[-1][1] += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" ...", end="")
        print()


def talk(turns):
    """Turns of (question, answer) as one text; the prompt's first words stand once"""
    parts = [format_prompt({"instruction": question}) + response for question, response in turns]
    first_words = parts[0][: parts[0].index("###")]
    return first_words + "\n\n".join(part.removeprefix(first_words) for part in parts)


COMMANDS = {f.__name__: f for f in (classify, predict, instruct, judge, chat)}


def parse_arguments():
    """The command line -> what it says, and the parser of its command"""
    parser = CommandLine(description="Finetune a GPT-2, and use what came of it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=f.__doc__, description=f.__doc__) for name, f in COMMANDS.items()}
    for name, data, out, epochs, batch_size in [
        ("classify", "messages.tsv", "out/spam", 10.0, 16),
        ("instruct", "instructions.json", "out/assistant", 3.0, 8),
    ]:
        add = parsers[name].add_argument
        add("--init", default=BASE, help="start from this GPT-2, a folder or a published name, or from 'random' weights")
        add("--data", default=str(DATA / data), metavar="FILE", help="rows to learn from, a file or a URL")
        add("--out", type=Path, default=Path(out), help="folder for all that the run writes")
        add("--overwrite", action="store_true", help="replace the run that is in --out")
        add("--resume", type=Path, metavar="OUT", help="go on with the run in this folder, with all its settings")
        add("--context-length", type=int, help="tokens of a row that are read (default: the model's; instruct grows it to 256)")
        add("--dropout", type=float, help="share of activations dropped in training (default: 0.1, in small models 0.3)")
        add("--lora-rank", type=int, default=0, help="train LoRA adapters of this rank instead of the weights. 0: none")
        add("--lora-alpha", type=float, default=16.0, help="what the adapters add is multiplied by alpha / rank")
        add("--lora-dropout", type=float, default=0.05, help="share of inputs dropped before the adapters")
        add("--lora-targets", nargs="+", default=list(LORA_TARGETS), help="names of the matrices that get adapters")
        add("--epochs", type=float, default=epochs, help="how often every row is learned from")
        for f in fields(TrainConfig):
            if f.name not in ("steps", "learning_rate", "eval_every"):
                add("--" + f.name.replace("_", "-"), type=type(f.default), default=f.default, help=f.metadata["help"])
        parsers[name].set_defaults(batch_size=batch_size)
        add("--learning-rate", type=float, help="at its peak (default: 1e-3 for LoRA and small models, else 5e-5)")
        add("--eval-every", type=int, help="steps from one validation and checkpoint to the next (default: an epoch)")

    add = parsers["classify"].add_argument
    add("--text-column", help=f"name of the column with the texts (default: {', '.join(TEXT_COLUMNS)})")
    add("--label-column", help=f"name of the column with the classes (default: {', '.join(LABEL_COLUMNS)})")
    add("--balance", action="store_true", help="use as many rows of each class as the rarest has")
    add("--train", choices=["head", "last", "all"],
        help="the weights to train; last: head, final norm and last block (default: last; all of a small model)")  # fmt: skip

    add = parsers["instruct"].add_argument
    add("--train-on-prompt", action="store_true", help="learn to write the prompts too")
    add("--compare", action="store_true", help="write the answers of the model that was the start, too")
    add("--max-new-tokens", type=int, default=256, help="longest answer")

    add = parsers["predict"].add_argument
    add("folder", type=Path, help="what classify wrote, such as out/spam")
    add("texts", nargs="*", help="texts; with none, each line of the standard input is one")

    add = parsers["judge"].add_argument
    add("responses", nargs="?", default="out/assistant/responses.json", help="what instruct wrote")
    add("--url", default="http://localhost:11434/v1", help="where an OpenAI-compatible server listens; this is Ollama's")
    add("--model", default="llama3", help="the server's name of the model that judges")

    add = parsers["chat"].add_argument
    add("folder", type=Path, nargs="?", default=Path("out/assistant"), help="what instruct wrote, or any GPT-2 folder")
    add("--temperature", type=float, default=0.7, help="0 takes the likeliest token each time")
    add("--top-k", type=int, default=50, help="sample among the k likeliest tokens")
    add("--max-new-tokens", type=int, default=256, help="longest answer")

    for name in ("classify", "predict", "instruct", "chat"):
        parsers[name].add_argument("--device", type=usable_device, default=default_device(), help="cpu, cuda or mps")

    args = parser.parse_args()
    return args, parsers[args.command]


def begin(args, parser):
    """Settle the start of a new run -> None; or, with --resume, take over the settings of an old one -> its state"""
    if args.command == "classify" and args.train and args.lora_rank:
        parser.error("--train and --lora-rank do not go together: LoRA trains its adapters, and the head")
    if not args.resume:
        if not args.overwrite:
            refuse_to_replace(args.out)
        for name in ("init", "data"):
            if Path(getattr(args, name)).exists():
                setattr(args, name, str(Path(getattr(args, name)).resolve()))  # so that it can be resumed from anywhere
        if args.init == str(args.out.resolve()):
            parser.error(f"--init and --out are both {args.out}; the new model needs a folder of its own")
        return None
    for name, value in vars(args).items():
        if value != parser.get_default(name) and name not in ("command", "resume", "device"):
            parser.error(f"--{name.replace('_', '-')} does not go with --resume, which goes on with a run as it is")
    checkpoint = read_checkpoint(args.resume)
    if checkpoint["settings"].get("command") != args.command:
        raise ValueError(f"{args.resume / 'resume.pt'}: not the state of a run of {args.command}")
    vars(args).update(checkpoint["settings"], out=args.resume)
    return checkpoint


def main():
    args, parser = parse_arguments()
    command = COMMANDS[args.command]
    if command not in (classify, instruct):
        return command(args)
    checkpoint = begin(args, parser)
    with sole_run(args.out):
        command(args, checkpoint)


if __name__ == "__main__":
    with one_line_errors():
        main()
