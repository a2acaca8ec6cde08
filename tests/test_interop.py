"""What other programs write opens here, and what is written here opens there. Needs transformers and safetensors."""

import os
import random
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # read when transformers is imported: it shall not look for anything elsewhere
)
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from gpt import GPT, GPTConfig, Tokenizer  # noqa: E402
from load_gpt2 import DTYPES, load_gpt2, read_safetensors, save_gpt2, write_safetensors  # noqa: E402
from test_load_gpt2 import mutate  # noqa: E402

ODD_TEXTS = [
    "The old man went home.",
    "  two  spaces\n\nand lines\t\r\n",
    "It's 12:30, isn't it? We'LL see…",
    "naïve café – 東京 🙂👩‍👩‍👧 \u200b\u00a0x",
    "\x00\x01\x7f",
    "x" * 300 + " " * 40 + "١٢٣ ½",
    "",
]


def random_model(tmp_path, vocab_size=50257, dtype=torch.float32, max_shard_size="5GB", **sizes):
    """A GPT2LMHeadModel with numbers far from the usual start, so that every part shows in the logits"""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1, **sizes
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.08).add_(
                1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            )
    model.to(dtype).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    return model.to(dtype).float()


SHAPES = [
    {"n_positions": 256, "n_layer": 2, "n_head": 4, "n_embd": 64},
    {"n_positions": 250, "n_layer": 5, "n_head": 3, "n_embd": 96, "vocab_size": 50300},
    {"n_positions": 1024, "n_layer": 3, "n_head": 1, "n_embd": 40, "vocab_size": 1000},
    {"n_positions": 256, "n_layer": 1, "n_head": 12, "n_embd": 192, "max_shard_size": "5MB"},
    {"n_positions": 256, "n_layer": 2, "n_head": 4, "n_embd": 64, "dtype": torch.bfloat16},
    {"n_positions": 256, "n_layer": 2, "n_head": 4, "n_embd": 64, "dtype": torch.float16},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transformers_model_gives_the_same_here(tmp_path, shape):
    theirs = random_model(tmp_path, **shape)
    vocab_size = theirs.config.vocab_size
    tokenizer = (
        Tokenizer.train(Path(__file__).read_text("utf-8"), 500)
        if vocab_size < 50257
        else Tokenizer.gpt2()
    )
    tokenizer.save(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == ("max_shard_size" in shape)
    ours, _ = load_gpt2(tmp_path)
    ids = torch.randint(0, vocab_size, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    expected = theirs.generate(
        ids[:1], max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 40:]
    assert ours.generate([ids[0].tolist()], 200, temperature=0) == [expected.tolist()]

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
    tokenizer = Tokenizer.train(Path(__file__).read_text("utf-8"), 600)
    model = GPT(
        GPTConfig(tokenizer.vocab_size, context_length=64, n_layer=2, n_head=2, n_embd=32)
    ).eval()
    save_gpt2(model, tokenizer, tmp_path, dtype=dtype)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert theirs.dtype == dtype and not any(info.values())
    ids = torch.randint(0, 600, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(
            load_gpt2(tmp_path)[0](ids), theirs.float()(ids).logits, atol=1e-5, rtol=1e-5
        )

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        their_tokenizer.eos_token_id == tokenizer.eot
        and len(their_tokenizer) == tokenizer.vocab_size
    )
    for text in ODD_TEXTS:
        assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)
        assert (
            their_tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False)
            == text
        )

    generator = transformers.pipeline("text-generation", model=str(tmp_path), dtype=torch.float32)
    (out,) = generator("def test", max_new_tokens=20, do_sample=False, return_full_text=False)
    (expected,) = load_gpt2(tmp_path)[0].generate(
        [tokenizer.encode("def test")], 20, temperature=0, eos_id=tokenizer.eot
    )
    assert out["generated_text"] == tokenizer.decode(expected)


def test_gpt2_tokenizer_of_transformers(tmp_path):
    """Their tokenizer.json, the only file that they save, and the files that we save, give the same ids"""
    tokenizer = Tokenizer.gpt2()
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, config=transformers.GPT2Config())
    for text in ODD_TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    random_model(tmp_path / "theirs", n_positions=8, n_layer=1, n_head=1, n_embd=4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "tokenizer.json").exists()
    _, loaded = load_gpt2(tmp_path / "theirs")
    assert loaded.vocab == tokenizer.vocab and loaded.merges == tokenizer.merges


def test_tokenizer_that_was_trained_with_their_library(tmp_path):
    """Special tokens first, and only a tokenizer.json"""
    trained = transformers.AutoTokenizer.from_pretrained(
        save_tiny(tmp_path / "tiny")
    ).train_new_from_iterator(
        [Path(__file__).read_text("utf-8")], 700, new_special_tokens=["[PAD]"]
    )
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
    tokenizer = Tokenizer.train(Path(__file__).read_text("utf-8"), 300)
    save_gpt2(
        GPT(GPTConfig(300, context_length=8, n_layer=1, n_head=1, n_embd=4)), tokenizer, folder
    )
    return folder


def test_their_tools_find_what_the_hub_half_has_cached(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from test_download import COMMIT, TINY, Hub

    hub = Hub()
    hub.publish("a/b", TINY)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    load_gpt2("a/b")
    hub.shutdown()
    path = huggingface_hub.try_to_load_from_cache("a/b", "model.safetensors", cache_dir=tmp_path)
    assert path == str(tmp_path / "models--a--b" / "snapshots" / COMMIT / "model.safetensors")
    (repo,) = huggingface_hub.scan_cache_dir(tmp_path).repos
    assert repo.repo_id == "a/b" and {
        ref for revision in repo.revisions for ref in revision.refs
    } == {"main"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        "a/b", cache_dir=tmp_path, local_files_only=True
    )
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            load_gpt2("a/b")[0](ids), theirs(ids).logits, atol=1e-5, rtol=1e-5
        )


# ---------------------------------------------------------------------------------------------------------------------
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
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


def test_safetensors_library_agrees_on_damaged_files(tmp_path):
    """What is accepted here is accepted there, with the same bytes."""
    rng, path = random.Random(1), tmp_path / "x"
    write_safetensors(
        path, {f"h.{i}": torch.randn(3, 4).to(dtype) for i, dtype in enumerate(DTYPES.values())}
    )
    original = path.read_bytes()
    for _ in range(1000):
        path.write_bytes(mutate(original, rng))
        try:
            ours = read_safetensors(path)
        except ValueError:
            continue
        theirs = safetensors_torch.load_file(path)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
            assert torch.equal(
                tensor.flatten().view(torch.uint8), theirs[name].flatten().view(torch.uint8)
            )
