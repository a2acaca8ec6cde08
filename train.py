"""
Pretraining, and the training loop that finetuning uses too.

    python train.py                                                # data/stories.txt, out/stories
    python train.py --text book.txt --model gpt2 --out out/book    # GPT-2's size, from scratch
    python train.py --text book.txt --init gpt2                    # from OpenAI's weights
    python train.py --bin 'data/corpus/*.bin' --model gpt2         # token files
    torchrun --nproc_per_node=8 train.py --text book.txt           # several GPUs

Run the same command again to go on where it was stopped.
"""

import argparse
import contextlib
import ctypes
import functools
import glob
import importlib.util
import io
import math
import os
import signal
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import get_args

import filelock
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, default_collate

import load_gpt2
from gpt import GPT, GPT2_CONFIGS, GPTConfig, TokenDataset, Tokenizer, create_dataloader, eval_mode
from load_gpt2 import atomic_write, fast_dtype, named_errors, print_line, show_progress

# --------------------------------------------------------------------------------------------------
# Settings: the fields of a dataclass are also the options of the command line


def option(default, help, **for_argparse):
    return field(default=default, metadata={"help": help, **for_argparse})


def add_options(parser, config_class):
    for f in fields(config_class):
        kind = (get_args(f.type) or [f.type])[0]  # int | None -> int
        # None is left to the dataclass, and not shown by --help
        default = argparse.SUPPRESS if f.default is None else f.default
        options = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        options = {"default": default, **options, **f.metadata}
        parser.add_argument("--" + f.name.replace("_", "-"), **options)


def with_defaults(config, **defaults):
    """-> the config with these values where it has None"""
    return replace(config, **{n: v for n, v in defaults.items() if getattr(config, n) is None})


@dataclass(frozen=True)
class TrainConfig:
    steps: int = option(500, "updates of the weights")
    batch_size: int = option(16, "sequences per update, over all processes")
    micro_batch_size: int | None = option(None, "sequences at once (gradient accumulation)")
    optimizer: str = option("adamw", "muon: for matrices in blocks", choices=("adamw", "muon"))
    learning_rate: float = option(1e-3, "peak learning rate")
    warmup: int = option(20, "steps of linear warmup")
    weight_decay: float = option(0.1, "weight decay of matrices")
    grad_clip: float = option(1.0, "clip the gradient norm to this")
    eval_every: int = option(100, "steps between validations, samples and saves")
    dtype: str = option("auto", "of matrix products", choices=("auto", "float32", "bfloat16"))
    seed: int = option(1, "of weights, shuffling, dropout and samples")
    out: Path | None = option(None, "output folder (default: out/NAME of the text)")
    overwrite: bool = option(False, "replace the run in the output folder")
    device: str = option(load_gpt2.default_device(), "cpu, cuda, mps", type=load_gpt2.usable_device)

    # Not a field: the settings that may change when a run goes on
    may_change = {"steps", "micro_batch_size", "out", "overwrite", "device"}

    def __post_init__(self):
        sizes = (self.steps, self.batch_size, self.micro_batch_size, self.eval_every)
        is_positive = min(n for n in sizes if n is not None) > 0 and self.grad_clip > 0
        if not is_positive or self.seed < 0:
            raise ValueError("steps, batches, eval-every and grad-clip must be positive, seed >= 0")


# --------------------------------------------------------------------------------------------------
# The training loop. A batch is the tuple of the model's arguments, targets last; the model returns
# the mean loss over the targets that are not -100.


def train(model, get_batch, val_loader, config, *, save, report=lambda: None, content=None):
    """
    Train a model, or go on with the run in the folder config.out.

    get_batch: a function, step -> batch. It depends on nothing else, so that runs can be resumed.
    val_loader: an iterable of batches, for a validation every eval_every steps.
    save, report: functions called after a validation, save() if its loss is the best so far.
        report() may return more columns for losses.csv.
    content: what the run learns from, anything with a repr; a run does not go on with another.
    Raises KeyboardInterrupt after Ctrl-C or SIGTERM, when the step is finished and saved,
    FloatingPointError for a loss that is not finite, ValueError if the folder holds another run.
    """
    out = Path(config.out)
    rank, world_size = process_rank()
    if config.batch_size < world_size:
        raise ValueError(f"a batch of {config.batch_size} sequences for {world_size} processes")
    device = torch.device(config.device)
    dtype = fast_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
    optimizers = create_optimizers(model.to(device), config)
    settings = {name: v for name, v in vars(config).items() if name not in config.may_change}
    settings["checksum of the data"] = zlib.crc32(repr(content).encode())
    # The rows of losses.csv; load_state also loads the model and the optimizers
    history = [{"step": 0}] if config.overwrite else load_state(out, settings, model, optimizers)
    first_step = history[-1]["step"]
    if first_step > 0:
        what = "finished at" if first_step >= config.steps else "going on from"
        print(f"{out}: {what} step {first_step}")
    model.train()
    parallel_model = DistributedDataParallel(model) if world_size > 1 else model
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    # No other run may write to the folder: `with lock` raises an OSError if one does
    lock = filelock.FileLock(out / ".lock", timeout=0) if rank == 0 else contextlib.nullcontext()
    with lock, catch_signals() as signals:
        if first_step == 0:  # before save(), because load_state refuses weights without a state
            write_state(out, settings, model, optimizers, history)
        status = f"step {first_step:5d}/{config.steps}"
        last_step = max(first_step, config.steps)
        for step in range(first_step, last_step + 1):
            if step % config.eval_every == 0 or step == last_step:
                val_loss = evaluate(model, val_loader, autocast)
                if not math.isfinite(val_loss):
                    raise FloatingPointError(f"{status}: the validation loss is {val_loss}")
                is_best = all(val_loss < row.get("val_loss", math.inf) for row in history)
                history[-1].setdefault("val_loss", val_loss)  # there already if the run was resumed
                if rank == 0:
                    if is_best:
                        save()
                    print_line(f"{status} | val {val_loss:.4f}")
                    history[-1] |= report() or {}
                write_state(out, settings, model, optimizers, history)
            if step == last_step:
                break
            start_time = time.perf_counter()
            learning_rate = scheduled_learning_rate(step, config)
            # Dropout of a resumed run is the same: the hash of integers is always the same
            torch.manual_seed(hash((config.seed, step, rank)))
            batch = get_batch(step)
            loss, norm = update(parallel_model, optimizers, learning_rate, batch, config, autocast)
            # Each process may have received a signal; all must stop after the same step
            loss, n_signals = sum_over_processes([loss, len(signals)], device)
            if not math.isfinite(loss + norm):
                raise FloatingPointError(
                    f"step {step + 1}: {loss=}, gradient {norm=}; {out} keeps the last good state. "
                    "A lower learning rate may help"
                )
            history.append({"step": step + 1, "learning_rate": learning_rate, "train_loss": loss})
            seconds = time.perf_counter() - start_time
            left = timedelta(seconds=round(seconds * (config.steps - step - 1)))
            status = f"step {step + 1:5d}/{config.steps} | loss {loss:.4f}"
            status += f" | {batch[0].numel() / seconds:,.0f} tokens/s | {left} left"
            if rank == 0:
                show_progress(status)
            if n_signals:
                write_state(out, settings, model, optimizers, history)
                print("stopped; the same command goes on (without --overwrite)")
                raise KeyboardInterrupt
    if rank == 0:
        plot_history(history, out / "losses.png")


def update(model, optimizers, learning_rate, batch, config, autocast):
    """
    One update of the weights. -> this process's part of the mean loss, the gradient norm

    The loss is the mean over all targets of the batch, whatever the number of processes, which
    share its rows, and the size of micro-batches, which save memory (gradient accumulation).
    """
    rank, world_size = process_rank()
    device = next(model.parameters()).device
    n_targets = int((batch[-1] != -100).sum())
    size = config.micro_batch_size or len(batch[0])
    micro_batches = list(zip(*(x[rank::world_size].split(size) for x in batch)))
    loss = 0.0
    for i, micro_batch in enumerate(micro_batches):
        weight = int((micro_batch[-1] != -100).sum()) / n_targets
        # Processes exchange gradients once, in the last backward pass
        exchange = world_size == 1 or i == len(micro_batches) - 1
        with contextlib.nullcontext() if exchange else model.no_sync():
            with autocast:
                micro_loss = model(*(x.to(device) for x in micro_batch)) * weight
            # DistributedDataParallel averages gradients over the processes; here they add up
            (micro_loss * world_size).backward()
        loss += micro_loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
    return loss.item(), norm.item()


@torch.no_grad()
def evaluate(model, loader, autocast):
    """The mean loss over all targets. Each process takes its share of the batches."""
    rank, world_size = process_rank()
    device = next(model.parameters()).device
    loss_sum = 0.0
    n_targets = 0
    with eval_mode(model):
        for batch in list(loader)[rank::world_size]:
            n = int((batch[-1] != -100).sum())
            with autocast:
                loss_sum += model(*(x.to(device) for x in batch)).item() * n
            n_targets += n
    loss_sum, n_targets = sum_over_processes([loss_sum, n_targets], device)
    return loss_sum / n_targets


def scheduled_learning_rate(step, config):
    """Linear warmup, then cosine decay to 10 % (Brown et al. 2020, appendix B). Steps from 0."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    decay = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return config.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * decay)) / 2)


def create_optimizers(model, config):
    """AdamW, or Muon for the matrices in the blocks. Weight decay is for matrices only."""
    muon, matrices, others = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # "h.0.attn..." in a GPT, "transformer.h.0.attn..." in a GPTClassifier
        if config.optimizer == "muon" and ".h." in f".{name}" and p.dim() == 2:
            muon.append(p)
        elif p.dim() >= 2:
            matrices.append(p)
        else:
            others.append(p)
    lr, decay = config.learning_rate, config.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=True)]
    if config.optimizer == "muon":
        optimizers.append(Muon(muon, lr, decay))
    return optimizers


class Muon(torch.optim.Optimizer):
    """
    The gradient, mixed with its running average (Nesterov momentum), is made a nearly orthogonal
    matrix (Jordan 2024), so that an update changes a matrix equally in all directions.
    torch.optim.Muon is the same, but always in bfloat16, which is slow on many CPUs.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # As large as AdamW's updates (Liu et al. 2025, section 2.2)
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonalize(matrix):
    """Five Newton-Schulz steps: the singular vectors stay, the singular values come near 1."""
    is_tall = len(matrix) > matrix.size(1)
    x = (matrix / matrix.norm().clamp(min=1e-7)).to(fast_dtype(matrix.device))
    x = x.T if is_tall else x
    for _ in range(5):
        gram = x @ x.T  # the coefficients below are Jordan's
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if is_tall else x).to(matrix.dtype)


@contextlib.contextmanager
def catch_signals():
    """Collect Ctrl-C and SIGTERM in a list. The second of a kind raises KeyboardInterrupt."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, signal.default_int_handler)

    handlers = {n: signal.signal(n, catch) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def keep_freed_memory():
    """
    Make glibc keep large blocks that are freed. Getting new, zeroed pages from the system takes a
    third of the time of a step of GPT-2 124M on two CPU cores.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


# --------------------------------------------------------------------------------------------------
# Processes: torchrun starts several; without it, there is one


def start_processes(device):
    """Join the processes that torchrun started, if it did; only the first of them prints."""
    if dist.is_torchelastic_launched():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" now means this GPU
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = io.StringIO()


def process_rank():
    """-> rank of this process, number of processes"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(numbers, device):
    if not dist.is_initialized():
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


# --------------------------------------------------------------------------------------------------
# The folder of a run


def load_state(out, settings, model, optimizers):
    """Load the state of an earlier start with the same settings, if there was one. -> history"""
    path = out / "resume.pt"
    if not path.exists():
        names = ("config.json", "model.safetensors", "merges.txt", "adapter")
        if any((out / name).exists() for name in names):
            raise ValueError(f"{out} holds a model; --overwrite replaces it, --out NAME keeps it")
        return [{"step": 0}]
    with named_errors(path):
        if zipfile.ZipFile(path).testzip():  # torch.load does not check the checksums
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["settings"]
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(f"{name} was {before.get(name)} and is {value}; see --overwrite")
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        return state["history"]


def write_state(out, settings, model, optimizers, history):
    """Write losses.csv and resume.pt."""
    if process_rank()[0] > 0:
        return
    columns = dict.fromkeys(name for row in history for name in row)
    lines = [",".join(columns)]
    lines += [",".join(str(row.get(column, "")) for column in columns) for row in history]
    with atomic_write(out / "losses.csv") as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    state = {"settings": settings, "history": history, "model": model.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    # An open file, because only then torch.save raises OSError for a full disk
    with atomic_write(out / "resume.pt") as part, open(part, "wb") as file:
        torch.save(state, file)


def plot_history(history, path):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} is not drawn: it needs `pip install matplotlib`")
        return
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(name for row in history for name in row):
        if name not in ("step", "learning_rate"):
            points = [(row["step"], row[name]) for row in history if name in row]
            axes.plot(*zip(*points), label=name, alpha=0.7)
    axes.set(xlabel="step")
    axes.legend()
    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=120)


# --------------------------------------------------------------------------------------------------
# Data: texts or token files


def find_files(names, folder):
    """Files, patterns with *, and URLs (downloaded once, into `folder`) -> list of paths"""
    paths = []
    for name in map(str, names):
        if name.startswith(("http://", "https://")):
            last = name.partition("?")[0].rpartition("/")[2]
            found = [folder / f"{zlib.crc32(name.encode()):08x}-{last}"]
            load_gpt2.download(name, found[0])
        else:
            found = [name] if Path(name).exists() else sorted(glob.glob(name))
        if not found:
            raise ValueError(f"{name}: no such file")
        paths += map(Path, found)
    return paths


def read_texts(paths):
    """-> one str, with a line <|endoftext|> before each text, as between documents in a text"""
    # Encoding takes ten times as much memory
    if sum(path.stat().st_size for path in paths) > 100_000_000:
        raise ValueError("more than 100 MB of text: use data/prepare.py, then --bin")
    result = ""
    for path in paths:
        with named_errors(path):
            text = path.read_text(encoding="utf-8-sig").removesuffix("\n")
        result += f"<|endoftext|>\n{text}\n"
    return result


def read_tokens(path, vocab_size):
    """A token file, which may begin with llm.c's header of 256 int32 -> np.memmap of uint16 ids"""
    with named_errors(path):
        header = np.fromfile(path, dtype="<i4", count=256)
        # llm.c's magic numbers are dates of 2024. Without a header, these are two ids of GPT-2 read
        # as one int32, which is such a number only if the first of them is above 54,911
        has_header = len(header) == 256 and header[0] // 10_000 == 2024
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024 if has_header else 0)
        # Magic number for GPT-2, version, number of tokens
        expected = [20240520, 1, min(len(tokens), 2**31 - 1)]
        if has_header and header[:3].tolist() != expected:
            raise ValueError(f"the header {header[:3].tolist()} should be {expected}")
        if tokens.max() >= vocab_size:
            raise ValueError(f"the id {tokens.max()} is not in a vocabulary of {vocab_size}")
        return tokens


def split_tokens(shards, context_length):
    """
    (name, tokens) pairs -> training, validation: lists of tokens, without shards that are too short
    for a window. Shards with val in the name are for validation, or else the end of the longest.
    """
    shards = [(name, tokens) for name, tokens in shards if len(tokens) > context_length]
    training = [tokens for name, tokens in shards if "val" not in name]
    validation = [tokens for name, tokens in shards if "val" in name]
    if not training:
        raise ValueError(f"no text for training is as long as a window of {context_length} tokens")
    if not validation:
        training.sort(key=len)
        # A tenth, but at most a million tokens, and at least a window
        n_val = max(min(len(training[-1]) // 10, 2**20), context_length + 1)
        validation = [training[-1][-n_val:]]
        training[-1] = training[-1][:-n_val]
    return training, validation


# --------------------------------------------------------------------------------------------------
# The command

# Two CPU cores train the first two in minutes. Their vocabulary is learned from the text.
MODELS = {
    "nano": GPTConfig(2048, context_length=256, n_layer=4, n_head=4, n_embd=256, dropout=0.15),
    "mini": GPTConfig(2048, context_length=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2),
    **GPT2_CONFIGS,
}
STORIES = Path(__file__).with_name("data") / "stories.txt"


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    batch_size: int = option(8, "sequences per update, over all processes")
    optimizer: str | None = option(None, "default: muon if small", choices=("adamw", "muon"))
    learning_rate: float | None = option(None, "peak (default: 6e-3 for small models, else 6e-4)")
    # With nargs, a list of str
    text: str | None = option(None, "files, URLs (default: data/stories.txt)", nargs="+")
    bin: str | None = option(None, "token files; val in a name: for validation", nargs="+")
    model: str = option("nano", "size of the model", choices=MODELS)
    init: str | None = option(None, "start from this model: a folder or a name on the hub")
    tokenizer: str | None = option(None, "folder of a tokenizer (default with --bin: GPT-2's)")
    vocab_size: int | None = option(None, "learn this vocabulary (default: the model's)")
    context_length: int | None = option(None, "tokens in a window (default: the model's)")
    dropout: float | None = option(None, "default: that of --model; 0 with --init")
    prompt: str = option("One day", "beginning of the samples")
    eval_windows: int = option(64, "windows in a validation, about")
    compile: bool | None = option(None, "torch.compile (default: on CUDA)")

    # Data may move: its lengths and first tokens are compared; compile changes no result
    may_change = TrainConfig.may_change | {"text", "bin", "compile"}

    def __post_init__(self):
        super().__post_init__()
        if self.eval_windows < 1:
            raise ValueError("eval-windows must be positive")
        if self.bin and (self.text or self.vocab_size is not None):
            raise ValueError("--bin excludes --text and --vocab-size; see --tokenizer")
        if bool(self.init) + bool(self.tokenizer) + (self.vocab_size is not None) > 1:
            raise ValueError("--init, --tokenizer and --vocab-size exclude each other")


def is_small(config):
    return config.n_embd < GPTConfig.n_embd  # smaller than any published GPT-2


def create_model(config, text):
    """-> a model with random weights or those of --init, its tokenizer"""
    torch.manual_seed(config.seed)
    if config.init:
        base, tokenizer = load_gpt2.load_gpt2(config.init)
        model = GPT(replace(base.config, dropout=config.dropout or 0.0))
        model.load_state_dict(base.state_dict())
        return model, tokenizer
    sizes = MODELS[config.model]
    if config.tokenizer:
        # At most, because token files hold 16-bit ids
        tokenizer = load_gpt2.read_tokenizer(config.tokenizer, vocab_size=2**16)
    elif config.vocab_size is None and (config.bin or config.model in GPT2_CONFIGS):
        tokenizer = Tokenizer.gpt2()
    else:  # a million characters are enough, and take seconds
        vocab_size = sizes.vocab_size if config.vocab_size is None else config.vocab_size
        tokenizer = Tokenizer.train(text.replace("<|endoftext|>\n", "")[:1_000_000], vocab_size)
    config = with_defaults(config, context_length=sizes.context_length, dropout=sizes.dropout)
    sizes = replace(sizes, context_length=config.context_length, dropout=config.dropout)
    return GPT(replace(sizes, vocab_size=tokenizer.vocab_size)), tokenizer


def pretrain(config):
    sources = config.bin or config.text or [STORIES]
    name = Path(sources[0]).resolve().parent.name if config.bin else Path(sources[0]).stem
    config = with_defaults(config, out=Path("out") / name)
    paths = find_files(sources, config.out.parent)
    text = "" if config.bin else read_texts(paths)
    model, tokenizer = create_model(config, text)
    context_length = config.context_length or model.config.context_length
    is_cuda = config.device.startswith("cuda")
    small = is_small(model.config)
    config = with_defaults(
        config,
        optimizer="muon" if small else "adamw",
        learning_rate=6e-3 if small else 6e-4,
        # On a CPU, more tokens at once take more memory, but no less time
        micro_batch_size=max(1, 2048 // context_length) if config.device == "cpu" else None,
        compile=is_cuda,
    )
    prompt = [tokenizer.eot, *tokenizer.encode(config.prompt)]  # the beginning of a document
    if max(context_length, len(prompt)) > model.config.context_length:
        raise ValueError("--context-length or --prompt is longer than the context of the model")
    if config.bin:
        # nanoGPT writes meta.pkl for vocabularies of characters; it is a pickle: not opened here
        if not config.tokenizer and any(path.with_name("meta.pkl").exists() for path in paths):
            raise ValueError("meta.pkl beside the token files: not GPT-2's ids; use --tokenizer")
        shards = [(path.name, read_tokens(path, tokenizer.vocab_size)) for path in paths]
    else:
        shards = [("text", load_gpt2.encode_documents(text, tokenizer))]
    training, validation = split_tokens(shards, context_length)
    train_data = ConcatDataset([TokenDataset(t, context_length) for t in training])
    # About eval_windows windows, evenly spread
    stride = max(context_length, math.ceil(sum(map(len, validation)) / config.eval_windows))
    val_data = ConcatDataset([TokenDataset(t, context_length, stride) for t in validation])
    val_loader = create_dataloader(val_data, config.micro_batch_size or config.batch_size)
    if config.batch_size > len(train_data):
        raise ValueError(
            f"a batch of {config.batch_size} is larger than the data: {len(train_data)}"
        )

    @functools.lru_cache(maxsize=1)
    def order(epoch):
        return np.random.default_rng([config.seed, epoch]).permutation(len(train_data))

    def get_batch(step):
        # Epochs, each in a random order of its own, follow each other with no gap
        places = range(step * config.batch_size, (step + 1) * config.batch_size)
        rows = [order(place // len(train_data))[place % len(train_data)] for place in places]
        return default_collate([train_data[row] for row in rows])

    def show_sample():
        options = {"temperature": 0.6, "top_k": 50, "eos_id": tokenizer.eot}
        options["generator"] = torch.Generator(config.device).manual_seed(config.seed)
        new_ids = model.stream(prompt, 100, **options)
        print(config.prompt + tokenizer.decode(new_ids), end="\n\n", flush=True)

    if config.compile and is_cuda and not importlib.util.find_spec("triton"):
        print("torch.compile needs Triton, which is not installed: going on without it")
    elif config.compile:
        model.compile()  # in place, so that parameters keep their names
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    data = f"{len(train_data):,} windows of {context_length} tokens"
    print(f"{size:.1f}M parameters, {data}, {config.device}")
    # A fingerprint of the data, to refuse to go on with other data
    fingerprint = [(name, len(tokens), zlib.crc32(tokens[: 2**20])) for name, tokens in shards]
    train(
        model, get_batch, val_loader, config, content=(fingerprint, tokenizer.vocab),
        save=lambda: load_gpt2.save_gpt2(model, tokenizer, config.out), report=show_sample,
    )  # fmt: skip
    print(f'finished: python load_gpt2.py {config.out} --prompt "{config.prompt}"')


def main():
    parser = load_gpt2.CommandLine(description="Train a GPT on a text.")
    add_options(parser, PretrainConfig)
    config = PretrainConfig(**vars(parser.parse_args()))
    start_processes(config.device)
    pretrain(config)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    with load_gpt2.one_line_errors():
        main()
