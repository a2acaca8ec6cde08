"""
GPT-2's weights, in and out: the safetensors format by hand, the folder that Hugging Face transformers reads and writes, and
the continuation of a text on the command line.

    python load_gpt2.py out/stories --prompt "The old man opened the door"
"""

import argparse
import codecs
import contextlib
import json
import math
import mmap
import os
import sys
import time
from pathlib import Path

import torch

from gpt import GPT, GPTConfig, Tokenizer, complete_file

# ---------------------------------------------------------------------------------------------------------------------
# Safetensors: 8 bytes that say how long the header is, a JSON header {name: {dtype, shape, data_offsets}}, raw bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The header of the largest GPT-2 has 60 KB; a file that announces megabytes is damaged or means harm
MAX_HEADER = 4 * 2**20


def read_safetensors(path):
    """
    File -> {name: tensor}. The tensors lie in the memory-mapped file: they cost no memory until they are read, and writing to
    them does not reach the file. Raises ValueError where the file is not whole and consistent in every byte.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > min(size - 8, MAX_HEADER):
            raise ValueError(f"{path}: cut short, or not a safetensors file ({size:,} bytes)")
        try:
            header = json.loads(file.read(header_size).decode("utf-8"), object_pairs_hook=unique_keys)
            header.pop("__metadata__", None)
            entries = sorted(
                (*entry["data_offsets"], name, str(entry["dtype"]), entry["shape"]) for name, entry in header.items()
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged safetensors header ({error!r:.100})") from None
        data = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)[8 + header_size :]

    tensors, position = {}, 0
    for begin, *end, name, dtype, shape in entries:
        # Tensors follow each other with no gap and no overlap, and each is as long as its shape says
        is_shape = isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 <= n <= size for n in shape)
        if not is_shape or dtype not in DTYPES:
            raise ValueError(f"{path}: the tensor {name!r:.80} has an unknown dtype or shape")
        n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
        if [begin, *end] != [position, position + n_bytes] or position + n_bytes > len(data):
            raise ValueError(f"{path}: the tensor {name!r:.80} does not fit its place in the file")
        raw, position = data[position : position + n_bytes], position + n_bytes
        if raw.storage_offset() % DTYPES[dtype].itemsize:
            raw = raw.clone()  # a number cannot start just anywhere in memory
        tensors[name] = raw.view(DTYPES[dtype]).view(shape)
    if position != len(data):
        raise ValueError(f"{path}: the tensors end at byte {position:,}, the file at {len(data):,}")
    return tensors


def unique_keys(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def write_safetensors(path, tensors):
    """{name: tensor} -> file, tensors in the order given; the same tensors make the same file."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the data start at a multiple of 8
    with complete_file(Path(path)) as part, open(part, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's folder: config.json, model.safetensors, merges.txt, vocab.json

# OpenAI wrote these four matrices as (in, out); nn.Linear holds (out, in)
TRANSPOSED = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")


def load_gpt2(folder, *, dtype=None, device="cpu"):
    """
    A folder as transformers or `save_gpt2` write it -> (GPT in eval mode, Tokenizer).
    Raises ValueError, with the file's name, for what is damaged or is not a GPT-2 as `gpt.py` computes it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder with a GPT-2 in it")
    config = read_config(folder / "config.json")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{folder}: {tokenizer.vocab_size} tokens do not fit a model with vocab_size={config.vocab_size}")

    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in read_safetensors(path).items()}
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.get("wte.weight", torch.empty(0))):
        raise ValueError(f"{path}: lm_head.weight is not wte.weight, but this model has one table for both")
    with torch.device("meta"):  # shapes only: no time goes into numbers that are replaced at once
        model = GPT(config).eval()
    weights = {}
    for name, parameter in model.state_dict().items():
        if name not in tensors:
            raise ValueError(f"{path}: {name} is missing")
        weights[name] = tensors[name].T if name.endswith(TRANSPOSED) else tensors[name]
        if weights[name].shape != parameter.shape:
            raise ValueError(f"{path}: {name} is {list(tensors[name].shape)}, which is not what config.json says")
    extra = [name for name in tensors if name not in weights and not name.endswith((".attn.bias", ".attn.masked_bias"))]
    if extra:
        raise ValueError(f"{path}: {extra[0]} is no part of GPT-2")
    model.load_state_dict(weights, assign=True)
    return model.to(device=device, dtype=dtype), tokenizer


def save_gpt2(model, tokenizer, folder, dtype=torch.float32):
    """Write what `AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)` open."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, weight in model.state_dict().items():
        weight = weight.T if name.endswith(TRANSPOSED) else weight
        weights["transformer." + name] = weight.to(dtype)
    write_safetensors(folder / "model.safetensors", weights)
    tokenizer.save(folder)
    with complete_file(folder / "config.json") as part:
        part.write_text(json.dumps(hf_config(model.config, tokenizer, dtype), indent=2) + "\n", encoding="utf-8")


def hf_config(config, tokenizer, dtype):
    """A GPTConfig in Hugging Face's words"""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def read_config(path):
    """config.json -> GPTConfig; what it does not say is as in GPT-2. Dropout is 0: who trains further chooses it anew."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(given, dict) or given.get("model_type") != "gpt2":
        raise ValueError(f'{path}: not a GPT-2 ("model_type" is not "gpt2")')
    n_embd = given.get("n_embd", 768)
    computed_here = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    for key, value in computed_here.items():
        if given.get(key, value) != value:
            raise ValueError(f"{path}: {key}={given[key]}, but this model is computed with {value} only")
    if given.get("n_inner") not in (None, 4 * n_embd):
        raise ValueError(f"{path}: n_inner={given['n_inner']}, but this model is computed with 4 n_embd only")
    sizes = {
        "vocab_size": given.get("vocab_size", 50257),
        "context_length": given.get("n_positions", 1024),
        "n_layer": given.get("n_layer", 12),
        "n_head": given.get("n_head", 12),
        "n_embd": n_embd,
    }
    for key, value in sizes.items():
        if type(value) is not int or not 0 < value < 2**24:
            raise ValueError(f"{path}: {key}={value!r} is no size")
    try:
        return GPTConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# What all commands share: the machine they run on, and errors that are one line


def default_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def fast_dtype(device):
    """The number format in which this device multiplies fastest: bfloat16 where its hardware has it, else float32"""
    device = torch.device(device).type
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if has_bf16 else torch.float32


def usable_device(name):
    """The name of a device, once it is sure that it works"""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{name} is not a device of this machine") from None
    return name


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class CommandLine(argparse.ArgumentParser):
    """argparse, with every default in --help, and one line for an error"""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpWithDefaults, allow_abbrev=False, **options)

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


@contextlib.contextmanager
def one_line_errors():
    """What the user can mend ends the program with one line and exit code 2; a traceback is for our own mistakes."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            error = f"{error.filename}: {error.strerror}"
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------


def main():
    parser = CommandLine(description="Continue a text with a GPT-2.")
    parser.add_argument("folder", help="a folder with a GPT-2, such as out/stories")
    parser.add_argument("--prompt", default="\n", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="how many tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=int, default=50, help="sample among the k likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest that reach this probability")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--device", type=usable_device, default=default_device(), help="cpu, cuda or mps")
    args = parser.parse_args()

    model, tokenizer = load_gpt2(args.folder, device=args.device, dtype=fast_dtype(args.device))
    generator = torch.Generator(args.device).manual_seed(args.seed)
    print(args.prompt, end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be spread over several tokens
    start, n = time.perf_counter(), 0
    for n, i in enumerate(
        model.stream(
            tokenizer.encode(args.prompt) or [tokenizer.eot],
            args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            eos_id=tokenizer.eot,
            generator=generator,
        ),
        start=1,
    ):
        print(decoder.decode(tokenizer.tokens[i]), end="", flush=True)
    print(decoder.decode(b"", final=True))
    print(f"\n{n} tokens, {n / (time.perf_counter() - start):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main()
