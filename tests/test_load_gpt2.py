import json
import math
import multiprocessing
import os
import random
import re
import shutil
import struct
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_main

import load_gpt2
from gpt import END_OF_TEXT, GPT, GPTConfig, Tokenizer
from load_gpt2 import (
    DTYPES,
    atomic_write,
    read_safetensors,
    save_folder,
    save_gpt2,
    stream_text,
    write_json,
    write_safetensors,
)
from load_gpt2 import load_gpt2 as load

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "tiny-gpt2"
SENTENCE = "The old man, 12 <s> \n\n café"

run = partial(run_main, load_gpt2)


# --------------------------------------------------------------------------------------------------
# Safetensors


def test_bytes_are_those_of_the_format(tmp_path):
    write_safetensors(
        tmp_path / "x",
        {"a": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), "b": torch.tensor(1.5)},
    )
    content = (tmp_path / "x").read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    assert json.loads(content[8 : 8 + n]) == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "I32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [16, 20]},
    }
    assert n % 8 == 0 and content[8 + n :] == struct.pack("<4if", 1, 2, 3, 4, 1.5)


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
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    write_safetensors(tmp_path / "y", tensors)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_writing_replaces_a_file_whole_or_not_at_all(tmp_path):
    def fail():
        raise KeyboardInterrupt

    write_safetensors(tmp_path / "x", {"a": torch.zeros(3)})
    bad = SimpleNamespace(nbytes=4, dtype=torch.float32, shape=(1,), detach=fail)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "x", {"a": torch.ones(3), "b": bad})
    assert read_safetensors(tmp_path / "x")["a"].tolist() == [0, 0, 0]
    assert os.listdir(tmp_path) == ["x"]


def test_complete_file(tmp_path):
    path = tmp_path / "x"
    with atomic_write(path) as part:
        part.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(KeyError), atomic_write(path) as part:
        part.write_text("tw")
        raise KeyError
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["x"]


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


TWICE = b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, '
TWICE += b'"a": {"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        safetensors_bytes(b"\xff\xff", 0),
        safetensors_bytes(b"[" * 100_000, 0),
        safetensors_bytes([], 0),
        safetensors_bytes({"a": 1}, 0),
        safetensors_bytes({"a": {}}, 0),
        safetensors_bytes(TWICE, 16),
        safetensors_bytes({"a": entry()}, 7),
        safetensors_bytes({"a": entry()}, 9),
        safetensors_bytes({"a": entry(dtype="F33")}, 8),
        safetensors_bytes({"a": entry(dtype=["F32"])}, 8),
        safetensors_bytes({"a": entry(shape=(3,))}, 8),
        safetensors_bytes({"a": entry(shape=(-1, -2))}, 8),
        safetensors_bytes({"a": entry(shape=(2.0,))}, 8),
        safetensors_bytes({"a": entry(shape=(2**62, 2**62, 0))}, 8),
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
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "x"))):
        read_safetensors(tmp_path / "x")


ODD_VALUES = [
    *(None, [], {}, "F32", "F8_E4M3", "U64", [0, 8], [8, 0], [2, 2], [[1]], True),
    *("x" * 1000, [1] * 9, [0] * 3),
]


def mutate(content, rng):
    """A valid file, changed a little: its length field, its header, values in it, or anywhere."""
    n = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + n], content[8 + n :]
    kind = rng.randrange(9)
    if kind == 0:  # another length
        lengths = [0, 1, n - 1, n + 1, n + 8, len(content), 2**31, 2**63, 2**64 - 1]
        return struct.pack("<Q", rng.choice(lengths)) + content[8:]
    if kind == 1:
        return content[: rng.randrange(len(content))]
    if kind == 2:
        return content + bytes(rng.randrange(1, 9))
    if kind == 3:  # another byte
        at = rng.randrange(len(content))
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if kind == 4:  # a piece of the header elsewhere in it, or gone, or twice
        a, b, c = sorted(rng.randrange(n + 1) for _ in range(3))
        moved = header[:a] + header[b:c] + header[a:]
        header = rng.choice([moved, header[:a] + header[c:], header[:c] + header[a:]])
    elif kind == 5:  # another number
        number = rng.choice([0, 1, -1, 7, 8, 2**31, 2**63, 2**64, 10**30, 1.5, 1e999])
        a, b = rng.choice([match.span() for match in re.finditer(rb"\d+", header)])
        header = header[:a] + json.dumps(number).encode() + header[b:]
    elif kind == 6:  # another value
        entries = json.loads(header)
        key = rng.choice(sorted(entries.keys() - {"__metadata__"}))
        if rng.random() < 0.3:
            entries[rng.choice([key, "", "a/../b"])] = rng.choice(ODD_VALUES)
        else:
            field = rng.choice(["dtype", "shape", "data_offsets", "more"])
            entries[key][field] = rng.choice(ODD_VALUES)
        header = json.dumps(entries).encode()
    elif kind == 7:  # two tensors exchange a value
        entries = json.loads(header)
        a, b = rng.sample(sorted(entries.keys() - {"__metadata__"}), 2)
        field = rng.choice(["shape", "data_offsets", "dtype"])
        entries[a][field], entries[b][field] = entries[b][field], entries[a][field]
        header = json.dumps(entries).encode()
    else:  # deep or long
        piece = rng.choice([b"[", b'{"a":', b"[[],", b"1", b'"', b'{"a":{}},', b" "])
        header = piece * 10 ** rng.randrange(1, 6)
    return struct.pack("<Q", len(header)) + header + data


def read_slowly(content):
    """What a valid file holds, by other means: {name: (dtype, shape, bytes)}"""
    (n,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + n])
    entries.pop("__metadata__", None)
    data = content[8 + n :]
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in entries.items()
    }


def test_fuzz(tmp_path):
    """500 changed files: each is either read as it is or refused, in little memory."""
    resource = pytest.importorskip("resource")  # not on Windows
    rng = random.Random(0)
    path = tmp_path / "x"
    tensors = {f"h.{name}": torch.randn(3, 4).to(dtype) for name, dtype in DTYPES.items()}
    write_safetensors(path, tensors | {"empty": torch.empty(0, 3), "scalar": torch.tensor(1.0)})
    original = path.read_bytes()
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n_read = 0
    for _ in range(500):
        content = mutate(original, rng)
        path.write_bytes(content)
        try:
            tensors = read_safetensors(path)
        except ValueError as error:
            assert str(path) in str(error)
            assert len(str(error)) < 1000
            continue
        n_read += 1
        expected = read_slowly(content)
        assert tensors.keys() == expected.keys()
        for name, (dtype, shape, raw) in expected.items():
            assert tensors[name].dtype == DTYPES[dtype]
            assert list(tensors[name].shape) == shape
            assert tensors[name].flatten().view(torch.uint8).numpy().tobytes() == raw
    assert 50 < n_read < 400
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle
    assert grown * (1 if sys.platform == "darwin" else 1024) < 200e6  # bytes


# --------------------------------------------------------------------------------------------------
# Folders


def same_weights(a, b):
    """Same names, same order, same bits"""
    names = list(a.state_dict())
    return names == list(b.state_dict()) and all(
        torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in names
    )


def test_load_save_load_is_the_identity(tmp_path):
    model, tokenizer = load(TINY)
    save_gpt2(model, tokenizer, tmp_path)
    again, tokenizer_again = load(tmp_path)
    assert again.config == model.config
    assert tokenizer_again.merges == tokenizer.merges
    assert tokenizer_again.vocab == tokenizer.vocab
    assert same_weights(again, model)
    # The names and bits are those that transformers wrote
    original = read_safetensors(TINY / "model.safetensors")
    saved = read_safetensors(tmp_path / "model.safetensors")
    assert original.keys() == saved.keys()
    assert all(torch.equal(original[name], saved[name]) for name in saved)
    names = {"config.json", "model.safetensors", "merges.txt", "vocab.json"}
    assert set(os.listdir(tmp_path)) == names | {"tokenizer_config.json"}


def test_config_json_says_what_was_computed(tmp_path):
    save_gpt2(*load(TINY), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    theirs = json.loads((TINY / "config.json").read_text("utf-8"))
    for key in ("model_type", "vocab_size", "n_positions", "n_layer", "n_head", "n_embd"):
        assert config[key] == theirs[key]
    for key in ("activation_function", "layer_norm_epsilon", "bos_token_id", "eos_token_id"):
        assert config[key] == theirs[key]


def test_dtype_and_mode():
    model, _ = load(TINY, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_a_loaded_model_can_be_trained_and_leaves_the_file_alone():
    model, _ = load(TINY)
    ids = torch.arange(16).view(2, 8)
    before = model(ids, ids).item()
    model(ids, ids).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    assert model(ids, ids).item() < before
    assert load(TINY)[0](ids, ids).item() == pytest.approx(before)


def test_a_model_can_be_saved_into_its_own_folder(tmp_path):
    """Its weights are the mapped file that is replaced."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    model, tokenizer = load(tmp_path)
    with torch.no_grad():
        model.ln_f.bias += 1
    save_gpt2(model, tokenizer, tmp_path)
    assert same_weights(load(tmp_path)[0], model)
    assert torch.equal(model.ln_f.bias, load(TINY)[0].ln_f.bias + 1)


def stop_in_child(monkeypatch, place, n_calls):
    """End this process, as kill -9 does, at a call of Tokenizer.save or of os.replace."""
    owner, name = {"tokenizer": (Tokenizer, "save"), "replace": (os, "replace")}[place]
    original = getattr(owner, name)
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == n_calls:
            os._exit(9)
        return original(*args)

    monkeypatch.setattr(owner, name, stop)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("place, n_calls", [("tokenizer", 1), ("replace", 1), ("replace", 3)])
def test_killed_while_saving(monkeypatch, tmp_path, place, n_calls):
    """Every file stays whole, and the folder opens."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    old, tokenizer = load(TINY)
    new = load(TINY)[0]
    with torch.no_grad():
        new.wpe.weight += 1

    def save_and_die():
        stop_in_child(monkeypatch, place, n_calls)
        save_gpt2(new, tokenizer, tmp_path)

    process = multiprocessing.get_context("fork").Process(target=save_and_die)
    process.start()
    process.join(timeout=30)
    assert process.exitcode == 9
    found = load(tmp_path)[0]
    assert same_weights(found, old) or (n_calls > 1 and same_weights(found, new))
    save_gpt2(new, tokenizer, tmp_path)
    assert same_weights(load(tmp_path)[0], new)


def test_an_error_while_saving_leaves_the_old_files(monkeypatch, tmp_path):
    def fail(self, folder):
        raise KeyboardInterrupt

    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model, tokenizer = load(TINY, dtype=torch.bfloat16)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tokenizer, "save", fail)
        save_gpt2(model, tokenizer, tmp_path)
    files = [path for path in tmp_path.iterdir() if path.name != ".part"]
    assert before == {path.name: path.read_bytes() for path in files}
    # The next save uses the folder of new files, and removes it
    save_gpt2(model, tokenizer, tmp_path)
    assert not (tmp_path / ".part").exists()
    assert same_weights(load(tmp_path, dtype=None)[0], model)


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_are_str_or_path(tmp_path, kind):
    model, tokenizer = load(kind(TINY))
    save_gpt2(model, tokenizer, kind(tmp_path / "a" / "b"))  # makes the folders
    assert same_weights(load(kind(tmp_path / "a" / "b"))[0], model)
    config = {"model_type": "gpt2", "n_positions": 48}
    save_folder(kind(tmp_path / "c"), model.state_dict(), tokenizer, config)
    assert json.loads((tmp_path / "c" / "config.json").read_text("utf-8")) == config
    weights = read_safetensors(kind(tmp_path / "c" / "model.safetensors"))
    assert torch.equal(weights["h.0.attn.c_attn.weight"].t(), model.h[0].attn.c_attn.weight)
    write_safetensors(kind(tmp_path / "x"), {"a": torch.ones(2)})
    assert read_safetensors(kind(tmp_path / "x"))["a"].tolist() == [1, 1]
    write_json(kind(tmp_path / "y"), {"é": 1})
    assert json.loads((tmp_path / "y").read_text("utf-8")) == {"é": 1}


def test_a_folder_that_is_half_replaced_does_not_load(monkeypatch, tmp_path):
    """It could have new weights and an old vocabulary."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    replace = os.replace

    def killed(source, target):
        if Path(target) == tmp_path / "vocab.json":
            raise KeyboardInterrupt
        replace(source, target)

    model, tokenizer = load(TINY)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        save_gpt2(model, tokenizer, tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json"):
        load(tmp_path)
    save_gpt2(model, tokenizer, tmp_path)
    assert same_weights(load(tmp_path)[0], model)


@pytest.mark.parametrize("kind", [str, Path])
def test_readers_of_a_folder_take_str_or_path(tmp_path, kind):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    assert load_gpt2.read_json(kind(tmp_path / "config.json"))["n_embd"] == 24
    assert load_gpt2.read_config(kind(tmp_path / "config.json")).n_embd == 24
    assert load_gpt2.read_tokenizer(kind(tmp_path), 320).eot == 319
    assert "transformer.wte.weight" in load_gpt2.read_weights(kind(tmp_path))
    shard(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    assert len(set(load_gpt2.read_weight_map(kind(index)).values())) == 2
    assert "transformer.wte.weight" in load_gpt2.read_weights(kind(tmp_path))


def test_original_names_mask_buffers_and_head(tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    weights = read_safetensors(TINY / "model.safetensors")
    tensors = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 48, 48, dtype=torch.uint8)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    write_safetensors(tmp_path / "model.safetensors", tensors)
    model = load(tmp_path)[0]
    assert same_weights(model, load(TINY)[0])
    assert "lm_head.weight" not in model.state_dict()


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text("utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def change_weights(folder, **changes):
    tensors = read_safetensors(folder / "model.safetensors") | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_safetensors(folder / "model.safetensors", tensors)


def change_vocab(folder, changes):
    vocab = json.loads((folder / "vocab.json").read_text("utf-8")) | changes
    vocab = {name: token_id for name, token_id in vocab.items() if token_id is not None}
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")


def shard(folder, **changes):
    """Cut the weights of a folder into two files with an index, as transformers does."""
    tensors = read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for i, part in enumerate((names[:10], names[10:]), start=1):
        file_name = f"model-0000{i}-of-00002.safetensors"
        write_safetensors(folder / file_name, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map | changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def test_shards(tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    shard(tmp_path)
    assert same_weights(load(tmp_path)[0], load(TINY)[0])


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "a/b.safetensors", "..", "/etc/passwd", "..\\x.safetensors"),
        *("x.bin", "", 5, None, {}),
    ],
)
def test_names_of_shards_stay_in_the_folder(tmp_path, name):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    shard(tmp_path, **{"transformer.wte.weight": name})
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: "):
        load(tmp_path)


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": 5}', '{"weight_map": {}}', "{"])
def test_damaged_index(tmp_path, index):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [False, True])
def test_round_trip_in_every_dtype(tmp_path, dtype, sharded):
    model, tokenizer = load(TINY)
    converted = load(TINY, dtype=dtype)[0]
    for folder in ("a", "b"):
        save_gpt2(converted, tokenizer, tmp_path / folder)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("a", "b")]
    assert files[0] == files[1]
    if sharded:
        shard(tmp_path / "a")
    as_in_file = load(tmp_path / "a", dtype=None)[0]
    loaded = load(tmp_path / "a")[0]
    for name, weight in model.state_dict().items():
        assert as_in_file.get_parameter(name).dtype == dtype
        assert torch.equal(as_in_file.get_parameter(name), weight.to(dtype))
        assert loaded.get_parameter(name).dtype == torch.float32
        assert torch.equal(loaded.get_parameter(name), weight.to(dtype).float())
    save_gpt2(as_in_file, tokenizer, tmp_path / "c")
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == files[0]


def test_weights_are_the_mapped_file_and_not_copies(tmp_path):
    """Also where they start at an odd byte, as in the files of OpenAI's weights"""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    content = (TINY / "model.safetensors").read_bytes()
    n = struct.unpack("<Q", content[:8])[0]
    odd = struct.pack("<Q", n + 1) + content[8 : 8 + n] + b" " + content[8 + n :]
    (tmp_path / "model.safetensors").write_bytes(odd)
    model = load(tmp_path)[0]
    places = [parameter.data_ptr() for parameter in model.parameters()]
    assert max(places) - min(places) < len(content)
    assert all(place % 4 == 1 for place in places)
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids), load(TINY)[0](ids))
    model(ids, ids).backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()


# --------------------------------------------------------------------------------------------------
# Tokenizers of other programs


def to_tokenizer_json(folder, **changes):
    """Write merges.txt and vocab.json as the one file of Hugging Face's fast tokenizers."""
    lines = (folder / "merges.txt").read_text("utf-8").splitlines()[1:]
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    (folder / "merges.txt").unlink()
    (folder / "vocab.json").unlink()
    added = [{"id": vocab.pop(END_OF_TEXT), "content": END_OF_TEXT}]
    content = {
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "added_tokens": added,
        "model": {"type": "BPE", "vocab": vocab, "merges": [line.split(" ") for line in lines]},
    }
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize("merges_are_strings", [False, True])
def test_tokenizer_json(tmp_path, merges_are_strings):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    changes = {}
    if merges_are_strings:  # as older versions wrote them
        lines = (TINY / "merges.txt").read_text("utf-8").splitlines()[1:]
        changes = {"model": {"merges": lines}}
    to_tokenizer_json(tmp_path, **changes)
    expected = Tokenizer.load(TINY)
    tokenizer = load(tmp_path)[1]
    assert tokenizer.vocab == expected.vocab
    assert tokenizer.merges == expected.merges
    assert tokenizer.encode(SENTENCE) == expected.encode(SENTENCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "WordPiece"}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": {"add_prefix_space": True}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": [1]},
        {"model": {"merges": [["a"]]}},
        {"model": {"merges": 5}},
        {"model": {"vocab": {}}},
        {"added_tokens": []},
        {"added_tokens": [{"id": 5, "content": END_OF_TEXT}]},
    ],
    ids=str,
)
def test_other_kinds_of_tokenizer_json_are_refused(tmp_path, changes):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    if isinstance(changes.get("normalizer"), dict):
        changes = {"normalizer": [changes["normalizer"]]}  # None has no entries to change
    to_tokenizer_json(tmp_path, **changes)
    with pytest.raises(ValueError, match="tokenizer.json: |no merge makes the token"):
        load(tmp_path)


def test_ids_of_vocab_json(tmp_path):
    """Tokenizers that were trained with Hugging Face's library have their special tokens first."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    usual = Tokenizer.load(TINY)
    vocab = {"<s>": 0, END_OF_TEXT: 1, "[PAD]": 2}
    vocab |= {name: i + 3 for name, i in usual.vocab.items() if i != usual.eot}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    change_config(tmp_path, vocab_size=322)
    change_weights(tmp_path, **{"transformer.wte.weight": torch.randn(322, 24)})
    _, tokenizer = load(tmp_path)
    ids = tokenizer.encode(SENTENCE)
    assert ids == [i + 3 for i in usual.encode(SENTENCE)]
    assert tokenizer.decode(ids) == SENTENCE
    assert tokenizer.eot == 1
    assert tokenizer.vocab_size == 322
    assert tokenizer.decode([0, 5000]) == "<s>\ufffd"
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).vocab == vocab


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"Ġt": 256, "he": 257}, "follow the order"),
        ({"!": 5}, "ids must differ"),
        ({"!": -1}, "vocab.json: "),
        ({"!": "0"}, "vocab.json: "),
        ({"!": 0.0}, "vocab.json: "),
        ({"!": [0]}, "vocab.json: "),
        ({"<s>": 400}, "ids up to 400, but vocab_size=400"),
        ({"!": None}, "'!'"),
        ({"Ġt": None}, "'Ġt'"),
        ({END_OF_TEXT: None}, "endoftext"),
        ({"zzz": 320}, "no merge makes the token zzz"),
    ],
    ids=str,
)
def test_vocab_json_must_fit_the_merges(tmp_path, changes, message):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    change_vocab(tmp_path, changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_gpt2.read_tokenizer(tmp_path, vocab_size=400)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name, content", [("merges.txt", b"\xff"), ("vocab.json", b"\xff")])
def test_errors_name_the_tokenizer_file(tmp_path, name, content):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}/.*{name}"):
        load(tmp_path)


def test_gpt2_without_tokenizer_files_has_gpt2s_own(tmp_path):
    tokenizer = load_gpt2.read_tokenizer(tmp_path, vocab_size=50257)
    assert tokenizer.encode("Hello, I am") == [15496, 11, 314, 716]
    with pytest.raises(ValueError, match="no merges.txt"):
        load_gpt2.read_tokenizer(tmp_path, vocab_size=50258)


# --------------------------------------------------------------------------------------------------
# Damaged folders


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def config(**changes):
    return lambda folder: change_config(folder, **changes)


def weights(**changes):
    changes = {f"transformer.{name}": weight for name, weight in changes.items()}
    return lambda folder: change_weights(folder, **changes)


def cut_short(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def other_head(folder):
    change_weights(folder, **{"lm_head.weight": torch.zeros(320, 24)})


def small_table(folder):
    change_config(folder, vocab_size=300)
    change_weights(folder, **{"transformer.wte.weight": torch.zeros(300, 24)})


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove("config.json"), "config.json: No such file"),
        (remove("model.safetensors"), "model.safetensors: No such file"),
        (remove("merges.txt"), "merges.txt: No such file"),
        (remove("vocab.json"), "vocab.json: No such file"),
        (remove("merges.txt", "vocab.json"), "no merges.txt"),
        (write("config.json", "[" * 100_000), "config.json: "),
        (write("config.json", "{"), "config.json: "),
        (write("config.json", "[]"), "config.json: not a JSON object"),
        (config(model_type="llama"), "config.json: model_type=llama is not supported"),
        (config(n_embd=[24]), "config.json: "),
        (config(n_layer="two"), "config.json: "),
        (config(n_head=5), "n_embd=24 is not divisible by n_head=5"),
        (config(n_layer=3), "h.2.ln_1.weight"),
        (config(n_layer=1), "h.1.ln_1.weight"),
        (config(n_positions=64), "wpe.weight"),
        (config(n_positions=2**60), "error: "),
        (config(vocab_size=321), "wte.weight"),
        (small_table, "ids up to 319, but vocab_size=300"),
        (config(activation_function="gelu"), "config.json: activation"),
        (config(activation_function=["gelu_new"]), "activation_function=["),
        (config(layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06"),
        (config(tie_word_embeddings=False), "tie_word_embeddings=False"),
        (config(scale_attn_weights=False), "scale_attn_weights=False"),
        (config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (config(reorder_and_upcast_attn=True), "reorder_and_upcast_attn=True"),
        (config(add_cross_attention=True), "add_cross_attention=True"),
        (weights(**{"h.0.mlp.c_fc.weight": torch.zeros(24, 100)}), "h.0.mlp.c_fc.weight"),
        (other_head, "lm_head.weight differs from wte.weight"),
        (weights(**{"ln_f.bias": None}), "ln_f.bias"),
        (weights(**{"wte.weight": None}), "wte.weight"),
        (weights(**{"more.weight": torch.zeros(2)}), "more.weight"),
        (weights(**{"h.0.mlp.c_fc.weight": torch.zeros(1, 24, 96)}), "damaged"),
        (weights(**{"h.0.mlp.c_fc.weight": torch.zeros(96, 24)}), "h.0.mlp.c_fc.weight"),
        (weights(**{"wte.weight": torch.zeros(320, 24, dtype=torch.uint8)}), "floating point"),
        (cut_short, "model.safetensors: "),
    ],
)
@pytest.mark.filterwarnings("error")  # a warning would be another line
def test_damaged_folders_are_one_line(monkeypatch, capsys, tmp_path, damage, message):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    code, out, error = run(monkeypatch, capsys, tmp_path)
    assert code == 1
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert str(tmp_path) in error


def test_settings_that_change_nothing_are_accepted(tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    given = json.loads((TINY / "config.json").read_text("utf-8"))
    names = ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    few = {key: given[key] for key in names} | {"n_inner": 96, "activation_function": None}
    (tmp_path / "config.json").write_text(json.dumps(few), "utf-8")
    assert same_weights(load(tmp_path)[0], load(TINY)[0])


# --------------------------------------------------------------------------------------------------
# The command


def complete(monkeypatch, capsys, folder, *args):
    """-> what the command writes to standard output"""
    args = [folder, "--dtype", "float32", "--max-new-tokens", 8, *args]
    code, out, error = run(monkeypatch, capsys, *args)
    assert code == 0, error
    return out


def test_command_continues_a_prompt(monkeypatch, capsys):
    model, tokenizer = load(TINY)
    args = ["--prompt", "The old", "--max-new-tokens", 20, "--temperature", 0]
    code, out, error = run(monkeypatch, capsys, TINY, "--dtype", "float32", *args)
    (ids,) = model.generate([tokenizer.encode("The old")], 20, temperature=0, eos_id=tokenizer.eot)
    assert code == 0
    assert out == "The old" + tokenizer.decode(ids) + "\n"
    assert f"{len(ids)} tokens, " in error
    assert "tokens/s" in error


def test_a_seed_repeats_a_text(monkeypatch, capsys):
    text = partial(complete, monkeypatch, capsys, TINY, "--prompt", "The old")
    assert text("--seed", 3) == text("--seed", 3) != text("--seed", 4)
    # Only one token is left to choose from
    assert text("--top-k", 1) == text("--top-p", 1e-6) == text("--temperature", 0)


def test_default_dtype_works(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, TINY, "--prompt", "The old", "--max-new-tokens", 3)
    assert code == 0
    assert out.startswith("The old")


def test_evaluate(monkeypatch, capsys, tmp_path):
    """Against one token at a time, each with just the context that the windows give it"""
    text = (ROOT / "data" / "stories.txt").read_text("utf-8")[:200]
    (tmp_path / "text.txt").write_text(text, "utf-8")
    model, tokenizer = load(TINY)
    ids = tokenizer.encode(text)
    assert len(ids) > 2 * 48
    total = 0.0
    for i in range(1, len(ids)):
        # Windows of 48 tokens; the last one ends with the text, and so begins earlier
        start = (i - 1) // 48 * 48
        start = min(start, len(ids) - 49)
        with torch.no_grad():
            total -= model(torch.tensor([ids[start:i]]))[0, -1].log_softmax(-1)[ids[i]].item()
    loss = total / (len(ids) - 1)
    code, out, error = run(monkeypatch, capsys, TINY, "--evaluate", tmp_path / "text.txt")
    assert code == 0
    assert error == ""
    assert float(re.search(r"loss ([\d.]+)", out)[1]) == pytest.approx(loss, abs=1e-4)
    assert float(re.search(r"perplexity ([\d.]+)", out)[1]) == pytest.approx(
        math.exp(loss), rel=1e-4
    )
    assert f"over {len(ids) - 1:,} tokens in windows of 48\n" in out


@pytest.mark.parametrize("n_tokens", [2, 48, 49, 50, 97])
def test_evaluate_counts_each_token_once(n_tokens):
    """A model with equal logits has the loss ln V, however the text is cut into windows."""
    model = load(TINY)[0]
    with torch.no_grad():
        model.wte.weight.zero_()
    loss = load_gpt2.evaluate_text(model, list(range(n_tokens)))
    assert loss == pytest.approx(math.log(320))


def test_evaluate_reads_documents_as_train_does(monkeypatch, capsys, tmp_path):
    (tmp_path / "text.txt").write_text("The old man.\n<|endoftext|>\nA dog.\n", encoding="utf-8")
    model, tokenizer = load(TINY)
    ids = [*tokenizer.encode("The old man.\n"), tokenizer.eot, *tokenizer.encode("A dog.\n")]
    expected = load_gpt2.evaluate_text(model, ids)
    _, out, _ = run(monkeypatch, capsys, TINY, "--evaluate", tmp_path / "text.txt")
    assert out.startswith(f"loss {expected:.4f} ") and f"over {len(ids) - 1} tokens" in out


def test_evaluate_a_long_text_in_bfloat16(monkeypatch, capsys, tmp_path):
    text = (ROOT / "data" / "stories.txt").read_text("utf-8")[:5000]
    (tmp_path / "text.txt").write_text(text, "utf-8")
    args = [TINY, "--evaluate", tmp_path / "text.txt"]
    losses = [
        float(run(monkeypatch, capsys, *args, "--dtype", dtype)[1].split()[1])
        for dtype in ("float32", "bfloat16")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_a_vocabulary_that_is_larger_than_the_tokenizer(monkeypatch, capsys, tmp_path):
    """Rows of padding in wte have no text; they are shown as U+FFFD."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(5000, context_length=64, n_layer=1, n_head=1, n_embd=8))
    save_gpt2(model, Tokenizer([]), tmp_path)
    out = complete(monkeypatch, capsys, tmp_path, "--top-k", 5000, "--max-new-tokens", 30)
    assert "\ufffd" in out


def test_help_shows_every_option(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "--help")
    assert code == 0
    for option in ("prompt", "max-new-tokens", "temperature", "top-k", "top-p", "seed"):
        assert "--" + option in out
    for option in ("evaluate", "dtype", "device"):
        assert "--" + option in out
    assert "%(" not in out


@pytest.mark.parametrize(
    "args, message",
    [
        (["no-such-folder"], "no-such-folder is neither a folder nor a name on the hub"),
        (
            ["tests/no-such-folder"],
            "tests/no-such-folder is neither a folder nor a name on the hub",
        ),
        ([TINY, "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        ([TINY, "--evaluate", "no-such.txt"], "no-such.txt: No such file"),
        ([TINY, "--evaluate", TINY], "tiny-gpt2: Is a directory"),
        ([TINY, "--evaluate", TINY / "model.safetensors"], "model.safetensors: "),
        ([TINY, "--top-p", 2], "top_p"),
        ([TINY, "--temperature", "nan"], "temperature"),
        ([TINY, "--prompt", "word " * 100], "not 1 to 48"),
        ([TINY, "--top-k", "0"], "top_k"),
        ([TINY, "--top-k", "x"], "--top-k"),
        ([TINY, "--seed", 2**70], "error: "),
        ([TINY, "--device", "abacus"], "abacus is not a device of this machine"),
        ([TINY, "--list"], "--list"),
        ([TINY, "--temp", 1], "--temp"),
        ([], "model"),
    ],
)
def test_bad_arguments_are_one_line(monkeypatch, capsys, args, message):
    monkeypatch.chdir(TINY.parent.parent)  # where there is a folder tests
    code, _, error = run(monkeypatch, capsys, *args)
    assert code == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


# --------------------------------------------------------------------------------------------------
# Streamed text


def byte_model():
    """A random model over single bytes, and its tokenizer"""
    torch.manual_seed(0)
    return GPT(GPTConfig(257, context_length=64, n_layer=1, n_head=1, n_embd=8)), Tokenizer([])


def test_bytes_of_a_character_come_together():
    """Byte by byte, the text must be the same as decoded at once."""
    model, tokenizer = byte_model()
    sampling = {"temperature": 0.8, "top_k": 257, "top_p": 1.0}
    generator = torch.Generator().manual_seed(0)
    pieces = list(stream_text(model, tokenizer, "🙂", 300, generator=generator, **sampling))
    (ids,) = model.generate(
        [tokenizer.encode("🙂")], 300,
        eos_id=tokenizer.eot, generator=torch.Generator().manual_seed(0), **sampling,
    )  # fmt: skip
    text = "".join(pieces)
    assert len(pieces) == len(ids) + 1
    assert text == tokenizer.decode(ids)
    assert "\ufffd" in text  # broken characters
    assert any(char > "\x7f" and char != "\ufffd" for char in text)  # and whole ones


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stream_text_leaves_the_backend_as_it_was(dtype):
    model, tokenizer = load(TINY, dtype=dtype)
    before = torch.backends.mkldnn.enabled
    pieces = stream_text(model, tokenizer, "The old", 5, temperature=0)
    text = next(pieces) + next(pieces)
    pieces.close()
    assert torch.backends.mkldnn.enabled == before
    assert "".join(stream_text(model, tokenizer, "The old", 5, temperature=0)).startswith(text)
    assert torch.backends.mkldnn.enabled == before
    assert not model.training


def test_stream_text_of_nothing():
    model, tokenizer = load(TINY)
    assert list(stream_text(model, tokenizer, "The old", 0)) == [""]
    after_eot = model.generate([[tokenizer.eot]], 5, temperature=0, eos_id=tokenizer.eot)[0]
    text = "".join(stream_text(model, tokenizer, "", 5, temperature=0))
    assert text == tokenizer.decode(after_eot)


def test_stream_text_ends_at_end_of_text():
    model, tokenizer = load(TINY)
    with torch.no_grad():  # end of text follows everything
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(model.wte.weight[tokenizer.eot])
        model.wte.weight[tokenizer.eot] *= 100
    assert list(stream_text(model, tokenizer, "The old", 5, temperature=0)) == [""]


# --------------------------------------------------------------------------------------------------
# What all scripts share


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("two\nlines"), "error: two lines"),
        (FileNotFoundError(2, "No such file", "x.txt"), "error: x.txt: No such file"),
        (OSError("no name"), "error: no name"),
        (FloatingPointError("nan"), "error: nan"),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_one_line_errors(error, code):
    with pytest.raises(SystemExit) as caught, load_gpt2.one_line_errors():
        raise error
    assert caught.value.code == code


def test_one_line_errors_where_there_is_no_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as after `>&-`
    with load_gpt2.one_line_errors():
        pass


def test_one_line_errors_lets_faults_of_the_code_through():
    with pytest.raises(KeyError), load_gpt2.one_line_errors():
        raise KeyError("x")


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("a"), RecursionError("a")], ids=repr)
def test_damaged_names_the_file(error):
    with pytest.raises(ValueError, match="^x.bin: .*a"), load_gpt2.named_errors("x.bin"):
        raise error


def test_damaged_lets_errors_of_the_system_through():
    with pytest.raises(FileNotFoundError), load_gpt2.named_errors("x.bin"):
        raise FileNotFoundError


def test_fast_dtype_needs_no_private_function(monkeypatch):
    assert load_gpt2.fast_dtype("cpu") in (torch.float32, torch.bfloat16)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert load_gpt2.fast_dtype("cpu") == torch.float32


def test_progress_goes_to_terminals_only(monkeypatch, capsys):
    load_gpt2.show_progress("50%")
    load_gpt2.print_line("done")
    assert capsys.readouterr() == ("done\n", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load_gpt2.show_progress("50%")
    load_gpt2.print_line("done")
    out, error = capsys.readouterr()
    assert out == "done\n"
    assert "50%" in error
