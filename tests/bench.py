"""
How fast this machine could be, how fast this project is, and how fast Hugging Face transformers is at the same work.

    pip install transformers && python tests/bench.py train        (or generate, or tokenize; all three without a name)

Every figure is measured in a process of its own, in turns with the others; the table gives the median of the rounds and,
in brackets, the slowest and the fastest.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

from gpt import GPT, GPT2_CONFIGS, TokenDataset, Tokenizer, create_dataloader
from load_gpt2 import fast_dtype
from train import TrainConfig, tokenize, train

ROWS, WINDOW = 4, 256  # tokens of a training step
PROMPT, NEW_TOKENS = list(range(8)), 100


def seconds(work, rounds=5):
    """Of the fastest of some rounds, after one to warm up: what the machine can do, not what it happens to do"""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def product_rate(dtype):
    """FLOP/s of the matrix product of the model's widest layer"""
    x, weight = torch.randn(ROWS * WINDOW, 768).to(dtype), torch.randn(3072, 768).to(dtype)
    return 2 * x.numel() * len(weight) / seconds(lambda: [x @ weight.T for _ in range(10)]) * 10


def read_rate():
    """Bytes/s of reading more memory than any cache holds"""
    x = torch.ones(2**27)
    return x.numel() * 4 / seconds(x.sum)


def train_limit(dtype):
    """6 FLOP for each weight and token: 2 forward, 4 backward. The position table takes no part in products."""
    weights = sum(p.numel() for p in GPT(GPT2_CONFIGS["gpt2"]).parameters()) - 1024 * 768
    return product_rate(dtype) / (6 * weights)


def train_ours():
    """train.py's own loop, as `train.py --model gpt2 --batch-size 4 --context-length 256` runs it"""
    torch.manual_seed(0)
    data = TokenDataset(torch.randint(0, 50257, (10_000,)), WINDOW)
    loaders = create_dataloader(data, ROWS, shuffle=True), create_dataloader(torch.utils.data.Subset(data, range(4)), ROWS)
    times = []
    with tempfile.TemporaryDirectory() as out:
        model = GPT(GPT2_CONFIGS["gpt2"])
        model.register_forward_pre_hook(lambda *_: times.append(time.perf_counter()) if model.training else None)
        train(model, *loaders, TrainConfig(steps=6, batch_size=ROWS, eval_every=6), Path(out), save=lambda: None)
    return ROWS * WINDOW / median(b - a for a, b in zip(times[1:], times[2:]))


def train_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 50257, (ROWS, WINDOW))
    times = []
    for _ in range(6):
        times.append(time.perf_counter())
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return ROWS * WINDOW / median(b - a for a, b in zip(times[1:], times[2:]))


def generate_ours(dtype):
    torch.manual_seed(0)
    model = GPT(GPT2_CONFIGS["gpt2"]).to(dtype)
    return NEW_TOKENS / seconds(lambda: model.generate([PROMPT], NEW_TOKENS, temperature=0), rounds=3)


def generate_transformers(dtype):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).to(dtype).eval()
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 50256}
    return NEW_TOKENS / seconds(lambda: model.generate(torch.tensor([PROMPT]), **options), rounds=3)


def long_text(n_characters):
    stories = (ROOT / "data" / "stories.txt").read_text(encoding="utf-8")
    return stories * (n_characters // len(stories))


def tokenize_ours():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(long_text(50_000_000), encoding="utf-8")
        start = time.perf_counter()
        tokenize([path], Tokenizer.gpt2(), Path(folder) / "text.bin")
        return path.stat().st_size / (time.perf_counter() - start)


def tokenize_tiktoken():
    encoding, text = Tokenizer.gpt2().encoding, long_text(50_000_000)
    parts = [text[i : i + 2**20] for i in range(0, len(text), 2**20)]
    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(encoding.encode_ordinary, parts):
            pass
    return len(text) / (time.perf_counter() - start)


bf16, fp32, fast = torch.bfloat16, torch.float32, fast_dtype("cpu")
name = str(fast).removeprefix("torch.")
JOBS = {  # the first row of each is what the others are compared with
    "train": {
        "transformers, float32": train_transformers,
        f"this project, {name}": train_ours,
        f"limit: matrix products in {name}": lambda: train_limit(fast),
        "limit: matrix products in float32": lambda: train_limit(fp32),
    },
    "generate": {
        "transformers, float32": lambda: generate_transformers(fp32),
        "transformers, bfloat16": lambda: generate_transformers(bf16),
        "this project, float32": lambda: generate_ours(fp32),
        "this project, bfloat16": lambda: generate_ours(bf16),
        "limit: reading bfloat16 weights": lambda: read_rate() / (2 * 124e6),
        "limit: reading float32 weights": lambda: read_rate() / (4 * 124e6),
    },
    "tokenize": {
        "tiktoken's encode_ordinary, all cores": tokenize_tiktoken,
        "this project, text file to token file": tokenize_ours,
    },
}
TITLES = {
    "train": f"Training GPT-2 124M, {ROWS} x {WINDOW} tokens a step, tokens/s",
    "generate": f"GPT-2 124M greedily writing {NEW_TOKENS} tokens after {len(PROMPT)}, tokens/s",
    "tokenize": "50 MB of text to GPT-2 tokens, bytes/s",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("jobs", nargs="*", help="train, generate, tokenize (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        job, row = args.measure
        rate = JOBS[job][row]()
        print(json.dumps([rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6]))
        return

    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "tiktoken") if find_spec(package))
    cpu = torch.cpu.get_capabilities().get("cpu_name", "") if hasattr(torch.cpu, "get_capabilities") else ""
    print(f"{cpu or platform.processor()} {platform.machine()}, {torch.get_num_threads()} threads; {packages}")
    for job in args.jobs or JOBS:
        rows = [row for row in JOBS[job] if find_spec("transformers") or "transformers" not in row]
        results = {row: [] for row in rows}
        for _ in range(args.rounds):
            for row in rows:
                command = [sys.executable, __file__, "--measure", job, row]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                results[row].append(json.loads(output.splitlines()[-1]))
        print(f"\n| {TITLES[job]} | median | (range) | ratio | peak memory |\n| --- | --- | --- | --- | --- |")
        base = median(rate for rate, _ in results[rows[0]])
        for row in rows:
            rates = [rate for rate, _ in results[row]]
            memory = max(memory for _, memory in results[row])
            spread = f"({min(rates):,.4g} to {max(rates):,.4g})"
            print(f"| {row} | {median(rates):,.4g} | {spread} | {median(rates) / base:.2f} | {memory:.1f} GB |", flush=True)


if __name__ == "__main__":
    main()
