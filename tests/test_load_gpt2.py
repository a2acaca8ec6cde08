import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch

import load_gpt2
from gpt import GPT, GPTConfig, Tokenizer
from load_gpt2 import DTYPES, load_gpt2 as load, read_safetensors, save_gpt2, write_safetensors

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "tiny-gpt2"


def run(monkeypatch, capsys, *args):
    """load_gpt2.py as a user runs it, in this process -> exit code, standard output, standard error"""
    monkeypatch.setattr(sys, "argv", ["load_gpt2.py", *map(str, args)])
    code = 0
    try:
        with load_gpt2.one_line_errors():
            load_gpt2.main()
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors


def test_bytes_are_those_of_the_format(tmp_path):
    write_safetensors(tmp_path / "x", {"a": torch.tensor([[1, 2], [3, 4]], dtype=torch.int16), "b": torch.tensor(1.5)})
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
    tensors |= {"empty": torch.empty(0, 5), "scalar": torch.tensor(3.25), "transposed": torch.arange(6.0).view(2, 3).T}
    write_safetensors(tmp_path / "x", tensors)
    back = read_safetensors(tmp_path / "x")
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    write_safetensors(tmp_path / "y", tensors)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_numbers_may_start_at_odd_bytes(tmp_path):
    write_safetensors(tmp_path / "x", {"a": torch.ones(3, dtype=torch.uint8), "b": torch.tensor([1.5, -2.5])})
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
        struct.pack("<Q", 5 * 2**20) + b" " * 5 * 2**20,
        safetensors_bytes(b"\xff\xff", 0),
        safetensors_bytes(b"[" * 100_000, 0),
        safetensors_bytes([], 0),
        safetensors_bytes({"a": 1}, 0),
        safetensors_bytes({"a": {}}, 0),
        safetensors_bytes(b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": {}}', 8),
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


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_load_save_load_is_the_identity(tmp_path):
    model, tokenizer = load(TINY)
    save_gpt2(model, tokenizer, tmp_path)
    again, tokenizer_again = load(tmp_path)
    assert again.config == model.config and tokenizer_again.merges == tokenizer.merges
    for (name, a), (name_again, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == name_again and torch.equal(a, b)
    # What transformers wrote comes out with the same names and bytes
    original, saved = (read_safetensors(folder / "model.safetensors") for folder in (TINY, tmp_path))
    assert original.keys() == saved.keys() and all(torch.equal(original[name], saved[name]) for name in saved)
    assert not list(tmp_path.glob("*.part"))


def test_dtype_and_mode():
    model, _ = load(TINY, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and not model.training


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
    tensors = {name.removeprefix("transformer."): t for name, t in read_safetensors(TINY / "model.safetensors").items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "h.0.attn.masked_bias": torch.tensor(-1e4)}
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


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: No such file"),
        (lambda f: (f / "merges.txt").unlink(), "merges.txt: No such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "model_type"),
        (lambda f: change_config(f, model_type="llama"), "model_type"),
        (lambda f: change_config(f, n_head=5), "n_embd=24 does not divide into n_head=5"),
        (lambda f: change_config(f, n_layer="two"), "n_layer='two' is no size"),
        (lambda f: change_config(f, n_layer=3), "h.2.ln_1.weight is missing"),
        (lambda f: change_config(f, n_layer=1), "h.1.attn.c_attn.bias is no part of GPT-2"),
        (lambda f: change_config(f, n_positions=64), "wpe.weight is [48, 24]"),
        (lambda f: change_config(f, vocab_size=300), "320 tokens do not fit a model with vocab_size=300"),
        (lambda f: change_config(f, vocab_size=321), "wte.weight is [320, 24]"),
        (lambda f: change_config(f, activation_function="gelu"), "activation_function=gelu"),
        (lambda f: change_config(f, tie_word_embeddings=False), "tie_word_embeddings=False"),
        (lambda f: change_config(f, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (lambda f: change_config(f, n_inner=100), "n_inner=100"),
        (lambda f: change_weights(f, **{"lm_head.weight": torch.zeros(320, 24)}), "lm_head.weight is not wte.weight"),
        (lambda f: change_weights(f, **{"transformer.ln_f.bias": None}), "ln_f.bias is missing"),
        (lambda f: (f / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:-1]), "model.safetensors"),
    ],
)
def test_damaged_folders_are_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, damage, message):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    code, _, error = run(monkeypatch, capsys, tmp_path)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_command_continues_a_prompt(monkeypatch, capsys):
    model, tokenizer = load(TINY, dtype=load_gpt2.fast_dtype("cpu"))
    code, out, error = run(monkeypatch, capsys, TINY, "--prompt", "The old", "--max-new-tokens", 20, "--temperature", 0)
    (ids,) = model.generate([tokenizer.encode("The old")], 20, temperature=0, eos_id=tokenizer.eot)
    assert code == 0 and out == "The old" + tokenizer.decode(ids) + "\n"
    assert f"{len(ids)} tokens, " in error and "tokens/s" in error


@pytest.mark.parametrize(
    "args, message",
    [
        (["no-such-folder"], "no-such-folder"),
        ([TINY, "--prompt", "word " * 100], "it must have 1 to 48"),
        ([TINY, "--top-k", "0"], "top_k"),
        ([TINY, "--top-k", "x"], "--top-k"),
        ([TINY, "--device", "abacus"], "abacus is not a device of this machine"),
        ([], "folder"),
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
    _, out, _ = run(monkeypatch, capsys, tmp_path, "--prompt", "🙂", "--max-new-tokens", 300, "--top-k", 257)
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
    assert "\ufffd" in out and any(char > "\x7f" and char != "\ufffd" for char in out[1:])  # broken characters and whole ones
