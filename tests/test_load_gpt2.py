import io
import json
import math
import random
import re
import shutil
import struct
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import load_gpt2
from conftest import run_main
from gpt import GPT, GPTConfig, Tokenizer
from load_gpt2 import DTYPES, load_gpt2 as load, read_safetensors, save_gpt2, write_safetensors

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "tiny-gpt2"


run = partial(run_main, load_gpt2)


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors


def test_bytes_are_those_of_the_format(tmp_path):
    write_safetensors(
        tmp_path / "x",
        {"a": torch.tensor([[1, 2], [3, 4]], dtype=torch.int16), "b": torch.tensor(1.5)},
    )
    content = (tmp_path / "x").read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    assert json.loads(content[8 : 8 + n]) == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "I16", "shape": [2, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [8, 12]},
    }
    assert n % 8 == 0 and content[8 + n :] == struct.pack("<4hf", 1, 2, 3, 4, 1.5)


def test_all_dtypes_come_back(tmp_path):
    tensors = {name: torch.arange(-3, 9).view(3, 4).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(3.25),
        "transposed": torch.arange(6.0).view(2, 3).T,
    }
    write_safetensors(tmp_path / "x", tensors)
    back = read_safetensors(tmp_path / "x")
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    write_safetensors(tmp_path / "y", tensors)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_numbers_may_start_at_odd_bytes(tmp_path):
    write_safetensors(
        tmp_path / "x", {"a": torch.ones(3, dtype=torch.uint8), "b": torch.tensor([1.5, -2.5])}
    )
    assert read_safetensors(tmp_path / "x")["b"].tolist() == [1.5, -2.5]


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    write_safetensors(tmp_path / "x", {"a": torch.zeros(3)})
    read_safetensors(tmp_path / "x")["a"].fill_(1)
    assert read_safetensors(tmp_path / "x")["a"].tolist() == [0, 0, 0]


def safetensors_bytes(header, n_data):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + bytes(n_data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        safetensors_bytes(b"{}" + b" " * 2**20, 0),
        safetensors_bytes(b"\xff\xff", 0),
        safetensors_bytes(b"[" * 100_000, 0),
        safetensors_bytes([], 0),
        safetensors_bytes({"a": 1}, 0),
        safetensors_bytes({"a": {}}, 0),
        safetensors_bytes(b'{"a": {}, "a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
        safetensors_bytes({"a": entry()}, 7),
        safetensors_bytes({"a": entry()}, 9),
        safetensors_bytes({"a": entry(dtype="F33")}, 8),
        safetensors_bytes({"a": entry(dtype=["F32"])}, 8),
        safetensors_bytes({"a": entry(shape=(3,))}, 8),
        safetensors_bytes({"a": entry(shape=(-1, -2))}, 8),
        safetensors_bytes({"a": entry(shape=(2.0,))}, 8),
        safetensors_bytes({"a": entry(shape=(2**62, 2**62, 0))}, 8),
        safetensors_bytes({"a": entry(shape=[1] * 9, offsets=(0, 4))}, 4),
        safetensors_bytes({"a": entry(shape=2)}, 8),
        safetensors_bytes({"a": entry(offsets=(0,))}, 8),
        safetensors_bytes({"a": entry(offsets=(0, 8, 8))}, 8),
        safetensors_bytes({"a": entry(offsets=(-8, 0))}, 8),
        safetensors_bytes({"a": entry(offsets=(0, 2**70))}, 8),
        safetensors_bytes({"a": entry(offsets="ab")}, 8),
        safetensors_bytes({"a": entry(offsets=(4, 12))}, 12),
        safetensors_bytes({"a": entry(), "b": entry()}, 8),
        safetensors_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, 12),
        safetensors_bytes({"a": entry(), "b": entry(offsets=(12, 20))}, 20),
    ],
)
def test_damaged_safetensors_are_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path / "x")):
        read_safetensors(tmp_path / "x")


def mutate(content, rng):
    """A valid file, changed a little: in its length field, in the text of its header, in the header's values, or anywhere"""
    n = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + n], content[8 + n :]
    kind = rng.randrange(8)
    if kind == 0:
        return (
            struct.pack(
                "<Q", rng.choice([0, 1, n - 1, n + 1, n + 8, len(content), 2**31, 2**63, 2**64 - 1])
            )
            + content[8:]
        )
    if kind == 1:
        return (
            content[: rng.randrange(len(content))]
            if rng.random() < 0.5
            else content + bytes(rng.randrange(1, 9))
        )
    if kind == 2:
        at = rng.randrange(len(content))
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if kind == 3:  # a piece of the header elsewhere in it, or twice, or gone
        a, b, c = sorted(rng.randrange(n + 1) for _ in range(3))
        header = rng.choice(
            [
                header[:a] + header[b:c] + header[a:],
                header[:a] + header[c:],
                header[:c] + header[a:],
            ]
        )
    elif kind == 4:  # another number
        number = rng.choice([0, 1, -1, 7, 8, 2**31, 2**63, 2**64, 10**30, 1.5, 1e999])
        places = [m.span() for m in re.finditer(rb"\d+", header)]
        a, b = rng.choice(places)
        header = header[:a] + json.dumps(number).encode() + header[b:]
    elif kind == 5:  # another value
        entries = json.loads(header)
        key = rng.choice(sorted(entries.keys() - {"__metadata__"}))
        value = [
            None,
            [],
            {},
            "F32",
            "F8_E4M3",
            "U64",
            [0, 8],
            [8, 0],
            [2, 2],
            [[1]],
            True,
            "x" * 1000,
            [1] * 9,
            [0] * 3,
        ]
        value = rng.choice(value)
        if rng.random() < 0.3:
            entries[rng.choice([key, "", "a/../b"])] = value
        else:
            entries[key][rng.choice(["dtype", "shape", "data_offsets", "more"])] = value
        header = json.dumps(entries).encode()
    elif kind == 6:  # the data of two tensors exchanged or overlapping
        entries = json.loads(header)
        a, b = rng.sample(sorted(entries.keys() - {"__metadata__"}), 2)
        field = rng.choice(["shape", "data_offsets", "dtype"])
        entries[a][field], entries[b][field] = entries[b][field], entries[a][field]
        header = json.dumps(entries).encode()
    else:  # deep or long
        header = rng.choice(
            [b"[", b'{"a":', b"[[],", b"1", b'"', b'{"a":{}},', b" "]
        ) * 10 ** rng.randrange(1, 6)
    return struct.pack("<Q", len(header)) + header + data


def read_slowly(content):
    """What a valid file holds, by other means: {name: (dtype, shape, bytes)}"""
    (n,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + n])
    entries.pop("__metadata__", None)
    begin_end = {name: entry["data_offsets"] for name, entry in entries.items()}
    data = {name: content[8 + n :][begin:end] for name, (begin, end) in begin_end.items()}
    return {name: (entry["dtype"], entry["shape"], data[name]) for name, entry in entries.items()}


def test_fuzz(tmp_path):
    """2,000 damaged files: each is either read rightly or refused, in little time and memory"""
    resource = pytest.importorskip("resource")  # not on Windows
    rng, path, n_read = random.Random(0), tmp_path / "x", 0
    tensors = {
        f"h.{i}.{name}": torch.randn(3, 4).to(dtype)
        for i, (name, dtype) in enumerate(DTYPES.items())
    }
    write_safetensors(path, tensors | {"empty": torch.empty(0, 3), "scalar": torch.tensor(1.0)})
    original, idle = path.read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):
        content = mutate(original, rng)
        path.write_bytes(content)
        start = time.perf_counter()
        try:
            tensors = read_safetensors(path)
        except ValueError as error:
            assert str(path) in str(error) and len(str(error)) < 1000
        else:
            n_read += 1
            expected = read_slowly(content)
            assert tensors.keys() == expected.keys()
            for name, (dtype, shape, raw) in expected.items():
                assert tensors[name].dtype == DTYPES[dtype] and list(tensors[name].shape) == shape
                assert tensors[name].flatten().view(torch.uint8).numpy().tobytes() == raw
        assert time.perf_counter() - start < 1
    assert 100 < n_read < 1500
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) * (
        1 if sys.platform == "darwin" else 1024
    ) < 200e6


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_load_save_load_is_the_identity(tmp_path):
    model, tokenizer = load(TINY)
    save_gpt2(model, tokenizer, tmp_path)
    again, tokenizer_again = load(tmp_path)
    assert again.config == model.config and tokenizer_again.merges == tokenizer.merges
    for (name, a), (name_again, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == name_again and torch.equal(a, b)
    # What transformers wrote comes out with the same names and bytes
    original, saved = (
        read_safetensors(folder / "model.safetensors") for folder in (TINY, tmp_path)
    )
    assert original.keys() == saved.keys() and all(
        torch.equal(original[name], saved[name]) for name in saved
    )
    assert not list(tmp_path.glob("*.part"))


def test_dtype_and_mode():
    model, _ = load(TINY, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {
        torch.bfloat16
    } and not model.training


def test_a_loaded_model_can_be_trained_and_has_one_table():
    model, _ = load(TINY)
    ids = torch.randint(0, 320, (2, 8))
    before = model(ids, ids).item()
    model(ids, ids).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    assert model(ids, ids).item() < before
    assert load(TINY)[0](ids, ids).item() == pytest.approx(before)


def test_original_names_mask_buffers_and_head(tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    tensors = {
        name.removeprefix("transformer."): t
        for name, t in read_safetensors(TINY / "model.safetensors").items()
    }
    tensors |= {
        "h.0.attn.bias": torch.ones(1, 1, 48, 48),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    write_safetensors(tmp_path / "model.safetensors", tensors)
    ids = torch.arange(10)[None]
    assert torch.equal(load(tmp_path)[0](ids), load(TINY)[0](ids))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text("utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def change_weights(folder, **changes):
    tensors = read_safetensors(folder / "model.safetensors") | changes
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    write_safetensors(folder / "model.safetensors", tensors)


def shard(folder, **changes):
    """Cut the weights of a folder in two files with an index, as transformers does with large models"""
    tensors = {
        name: tensor.clone()
        for name, tensor in read_safetensors(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    names, weight_map = list(tensors), {}
    for i, part in enumerate((names[:10], names[10:]), start=1):
        write_safetensors(
            folder / f"model-0000{i}-of-00002.safetensors", {name: tensors[name] for name in part}
        )
        weight_map |= dict.fromkeys(part, f"model-0000{i}-of-00002.safetensors")
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map | changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def test_shards(tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    shard(tmp_path)
    ids = torch.arange(10)[None]
    assert torch.equal(load(tmp_path)[0](ids), load(TINY)[0](ids))


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "a/b.safetensors",
        "..",
        "/etc/passwd",
        "..\\x.safetensors",
        "x.bin",
        "",
        5,
        None,
        {},
    ],
)
def test_names_of_shards_stay_in_the_folder(tmp_path, name):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    shard(tmp_path, **{"transformer.wte.weight": name})
    with pytest.raises(ValueError, match="is no name of a shard"):
        load(tmp_path)


def test_shards_hold_what_the_index_says(tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    shard(tmp_path, **{"transformer.wte.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(
        ValueError, match="model-00001-of-00002.safetensors: holds other tensors than"
    ):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [False, True])
def test_round_trip_in_every_dtype(tmp_path, dtype, sharded):
    model, tokenizer = load(TINY)
    for folder in ("a", "b"):
        save_gpt2(model, tokenizer, tmp_path / folder, dtype=dtype)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("a", "b")]
    assert files[0] == files[1]
    if sharded:
        shard(tmp_path / "a")
    as_in_file = load(tmp_path / "a", dtype=None)[0]
    for (name, weight), loaded, in_file in zip(
        model.state_dict().items(),
        load(tmp_path / "a")[0].parameters(),
        as_in_file.parameters(),
        strict=True,
    ):
        assert in_file.dtype == dtype and torch.equal(in_file, weight.to(dtype))
        assert loaded.dtype == torch.float32 and torch.equal(loaded, weight.to(dtype).float())
    save_gpt2(as_in_file, tokenizer, tmp_path / "c", dtype=dtype)
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == files[0]


def test_weights_are_the_mapped_file_and_not_copies(tmp_path):
    """Also where the header leaves them at an odd place, as in the files that OpenAI's weights were published in"""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    content = (TINY / "model.safetensors").read_bytes()
    n = struct.unpack("<Q", content[:8])[0]
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", n + 1) + content[8 : 8 + n] + b" " + content[8 + n :]
    )
    model, ids = load(tmp_path)[0], torch.arange(10)[None]
    places = [parameter.data_ptr() for parameter in model.parameters()]
    assert max(places) - min(places) < len(content) and all(place % 4 == 1 for place in places)
    assert torch.equal(model(ids), load(TINY)[0](ids))
    model(ids, ids).backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()


def test_whole_numbers_are_no_weights(tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    change_weights(tmp_path, **{"transformer.wte.weight": torch.zeros(320, 24, dtype=torch.int8)})
    with pytest.raises(ValueError, match="wte.weight has whole numbers"):
        load(tmp_path)


def test_ids_of_vocab_json(tmp_path):
    """Tokenizers that were trained with Hugging Face's library often have their special tokens first."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    usual = Tokenizer.load(TINY)
    vocab = {"<s>": 0, "<|endoftext|>": 1, "[PAD]": 2} | {
        name: i + 3 for name, i in usual.vocab.items() if i != usual.eot
    }
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    change_config(tmp_path, vocab_size=322)
    tensors = {"transformer.wte.weight": torch.randn(322, 24)}
    change_weights(tmp_path, **tensors)
    _, tokenizer = load(tmp_path)
    text = "The old man, 12 <s> \n\n caf\u00e9"
    assert (
        tokenizer.encode(text) == [i + 3 for i in usual.encode(text)]
        and tokenizer.decode(tokenizer.encode(text)) == text
    )
    assert (
        tokenizer.eot == 1
        and tokenizer.vocab_size == 322
        and tokenizer.decode([0, 5000]) == "<s>\ufffd"
    )
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).vocab == vocab


@pytest.mark.parametrize(
    "change, message",
    [
        ({"Ġt": 256, "he": 257}, "do not follow the order"),
        ({"!": 5}, "different whole numbers"),
        ({"!": -1}, "different whole numbers"),
        ({"!": "0"}, "different whole numbers"),
        ({"zzz": 320}, "no merge makes 'zzz'"),
    ],
)
def test_vocab_json_must_fit_the_merges(tmp_path, change, message):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    vocab = json.loads((TINY / "vocab.json").read_text("utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | change), "utf-8")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_gpt2_without_tokenizer_files_has_gpt2s_own(tmp_path):
    model = GPT(GPTConfig(context_length=8, n_layer=1, n_head=1, n_embd=4))
    save_gpt2(model, Tokenizer.gpt2(), tmp_path)
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "vocab.json").unlink()
    assert load(tmp_path)[1].encode("Hello, I am") == [15496, 11, 314, 716]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors in it; pickles"),
        (lambda f: (f / "merges.txt").unlink(), "merges.txt: No such file"),
        (lambda f: (f / "vocab.json").unlink(), "vocab.json: No such file"),
        (
            lambda f: [(f / name).unlink() for name in ("merges.txt", "vocab.json")],
            "no merges.txt and no tokenizer.json",
        ),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text(" " * 2**20 + "{}"), "bytes are too many"),
        (lambda f: change_config(f, n_embd=[24]), "n_embd=[24] is no size"),
        (lambda f: change_config(f, n_layer=2**23), "n_layer=8388608 is no size"),
        (lambda f: change_config(f, reorder_and_upcast_attn=True), "reorder_and_upcast_attn=True"),
        (lambda f: change_config(f, add_cross_attention=True), "add_cross_attention=True"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
        (lambda f: change_config(f, model_type="llama"), "model_type"),
        (lambda f: change_config(f, n_head=5), "n_embd=24 does not divide into n_head=5"),
        (lambda f: change_config(f, n_layer="two"), "n_layer='two' is no size"),
        (lambda f: change_config(f, n_layer=3), "h.2.ln_1.weight is missing"),
        (lambda f: change_config(f, n_layer=1), "h.1.attn.c_attn.bias is no part of the model"),
        (lambda f: change_config(f, n_positions=64), "wpe.weight is [48, 24]"),
        (
            lambda f: change_config(f, vocab_size=300),
            "320 tokens do not fit a model with vocab_size=300",
        ),
        (lambda f: change_config(f, vocab_size=321), "wte.weight is [320, 24]"),
        (lambda f: change_config(f, activation_function="gelu"), "activation_function=gelu"),
        (lambda f: change_config(f, tie_word_embeddings=False), "tie_word_embeddings=False"),
        (
            lambda f: change_config(f, scale_attn_by_inverse_layer_idx=True),
            "scale_attn_by_inverse_layer_idx=True",
        ),
        (lambda f: change_config(f, n_inner=100), "n_inner=100"),
        (
            lambda f: change_weights(f, **{"lm_head.weight": torch.zeros(320, 24)}),
            "lm_head.weight is not wte.weight",
        ),
        (lambda f: change_weights(f, **{"transformer.ln_f.bias": None}), "ln_f.bias is missing"),
        (
            lambda f: change_weights(
                f, **{"transformer.h.0.mlp.c_fc.weight": torch.zeros(1, 24, 96)}
            ),
            "c_fc.weight is [1, 24, 96]",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (TINY / "model.safetensors").read_bytes()[:-1]
            ),
            "model.safetensors",
        ),
    ],
)
@pytest.mark.filterwarnings("error")  # which would be another line
def test_damaged_folders_are_one_line_and_exit_code_2(
    monkeypatch, capsys, tmp_path, damage, message
):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    code, _, error = run(monkeypatch, capsys, tmp_path)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_command_continues_a_prompt(monkeypatch, capsys):
    model, tokenizer = load(TINY, dtype=load_gpt2.fast_dtype("cpu"))
    code, out, error = run(
        monkeypatch, capsys, TINY, "--prompt", "The old", "--max-new-tokens", 20, "--temperature", 0
    )
    (ids,) = model.generate([tokenizer.encode("The old")], 20, temperature=0, eos_id=tokenizer.eot)
    assert code == 0 and out == "The old" + tokenizer.decode(ids) + "\n"
    assert f"{len(ids)} tokens, " in error and "tokens/s" in error


def test_samples_are_seeded(monkeypatch, capsys):
    def samples(*args):
        code, out, _ = run(
            monkeypatch,
            capsys,
            TINY,
            "--prompt",
            "The old",
            "--max-new-tokens",
            8,
            "--dtype",
            "float32",
            *args,
        )
        assert code == 0
        return out

    first = samples("--samples", 2, "--seed", 3)
    head, one, two = re.split(r"--- \d of 2\n", first)
    assert (
        head == ""
        and one != two
        and one == samples("--seed", 3)
        and first == samples("--samples", 2, "--seed", 3)
    )
    assert one.startswith("The old") and two.startswith("The old") and one != samples("--seed", 4)
    # Only one token is left to choose from
    assert samples("--top-k", 1) == samples("--top-p", 1e-6) == samples("--temperature", 0)


@pytest.mark.parametrize(
    "given, prompt",
    [(b"The old", "The old"), ("na\u00efve\r\n\n".encode(), "na\u00efve\r\n"), (b"", "")],
)
def test_prompt_from_standard_input(monkeypatch, capsys, given, prompt):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    _, out, _ = run(monkeypatch, capsys, TINY, "--prompt", "-", "--max-new-tokens", 5)
    assert out == run(monkeypatch, capsys, TINY, "--prompt", prompt, "--max-new-tokens", 5)[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    code, _, error = run(monkeypatch, capsys, TINY, "--prompt", "-")
    assert code == 2 and "error: standard input: not a UTF-8 text" in error


@pytest.mark.parametrize("stride", [1, 7, 47, 48, None])
def test_evaluate(monkeypatch, capsys, tmp_path, stride):
    """Against one token at a time, each with just the context that the windows give it"""
    text = (ROOT / "data" / "stories.txt").read_text("utf-8")[:400]
    (tmp_path / "text.txt").write_text(text, "utf-8")
    model, tokenizer = load(TINY)
    ids, total = tokenizer.encode(text), 0.0
    for i in range(1, len(ids)):
        start = next(start for start in range(0, len(ids), stride or 48) if i <= start + 48)
        with torch.no_grad():
            total -= model(torch.tensor([ids[start:i]]))[0, -1].log_softmax(-1)[ids[i]].item()
    loss = total / (len(ids) - 1)
    args = [] if stride is None else ["--stride", stride]
    code, out, error = run(monkeypatch, capsys, TINY, "--evaluate", tmp_path / "text.txt", *args)
    assert code == 0 and error == ""
    expected = f"over {len(ids) - 1:,} tokens (context 48, stride {stride or 48}, float32)\n"
    assert out.startswith(f"loss {loss:.4f} nats per token, perplexity ") and out.endswith(expected)
    assert float(re.search(r"perplexity ([\d.]+)", out)[1]) == pytest.approx(
        math.exp(loss), abs=0.006
    )


def test_evaluate_a_long_text_in_bfloat16(monkeypatch, capsys, tmp_path):
    """Longer than a window by one token, and in steps"""
    (tmp_path / "text.txt").write_text(
        (ROOT / "data" / "stories.txt").read_text("utf-8")[:20_000], "utf-8"
    )
    args = [TINY, "--evaluate", tmp_path / "text.txt", "--stride", 40]
    losses = [
        float(run(monkeypatch, capsys, *args, "--dtype", dtype)[1].split()[1])
        for dtype in ("float32", "bfloat16")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_a_vocabulary_that_is_larger_than_the_tokenizer(monkeypatch, capsys, tmp_path):
    """Rows of padding in wte, as GPUs like them, have no text; they are shown as U+FFFD."""
    torch.manual_seed(0)
    save_gpt2(
        GPT(GPTConfig(5000, context_length=64, n_layer=1, n_head=1, n_embd=8)),
        Tokenizer([]),
        tmp_path,
    )
    code, out, _ = run(monkeypatch, capsys, tmp_path, "--top-k", 5000, "--max-new-tokens", 30)
    assert code == 0 and "\ufffd" in out


def test_help_shows_every_option(monkeypatch, capsys):
    code, output, _ = run(monkeypatch, capsys, "--help")
    options = "list prompt max-new-tokens temperature top-k top-p seed samples evaluate stride dtype device".split()
    assert code == 0 and all("--" + option in output for option in options) and "None" not in output


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["no-such-folder"],
            "no-such-folder is not a folder; names on the hub are distilgpt2, gpt2, ",
        ),
        ([TINY, "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        ([TINY, "--evaluate", "no-such.txt"], "no-such.txt: No such file"),
        ([TINY, "--evaluate", TINY / "model.safetensors"], "model.safetensors: not a UTF-8 text"),
        ([TINY, "--evaluate", TINY / "merges.txt", "--stride", 0], "stride of 1 to 48"),
        ([TINY, "--evaluate", TINY / "merges.txt", "--stride", 49], "stride of 1 to 48"),
        ([TINY, "--samples", 0], "--samples"),
        ([TINY, "--top-p", 2], "top_p"),
        ([TINY, "--prompt", "word " * 100], "it must have 1 to 48"),
        ([TINY, "--top-k", "0"], "top_k"),
        ([TINY, "--top-k", "x"], "--top-k"),
        ([TINY, "--device", "abacus"], "abacus is not a device of this machine"),
        ([], "a model is needed: a folder or a name on the hub"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(monkeypatch, capsys, args, message):
    code, _, error = run(monkeypatch, capsys, *args)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_bytes_of_a_character_are_printed_together(monkeypatch, capsys, tmp_path):
    """A vocabulary of single bytes: what is streamed, byte by byte, must read as if it had been decoded in one go."""
    torch.manual_seed(0)
    tokenizer = Tokenizer([])
    model = GPT(GPTConfig(vocab_size=257, context_length=64, n_layer=1, n_head=1, n_embd=8))
    save_gpt2(model, tokenizer, tmp_path)
    model = load(tmp_path, dtype=load_gpt2.fast_dtype("cpu"))[0]
    _, out, _ = run(
        monkeypatch, capsys, tmp_path, "--prompt", "🙂", "--max-new-tokens", 300, "--top-k", 257
    )
    (ids,) = model.generate(
        [tokenizer.encode("🙂")],
        300,
        temperature=0.8,
        top_k=257,
        top_p=1.0,
        eos_id=256,
        generator=torch.Generator().manual_seed(0),
    )
    assert out == "🙂" + tokenizer.decode(ids) + "\n"
    assert "\ufffd" in out and any(
        char > "\x7f" and char != "\ufffd" for char in out[1:]
    )  # broken characters and whole ones
