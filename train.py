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
import glob
import hashlib
import itertools
import json
import math
import os
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
    print_line,
    read_config,
    save_gpt2,
    show_progress,
    usable_device,
)

# ---------------------------------------------------------------------------------------------------------------------
# Processes: torchrun starts them and says through the environment who is who; one process alone is rank 0 of 1

RANK, WORLD_SIZE = 0, 1


def start_processes(device):
    """Join the processes that torchrun started -> the device of this one"""
    global RANK, WORLD_SIZE
    if not dist.is_torchelastic_launched():
        return torch.device(device)
    RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # The others wait while rank 0 tokenizes, which may take hours
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=1))
    return torch.device(device)


def sum_over_processes(numbers, device):
    if WORLD_SIZE == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The loop. It knows nothing of language: a batch is the tuple of the model's arguments, targets last, with -100 for what
# does not count; the model returns the mean loss over the rest.


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    steps: int = option(200, "updates of the weights")
    batch_size: int = option(16, "rows in a step, over all processes")
    micro_batch_size: int = option(0, "rows in the model at once, to save memory; 0: all, or in train.py on a CPU 2,048 tokens")
    optimizer: str = option("adamw", "adamw, or muon, which takes over the matrices in the blocks")
    learning_rate: float = option(1e-3, "at its peak")
    warmup: int = option(20, "steps in which the learning rate grows to its peak")
    weight_decay: float = option(0.1, "pull of matrices towards 0")
    grad_clip: float = option(1.0, "a longer gradient is scaled down to this length")
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
    in the blocks are left to Muon (Jordan 2024), which makes each update nearly orthogonal; its length is scaled to that of
    AdamW's (Liu et al. 2025, section 2.2).
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


def train(model, train_loader, val_loader, config, out, *, save, report=lambda: None, settings=None, checkpoint=None):
    """
    Train `model`, on the device where it is. The batch_sampler of `train_loader` is a ShuffledBatches, of micro-batches.

    At the start, the end and every eval_every steps: the loss over `val_loader`; `save()` where it is the lowest so far;
    `report()`, which may show something and return {name: number}, more columns for losses.csv; then out/losses.csv and
    out/resume.pt, with `settings`. What an earlier run has left in `out` goes before the first save.
    A step depends on the state, the seed and its own number alone: a run that goes on from a `checkpoint` (see read_checkpoint)
    repeats to the last bit what it would have done. Ctrl-C and SIGTERM end it after the current step, with its state saved.

    Returns the number of the signal that stopped it, or None. Raises FloatingPointError at a loss that is not finite.
    """
    device = next(model.parameters()).device
    batch_sampler = train_loader.batch_sampler
    if config.batch_size % (batch_sampler.batch_size * WORLD_SIZE):
        raise ValueError(
            f"a batch of {config.batch_size} rows does not divide into micro-batches of {batch_sampler.batch_size} "
            f"for {WORLD_SIZE} process(es)"
        )
    n_micro_batches = config.batch_size // batch_sampler.batch_size  # in a step, over all processes
    optimizers = create_optimizers(model, config)
    step, best_loss, history = 0, math.inf, [{"step": 0}]  # history: the rows of losses.csv
    if checkpoint is not None:
        try:
            model.load_state_dict(checkpoint["model"])
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{out / 'resume.pt'}: does not fit the model of {out / 'config.json'} ({error!s:.100})") from None
        step, best_loss, history = checkpoint["step"], checkpoint["best_loss"], checkpoint["history"]
    parallel = DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    dtype = fast_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
    keep_freed_memory()
    batch_sampler.first, batch_sampler.every = step * n_micro_batches + RANK, WORLD_SIZE
    batches = iter(train_loader)

    def save_state():
        write_losses(out / "losses.csv", history)
        state = {"step": step, "best_loss": best_loss, "history": history, "settings": settings or {}}
        state |= {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        with complete_file(out / "resume.pt") as part:
            try:
                torch.save(state, part)
            except RuntimeError as error:  # so torch says that the disk is full
                raise OSError(f"{part}: cannot be written ({error!s:.60}); is the disk full?") from None

    progress, stops = f"step {step:5d}/{config.steps}", 0
    first_step, start, tokens = step, time.perf_counter(), 0  # since the last validation
    with catch_signals() as caught:
        while True:
            is_due = step % config.eval_every == 0 or step == config.steps
            if is_due and "val_loss" not in history[-1]:  # a run that goes on has it from before
                val_loss = evaluate(model, val_loader, autocast)
                if not math.isfinite(val_loss):
                    raise FloatingPointError(f"validation loss {val_loss} at step {step}; {out} keeps the last good state")
                if RANK == 0:
                    history[-1]["val_loss"] = val_loss
                    if step == 0:
                        for name in OF_ONE_RUN:
                            (out / name).unlink(missing_ok=True)
                    if val_loss < best_loss:
                        best_loss = val_loss
                        save()
                    print_line(f"{progress} | val {val_loss:.4f}")
                    history[-1] |= report() or {}
                    save_state()
                first_step, start, tokens = step, time.perf_counter(), 0
            elif stops and RANK == 0:
                save_state()
            if stops or step >= config.steps:
                break

            lr = scheduled_learning_rate(step, config)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr
            step_batches = list(itertools.islice(batches, n_micro_batches // WORLD_SIZE))
            loss, step_tokens = backward(parallel, step_batches, autocast, seed=(config.seed, step))
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

            tokens, seconds = tokens + step_tokens, time.perf_counter() - start
            left = timedelta(seconds=round(seconds / (step - first_step) * (config.steps - step)))
            progress = f"step {step:5d}/{config.steps} | loss {train_loss:.4f} | {tokens / seconds:,.0f} tokens/s | {left} left"
            if RANK == 0:
                show_progress(progress)
        if RANK == 0:
            write_losses(out / "losses.csv", history)  # once more: an earlier end's may have been lost
            plot_losses(history, out / "losses.png")
    return (caught or [signal.SIGTERM])[0] if step < config.steps else None  # the signal may have gone to another process


def backward(model, batches, autocast, seed):
    """
    Add up the gradients of the mean loss over all targets of a step, however it is cut into `batches` and over processes.
    Returns this process's part of that mean, a tensor, and the number of tokens that all of them have read.
    """
    device = next(model.parameters()).device
    n_targets = [int((batch[-1] != -100).sum()) for batch in batches]
    n_tokens = sum(batch[0].numel() for batch in batches)
    all_targets, all_tokens = sum_over_processes([sum(n_targets), n_tokens], device)
    loss_sum = torch.zeros((), device=device)
    for i, (batch, n) in enumerate(zip(batches, n_targets)):
        # What dropout drops follows from the number of the batch, whichever process has it
        torch.manual_seed(hash((*seed, i * WORLD_SIZE + RANK)))
        is_last = i == len(batches) - 1
        with contextlib.nullcontext() if is_last or WORLD_SIZE == 1 else model.no_sync():  # DDP adds up over processes once
            with autocast:
                loss = model(*(x.to(device, non_blocking=True) for x in batch))
            (loss * (n * WORLD_SIZE / all_targets)).backward()  # DDP will divide by WORLD_SIZE
        loss_sum += loss.detach() * n
    return loss_sum / all_targets, all_tokens


@torch.no_grad()
def evaluate(model, loader, autocast):
    """The mean loss over all targets of all batches, each process taking its share of the batches"""
    device = next(model.parameters()).device
    loss_sum, n_targets = 0.0, 0
    model.eval()
    for i, batch in enumerate(loader):
        if i % WORLD_SIZE == RANK:
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
# What a run leaves behind


@contextlib.contextmanager
def sole_run(out):
    """Make the folder `out` and hold it: the files of two runs at once would mix. Leave none behind if nothing came of it."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY) if fcntl else None  # Windows has no such locks
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"{out}: another run is at work in this folder") from None
    finally:
        if fcntl:
            os.close(lock)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where it is empty


# What belongs to the weights of one run, here and in finetune.py, and goes when --overwrite puts others in their place
OF_ONE_RUN = ("resume.pt", "losses.csv", "losses.png", "accuracies.png", "responses.json")
OF_ONE_RUN += ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")


def refuse_to_replace(out):
    if any((out / name).exists() for name in ("resume.pt", "config.json")):
        raise ValueError(f"{out} holds a run: --resume {out} goes on with it, --overwrite replaces it, --out NAME keeps it")


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
        if checkpoint.keys() != {"step", "best_loss", "history", "settings", "model", "optimizers"}:
            raise ValueError("not the state of a run")
        if len(checkpoint["history"]) != checkpoint["step"] + 1 or not isinstance(checkpoint["settings"], dict):
            raise ValueError("an inconsistent state")
        return checkpoint
    except Exception as error:  # torch takes damaged bytes for what they seem to be, and so it may fail in any way
        raise ValueError(f"{path}: damaged ({error!r:.100})") from None


def plot_losses(rows, path, names=("train_loss", "val_loss")):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: `pip install matplotlib` draws it")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name, "") != ""]
        axes.plot(*zip(*points), label=name.replace("_", " "), alpha=0.7)
    axes.set(xlabel="step")
    axes.legend()
    with complete_file(path) as part:
        figure.savefig(part, format="png", dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining: texts to tokens, tokens to windows. Token files are llm.c's: 256 int32 (magic, version, number of tokens, and
# from the fourth on whatever one likes: here how far tokenizing has come), then the ids as uint16.

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
HEADER = struct.Struct("<3i 2q")  # magic, version, tokens up to 2^31 - 1, chunks of text, tokens
CHUNKS_AT_ONCE = 32  # in memory, of a million characters each: enough to keep many cores busy


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
    sides, so the chunks' tokens are the tokens of the whole (unless in a million characters there is no such place).
    """
    rest = ""
    try:
        with open(path, encoding="utf-8-sig") as file:
            while chunk := file.read(n_characters):
                chunk = rest + chunk
                last_word = re.match(r".*\S(?=[ \n])", chunk, re.DOTALL)
                end = last_word.end() if last_word else len(chunk)
                yield chunk[:end]
                rest = chunk[end:]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text ({error.reason})") from None
    if rest:
        yield rest


def data_fingerprint(paths, tokenizer):
    """A name for files and vocabulary. It looks at place, size and time of a file, since reading it all may take hours."""
    sources = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return hashlib.sha256(json.dumps([sources, tokenizer.vocab]).encode()).hexdigest()


def tokenize(paths, tokenizer, bin_path):
    """
    Write the texts' tokens, an end-of-text after each, into one token file, on all cores, unless it is there already. What an
    earlier process left unfinished goes on from where it stopped.
    """
    if bin_path.exists():
        return
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"{tokenizer.vocab_size:,} tokens do not fit the 16 bits of a token file")

    def encode(text):
        ids = tokenizer.encoding.encode_to_numpy(text, disallowed_special=()) if text else [tokenizer.eot]
        return np.asarray(ids).astype("<u2").tobytes()

    def n_bytes(texts):
        return sum(len(text.encode()) for text in texts)

    chunks = (text for path in paths for text in itertools.chain(read_chunks(path), [""]))  # "": the end of a text
    part = bin_path.with_name(bin_path.name + ".part")
    part.touch()
    try:
        with open(part, "r+b") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
            *_, n_chunks, n_tokens = read_header(part)
            size = sum(path.stat().st_size for path in paths)
            done = skipped = n_bytes(itertools.islice(chunks, n_chunks))  # which takes them from `chunks`
            start = time.perf_counter()
            file.seek(HEADER_BYTES + 2 * n_tokens)
            while group := list(itertools.islice(chunks, CHUNKS_AT_ONCE)):
                file.writelines(pool.map(encode, group))
                end = file.tell()
                n_chunks, n_tokens, done = n_chunks + len(group), (end - HEADER_BYTES) // 2, done + n_bytes(group)
                file.seek(0)  # what has been written counts once the header says so
                file.write(HEADER.pack(MAGIC, VERSION, min(n_tokens, 2**31 - 1), n_chunks, n_tokens))
                file.flush()
                file.seek(end)
                left = (size - done) * (time.perf_counter() - start) / (done - skipped + 1)
                show_progress(f"tokenizing: {done / size:.0%}, {timedelta(seconds=round(left))} left")
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

# What belongs to one start of the program, not to the run
NOT_SETTINGS = ("out", "overwrite", "resume", "device", "compile")


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
    add("--dropout", type=float, help="share of activations dropped in training (default: that of --model; 0 with --init)")
    add("--out", type=Path, help="folder for all that the run writes (default: out/ and the name of the text)")
    add("--overwrite", action="store_true", help="replace the run that is in --out")
    add("--resume", type=Path, metavar="OUT", help="go on with the run in this folder; settings given here replace its own")
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
            parser.error(f"this is a run of finetune.py: python finetune.py {checkpoint['settings']['command']} --resume")
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


def starting_model(args, files, out, checkpoint):
    """The model and its tokenizer: of the run to be resumed, of --init, or new ones. Fills in what `args` leave open."""
    weights = None
    if checkpoint is not None:
        config, tokenizer = read_config(out / "config.json"), Tokenizer.load(out)
    elif args.init:
        loaded, tokenizer = load_gpt2(args.init)
        config, weights = loaded.config, loaded.state_dict()
        if args.vocab_size not in (None, config.vocab_size):
            raise ValueError(f"--vocab-size {args.vocab_size} does not fit {args.init}, which has {config.vocab_size}")
    else:
        config = (SMALL_CONFIGS | GPT2_CONFIGS)[args.model]
        vocab_size = config.vocab_size if args.vocab_size is None else args.vocab_size
        if args.bin or vocab_size == GPTConfig.vocab_size:
            tokenizer = Tokenizer.gpt2()
        else:  # a million characters, an equal share of each text, teach it in seconds
            beginnings = (next(read_chunks(path, 1_000_000 // len(files) + 1), "") for path in files)
            tokenizer = Tokenizer.train("".join(beginnings), vocab_size)
        context_length = config.context_length if args.context_length is None else args.context_length
        config = replace(config, vocab_size=tokenizer.vocab_size, context_length=context_length)
    if args.context_length is None:
        args.context_length = config.context_length
    if args.dropout is None:
        args.dropout = config.dropout
    if args.context_length > config.context_length:
        raise ValueError(
            f"--context-length {args.context_length} is more than the {config.context_length} of {args.init or out}"
        )
    torch.manual_seed(args.seed)
    model = GPT(replace(config, dropout=args.dropout))
    if weights is not None:
        model.load_state_dict(weights)
    return model, tokenizer


def pretrain(args, config, checkpoint, out, device):
    """Make ready what the command line asks for, and train -> what `train` returns"""
    files = find_files(args.bin or args.text, out.parent)
    model, tokenizer = starting_model(args, files, out, checkpoint)
    model.to(device)
    if args.compile:
        model.compile()  # in place, so the weights keep their names
    prompt = tokenizer.encode(args.prompt) or [tokenizer.eot]
    if len(prompt) > model.config.context_length:
        raise ValueError(f"--prompt has {len(prompt)} tokens, more than the context of {model.config.context_length}")

    fingerprint = data_fingerprint(files, tokenizer)
    if checkpoint is not None and checkpoint["settings"].get("data") != fingerprint:
        raise ValueError(f"the files of {out} have another place, size or time than when it began; --init {out} goes on anew")
    if args.bin:
        shards = [(path.name, read_tokens(path)) for path in files]
    else:
        bin_path = Path(f"{out}-{fingerprint[:8]}.bin")
        if RANK == 0:
            tokenize(files, tokenizer, bin_path)
        if WORLD_SIZE > 1:
            dist.barrier()  # until it is there
        shards = [("text", read_tokens(bin_path))]
    training, validation = make_datasets(shards, args.context_length, args.eval_windows)
    micro_batch_size = args.micro_batch_size or max(1, args.batch_size // WORLD_SIZE)
    if not args.micro_batch_size and device.type == "cpu":
        while micro_batch_size % 2 == 0 and micro_batch_size * args.context_length > 2048:
            micro_batch_size //= 2  # more tokens at once take more memory, but on a CPU no less time

    def collate(windows):
        inputs, targets = default_collate(windows)
        highest = max(inputs.max(), targets.max())
        if highest >= model.config.vocab_size:
            raise ValueError(f"token id {highest} does not fit a vocabulary of {model.config.vocab_size}")
        return inputs, targets

    train_loader = create_dataloader(training, micro_batch_size, shuffle=True, seed=args.seed, collate_fn=collate)
    val_loader = create_dataloader(validation, micro_batch_size, collate_fn=collate)

    def show_sample():
        generator = torch.Generator(device).manual_seed(args.seed)
        ids = model.stream(prompt, 100, temperature=0.8, top_k=50, eos_id=tokenizer.eot, generator=generator)
        print(textwrap.indent((args.prompt + tokenizer.decode(ids)).strip(), "    "), end="\n\n", flush=True)

    # What the run needs to be resumed anywhere on this machine, spelled out
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings |= {"bin" if args.bin else "text": [str(path.absolute()) for path in files], "data": fingerprint}
    if RANK == 0:
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{n_parameters / 1e6:.1f}M parameters, {len(training):,} windows of {args.context_length} tokens, "
            f"{len(validation)} for validation; {device}"
        )
    return train(
        model, train_loader, val_loader, config, out, settings=settings, checkpoint=checkpoint, report=show_sample,
        save=lambda: save_gpt2(model, tokenizer, out),
    )  # fmt: skip


def main():
    args, checkpoint = parse_arguments()
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    name = re.sub(r"\W+", "-", Path((args.bin or args.text)[0]).stem).strip("-") or "text"
    out = args.out or Path("out") / name
    if checkpoint is None and not args.overwrite:
        refuse_to_replace(out)
    device = start_processes(args.device)
    with sole_run(out) if RANK == 0 else contextlib.nullcontext():
        stopped_by = pretrain(args, config, checkpoint, out, device)
    if RANK == 0:
        if stopped_by:
            print(f"stopped; go on with: python train.py --resume {out}")
        else:
            print(f'{out} is a GPT-2 folder: python load_gpt2.py {out} --prompt "The old man"')
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped_by:
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    with one_line_errors():
        main()
