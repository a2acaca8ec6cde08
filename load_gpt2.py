"""
GPT-2's weights in and out: the safetensors format, Hugging Face folders, the download from the hub,
and text completion on the command line; also what all scripts share: devices, progress, errors.

    python load_gpt2.py gpt2 --prompt "Every effort moves you"
    python load_gpt2.py out/stories --prompt "One day"
    python load_gpt2.py gpt2-medium --evaluate book.txt
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import requests
import torch
from filelock import FileLock  # installed with torch

from gpt import END_OF_TEXT, GPT, GPT2_CONFIGS, GPTConfig, TokenDataset, Tokenizer

# --------------------------------------------------------------------------------------------------
# Safetensors: the length of the header (8 bytes, little endian), the header as JSON
# {name: {dtype, shape, data_offsets}}, then the data of all tensors, one after the other

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path):
    """
    File -> {name: tensor}. The tensors are views of the memory-mapped file: they take no memory
    until they are read, and writing to them does not change the file.
    Raises ValueError unless the tensors account for every byte of the file.
    """
    with named_errors(path):
        file = np.memmap(path, mode="c")  # bytes, copied when they are written to
        header_size = int.from_bytes(file[:8].tobytes(), "little")
        if header_size > len(file) - 8:
            raise ValueError("cut short, or not a safetensors file")
        header = json.loads(file[8 : 8 + header_size].tobytes())
        header.pop("__metadata__", None)
        data = file[8 + header_size :]
        tensors = {}
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            begin = end
            end += math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [begin, end] or end > len(data):
                raise ValueError(f"the tensor {name} does not fit its place in the file")
            # NumPy has no bfloat16, so first as integers of the same size
            integers = torch.from_numpy(data[begin:end].view(f"i{dtype.itemsize}"))
            tensors[name] = integers.view(dtype).view(shape)
        if end != len(data):
            raise ValueError(f"the tensors end after {end:,} bytes, the file after {len(data):,}")
        return tensors


def write_safetensors(path, tensors):
    """{name: tensor} -> file, in the order given; the same tensors make the same file."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin = end
        end += tensor.nbytes
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [begin, end]}
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data starts at a multiple of 8
    with atomic_write(path) as part, open(part, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


@contextlib.contextmanager
def named_errors(path):
    """Turn any error about the content of a file into one ValueError that names the file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # damaged bytes make parsers fail in any way
        is_clear = isinstance(error, (ValueError, RuntimeError))
        reason = str(error) if is_clear else f"damaged ({error!r})"
        raise ValueError(f"{path}: {reason:.400}") from error


@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as part:` write to `part`, which is renamed when it is complete."""
    part = Path(f"{path}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Hugging Face folders: config.json, model.safetensors, merges.txt, vocab.json

# OpenAI stored these matrices as (in, out); nn.Linear has (out, in)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# config.json's names of the sizes in a GPTConfig
SIZES = {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
SIZES |= {"n_positions": "context_length"}

# Settings of GPT-2 in Hugging Face's transformers library that change what is computed, with the
# one value that is supported here
FIXED_SETTINGS = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def load_gpt2(name_or_folder, *, dtype=torch.float32, device="cpu"):
    """
    Load a model and its tokenizer. -> (GPT in eval mode, Tokenizer)

    name_or_folder: a key of GPT2_CONFIGS, `owner/name` on the Hugging Face hub, or a folder.
    dtype: of the weights, or None for that of the file. Weights that need no conversion stay in the
        memory-mapped file.
    Raises ValueError for a damaged file, or a model that `gpt.py` does not compute.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        folder = fetch_from_hub(str(name_or_folder))
    config = read_config(folder / "config.json")
    weights = {name.removeprefix("transformer."): w for name, w in read_weights(folder).items()}
    with named_errors(folder), torch.device("meta"):  # parameters without memory
        model = GPT(config)
    assign_weights(model, weights, folder)
    return model.eval().to(device, dtype), read_tokenizer(folder, config.vocab_size)


def assign_weights(model, weights, folder):
    """Make tensors the parameters of a model. weights: {name in the model: tensor of a file}"""
    with named_errors(folder):
        parameters = {}
        for name, weight in weights.items():
            # Under these names, published files hold no biases, but the causal masks
            if not name.endswith((".attn.bias", ".attn.masked_bias")):
                parameters[name] = weight.t() if name.endswith(TRANSPOSED) else weight
        head = parameters.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, parameters["wte.weight"]):
            raise ValueError("lm_head.weight differs from wte.weight; here they are tied")
        model.load_state_dict(parameters, assign=True)


def read_weights(folder):
    """model.safetensors, or the shards that model.safetensors.index.json lists -> {name: tensor}"""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return read_safetensors(folder / "model.safetensors")
    weight_map = read_weight_map(index)
    shards = {shard: read_safetensors(folder / shard) for shard in set(weight_map.values())}
    with named_errors(index):
        return {name: shards[shard][name] for name, shard in weight_map.items()}


def read_weight_map(index):
    """-> {name of a tensor: file in the folder of the index}"""
    weight_map = read_json(index, "weight_map")
    with named_errors(index):
        for shard in weight_map.values():
            if not re.fullmatch(r"\w[\w.-]*\.safetensors", shard):  # no paths to other folders
                raise ValueError(f"{shard} is not the name of a shard")
        return weight_map


def read_json(path, key=None):
    """-> the object in a JSON file, or its value for a key"""
    with named_errors(path):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        if key is not None and key not in content:
            raise ValueError(f"it has no {key}")
        return content if key is None else content[key]


def read_config(path):
    """config.json -> GPTConfig with dropout 0; sizes that it does not give are those of GPT-2"""
    content = read_json(path)
    with named_errors(path):
        for key, value in FIXED_SETTINGS.items():
            if content.get(key) not in (None, value):
                raise ValueError(f"{key}={content[key]} is not supported, only {value}")
        return GPTConfig(**{SIZES[key]: content[key] for key in SIZES if key in content})


def read_tokenizer(folder, vocab_size):
    """From merges.txt and vocab.json, or from tokenizer.json, or else GPT-2's own -> Tokenizer"""
    folder = Path(folder)
    # If only one of the two exists, `load` says that the other is missing
    if (folder / "merges.txt").exists() or (folder / "vocab.json").exists():
        with named_errors(f"{folder}/merges.txt, vocab.json"):
            tokenizer = Tokenizer.load(folder)
    elif (folder / "tokenizer.json").exists():
        with named_errors(folder / "tokenizer.json"):
            tokenizer = read_tokenizer_json(folder / "tokenizer.json")
    elif vocab_size == GPTConfig.vocab_size:
        return Tokenizer.gpt2()
    else:
        raise ValueError(f"{folder}: no merges.txt, and the vocabulary is not GPT-2's")
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{folder}: ids up to {tokenizer.vocab_size - 1}, but {vocab_size=}")
    # If a merge is missing, its token must not pass as a special one, which looks like <s> or [PAD]
    for token in tokenizer.encoding.special_tokens_set:
        if token[:1] + token[-1:] not in ("<>", "[]"):
            raise ValueError(f"{folder}: no merge makes the token {token}")
    return tokenizer


def read_tokenizer_json(path):
    """The tokenizers library's format -> Tokenizer"""
    content = json.loads(path.read_text(encoding="utf-8"))
    bpe, pre_tokenizer = content["model"], content["pre_tokenizer"]
    kind = (bpe["type"], pre_tokenizer["type"], pre_tokenizer.get("use_regex", True))
    changes_text = pre_tokenizer["add_prefix_space"] or content["normalizer"]
    if kind != ("BPE", "ByteLevel", True) or changes_text:
        raise ValueError("not GPT-2's kind of tokenizer")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    return Tokenizer(merges, bpe["vocab"] | added)


def save_gpt2(model, tokenizer, folder, *, chat_template=None):
    """
    Write a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`
    open. The weights keep their dtype.
    """
    weights = {f"transformer.{name}": weight for name, weight in model.state_dict().items()}
    save_folder(folder, weights, tokenizer, hf_config(model.config, tokenizer), chat_template)


def save_folder(folder, weights, tokenizer, config, chat_template=None):
    """
    Write the files of a Hugging Face folder. All are complete before the first is replaced.
    weights: {name in transformers: tensor in nn.Linear's layout}. config: for config.json.
    """
    folder = Path(folder)
    weights = {name: w.t() if name.endswith(TRANSPOSED) else w for name, w in weights.items()}
    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": config["n_positions"],
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT),
    }
    if chat_template:
        tokenizer_config["chat_template"] = chat_template
    part = folder / ".part"
    part.mkdir(parents=True, exist_ok=True)  # it exists if a save was interrupted
    write_safetensors(part / "model.safetensors", weights)
    tokenizer.save(part)
    write_json(part / "tokenizer_config.json", tokenizer_config)
    write_json(part / "config.json", config)
    # Files of another model. config.json comes back last: a folder without it does not load
    stale = ("tokenizer.json", "special_tokens_map.json", "model.safetensors.index.json")
    for name in ("config.json", *stale):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, folder / path.name)
    part.rmdir()


def write_json(path, content):
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def hf_config(config, tokenizer):
    """GPTConfig -> content of config.json"""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{key: getattr(config, name) for key, name in SIZES.items()},
        "n_ctx": config.context_length,  # for llama.cpp's converter
        **FIXED_SETTINGS,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot),
    }


# --------------------------------------------------------------------------------------------------
# The Hugging Face hub, and the cache of Hugging Face's own tools:
# models--OWNER--NAME/snapshots/COMMIT/FILE, with the commit of the main branch in refs/main


HUB_NAMES = {name: f"openai-community/{name}" for name in GPT2_CONFIGS}
HUB_NAMES["distilgpt2"] = "distilbert/distilgpt2"


def cache_folder(name):
    """-> the folder of a model in the cache; it may not exist"""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{home}/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    repository = cache / f"models--{name.replace('/', '--')}"
    ref = repository / "refs" / "main"
    commit = ref.read_text().strip() if ref.is_file() else "main"
    return repository / "snapshots" / commit


def fetch_from_hub(name):
    """Download what the cache lacks of a model. -> its folder in the cache"""
    # OWNER/NAME; but if there is a folder OWNER, the path of a folder was meant, which is missing
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)
    if name not in GPT2_CONFIGS and (not is_hub_name or Path(name).parent.is_dir()):
        known = ", ".join(GPT2_CONFIGS)
        raise ValueError(f"{name} is neither a folder nor a name on the hub ({known}, OWNER/NAME)")
    folder = cache_folder(name)
    if not folder.exists():  # not in the cache under a short name, as gpt2: use the full name
        name = HUB_NAMES.get(name, name)
        folder = cache_folder(name)
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return folder
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = f"{endpoint.rstrip('/')}/{name}/resolve/{folder.name}"  # a commit, or main
    token = os.environ.get("HF_TOKEN", "").strip()
    fetched = []

    def fetch(*file_names):
        """-> the first that is in the cache, or else the first that the hub has, or None"""
        cached = [file_name for file_name in file_names if (folder / file_name).exists()]
        if cached:
            return cached[0]
        for file_name in file_names:
            try:
                download(f"{url}/{file_name}", folder / file_name, token)
                fetched.append(folder / file_name)
                return file_name
            except requests.HTTPError as error:
                if error.response.status_code != 404:
                    raise
        return None

    try:
        # Small files first: other models are refused before gigabytes are downloaded
        if not fetch("config.json"):
            raise ValueError(f"{name} is not a folder, and the hub has no config.json of it")
        config = read_config(folder / "config.json")
        if fetch("merges.txt", "tokenizer.json") == "merges.txt":
            fetch("vocab.json")
        read_tokenizer(folder, config.vocab_size)
        index = "model.safetensors.index.json"
        if fetch("model.safetensors", index) == index:
            for shard in set(read_weight_map(folder / index).values()):
                fetch(shard)
        read_weights(folder)  # only to check them
    except requests.RequestException as error:
        raise ValueError(
            f"{name} is not a folder, and the hub did not provide it: {error}. Give a folder, set "
            "HF_TOKEN for a private model, or set HF_ENDPOINT to a mirror"
        ) from None
    except ValueError:
        for path in fetched:
            if path.stat().st_size < 2**20:  # it may be a login page, or cut short
                path.unlink()
        raise
    return folder


# --------------------------------------------------------------------------------------------------
# Download: resumable; a file appears under its name only when it is complete

TIMEOUT = 20  # seconds without an answer, or without a byte
WAITS = (1, 2, 4, 8, 16)  # seconds before each new attempt
LONGEST_WAIT = 300  # seconds; the hub limits the rate of requests in windows of five minutes


def download(url, path, token=""):
    """
    Download a file, unless it exists. If the network fails or the server is busy, it tries again, a
    few times, and goes on where it stopped; so does a later run. Length and, if the hub gives it,
    SHA-256 are checked. token: for the hub; it is not sent to other hosts.
    Raises requests.RequestException, or ValueError for a wrong SHA-256.
    """
    path = Path(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    waits = iter(WAITS)
    with FileLock(f"{path}.lock"):  # processes that need the same file wait for the first
        while not path.exists():
            try:
                fetch_rest(url, path, token)
            except requests.RequestException as error:
                wait = next(waits, math.inf)  # infinity if no retries are left
                if error.response is not None:
                    status = error.response.status_code
                    # 416: nothing to send, and fetch_rest has removed the part; 429: busy
                    if status < 500 and status not in (416, 429):
                        raise
                    seconds = error.response.headers.get("Retry-After", "")
                    wait = max(wait, int(seconds) if seconds.isdecimal() else 0)
                if wait > LONGEST_WAIT:
                    raise
                print_line(f"{error}; trying again in {wait} s", sys.stderr)
                time.sleep(wait)


def fetch_rest(url, path, token):
    """
    One attempt: append what the part lacks, and rename it when it is complete. The ETag is the
    server's name for a version of the file. With If-Range, the server sends the rest of the same
    version, or else a whole file (RFC 9110, section 13.1.5).
    """
    part = Path(f"{path}.part")
    etag_path = Path(f"{path}.etag")
    headers = {"Accept-Encoding": "identity"}  # or Content-Length would be that of compressed data
    if token:
        headers["Authorization"] = f"Bearer {token}"  # requests removes it for another host
    etag = etag_path.read_text(encoding="utf-8") if etag_path.exists() else ""
    if etag and part.exists():
        headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": etag}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # the part is as long as the file, or longer
            part.unlink(missing_ok=True)
        # The hub's own words, for the error of raise_for_status
        response.reason = response.headers.get("X-Error-Message") or response.reason
        response.raise_for_status()
        if response.status_code != 206:  # not the rest, but a whole file
            part.unlink(missing_ok=True)
            etag_path.write_text(response.headers.get("ETag", ""), encoding="utf-8")
        with open(part, "ab") as file:
            start = file.tell()
            size = start + float(response.headers.get("Content-Length", math.inf))  # bytes
            start_time = time.monotonic()
            for block in response.iter_content(2**16):
                file.write(block)
                speed = (file.tell() - start) / (time.monotonic() - start_time + 1e-9)  # bytes/s
                left = (size - file.tell()) / speed  # seconds
                done = f"{file.tell() / 1e6:.0f} of {size / 1e6:.0f} MB"
                show_progress(f"{path.name}: {done}, {speed / 1e6:.1f} MB/s, {left:.0f} s left")
        show_progress("")
        if size < math.inf and part.stat().st_size != size:  # inf: the server gave no length
            raise requests.ConnectionError(f"{url}: the connection was closed before the end")
    for hop in response.history:
        # When the hub redirects to its storage host, it gives the SHA-256 of a large file
        sha256 = hop.headers.get("X-Linked-ETag", "").strip('"')
        if len(sha256) == 64 and hashlib.sha256(np.memmap(part, mode="r")).hexdigest() != sha256:
            part.unlink()
            raise ValueError(f"{url}: the SHA-256 of the download is not {sha256}")
    os.replace(part, path)
    etag_path.unlink()


# --------------------------------------------------------------------------------------------------
# What all scripts share: texts, devices, progress, and one-line errors


def encode_documents(text, tokenizer):
    """
    Text with a line <|endoftext|> between documents -> array of ids, in which it is one token.
    Within a line, it is encoded as ordinary characters.
    """
    documents = re.split(r"^<\|endoftext\|>$\n?", text, flags=re.MULTILINE)
    if text.count(END_OF_TEXT) == len(documents) - 1:  # none within a line: one call is faster
        return tokenizer.encoding.encode_to_numpy(
            END_OF_TEXT.join(documents), allowed_special={END_OF_TEXT}, disallowed_special=()
        )
    ids = []
    for document in documents:
        ids += [tokenizer.eot, *tokenizer.encode(document)]
    return np.array(ids[1:], dtype=np.uint32)


def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(name):
    """For argparse: the name of a device that works"""
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError):
        raise argparse.ArgumentTypeError(f"{name} is not a device of this machine") from None
    return name


def fast_dtype(device):
    """bfloat16 if the device has hardware for it, else float32"""
    if torch.device(device).type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # a private function of PyTorch, False on mps; without it, float32 is always right
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if has_bf16 else torch.float32


def show_progress(line):
    """Replace the current line of the terminal. On standard error, so that it enters no file."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def print_line(line, file=None):
    """Print a line in place of the progress."""
    show_progress("")
    print(line, file=file, flush=True)


class CommandLine(argparse.ArgumentParser):
    """argparse with defaults in --help, and one-line errors"""

    def __init__(self, **options):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


@contextlib.contextmanager
def one_line_errors():
    """End the program with one line for errors that the user can correct."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # notebooks replace these files
            stream.reconfigure(errors="replace")  # for terminals that lack a character
    try:
        yield
    except (ValueError, OSError, FloatingPointError, OverflowError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            error = f"{error.filename}: {error.strerror}"
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit(130)


# --------------------------------------------------------------------------------------------------
# The command: complete a text, or measure how well a model predicts one


def stream_text(model, tokenizer, prompt, max_new_tokens, **sampling):
    """`model.stream` for text: yields one piece for each new token, and one for the end."""
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    new_ids = model.stream(ids, max_new_tokens, eos_id=tokenizer.eot, **sampling)
    pieces = tokenizer.decode_stream(new_ids)
    yield next(pieces)  # reads the prompt
    # For a single row, PyTorch's own bfloat16 matrix-vector product is twice as fast as mkldnn's
    use_mkldnn = model.wte.weight.dtype != torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=use_mkldnn, allow_tf32=None):  # None: as it is
        yield from pieces


@torch.no_grad()
def evaluate_text(model, ids):
    """
    Mean cross-entropy in nats over all tokens but the first, in windows of the context length.
    model: in eval mode, as load_gpt2 returns it.
    """
    device = model.wte.weight.device
    dataset = TokenDataset(ids, min(model.config.context_length, len(ids) - 1))
    total = 0.0
    for i in range(len(dataset)):
        inputs, targets = (row[None].to(device) for row in dataset[i])
        total += model(inputs, targets).item() * (targets != -100).sum().item()
        show_progress(f"window {i + 1} of {len(dataset)}")
    return total / (len(ids) - 1)


def main():
    parser = CommandLine(description="Complete a text, or measure how well a model predicts one.")
    add = parser.add_argument
    names = ", ".join(GPT2_CONFIGS)
    add("model", help=f"a folder, such as out/stories, or {names}, or OWNER/NAME on the hub")
    add("--prompt", default="\n", help="the text to complete")
    add("--max-new-tokens", type=int, default=200, help="tokens to generate")
    add("--temperature", type=float, default=0.8, help="0 always takes the most likely token")
    add("--top-k", type=int, default=50, help="sample from the k most likely tokens")
    add("--top-p", type=float, default=1.0, help="nucleus sampling: from the tokens that reach p")
    add("--seed", type=int, default=0, help="the same seed gives the same text")
    add("--adapter", metavar="FOLDER", help="LoRA adapters for the model")
    add("--evaluate", metavar="FILE", help="instead: loss per token and perplexity of this text")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    dtype_help = "of the weights; auto: float32 for --evaluate, else what is fast on the device"
    add("--dtype", choices=dtypes, default="auto", help=dtype_help)
    add("--device", type=usable_device, default=default_device(), help="cpu, cuda or mps")
    args = parser.parse_args()

    dtype = torch.float32 if args.evaluate else fast_dtype(args.device)
    if args.dtype != "auto":
        dtype = getattr(torch, args.dtype)
    # Adapters are merged in float32
    model, tokenizer = load_gpt2(args.model, dtype=torch.float32 if args.adapter else dtype)
    if args.adapter:
        from finetune import merge_adapter  # here, because finetune.py imports this file

        model = merge_adapter(model, args.model, args.adapter)
    model.to(args.device, dtype)
    if args.evaluate:
        with named_errors(args.evaluate):
            text = Path(args.evaluate).read_text(encoding="utf-8-sig")
            ids = encode_documents(text, tokenizer)
            if len(ids) < 2:
                raise ValueError("a text of at least two tokens is needed")
            loss = evaluate_text(model, ids)
        print_line(
            f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}, "
            f"over {len(ids) - 1:,} tokens in windows of {model.config.context_length}"
        )
        return
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    sampling["generator"] = torch.Generator(args.device).manual_seed(args.seed)
    print(args.prompt, end="", flush=True)
    start_time = time.perf_counter()
    n_tokens = -1  # the last piece is not a token, but the end
    for piece in stream_text(model, tokenizer, args.prompt, args.max_new_tokens, **sampling):
        n_tokens += 1
        print(piece, end="", flush=True)
    speed = n_tokens / (time.perf_counter() - start_time)
    print()
    print(f"\n{n_tokens} tokens, {speed:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main()
