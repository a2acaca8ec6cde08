"""
GPT-2's weights, in and out: the safetensors format by hand, the folder that transformers reads and writes, the download from
Hugging Face's hub, and the continuation of a text on the command line.

    python load_gpt2.py gpt2 --prompt "Every effort moves you"
    python load_gpt2.py out/stories --prompt "The old man opened the door" --samples 3
    python load_gpt2.py gpt2-medium --evaluate book.txt
    python load_gpt2.py --list
"""

import argparse
import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import re
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import requests
import torch
import torch.nn.functional as F

from gpt import GPT, GPT2_CONFIGS, GPTConfig, Tokenizer, complete_file, parse_merges

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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

# The largest JSON here, a header of gpt2-xl, has 60 KB; what announces megabytes is damaged or means harm
MAX_JSON = 2**20


def read_safetensors(path, dtype=None):
    """
    File -> {name: tensor}. The tensors lie in the memory-mapped file: they cost no memory until they are read, and writing to
    them does not reach the file. Only those that are not of `dtype`, where one is given, become copies that are.
    Raises ValueError where the file is not whole and consistent in every byte.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > min(size - 8, MAX_JSON):
            raise ValueError(f"{path}: cut short, or not a safetensors file ({size:,} bytes)")
        try:
            header = json.loads(file.read(header_size).decode("utf-8"), object_pairs_hook=unique_keys)
            header.pop("__metadata__", None)
            entries = sorted(
                (entry["data_offsets"], name, str(entry["dtype"]), entry["shape"]) for name, entry in header.items()
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged safetensors header ({error!r:.100})") from None
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    data, tensors, end = memoryview(mapped)[8 + header_size :], {}, 0
    for offsets, name, dtype_name, shape in entries:
        # Tensors follow each other with no gap and no overlap, and each is as long as its shape says
        is_shape = isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 <= n <= size for n in shape)
        if not is_shape or dtype_name not in DTYPES:
            raise ValueError(f"{path}: the tensor {name!r:.80} has an unknown dtype or shape")
        n, begin = math.prod(shape), end
        end += n * DTYPES[dtype_name].itemsize
        if offsets != [begin, end] or end > len(data):
            raise ValueError(f"{path}: the tensor {name!r:.80} does not fit its place in the file")
        # Files written before headers were padded, OpenAI's among them, start their numbers at odd bytes; torch takes them so
        tensor = torch.frombuffer(data, dtype=DTYPES[dtype_name], count=n, offset=begin) if n else torch.empty(0)
        tensor = tensor.to(DTYPES[dtype_name]).view(shape)
        if dtype is not None and tensor.dtype != dtype and tensor.is_floating_point():
            tensor = tensor.to(dtype)
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)  # what has been copied need not stay in memory twice
        tensors[name] = tensor
    if end != len(data):
        raise ValueError(f"{path}: the tensors end after {end:,} bytes, the file after {len(data):,}")
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


def load_gpt2(name_or_folder, *, revision="main", dtype=torch.float32, device="cpu"):
    """
    One of GPT2_CONFIGS, any `owner/name` on the hub, or a folder as transformers or `save_gpt2` write it -> (GPT in eval mode,
    Tokenizer). The weights are those of the file, mapped into memory: only another dtype or device makes copies of them.
    Raises ValueError, with the file's name, for what is damaged or is not a GPT-2 as `gpt.py` computes it.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        folder = fetch_from_hub(str(name_or_folder), revision)
    config = read_config(folder / "config.json")
    tokenizer = read_tokenizer(folder, config)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in read_weights(folder, dtype).items()}
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.get("wte.weight", torch.empty(0))):
        raise ValueError(f"{folder}: lm_head.weight is not wte.weight, but this model has one table for both")
    with torch.device("meta"):  # shapes only: no time goes into numbers that are replaced at once
        model = GPT(config).eval()
    put_weights(model, tensors, folder)
    return model.to(device), tokenizer


def put_weights(model, tensors, folder):
    """Let the model's parameters be these tensors, laid out as in `folder`, whence they are; each must have its place."""
    weights = {}
    for name, parameter in model.state_dict().items():
        if name not in tensors:
            raise ValueError(f"{folder}: {name} is missing")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{folder}: {name} has whole numbers, {tensors[name].dtype}; quantized weights are not read")
        # .T would print a warning where a damaged tensor has not two dimensions
        weights[name] = tensors[name].transpose(0, -1) if name.endswith(TRANSPOSED) else tensors[name]
        if weights[name].shape != parameter.shape:
            raise ValueError(f"{folder}: {name} is {list(tensors[name].shape)}, which is not what config.json says")
    for name in tensors:
        if name not in weights and not name.endswith((".attn.bias", ".attn.masked_bias")):  # masks, in OpenAI's files
            raise ValueError(f"{folder}: {name} is no part of the model")
    model.load_state_dict(weights, assign=True)


def read_weights(folder, dtype):
    """model.safetensors, or the shards that model.safetensors.index.json names -> {name: tensor}"""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return read_safetensors(folder / "model.safetensors", dtype)
    if not index.exists():
        raise ValueError(f"{folder}: no model.safetensors in it; pickles (*.bin, *.pt), which can run code, are not opened")
    weight_map, tensors = read_index(index), {}
    for shard in sorted(set(weight_map.values())):
        of_shard = read_safetensors(folder / shard, dtype)
        if of_shard.keys() != {name for name in weight_map if weight_map[name] == shard}:
            raise ValueError(f"{folder / shard}: holds other tensors than {index.name} says")
        tensors |= of_shard
    return tensors


def read_index(path):
    """-> {name of a tensor: file name of its shard}"""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: no weight_map in it")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", shard):
            raise ValueError(f"{path}: {shard!r:.80} is no name of a shard in the same folder")
    return weight_map


def read_json(path):
    """A file of moderate size that holds one JSON object -> dict"""
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes are too many")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error!r:.100})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def read_tokenizer(folder, config):
    """merges.txt and vocab.json, or tokenizer.json, which says the same in one file, or else GPT-2's own -> Tokenizer"""
    path = folder / "tokenizer.json"
    if (folder / "merges.txt").exists() or (folder / "vocab.json").exists() and not path.exists():
        tokenizer = Tokenizer.load(folder)
    elif path.exists():
        tokenizer = read_tokenizer_json(path)
    elif config.vocab_size == GPTConfig.vocab_size:
        tokenizer = Tokenizer.gpt2()
    else:
        raise ValueError(f"{folder}: no merges.txt and no tokenizer.json, and the vocabulary is not GPT-2's")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{folder}: {tokenizer.vocab_size} tokens do not fit a model with vocab_size={config.vocab_size}")
    return tokenizer


def read_tokenizer_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        bpe, cut = content["model"], content["pre_tokenizer"]
        if [bpe["type"], cut["type"], cut["add_prefix_space"], content["normalizer"]] != ["BPE", "ByteLevel", False, None]:
            raise ValueError("not a byte-level BPE as GPT-2 has it")
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
        vocab = bpe["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
        return Tokenizer(parse_merges("\n".join(merges)), vocab)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or of another kind ({error!r:.100})") from None


def save_gpt2(model, tokenizer, folder, dtype=torch.float32):
    """
    Write what `AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)` open.
    dtype: of the weights in the file, float32, bfloat16 or float16.
    """
    weights = {"transformer." + name: weight.to(dtype) for name, weight in model.state_dict().items()}
    save_folder(folder, weights, tokenizer, hf_config(model.config, tokenizer, dtype))


def save_folder(folder, weights, tokenizer, config):
    """weights: {name in transformers: tensor as nn.Linear has it}. config: what goes into config.json"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.T if name.endswith(TRANSPOSED) else weight for name, weight in weights.items()}
    write_safetensors(folder / "model.safetensors", weights)
    tokenizer.save(folder)
    write_json(folder / "config.json", config)


def write_json(path, content):
    with complete_file(path) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# What config.json calls the sizes of a GPTConfig
SIZES = {"n_positions": "context_length"} | {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}

# What transformers computes as config.json says, and gpt.py in this one way
COMPUTED_HERE = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def hf_config(config, tokenizer, dtype):
    """A GPTConfig in Hugging Face's words"""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        **COMPUTED_HERE,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def read_config(path):
    """config.json -> GPTConfig; what it does not say is as in GPT-2. Dropout is 0: who trains further chooses it anew."""
    given = read_json(path)
    if given.get("model_type") != "gpt2":
        raise ValueError(f'{path}: not a GPT-2 ("model_type" is not "gpt2")')
    try:
        config = GPTConfig(**{ours: given[theirs] for theirs, ours in SIZES.items() if theirs in given})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for key, value in COMPUTED_HERE.items():
        if given.get(key, value) != value:
            raise ValueError(f"{path}: {key}={given[key]!s:.40}, but this model is computed with {value} only")
    if given.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"{path}: n_inner={given['n_inner']!s:.40}, but this model is computed with 4 n_embd only")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# The hub, and the cache that Hugging Face's own tools use: models--OWNER--NAME/snapshots/COMMIT/FILE, and the commit of a
# branch in refs/. Snapshots hold the files themselves, not links into a folder of blobs, as theirs do on systems without links.

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # whole, or the list of their shards
HUB_NAMES = {name: f"openai-community/{name}" for name in GPT2_CONFIGS} | {"distilgpt2": "distilbert/distilgpt2"}


def hf_home():
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or default).expanduser()


def hf_token():
    path = Path(os.environ.get("HF_TOKEN_PATH") or hf_home() / "token").expanduser()
    return (os.environ.get("HF_TOKEN") or (path.read_text(encoding="utf-8") if path.is_file() else "")).strip()


def cached_repository(name):
    """The folder in the cache for a name on the hub"""
    cache = Path(os.environ.get("HF_HUB_CACHE") or hf_home() / "hub").expanduser()
    return cache / f"models--{name.replace('/', '--')}"


def cached_snapshot(name, revision="main"):
    """The folder in the cache that holds the weights of a name on the hub, or None"""
    for known_as in (HUB_NAMES.get(name, name), name):  # Hugging Face's tools keep "gpt2" under the name they are asked for
        repository = cached_repository(known_as)
        ref = repository / "refs" / revision
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
        folder = repository / "snapshots" / commit
        if any((folder / file).exists() for file in WEIGHTS):
            return folder


def fetch_from_hub(name, revision):
    """A name on the hub -> its folder in the cache, after fetching what is not there yet, all of it of the same commit"""
    if name not in HUB_NAMES and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        raise ValueError(f"{name} is not a folder; names on the hub are {', '.join(HUB_NAMES)} and OWNER/NAME")
    owner_name, token, folder = HUB_NAMES.get(name, name), hf_token(), cached_snapshot(name, revision)
    url = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/") + f"/{owner_name}/resolve"
    repository = cached_repository(owner_name)

    def fetch_one_of(*files):
        """The first that is cached, or else the first that the repository has -> its name, or None"""
        for file in [file for file in files if (folder / file).exists()] or files:
            with contextlib.suppress(FileNotFoundError):
                download(f"{url}/{folder.name}/{file}", folder / file, token)
                return file

    try:
        if folder is None:
            try:
                with tempfile.TemporaryDirectory() as scratch:
                    headers = download(f"{url}/{revision}/config.json", Path(scratch) / "config.json", token)
            except (FileNotFoundError, ValueError) as error:
                hint = "A private or gated repository needs HF_TOKEN"
                raise ValueError(f"{name} is not a folder, and the hub refuses: {error}. {hint}") from None
            commit = headers.get("X-Repo-Commit", "")
            commit = commit if re.fullmatch(r"[0-9a-f]{40}", commit) else revision
            folder, ref = repository / "snapshots" / commit, repository / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            part = ref.with_name(f"{ref.name}.{os.getpid()}.part")  # two processes may be here at once
            part.write_text(commit, encoding="utf-8")
            os.replace(part, ref)
        fetch_one_of("config.json")
        read_config(folder / "config.json")  # before gigabytes come that are of no use
        if fetch_one_of(*WEIGHTS) == "model.safetensors.index.json":
            for shard in sorted(set(read_index(folder / "model.safetensors.index.json").values())):
                fetch_one_of(shard)
        if fetch_one_of("merges.txt", "tokenizer.json") == "merges.txt":
            fetch_one_of("vocab.json")
    except Unavailable as error:
        raise ValueError(
            f"{error}; and {repository} does not hold it. "
            "Try again later, give a folder instead of a name, or set HF_ENDPOINT to a mirror"
        ) from None
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Download: what takes a name only when it is whole, however often the network breaks

TIMEOUT = 20  # seconds without an answer, or without a byte
WAITS = (1, 2, 4, 8, 16)  # seconds before another attempt; they begin anew whenever one has brought more than all before
LONGEST_WAIT = 300  # seconds that a server may ask for; the hub counts its callers' requests over five minutes


class Unavailable(ConnectionError):
    """A fault that may pass. wait: the seconds that the server asks for"""

    def __init__(self, message, wait=0):
        super().__init__(message)
        self.wait = wait


def download(url, path, token=""):
    """
    Fetch `url` into the file `path`, unless it is there, and return the headers of the answer.

    What has come stays in path.part, from where the next attempt, or the next process, goes on. The file is checked against
    the length announced and, where a hub gives it, its SHA-256. token: who asks, for a hub. Raises Unavailable where no
    attempt helped, FileNotFoundError where the server has no such file, ValueError where it refuses.
    """
    answer, waits, most = requests.structures.CaseInsensitiveDict(), list(WAITS), 0
    if path.exists():
        return answer
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_part(path) as part:
        while not path.exists():  # another process may have fetched it while this one waited for the part
            try:
                fetch_rest(url, token, part, answer)
                if fcntl is None:
                    part.close()  # Windows renames no open file; elsewhere the lock must last until the new name stands
                os.replace(part.name, path)
            except Unavailable as error:
                size = part.seek(0, os.SEEK_END)
                if size > most:
                    waits, most = list(WAITS), size
                if not waits or error.wait > LONGEST_WAIT:
                    raise
                wait = max(waits.pop(0), error.wait)
                print_line(f"{error}; trying again in {wait} s", sys.stderr)
                time.sleep(wait)
    return answer


@contextlib.contextmanager
def open_part(path):
    """path.part, open for this process alone: others that want the same file wait here. An empty one is cleared away."""
    part = path.with_name(path.name + (".part" if fcntl else f".{os.getpid()}.part"))
    while True:
        file = open(part, "a+b")
        if fcntl is None:
            break
        with contextlib.suppress(OSError):  # on file systems without locks, length and hash have to find a mix of two
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                break
        file.close()  # while this process waited, the other one renamed or removed the part
    with file:
        try:
            yield file
        finally:
            is_empty = not file.closed and os.fstat(file.fileno()).st_size == 0
            if fcntl is None:
                file.close()
            if is_empty:
                part.unlink(missing_ok=True)


def fetch_rest(url, token, part, answer):
    """One attempt to append to `part` what it lacks. answer: the headers of the attempt before, and then of this one"""
    start, name = part.seek(0, os.SEEK_END), Path(part.name).stem
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    if token:
        headers["Authorization"] = f"Bearer {token}"  # which requests keeps from other hosts that the answer may send it to
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            check_status(url, response)
            earlier = answer.copy()
            answer.clear()
            for r in (response, *reversed(response.history)):  # the hub may send on to a storage host; its word counts
                answer.update(r.headers)
            tag = answer.get("X-Linked-ETag") or (answer.get("ETag", "") if "X-Repo-Commit" in response.headers else "")
            sha256 = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', tag)
            # What is here may be of another file: a hash will tell; without one, the attempt before must have said the same
            same = sha256 or earlier and all(earlier.get(key) == answer.get(key) for key in ("ETag", "Last-Modified"))
            is_rest = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if start and response.status_code != 200 and not (same and is_rest):
                part.truncate(0)
                raise Unavailable(f"{url}: what is here already and what comes now do not fit together")
            if response.status_code == 200:
                part.truncate(start := 0)
            length = response.headers.get("Content-Length", "")
            size, done = start + int(length) if length.isdecimal() else None, start
            began = shown = time.monotonic()
            for block in response.iter_content(2**16):
                part.write(block)
                done, now = done + len(block), time.monotonic()
                if now - shown > 0.2:
                    shown, speed = now, (done - start) / (now - began)
                    left = timedelta(seconds=round((size - done) / speed)) if size else "?"
                    of = f" of {size / 1e6:.0f}" if size else ""
                    show_progress(f"{name}: {done / 1e6:.0f}{of} MB, {speed / 1e6:.1f} MB/s, {left} left")
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise Unavailable(f"{url}: {getattr(error.args[0], 'reason', error) if error.args else error}") from None
    finally:
        part.flush()
    if size is not None and done < size:  # which urllib3 before 2.0 does not notice
        raise Unavailable(f"{url}: the connection broke after {done:,} of {size:,} bytes")
    if answer.get("X-Linked-Size", str(done)) != str(done):
        part.truncate(0)
        raise Unavailable(f"{url}: {done:,} bytes came, but the hub has {answer['X-Linked-Size']}")
    if sha256:
        part.seek(0)
        digest = hashlib.sha256()
        while block := part.read(2**20):
            digest.update(block)
        if digest.hexdigest() != sha256[1]:
            part.truncate(0)
            message = f"{url}: the SHA-256 of what came is {digest.hexdigest()}, not {sha256[1]}"
            raise Unavailable(message) if start else ValueError(message)  # only pieces may have been of two files
    if done > 1e6:
        print_line(f"{name}: {done / 1e6:.0f} MB in {timedelta(seconds=round(time.monotonic() - began))}", sys.stderr)


def check_status(url, response):
    code = response.status_code
    reason = f"{code} {response.headers.get('X-Error-Message') or response.reason}"
    if code == 429 or code >= 500:
        asked = response.headers.get("Retry-After", "")
        if asked.isdecimal():
            raise Unavailable(f"{url}: {reason}, come back in {asked} s", wait=int(asked))
        raise Unavailable(f"{url}: {reason}")
    if code == 404:
        raise FileNotFoundError(errno.ENOENT, f"the server has no such file ({reason})", url)
    if code not in (200, 206, 416):  # 416: it has nothing from there on, so what is here cannot be right
        raise ValueError(f"{url}: {reason}")


def show_progress(line):
    """On a terminal, over the line before; on standard error, so that it never gets into a file"""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def print_line(line, file=None):
    """In place of the progress, to stay; `file` as in print"""
    show_progress("")
    print(line, file=file, flush=True)


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
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError):
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
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))
        with contextlib.suppress(AttributeError):
            getattr(sys, name).reconfigure(errors="replace")  # a terminal that lacks a character must not end a training
    try:
        yield
    except (ValueError, OSError, FloatingPointError, OverflowError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            error = f"{error.filename}: {error.strerror}"
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------
# The command: measure how well a model predicts a text, or let it go on with one


@torch.no_grad()
def evaluate_text(model, ids, stride):
    """
    The mean loss, in nats, over all tokens of a text but the first. Windows of context_length tokens start `stride` apart; in
    each, only what no earlier window has predicted counts, so that a token has context_length - stride before it or more.
    """
    device, context_length = model.wte.weight.device, model.config.context_length
    if len(ids) < 2 or not 0 < stride <= context_length:
        raise ValueError(f"needs a text of 2 tokens or more and a stride of 1 to {context_length}")
    ids, total, start, done = torch.tensor(ids), 0.0, 0, 0  # done: tokens that have been predicted
    while done < len(ids) - 1:
        window = ids[start : start + context_length + 1].to(device)
        n = start + len(window) - 1 - done
        logits = model(window[None, :-1])[0, -n:]  # (n, V)
        total += F.cross_entropy(logits.float(), window[-n:], reduction="sum").item()
        start, done = start + stride, done + n
        show_progress(f"{done:,} of {len(ids) - 1:,} tokens, loss {total / done:.4f}")
    return total / done


def complete(model, tokenizer, prompt, max_new_tokens, **options):
    """Print the prompt and, token by token, how the model goes on -> the number of new tokens"""
    print(prompt, end="", flush=True)
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    new_ids = model.stream(ids, max_new_tokens, eos_id=tokenizer.eot, **options)
    for n, piece in enumerate(tokenizer.decode_stream(new_ids)):  # one piece for each token, and one for the end
        print(piece, end="", flush=True)
    print()
    return n


def list_names():
    print(f"{'name':12}  {'parameters':>13}  {'download':>8}  cached in")
    for name, config in GPT2_CONFIGS.items():
        with torch.device("meta"):
            n = sum(parameter.numel() for parameter in GPT(config).parameters())
        n_bytes = 4 * (n + config.n_layer * config.context_length**2)  # the published files also hold a mask for each layer
        print(f"{name:12}  {n:13,}  {n_bytes / 1e6:5,.0f} MB  {cached_snapshot(name) or '-'}")


def main():
    parser = CommandLine(description="Continue a text with a GPT-2, or measure how well it predicts one.")
    add = parser.add_argument
    add("model", nargs="?", help=f"a folder, such as out/stories, or a name on the hub: {', '.join(HUB_NAMES)} or OWNER/NAME")
    add("--list", action="store_true", help="show the published sizes, and which are in the cache")
    add("--prompt", default="\n", help="the text to continue; - reads it from standard input")
    add("--max-new-tokens", type=int, default=200, help="how many tokens to write")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    add("--top-k", type=int, default=50, help="sample among the k likeliest tokens")
    add("--top-p", type=float, default=1.0, help="sample among the likeliest that reach this probability")
    add("--seed", type=int, default=0, help="the same seed gives the same text")
    add("--samples", type=int, default=1, help="how many continuations to write")
    add("--evaluate", type=Path, metavar="FILE", help="instead: the loss per token and the perplexity over this text")
    add("--stride", type=int, help="tokens from one window to the next in --evaluate (default: the context length)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of the weights; auto is float32 for --evaluate, else what the device does fastest")  # fmt: skip
    add("--device", type=usable_device, default=default_device(), help="cpu, cuda or mps")
    args = parser.parse_args()
    if args.list:
        return list_names()
    if args.model is None:
        parser.error("a model is needed: a folder or a name on the hub")
    if args.samples < 1:
        parser.error("--samples must be at least 1")

    auto = torch.float32 if args.evaluate else fast_dtype(args.device)
    dtype = auto if args.dtype == "auto" else getattr(torch, args.dtype)
    text = args.prompt
    if args.evaluate or text == "-":
        # Of the standard input, the last line break is not meant; so the shell, too, takes what a command writes
        data = args.evaluate.read_bytes() if args.evaluate else sys.stdin.buffer.read().removesuffix(b"\n")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.evaluate or 'standard input'}: not a UTF-8 text ({error.reason})") from None
    model, tokenizer = load_gpt2(args.model, dtype=dtype, device=args.device)

    if args.evaluate:
        ids, stride = tokenizer.encode(text), model.config.context_length if args.stride is None else args.stride
        loss = evaluate_text(model, ids, stride)
        print_line(
            f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}, over {len(ids) - 1:,} tokens "
            f"(context {model.config.context_length}, stride {stride}, {str(dtype).removeprefix('torch.')})"
        )
        return
    generator = torch.Generator(args.device).manual_seed(args.seed)
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "generator": generator}
    start, n = time.perf_counter(), 0
    for i in range(args.samples):
        if args.samples > 1:
            print(f"--- {i + 1} of {args.samples}")
        n += complete(model, tokenizer, text, args.max_new_tokens, **options)
    print(f"\n{n} tokens, {n / (time.perf_counter() - start):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main()
