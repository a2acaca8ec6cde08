"""
Pretraining, and the one training loop through which everything here is trained.

    python train.py                                             data/stories.txt -> out/stories, in a minute or two
    python train.py --text book.txt --model gpt2 --out out/book
    python train.py --resume out/book
    torchrun --nproc_per_node=8 train.py --bin 'fineweb/*.bin' --model gpt2
"""

import argparse
import contextlib
import csv
import ctypes
import errno
import glob
import hashlib
import importlib.util
import itertools
import json
import math
import os
import pickle
import re
import signal
import struct
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, default_collate

from gpt import GPT, GPT2_CONFIGS, GPTConfig, TokenDataset, Tokenizer, complete_file, create_dataloader
from load_gpt2 import (
    CommandLine,
    default_device,
    download,
    fast_dtype,
    fcntl,
    load_gpt2,
    one_line_errors,
    read_config,
    save_gpt2,
    usable_device,
)

# ---------------------------------------------------------------------------------------------------------------------
# The loop. It knows nothing of language: a batch is the tuple of the model's arguments, targets last, with -100 for what
# does not count; the model returns the mean loss over the rest.


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    steps: int = option(200, "updates of the weights")
    batch_size: int = option(16, "rows in a step, over all processes")
    micro_batch_size: int = option(0, "rows that go through the model at once; 0: as many as fit")
    optimizer: str = option("adamw", "adamw, or muon, which takes over the matrices in the blocks")
    learning_rate: float = option(1e-3, "at its peak")
    warmup: int = option(20, "steps in which the learning rate grows to its peak")
    weight_decay: float = option(0.1, "pull of matrices towards 0")
    grad_clip: float = option(1.0, "longest gradient that is followed whole")
    eval_every: int = option(50, "steps from one validation, sample and checkpoint to the next")
    dtype: str = option("auto", "of matrix products: float32, bfloat16, or auto, what the device does fastest")
    seed: int = option(1, "of weights, shuffling, dropout and samples")

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.eval_every) < 1 or min(self.micro_batch_size, self.warmup, self.seed) < 0:
            raise ValueError("steps, batch size and eval-every must be at least 1, and no number may be negative")
        if not (self.learning_rate > 0 and self.grad_clip > 0 and self.weight_decay >= 0):
            raise ValueError("learning rate and grad-clip must be above 0, and weight decay not below")
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} is more than 32 bits")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer={self.optimizer} is not adamw or muon")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype} is not float32, bfloat16 or auto")


def scheduled_learning_rate(step, config):
    """Linear warmup, then half a cosine down to a tenth of the peak (Brown et al. 2020, appendix B); step counts from 0"""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def create_optimizers(model, config):
    """
    AdamW, with weight decay on matrices only: a LayerNorm or a bias pulled to 0 would lose its meaning. With muon, the matrices
    in the blocks are left to Muon (Jordan 2024), scaled so that AdamW's learning rate suits it (Liu et al. 2025, section 2.2).
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for_muon = [name for name, p in trained.items() if config.optimizer == "muon" and ".h." in "." + name and p.dim() == 2]
    in_blocks = [trained.pop(name) for name in for_muon]
    groups = [
        {"params": [p for p in trained.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)]
    if in_blocks:
        optimizers.append(torch.optim.Muon(in_blocks, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def train(model, train_loader, val_loader, config, out, *, save, report=lambda: {}, settings=None, checkpoint=None):
    """
    Train `model`, on the device where it is, from `train_loader`: one made with shuffle=True, its batches are micro-batches.

    Every eval_every steps: the loss over all of `val_loader`; `save()` where it is the lowest so far; `report()`, which may show
    something and returns {name: number} of more columns for losses.csv; out/losses.csv and out/resume.pt. Every step depends on
    the state, the seed and its own number alone, so a run that goes on from a `checkpoint` (what torch.load reads from resume.pt)
    repeats to the last bit what it would have done. `settings` go into resume.pt for whoever resumes. Ctrl-C and SIGTERM end the
    run after the current step, with its state saved.

    Returns the number of the signal that stopped it, or None. Raises FloatingPointError at a loss that is not finite.
    """
    device = next(model.parameters()).device
    rank, world_size = process_rank(), process_count()
    batch_sampler = train_loader.batch_sampler
    micro_batches = config.batch_size // batch_sampler.batch_size  # in a step, over all processes
    if config.batch_size != micro_batches * batch_sampler.batch_size or micro_batches % world_size or not micro_batches:
        raise ValueError(
            f"a batch of {config.batch_size} rows does not divide into micro-batches of {batch_sampler.batch_size} "
            f"for {world_size} process(es)"
        )
    optimizers = create_optimizers(model, config)
    step, best_loss, history = 0, math.inf, []  # history: the rows of losses.csv
    if checkpoint is not None:
        try:
            model.load_state_dict(checkpoint["model"])
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{out / 'resume.pt'}: does not fit the model of {out / 'config.json'} ({error!s:.100})") from None
        step, best_loss, history = checkpoint["step"], checkpoint["best_loss"], checkpoint["history"]
    parallel = DistributedDataParallel(model) if world_size > 1 else model
    dtype = fast_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
    keep_freed_memory()

    def save_state():
        write_losses(out / "losses.csv", history)
        state = {"step": step, "best_loss": best_loss, "history": history, "settings": settings}
        state |= {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        with complete_file(out / "resume.pt") as part:
            try:
                torch.save(state, part)
            except RuntimeError as error:  # so torch says that the disk is full
                raise OSError(errno.EIO, f"cannot be written ({error!s:.60}); is the disk full?", str(part)) from None

    def measure_and_save():
        """Validate; keep the weights if they are the best so far, and the state; show how it goes."""
        nonlocal best_loss
        val_loss = evaluate(model, val_loader, autocast)
        if not math.isfinite(val_loss):
            raise FloatingPointError(f"the validation loss is {val_loss} at step {step}; {out} keeps the last good state")
        if rank == 0:
            history[-1]["val_loss"] = val_loss
            if val_loss < best_loss:
                best_loss = val_loss
                save()
            print_line(f"{progress} | val {val_loss:.4f}")
            history[-1] |= report()
            save_state()

    progress = f"step {step:5d}/{config.steps}"
    with catch_signals() as caught:
        if checkpoint is None:
            history.append({"step": 0})
            measure_and_save()
        batch_sampler.start, batch_sampler.step = step * micro_batches + rank, world_size
        batches = iter(train_loader)
        step_batches = list(itertools.islice(batches, micro_batches // world_size))
        first_step, first_time = step, time.perf_counter()
        tokens, seconds = 0, 0.0  # since the last measure_and_save
        while step < config.steps:
            step_time = time.perf_counter()
            lr = scheduled_learning_rate(step, config)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr
            loss, step_tokens = backward(parallel, step_batches, autocast, seed=(config.seed, step))
            step_batches = list(itertools.islice(batches, micro_batches // world_size))  # of the next step, while a GPU works
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
            train_loss, stops = sum_over_processes([loss.item(), len(caught)], device)
            if not math.isfinite(train_loss + norm):
                raise FloatingPointError(
                    f"the loss is {train_loss} with a gradient of length {norm} at step {step + 1}; "
                    f"{out} keeps the last good state. A lower learning rate may help"
                )
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            step += 1
            history.append({"step": step, "learning_rate": lr, "train_loss": train_loss})

            tokens, seconds = tokens + step_tokens, seconds + time.perf_counter() - step_time
            left = (time.perf_counter() - first_time) / (step - first_step) * (config.steps - step)
            progress = (
                f"step {step:5d}/{config.steps} | loss {train_loss:.4f} | {tokens / seconds:,.0f} tokens/s | "
                f"{timedelta(seconds=round(left))} left"
            )
            if rank == 0:
                show_progress(progress)
            if step % config.eval_every == 0 or step == config.steps:
                measure_and_save()
                tokens, seconds = 0, 0.0
            elif stops and rank == 0:
                save_state()
            if stops:
                break
        if rank == 0:
            plot_losses(history, out / "losses.png")
    return (caught or [signal.SIGTERM])[0] if step < config.steps else None  # the signal may have gone to another process


def backward(model, batches, autocast, seed):
    """
    Add up the gradients of the mean loss over all targets of a step, however it is cut into `batches` and over processes.
    Returns this process's part of that mean, a tensor, and the number of tokens that all of them have read.
    """
    device = next(model.parameters()).device
    rank, world_size = process_rank(), process_count()
    n_targets = [int((batch[-1] != -100).sum()) for batch in batches]
    n_tokens = sum(batch[0].numel() for batch in batches)
    all_targets, all_tokens = sum_over_processes([sum(n_targets), n_tokens], device)
    loss_sum = torch.zeros((), device=device)
    for i, (batch, n) in enumerate(zip(batches, n_targets)):
        # What dropout drops follows from the number of the batch, whichever process has it
        torch.manual_seed(hash((*seed, i * world_size + rank)))
        is_last = i == len(batches) - 1
        with contextlib.nullcontext() if is_last or world_size == 1 else model.no_sync():  # DDP adds up over processes once
            with autocast:
                loss = model(*(x.to(device, non_blocking=True) for x in batch))
            (loss * (n * world_size / all_targets)).backward()  # DDP will divide by world_size
        loss_sum += loss.detach() * n
    return loss_sum / all_targets, all_tokens


@torch.no_grad()
def evaluate(model, loader, autocast):
    """The mean loss over all targets of all batches, each process taking its share of the batches"""
    rank, world_size = process_rank(), process_count()
    device = next(model.parameters()).device
    loss_sum, n_targets = 0.0, 0
    model.eval()
    for i, batch in enumerate(loader):
        if i % world_size == rank:
            n = int((batch[-1] != -100).sum())
            with autocast:
                loss_sum += model(*(x.to(device, non_blocking=True) for x in batch)).item() * n
            n_targets += n
    model.train()
    loss_sum, n_targets = sum_over_processes([loss_sum, n_targets], device)
    return loss_sum / n_targets


@contextlib.contextmanager
def catch_signals():
    """Ctrl-C and SIGTERM go into the list that this yields; a second one ends the program as usual."""
    caught, before = [], {}

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_freed_memory():
    """
    Tell glibc to keep large blocks that are freed. By default it gives them back to the system, which hands them out again page
    by page, zeroed, at every step: a third of the time of a step of GPT-2 124M on two CPU cores.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Processes: torchrun starts them and says through the environment who is who; one process alone is rank 0 of 1


def start_processes(device):
    """Join the processes that torchrun started -> the device of this one"""
    if "RANK" not in os.environ:
        return torch.device(device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # The others wait while rank 0 tokenizes, which may take hours
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=1))
    return torch.device(device)


def process_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 does the work in this block while the others wait; then they find it done"""
    if process_rank() != 0:
        dist.barrier()
    yield
    if process_rank() == 0 and dist.is_initialized():
        dist.barrier()


def sum_over_processes(numbers, device):
    if process_count() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def show_progress(line):
    """On a terminal, over the line before"""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="", flush=True)


def print_line(line):
    """In place of the progress, to stay"""
    clear = "\r\x1b[K" if sys.stdout.isatty() else ""
    print(clear + line, flush=True)


@contextlib.contextmanager
def sole_run(out):
    """Make the folder `out` and hold it: the files of two runs at once would mix. Leave none behind if nothing came of it."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        if fcntl is None:
            yield
            return
        folder = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise ValueError(f"{out}: another run is at work in this folder") from None
        finally:
            os.close(folder)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where it is empty


def refuse_to_replace(out):
    if any((out / name).exists() for name in ("resume.pt", "config.json")):
        raise ValueError(f"{out} holds a run: --resume {out} goes on with it, --overwrite replaces it, --out NAME leaves it alone")


def write_losses(path, rows):
    columns = dict.fromkeys(name for row in rows for name in row)  # each once, in the order of their appearance
    with complete_file(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_losses(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_checkpoint(folder):
    """out/resume.pt -> what `train` has saved there"""
    path = folder / "resume.pt"
    if not path.exists():
        raise ValueError(f"{path}: no such file; a run that has saved nothing yet is started again, with --overwrite")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if {"step", "best_loss", "history", "model", "optimizers"} - checkpoint.keys() or not isinstance(checkpoint["settings"], dict):
            raise ValueError("not the state of a run")
        return checkpoint
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: damaged ({error!r:.100})") from None


LOSS_CURVES = [("train_loss", "training batch", {"alpha": 0.4}), ("val_loss", "validation", {"marker": "."})]


def plot_losses(rows, path, curves=LOSS_CURVES, unit="loss (nats)"):
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no {path.name}: `pip install matplotlib` draws it")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in curves:
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name, "") != ""]
        axes.plot(*zip(*points), label=label, **style)
    axes.set(xlabel="step", ylabel=unit)
    axes.legend()
    with complete_file(path) as part:
        figure.savefig(part, format="png", dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining: texts to tokens, tokens to windows. Token files are llm.c's: 256 int32 (magic, version, number of tokens, and
# from the fourth on whatever one likes: here a fingerprint of what the tokens were made from), then the ids as uint16.

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
CHUNKS_AT_ONCE = 32  # in memory, of a million characters each: enough to keep many cores busy
HEADER = struct.Struct("<3i 32s 2q")  # magic, version, tokens up to 2^31 - 1, fingerprint, chunks of text, tokens


def find_files(names, folder):
    """Files, folders (all *.txt below), globs and URLs (fetched once, into `folder`) -> list of paths"""
    paths = []
    for name in names:
        if name.startswith(("http://", "https://")):
            last = re.sub(r"[^\w.-]", "_", name.rstrip("/").rsplit("/", 1)[-1])
            found = [folder / f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{last}"]
            download(name, found[0])
        elif name and Path(name).is_dir():
            found = sorted(Path(name).rglob("*.txt"))
        else:
            found = [Path(name)] if Path(name).is_file() else [Path(path) for path in sorted(glob.glob(name, recursive=True))]
        if not found:
            raise ValueError(f"{name}: no *.txt in this folder" if name and Path(name).is_dir() else f"{name}: no such file")
        paths += found
    for path in paths:
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: empty")
    return paths


def read_chunks(path, n_characters=2**20):
    """
    A text, a million characters at a time, cut before a blank that follows a word: GPT-2 never makes one token of the two
    sides, so the chunks' tokens are the tokens of the whole.
    """
    rest = ""
    try:
        with open(path, encoding="utf-8-sig") as file:
            while chunk := file.read(n_characters):
                chunk = rest + chunk
                last_word = re.compile(r".*\S(?=[ \n])", re.DOTALL).match(chunk)
                end = last_word.end() if last_word else len(chunk)
                yield chunk[:end]
                rest = chunk[end:]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text ({error.reason})") from None
    if rest:
        yield rest


def data_fingerprint(paths, tokenizer):
    """32 bytes that change when a file or the vocabulary does"""
    sources = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return hashlib.sha256(json.dumps([sources, tokenizer.vocab]).encode()).digest()


def tokenize(paths, tokenizer, bin_path):
    """
    Write the texts' tokens, an end-of-text after each, into one token file, on all cores, unless it is there already. What an
    earlier process left unfinished goes on from where it stopped.
    """
    fingerprint = data_fingerprint(paths, tokenizer)
    part = bin_path.with_name(bin_path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    if bin_path.exists():
        magic, _, _, known, _, _ = read_header(bin_path)
        if known == fingerprint:
            return
        if magic != MAGIC or known == bytes(32):
            raise ValueError(f"{bin_path}: would be replaced by the tokens of the text, but is something else; choose another --out")
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"{tokenizer.vocab_size:,} tokens do not fit the 16 bits of a token file")

    def encode(text):  # None: the end of a text
        ids = [tokenizer.eot] if text is None else tokenizer.encoding.encode_to_numpy(text, disallowed_special=())
        return np.asarray(ids).astype("<u2").tobytes()

    def n_bytes(texts):
        return sum(len(text.encode()) for text in texts if text is not None)

    chunks = (text for path in paths for text in itertools.chain(read_chunks(path), [None]))
    part.touch()
    try:
        with open(part, "r+b") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
            *_, known, n_chunks, n_tokens = read_header(part)
            if known != fingerprint:
                n_chunks = n_tokens = 0
                file.truncate(0)
            size, skipped = sum(path.stat().st_size for path in paths), n_bytes(itertools.islice(chunks, n_chunks))
            done, start = skipped, time.perf_counter()
            file.seek(HEADER_BYTES + 2 * n_tokens)
            while group := list(itertools.islice(chunks, CHUNKS_AT_ONCE)):
                for ids in pool.map(encode, group):
                    file.write(ids)
                end = file.tell()
                n_chunks, n_tokens, done = n_chunks + len(group), (end - HEADER_BYTES) // 2, done + n_bytes(group)
                file.seek(0)  # what has been written counts once the header says so
                file.write(HEADER.pack(MAGIC, VERSION, min(n_tokens, 2**31 - 1), fingerprint, n_chunks, n_tokens))
                file.flush()
                file.seek(end)
                rate = (done - skipped + 1) / (time.perf_counter() - start)
                left = timedelta(seconds=round((size - done) / rate))
                show_progress(f"tokenizing: {done / size:.0%}, {rate / 1e6:.0f} MB/s, {left} left")
            file.truncate()
    except ValueError:  # the text itself is wrong
        part.unlink()
        raise
    os.replace(part, bin_path)
    print_line(f"{bin_path}: {n_tokens:,} tokens")


def read_header(path):
    with open(path, "rb") as file:
        return HEADER.unpack(file.read(HEADER.size).ljust(HEADER.size, b"\0"))


def read_tokens(path):
    """A token file, llm.c's (with a header) or nanoGPT's (bare uint16) -> np.memmap of its ids"""
    size = path.stat().st_size
    magic, version, n_tokens, *_ = read_header(path)
    offset = HEADER_BYTES if magic == MAGIC else 0
    if size % 2 or size <= offset:
        raise ValueError(f"{path}: not a file of 16-bit token ids ({size:,} bytes)")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=offset)
    if offset and (version != VERSION or n_tokens != min(len(tokens), 2**31 - 1)):
        raise ValueError(f"{path}: {len(tokens):,} tokens, but its header says {n_tokens:,} (version {version})")
    return tokens


def first_million(paths):
    """A million characters, an equal share from each text: enough to learn a vocabulary from in seconds"""
    return "".join(next(read_chunks(path, 1_000_000 // len(paths) + 1), "") for path in paths)


def make_datasets(shards, context_length, eval_windows):
    """
    (name, tokens) pairs -> (training windows, validation windows). Validation has the shards with "val" in their name, or else
    the last tenth of the last shard, a million tokens at most; about eval_windows windows are taken from it, evenly spread.
    """
    training = [tokens for name, tokens in shards if "val" not in name]
    validation = [tokens for name, tokens in shards if "val" in name]
    if not training:
        raise ValueError("all token files are for validation: they have 'val' in their names")
    if not validation:
        held_out = max(min(len(training[-1]) // 10, 2**20), context_length + 1)
        validation = [training[-1][-held_out:]]
        training[-1] = training[-1][:-held_out]
    stride = max(context_length, math.ceil(sum(len(tokens) for tokens in validation) / eval_windows))
    return (
        ConcatDataset([TokenDataset(tokens, context_length) for tokens in training]),
        ConcatDataset([TokenDataset(tokens, context_length, stride) for tokens in validation]),
    )


# Sizes that two CPU cores train in minutes; their vocabulary, of at most this size, is learned from the text
SMALL_CONFIGS = {
    "nano": GPTConfig(3072, context_length=128, n_layer=4, n_head=4, n_embd=256, dropout=0.35),  # 4M
    "mini": GPTConfig(4096, context_length=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2),  # 12M
}


def parse_arguments():
    """The command line; with --resume, on top of what the run to be resumed was started with"""
    parser = CommandLine(description="Train a GPT on a text.")
    add = parser.add_argument
    add("--text", nargs="+", help="files, folders, globs, URLs (default: data/stories.txt)")
    add("--bin", nargs="+", help="instead of --text: token files of nanoGPT or llm.c; 'val' in a name is for validation")
    add("--model", default="nano", choices=[*SMALL_CONFIGS, *GPT2_CONFIGS], help="sizes of the model; --init brings its own")
    add("--init", metavar="NAME", help="start from this GPT-2, a folder or a name on the hub, instead of from random weights")
    add("--vocab-size", type=int, help="learn a vocabulary of this size from the text (default: the model's)")
    add("--context-length", type=int, help="tokens in a window (default: the model's)")
    add("--dropout", type=float, help="share of activations dropped in training (default: the model's)")
    add("--out", type=Path, help="folder for all that the run writes (default: out/ and the name of the text)")
    add("--overwrite", action="store_true", help="replace the run that is in --out")
    add("--resume", type=Path, metavar="OUT", help="go on with the run in this folder, with all its settings")
    add("--prompt", default="\n", help="how the samples begin")
    add("--eval-windows", type=int, default=64, help="windows in a validation")
    add("--device", type=usable_device, default=default_device(), help="cpu, cuda or mps")
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="torch.compile the model")
    for f in fields(TrainConfig):
        add("--" + f.name.replace("_", "-"), type=type(f.default), default=f.default, help=f.metadata["help"])
    args, checkpoint = parser.parse_args(), None
    if args.resume:
        for name in ("out", "overwrite", "init", "model", "vocab_size", "optimizer"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} does not go with --resume, which goes on with a run as it is")
        checkpoint = read_checkpoint(args.resume)
        if "command" in checkpoint["settings"]:
            parser.error(f"{args.resume} is a run of finetune.py: python finetune.py {checkpoint['settings']['command']} --resume")
        parser.set_defaults(**checkpoint["settings"])
        args = parser.parse_args()
        args.out = args.resume
    if args.text and args.bin:
        parser.error("--text and --bin do not go together")
    if not args.text and not args.bin:
        args.text = [str(Path(__file__).with_name("data") / "stories.txt")]
    if args.eval_windows < 1:
        parser.error("--eval-windows must be at least 1")
    return args, checkpoint


# What belongs to one start of the program, not to the run
NOT_SETTINGS = ("out", "overwrite", "resume", "device", "compile")


def main():
    args, checkpoint = parse_arguments()
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    name = re.sub(r"\W+", "-", Path((args.bin or args.text)[0]).stem).strip("-") or "text"
    out = args.out or Path("out") / name
    if checkpoint is None and not args.overwrite:
        refuse_to_replace(out)
    device = start_processes(args.device)
    with sole_run(out) if process_rank() == 0 else contextlib.nullcontext():
        stopped_by = pretrain(args, config, checkpoint, out, device)
    if process_rank() == 0:
        if stopped_by:
            print(f"stopped; go on with: python train.py --resume {out}")
        else:
            print(f'{out} is a GPT-2 folder: python load_gpt2.py {out} --prompt "The old man"')
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped_by:
        sys.exit(128 + stopped_by)


def pretrain(args, config, checkpoint, out, device):
    """What the command line asks for, made ready for `train`"""
    # The vocabulary, and the model on it: those of the run to be resumed, of --init, or new ones
    with rank_0_first():
        files = find_files(args.bin or args.text, out.parent)
    weights = None
    if checkpoint is not None:
        gpt_config, tokenizer = read_config(out / "config.json"), Tokenizer.load(out)
    elif args.init:
        with rank_0_first():
            loaded, tokenizer = load_gpt2(args.init)
        gpt_config, weights = loaded.config, loaded.state_dict()
        if args.vocab_size not in (None, gpt_config.vocab_size):
            raise ValueError(f"--vocab-size {args.vocab_size} does not fit {args.init}, which has {gpt_config.vocab_size}")
    else:
        gpt_config = (SMALL_CONFIGS | GPT2_CONFIGS)[args.model]
        vocab_size = gpt_config.vocab_size if args.vocab_size is None else args.vocab_size
        if args.bin or vocab_size == GPTConfig.vocab_size:
            tokenizer = Tokenizer.gpt2()
        else:
            tokenizer = Tokenizer.train(first_million(files), vocab_size)
        gpt_config = replace(gpt_config, vocab_size=tokenizer.vocab_size)
        if args.context_length is not None:
            gpt_config = replace(gpt_config, context_length=args.context_length)
    context_length = gpt_config.context_length if args.context_length is None else args.context_length
    if context_length > gpt_config.context_length:
        raise ValueError(f"--context-length {context_length} is more than the {gpt_config.context_length} of {args.init or out}")
    gpt_config = replace(gpt_config, dropout=gpt_config.dropout if args.dropout is None else args.dropout)
    prompt = tokenizer.encode(args.prompt) or [tokenizer.eot]
    if len(prompt) > gpt_config.context_length:
        raise ValueError(f"--prompt has {len(prompt)} tokens, more than the context of {gpt_config.context_length}")
    torch.manual_seed(args.seed)
    model = GPT(gpt_config)
    if weights is not None:
        model.load_state_dict(weights)
    model.to(device)
    if args.compile:
        model.compile()  # in place, so the weights keep their names

    # The data
    fingerprint = data_fingerprint(files, tokenizer).hex()
    if checkpoint is not None and checkpoint["settings"]["data"] != fingerprint:
        raise ValueError(f"the text of {out} is not what it was when the run began; a new run can go on from it: --init {out}")
    if args.bin:
        shards = [(path.name, read_tokens(path)) for path in files]
    else:
        bin_path = out.parent / f"{out.name}.bin"
        with rank_0_first():
            tokenize(files, tokenizer, bin_path)
        shards = [("text", read_tokens(bin_path))]
    training, validation = make_datasets(shards, context_length, args.eval_windows)
    micro_batch_size = args.micro_batch_size or max(1, args.batch_size // process_count())
    if not args.micro_batch_size and device.type == "cpu":
        while micro_batch_size % 2 == 0 and micro_batch_size * context_length > 2048:
            micro_batch_size //= 2  # more tokens at once take more memory, but on a CPU no less time

    def collate(windows):
        inputs, targets = default_collate(windows)
        if max(inputs.max(), targets.max()) >= gpt_config.vocab_size:
            raise ValueError(f"token id {max(inputs.max(), targets.max())} does not fit a vocabulary of {gpt_config.vocab_size}")
        return inputs, targets

    train_loader = create_dataloader(training, micro_batch_size, shuffle=True, seed=args.seed, collate_fn=collate)
    val_loader = create_dataloader(validation, micro_batch_size, collate_fn=collate)

    old_files = [out / name for name in ("resume.pt", "losses.csv", "losses.png")] if args.overwrite else []

    def save():
        save_gpt2(model, tokenizer, out)
        while old_files:  # only now there is something in their place
            old_files.pop().unlink(missing_ok=True)

    def sample():
        generator = torch.Generator(device).manual_seed(args.seed)
        (ids,) = model.generate(
            [prompt], max_new_tokens=100, temperature=0.8, top_k=50, eos_id=tokenizer.eot, generator=generator
        )
        text = (args.prompt + tokenizer.decode(ids)).strip()
        print(textwrap.indent(text, "    "), end="\n\n", flush=True)
        return {}

    # What the run needs to be resumed anywhere on this machine, spelled out
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings |= {"bin" if args.bin else "text": [str(path.resolve()) for path in files]}
    settings |= {"dropout": gpt_config.dropout, "data": fingerprint}
    if process_rank() == 0:
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{n_parameters / 1e6:.1f}M parameters, {len(training):,} windows of {context_length} tokens, "
            f"{len(validation)} for validation; {device}"
        )
    return train(
        model, train_loader, val_loader, config, out, save=save, report=sample, settings=settings, checkpoint=checkpoint
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
