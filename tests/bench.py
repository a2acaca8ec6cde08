"""
How fast this project is, how fast others are at the same work, and how fast this machine could be.

    pip install transformers peft && python tests/bench.py                  every job
    python tests/bench.py train generate --peer ../nanoGPT                  beside another code
    python tests/bench.py finetune --model gpt2-medium                      full and LoRA tuning
    python tests/bench.py train generate --device cuda

--peer is a checkout of nanoGPT or LLMs-from-scratch. Every figure is measured in a process of its
own, in turns with the others. A table gives the median of the rounds, and in brackets the slowest
and the fastest. Ratios are to the first row.
"""

import argparse
import io
import itertools
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

from finetune import add_lora
from gpt import GPT, GPT2_CONFIGS, Tokenizer
from load_gpt2 import fast_dtype, load_gpt2, save_gpt2, stream_text
from train import TrainConfig, train

ROOT = Path(__file__).parent.parent

parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
parser.add_argument(
    "jobs",
    nargs="*",
    metavar="JOB",
    help="train, generate, tokenize, load, finetune (default: all)",
)
parser.add_argument("--device", default="cpu", help="cpu or cuda")
parser.add_argument("--model", default="gpt2", choices=GPT2_CONFIGS)
parser.add_argument(
    "--peer", type=Path, help="a checkout of nanoGPT or LLMs-from-scratch, to be measured too"
)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument(
    "--measure", help=argparse.SUPPRESS
)  # the row of which this process is to print the rate
args = parser.parse_args()

device, config = torch.device(args.device), GPT2_CONFIGS[args.model]
bf16, fp32, fast = torch.bfloat16, torch.float32, fast_dtype(device)
ROWS, WINDOW = (4, 256) if device.type == "cpu" else (32, 1024)  # tokens of a training step
STEPS = 10  # of which the first three warm up, compile and fill the allocator
PROMPT, NEW_TOKENS = list(range(8)), 100
N_WEIGHTS = sum(p.numel() for p in GPT(config).parameters()) if args.measure else 0


def now():
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work, rounds=3):
    """Of the fastest of some rounds, after one to warm up"""
    times = []
    for _ in range(rounds + 1):
        start = now()
        work()
        times.append(now() - start)
    return min(times[1:])


# --------------------------------------------------------------------------------------------------
# Training: tokens/s


def step_rate(times, tokens):
    return tokens / median(b - a for a, b in itertools.pairwise(times[3:]))


def train_ours(change=lambda model: model, dtype="auto", rows=ROWS, window=WINDOW):
    """train.py's own loop"""
    torch.manual_seed(0)
    ids = torch.randint(0, 50257, (STEPS, rows, window + 1))
    batches = [(x[:, :-1], x[:, 1:]) for x in ids]
    model = change(GPT(config)).to(device)
    if device.type == "cuda":
        model.compile()
    times = []
    model.register_forward_pre_hook(lambda *_: times.append(now()) if model.training else None)
    with tempfile.TemporaryDirectory() as out, redirect_stdout(io.StringIO()):
        train_config = TrainConfig(
            steps=STEPS, batch_size=rows, eval_every=STEPS, dtype=dtype, out=out, device=device.type
        )
        train(model, batches.__getitem__, batches[:1], train_config, save=lambda: None)
    return step_rate(times, rows * window)


def train_steps(model, loss_of, optimizer, rows=ROWS, window=WINDOW):
    """The plainest loop"""
    ids, times = torch.randint(0, 50257, (rows, window + 1), device=device), []
    for _ in range(STEPS):
        times.append(now())
        loss_of(model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step_rate(times, rows * window)


def transformers_model(dtype=fp32):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    return GPT2LMHeadModel(GPT2Config(**sizes, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)).to(
        device, dtype
    )


def train_transformers(dtype, lora=False, **sizes):
    model = transformers_model(dtype).train()
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["c_attn", "c_proj", "c_fc"]
        model = get_peft_model(
            model,
            LoraConfig(r=16, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM"),
        )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return train_steps(
        model, lambda model, inputs, _: model(inputs, labels=inputs).loss, optimizer, **sizes
    )


def peer_model():
    """A GPT of nanoGPT or LLMs-from-scratch, and how it gives its loss and continues a text"""
    torch.manual_seed(0)
    sys.modules.pop("gpt")  # theirs has the same name
    if (args.peer / "model.py").exists():
        sys.path.insert(0, str(args.peer))
        from model import GPT as PeerGPT
        from model import GPTConfig as PeerConfig

        sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
        with redirect_stdout(io.StringIO()):
            model = PeerGPT(PeerConfig(**sizes, vocab_size=50257, bias=True)).to(device)
        return (
            model,
            lambda model, *batch: model(*batch)[1],
            lambda model, ids, n: model.generate(ids, n, top_k=1),
        )
    sys.path.insert(0, str(args.peer / "ch04" / "01_main-chapter-code"))
    from gpt import GPTModel, generate_text_simple

    sizes = {"n_layers": config.n_layer, "n_heads": config.n_head, "emb_dim": config.n_embd}
    shared = {"vocab_size": 50257, "context_length": 1024, "drop_rate": 0.0, "qkv_bias": True}
    return (
        GPTModel(sizes | shared).to(device),
        lambda model, inputs, targets: torch.nn.functional.cross_entropy(
            model(inputs).flatten(0, 1), targets.flatten()
        ),
        lambda model, ids, n: generate_text_simple(model, ids, n, context_size=1024),
    )


def train_peer():
    model, loss_of, _ = peer_model()
    return train_steps(model.train(), loss_of, torch.optim.AdamW(model.parameters(), lr=1e-4))


def product_rate(dtype):
    """FLOP/s of the matrix product of the model's widest layer"""
    x, weight = (
        torch.randn(ROWS * WINDOW, config.n_embd),
        torch.randn(4 * config.n_embd, config.n_embd),
    )
    x, weight = x.to(device, dtype), weight.to(device, dtype)
    return (
        2
        * x.numel()
        * len(weight)
        / seconds(lambda: [x @ weight.T for _ in range(10)], rounds=5)
        * 10
    )


def train_limit(dtype, flop=6):
    """
    6 FLOP for each weight and token, 2 forward and 4 backward; 2 fewer for frozen weights.
    Position embeddings take none.
    """
    return product_rate(dtype) / (flop * (N_WEIGHTS - config.context_length * config.n_embd))


# --------------------------------------------------------------------------------------------------
# Generation: new tokens/s, greedy


def generate_ours(dtype, prompts=(PROMPT,)):
    torch.manual_seed(0)
    model = GPT(config).to(device, dtype)
    n_tokens = len(prompts) * NEW_TOKENS
    return n_tokens / seconds(lambda: model.generate(prompts, NEW_TOKENS, temperature=0))


def stream_ours(dtype):
    """As the command line writes"""
    torch.manual_seed(0)
    model, tokenizer = GPT(config).to(device, dtype), Tokenizer.gpt2()
    prompt = tokenizer.decode(PROMPT)
    return NEW_TOKENS / seconds(
        lambda: list(stream_text(model, tokenizer, prompt, NEW_TOKENS, temperature=0))
    )


def ragged_prompts(n):
    lengths = torch.randint(4, 65, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    return [list(range(length)) for length in lengths]


def generate_transformers(dtype):
    model = transformers_model(dtype).eval()
    options = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 50256,
    }
    return NEW_TOKENS / seconds(
        lambda: model.generate(torch.tensor([PROMPT], device=device), **options)
    )


@torch.no_grad()
def generate_peer():
    model, _, generate = peer_model()
    return NEW_TOKENS / seconds(
        lambda: generate(model.eval(), torch.tensor([PROMPT], device=device), NEW_TOKENS), rounds=1
    )


def generate_limit(dtype):
    """Reading every weight once for each token, as fast as this machine adds up a large array"""
    x = torch.ones(2**27, device=device)
    return x.nbytes / seconds(x.sum, rounds=5) / (dtype.itemsize * N_WEIGHTS)


# --------------------------------------------------------------------------------------------------
# Tokenizing: bytes/s; loading: folders/s


def long_text(n_characters):
    stories = (ROOT / "data" / "stories.txt").read_text(encoding="utf-8")
    return stories * (n_characters // len(stories))


def tokenize_ours():
    sys.path.insert(0, str(ROOT / "data"))
    import prepare

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        path = Path(folder) / "text.txt"
        path.write_text(long_text(50_000_000), encoding="utf-8")
        sys.argv = ["prepare.py", str(path), "--out", f"{folder}/out"]
        start = time.perf_counter()
        prepare.main()
        return path.stat().st_size / (time.perf_counter() - start)


def tokenize_tiktoken():
    encoding, text = Tokenizer.gpt2().encoding, long_text(50_000_000)
    parts = [text[i : i + 2**20] for i in range(0, len(text), 2**20)]
    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(encoding.encode_ordinary, parts):
            pass
    return len(text) / (time.perf_counter() - start)


def load(read):
    with tempfile.TemporaryDirectory() as folder:
        save_gpt2(GPT(config), Tokenizer.gpt2(), folder)
        return 1 / seconds(lambda: read(folder))


def from_pretrained(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).to(device), AutoTokenizer.from_pretrained(
        folder
    )


# --------------------------------------------------------------------------------------------------

SIZES = {"rows": 8, "window": 128}  # of a step of finetuning
fast_name = str(fast).removeprefix("torch.")
JOBS = {
    f"Training {args.model}, {ROWS} x {WINDOW} tokens a step, tokens/s": {
        "train: transformers, float32": lambda: train_transformers(fp32),
        "train: transformers, all in bfloat16": lambda: train_transformers(bf16),
        "train: peer": train_peer,
        "train: this project, float32": lambda: train_ours(dtype="float32"),
        f"train: this project, {fast_name} products": train_ours,
        f"train: limit, matrix products in {fast_name}": lambda: train_limit(fast),
        "train: limit, matrix products in float32": lambda: train_limit(fp32),
    },
    f"{args.model} writing {NEW_TOKENS} tokens after {len(PROMPT)}, greedily, tokens/s": {
        "generate: transformers, float32": lambda: generate_transformers(fp32),
        "generate: transformers, bfloat16": lambda: generate_transformers(bf16),
        "generate: peer": generate_peer,
        "generate: this project, float32": lambda: generate_ours(fp32),
        "generate: this project, bfloat16": lambda: stream_ours(bf16),
        "generate: this project, bfloat16, 32 ragged prompts": lambda: generate_ours(
            bf16, ragged_prompts(32)
        ),
        "generate: limit, reading bfloat16 weights": lambda: generate_limit(bf16),
        "generate: limit, reading float32 weights": lambda: generate_limit(fp32),
    },
    "50 MB of text to GPT-2 tokens, bytes/s": {
        "tokenize: tiktoken's encode_ordinary, all cores": tokenize_tiktoken,
        "tokenize: this project, text file to token file": tokenize_ours,
    },
    f"Loading {args.model} and its tokenizer from a local folder, times/s": {
        "load: transformers": lambda: load(from_pretrained),
        "load: this project": lambda: load(lambda folder: load_gpt2(folder, device=device)),
    },
    f"Finetuning {args.model}, 8 x 128 tokens a step, tokens/s": {
        "finetune: transformers, float32": lambda: train_transformers(fp32, **SIZES),
        "finetune: transformers + peft, float32, LoRA 16": lambda: train_transformers(
            fp32, lora=True, **SIZES
        ),
        f"finetune: this project, {fast_name} products": lambda: train_ours(**SIZES),
        f"finetune: this project, {fast_name} products, LoRA 16": lambda: train_ours(
            lambda gpt: add_lora(gpt, 16), **SIZES
        ),
        f"finetune: limit, matrix products in {fast_name}": lambda: train_limit(fast),
        f"finetune: limit, matrix products in {fast_name}, LoRA": lambda: train_limit(fast, flop=4),
    },
}


def measure(row):
    """The rate and the peak memory of one row, in GB, as the last line of the output"""
    rate = {row: work for rows in JOBS.values() for row, work in rows.items()}[row]()
    memory = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(json.dumps([rate, memory / 1e9]))


def measure_apart(row):
    command = [sys.executable, *sys.argv, "--measure", row]
    return json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[
            -1
        ]
    )


def main():
    if args.measure:
        measure(args.measure)
        return
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        cpu = (
            torch.cpu.get_capabilities().get("cpu_name", "")
            if hasattr(torch.cpu, "get_capabilities")
            else ""
        )
        machine = (
            f"{cpu or platform.processor()} {platform.machine()}, {torch.get_num_threads()} threads"
        )
    packages = ", ".join(
        f"{name} {version(name)}"
        for name in ("torch", "transformers", "peft", "tiktoken")
        if find_spec(name)
    )
    print(f"{machine}; {packages}")
    for title, rows in JOBS.items():
        rows = [
            row
            for row in rows
            if all(find_spec(name) or name not in row for name in ("transformers", "peft"))
        ]
        rows = [row for row in rows if args.peer or "peer" not in row]
        if args.jobs and rows[0].split(":")[0] not in args.jobs:
            continue
        results = [[measure_apart(row) for row in rows] for _ in range(args.rounds)]
        print(
            f"\n| {title} | median | (range) | ratio | peak memory |\n"
            "| --- | --- | --- | --- | --- |"
        )
        for row, measured in zip(rows, zip(*results)):
            rates, memories = zip(*measured)
            ratio = median(rates) / median(result[0][0] for result in results)
            name = row.split(": ")[1].replace("peer", args.peer.resolve().name if args.peer else "")
            spread = f"({min(rates):,.4g} to {max(rates):,.4g})"
            print(
                f"| {name} | {median(rates):,.4g} | {spread} | {ratio:.2f} | "
                f"{max(memories):.1f} GB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
