"""
What other programs write opens here, and what is written here opens there. Needs transformers and
safetensors.
"""

import json
import os
import random
from pathlib import Path

import pytest
import torch

# Read when transformers is imported: it shall not look for anything on the network
os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from test_load_gpt2 import mutate  # noqa: E402

from gpt import GPT, GPTConfig, Tokenizer  # noqa: E402
from load_gpt2 import (  # noqa: E402
    DTYPES,
    load_gpt2,
    read_safetensors,
    save_gpt2,
    write_safetensors,
)

SOURCE = Path(__file__).read_text("utf-8")
ODD_TEXTS = [
    "The old man went home.",
    "  two  spaces\n\nand lines\t\r\n",
    "It's 12:30, isn't it? We'LL see…",
    "naïve café – 東京 🙂👩‍👩‍👧 \u200b\u00a0x",
    "\x00\x01\x7f",
    "x" * 300 + " " * 40 + "١٢٣ ½",
    "",
]


def random_model(folder, vocab_size=1000, dtype=torch.float32, max_shard_size="5GB", **sizes):
    """A GPT2LMHeadModel with weights so large that every part shows in the logits"""
    torch.manual_seed(0)
    eot = vocab_size - 1
    config = transformers.GPT2Config(
        vocab_size=vocab_size, bos_token_id=eot, eos_token_id=eot, **sizes
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = ".ln_" in name and name.endswith("weight")
            parameter.normal_(std=0.08).add_(1.0 if is_gain else 0.0)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return model.to(dtype).float()


SMALL = {"n_positions": 64, "n_layer": 2, "n_head": 4, "n_embd": 64}
SHAPES = [
    {"n_positions": 70, "n_layer": 5, "n_head": 3, "n_embd": 24, "vocab_size": 50300},
    {"n_positions": 1024, "n_layer": 3, "n_head": 1, "n_embd": 40},
    {"n_positions": 64, "n_layer": 1, "n_head": 12, "n_embd": 96, "max_shard_size": "300KB"},
    SMALL | {"dtype": torch.bfloat16},
    SMALL | {"dtype": torch.float16},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transformers_model_gives_the_same_here(tmp_path, shape):
    theirs = random_model(tmp_path, **shape)
    vocab_size = theirs.config.vocab_size
    small_vocab = vocab_size < 50257
    tokenizer = Tokenizer.train(SOURCE, 400) if small_vocab else Tokenizer.gpt2()
    tokenizer.save(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == ("max_shard_size" in shape)
    ours, _ = load_gpt2(tmp_path)
    ids = torch.randint(0, vocab_size, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    expected = theirs.generate(
        ids[:1], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 30:]
    assert ours.generate([ids[0].tolist()], 30, temperature=0) == [expected.tolist()]

    # And back
    save_gpt2(ours, tokenizer, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_folder_opens_in_transformers(tmp_path, dtype):
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(SOURCE, 500)
    config = GPTConfig(tokenizer.vocab_size, context_length=64, n_layer=2, n_head=2, n_embd=32)
    save_gpt2(GPT(config).to(dtype), tokenizer, tmp_path)
    model = load_gpt2(tmp_path)[0]
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert theirs.dtype == dtype
    assert not any(info.values())
    ids = torch.randint(0, 500, (2, 30))
    with torch.no_grad():
        logits = theirs.float()(ids).logits
        torch.testing.assert_close(model(ids), logits, atol=1e-5, rtol=1e-5)

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert their_tokenizer.eos_token_id == tokenizer.eot
    assert len(their_tokenizer) == tokenizer.vocab_size
    for text in ODD_TEXTS:
        ids = tokenizer.encode(text)
        assert their_tokenizer(text)["input_ids"] == ids
        assert their_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text

    prompt = tokenizer.encode("def test")
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    (expected,) = model.generate([prompt], 20, temperature=0, eos_id=tokenizer.eot)
    assert out[0, len(prompt) :].tolist() == expected


def test_gpt2_tokenizer_of_transformers(tmp_path):
    """Their tokenizer.json and our merges.txt and vocab.json give the same ids."""
    tokenizer = Tokenizer.gpt2()
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, config=transformers.GPT2Config())
    for text in ODD_TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    sizes = {"n_positions": 8, "n_layer": 1, "n_head": 1, "n_embd": 4}
    random_model(tmp_path / "theirs", vocab_size=50257, **sizes)
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "tokenizer.json").exists()
    _, loaded = load_gpt2(tmp_path / "theirs")
    assert loaded.vocab == tokenizer.vocab
    assert loaded.merges == tokenizer.merges


def test_tokenizer_that_was_trained_with_their_library(tmp_path):
    """Special tokens first, and only a tokenizer.json"""
    usual = transformers.AutoTokenizer.from_pretrained(save_tiny(tmp_path / "tiny"))
    trained = usual.train_new_from_iterator([SOURCE], 700, new_special_tokens=["[PAD]"])
    random_model(tmp_path, vocab_size=len(trained), n_positions=8, n_layer=1, n_head=1, n_embd=4)
    trained.save_pretrained(tmp_path)
    _, tokenizer = load_gpt2(tmp_path)
    assert tokenizer.eot == trained.convert_tokens_to_ids("<|endoftext|>") < 5
    for text in ODD_TEXTS:
        assert trained(text)["input_ids"] == tokenizer.encode(text)
    tokenizer.save(tmp_path / "tiny")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "tiny")
    for text in ODD_TEXTS:
        assert again(text)["input_ids"] == tokenizer.encode(text)


def save_tiny(folder):
    model = GPT(GPTConfig(300, context_length=8, n_layer=1, n_head=1, n_embd=4))
    save_gpt2(model, Tokenizer.train(SOURCE, 300), folder)
    return folder


def test_their_tools_find_what_is_in_the_cache(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from test_download import TINY, Hub

    hub = Hub()
    try:
        hub.publish("a/b", TINY)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        ours = load_gpt2("a/b")[0]
    finally:
        hub.close()
    path = huggingface_hub.try_to_load_from_cache("a/b", "model.safetensors", cache_dir=tmp_path)
    assert path == str(tmp_path / "models--a--b" / "snapshots" / "main" / "model.safetensors")
    (repo,) = huggingface_hub.scan_cache_dir(tmp_path).repos
    assert repo.repo_id == "a/b"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        "a/b", cache_dir=tmp_path, local_files_only=True
    )
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# The safetensors library


def test_safetensors_library_reads_and_writes_the_same(tmp_path):
    tensors = {name: torch.randn(4, 6).mul(10).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"empty": torch.empty(0, 2), "scalar": torch.tensor(2.0)}
    write_safetensors(tmp_path / "ours", tensors)
    safetensors_torch.save_file(tensors, tmp_path / "theirs")
    for read, path in ((safetensors_torch.load_file, "ours"), (read_safetensors, "theirs")):
        back = read(tmp_path / path)
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype
            assert torch.equal(back[name], tensor)


def repeats_a_name(path):
    """JSON with a name that occurs twice: Python takes the last, their library refuses some."""
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")
    repeated = []

    def note(pairs):
        repeated.extend([pairs] if len(dict(pairs)) < len(pairs) else [])
        return dict(pairs)

    json.loads(content[8 : 8 + n], object_pairs_hook=note)
    return bool(repeated)


def test_safetensors_library_agrees_on_damaged_files(tmp_path):
    """What is accepted here is accepted there, with the same bytes, if no name is repeated."""
    rng = random.Random(1)
    path = tmp_path / "x"
    tensors = {f"h.{i}": torch.randn(3, 4).to(dtype) for i, dtype in enumerate(DTYPES.values())}
    write_safetensors(path, tensors)
    original = path.read_bytes()
    n_read = 0
    for _ in range(250):
        path.write_bytes(mutate(original, rng))
        try:
            ours = read_safetensors(path)
        except ValueError:
            continue
        n_read += 1
        if repeats_a_name(path):
            continue
        theirs = safetensors_torch.load_file(path)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            assert tensor.shape == theirs[name].shape
            bits = [t.flatten().view(torch.uint8) for t in (tensor, theirs[name])]
            assert torch.equal(*bits)
    assert n_read > 25
