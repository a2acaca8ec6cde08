import hashlib
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import torch

import gpt
from gpt import (
    GPT,
    GPT2_CONFIGS,
    GPTConfig,
    KVCache,
    TokenDataset,
    Tokenizer,
    create_dataloader,
    eval_mode,
    read_merges,
    sample,
)
from load_gpt2 import load_gpt2, read_safetensors

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "tiny-gpt2"  # made by Hugging Face's libraries: make_tiny_gpt2.py
EXPECTED = json.loads((TINY / "expected.json").read_text(encoding="utf-8"))
STORIES = (ROOT / "data" / "stories.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny():
    return load_gpt2(TINY)[0]


@pytest.fixture(scope="module")
def gpt2_tokenizer():
    return Tokenizer.gpt2()


@pytest.fixture(scope="module")
def trained_tokenizer():
    return Tokenizer.train(STORIES[:40_000], 600)


# --------------------------------------------------------------------------------------------------
# Config


@pytest.mark.parametrize(
    "name, n_parameters",
    [
        ("distilgpt2", 81_912_576),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameters_are_as_many_as_published(name, n_parameters):
    with torch.device("meta"):
        model = GPT(GPT2_CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == n_parameters


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_embd": 100, "n_head": 3},
        {"n_layer": 0},
        {"vocab_size": -1},
        {"context_length": 8.0},
        {"n_head": True},
        {"n_embd": "768"},
    ],
)
def test_config_refuses_what_cannot_be_built(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        GPTConfig(**sizes)


def test_dropout_must_be_a_probability():
    with pytest.raises(ValueError, match="dropout"):
        GPT(GPTConfig(vocab_size=2, context_length=2, n_layer=1, n_head=1, n_embd=2, dropout=1.5))


# --------------------------------------------------------------------------------------------------
# Tokenizer


def test_gpt2_ids_are_the_published_ones(gpt2_tokenizer):
    encode = gpt2_tokenizer.encode
    assert gpt2_tokenizer.vocab_size == 50257 and gpt2_tokenizer.eot == 50256
    assert encode("Hello, I am") == [15496, 11, 314, 716]
    assert encode("Hello world") == [15496, 995]
    # LLMs-from-scratch, chapter 4
    assert encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert encode("!") == [0] and encode(" ") == [220] and encode("\n") == [198]


def test_copied_without_data_the_merges_come_from_tiktokens_cache(monkeypatch, tmp_path):
    content = (ROOT / "data" / "gpt2-merges.txt").read_bytes()

    def read_file_cached(url, expected_hash):
        assert url.startswith("https://openaipublic.blob.core.windows.net/gpt-2/")
        assert hashlib.sha256(content).hexdigest() == expected_hash
        return content

    monkeypatch.setattr(gpt, "__file__", str(tmp_path / "gpt.py"))
    monkeypatch.setattr(gpt, "read_file_cached", read_file_cached)
    assert Tokenizer.gpt2().encode("Hello world") == [15496, 995]


def test_control_token_in_a_text_is_plain_characters(gpt2_tokenizer):
    ids = gpt2_tokenizer.encode("<|endoftext|>")
    assert gpt2_tokenizer.eot not in ids and gpt2_tokenizer.decode(ids) == "<|endoftext|>"
    assert gpt2_tokenizer.decode([gpt2_tokenizer.eot]) == "<|endoftext|>"
    trained = Tokenizer.train("<|endoftext|> " * 50, 300)
    assert trained.eot not in trained.encode("<|endoftext|>")


def test_tokens_of_hugging_face_files_are_hugging_faces():
    tokenizer = Tokenizer.load(TINY)
    for text, ids in EXPECTED["texts"].items():
        assert tokenizer.encode(text) == ids


def random_texts():
    rng = np.random.default_rng(0)
    anything = [chr(c) for c in rng.integers(0, 0x110000, 3000) if not 0xD800 <= c < 0xE000]
    odd = list(" \t\n\r\v\x00\x1c\x85\u00a0\u2028\u200b\u0301'sé東🙂👩‍👩‍👧½٣ﬁİ<|>0a.")
    for alphabet in (anything, odd, list("ab \n"), list("ab' ")):
        for n in (1, 7, 300):
            yield "".join(rng.choice(alphabet, n))


@pytest.mark.parametrize("name", ["gpt2_tokenizer", "trained_tokenizer"])
def test_decode_undoes_encode(request, name):
    tokenizer = request.getfixturevalue(name)
    for text in random_texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_stream_yields_a_character_with_its_last_byte(gpt2_tokenizer):
    text = "naïve 東🙂!"
    ids = gpt2_tokenizer.encode(text)
    pieces = list(gpt2_tokenizer.decode_stream(iter(ids)))
    assert len(pieces) == len(ids) + 1 and "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) and "" in pieces[:-1]
    for n in range(len(ids)):  # each prefix is all that can be known by then
        done = b"".join(map(gpt2_tokenizer.encoding.decode_single_token_bytes, ids[:n]))
        assert "".join(pieces[:n]) == done.decode("utf-8", errors="ignore")
    assert list(gpt2_tokenizer.decode_stream([])) == [""]


def test_what_cannot_be_decoded_becomes_a_replacement_character(gpt2_tokenizer):
    half = gpt2_tokenizer.encode("é" + "🙂")[:-1]
    assert gpt2_tokenizer.decode(half) == "é\ufffd"
    assert gpt2_tokenizer.decode([0, 50257, 0, -1]) == "!\ufffd!\ufffd"  # unknown ids
    assert gpt2_tokenizer.decode(torch.tensor([15496, 995])) == "Hello world"


def test_more_blanks_than_the_regex_can_take_are_an_error(gpt2_tokenizer):
    with pytest.raises(ValueError, match="while tokenizing"):
        gpt2_tokenizer.encode("x" + " " * 2_000_000 + "y")


def test_half_a_surrogate_pair_is_encoded_as_a_replacement_character(gpt2_tokenizer):
    assert gpt2_tokenizer.decode(gpt2_tokenizer.encode("a\ud83db")) == "a\ufffdb"


# BPE once more, slowly: words are lists of byte strings, and each merge counts all pairs anew.
# The split pattern is the one that OpenAI published; bytes are spelled as in OpenAI's encoder.py.

OPENAI_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPELLING = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
SPELLING |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in SPELLING)}


def slow_spell(token):
    return "".join(SPELLING[byte] for byte in token)


def slow_split(text):
    return [[bytes([b]) for b in word.encode()] for word in regex.findall(OPENAI_PATTERN, text)]


def slow_bpe(text, n_merges):
    words = slow_split(text)
    merges = []
    while len(merges) < n_merges:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not pairs or max(pairs.values()) < 2:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], [slow_spell(token) for token in pair]))
        merges.append(best)
        words = [slow_merge(word, best) for word in words]
    return [f"{slow_spell(left)} {slow_spell(right)}" for left, right in merges]


def slow_merge(word, pair):
    merged = []
    while word:
        n = 2 if tuple(word[:2]) == pair else 1
        merged.append(b"".join(word[:n]))
        word = word[n:]
    return merged


# Texts that would go wrong where a token is taken for a regular expression or for its replacement
ODD_TEXTS = [
    r"\d+\\n \1 \g<0> [a-z]*(?:x|y)$ ^.{2,3} a\b \\\\ " * 9,
    "\\" * 101,
    r".*+?^$|()[]{}\n " * 3 + r"\.*+?^$|()[]{}-#&~ " * 3,
]


def odd_texts():
    rng = np.random.default_rng(1)
    for alphabet in (list("\\1g<>"), list(".*+?^$|()[]{}\\ "), list("aA \\\u0120\u00a0\u0085é")):
        yield "".join(rng.choice(alphabet, 400))
    yield from ODD_TEXTS


def test_training_learns_what_slow_counting_learns():
    assert Tokenizer.train(STORIES[:5_000], 350).merges == slow_bpe(STORIES[:5_000], 350 - 257)
    for text in [*random_texts(), *odd_texts()]:
        assert Tokenizer.train(text, 330).merges == slow_bpe(text, 330 - 257)


def test_training_learns_what_hugging_face_learns():
    theirs = read_merges((TINY / "merges.txt").read_text(encoding="utf-8"))
    ours = Tokenizer.train(STORIES, 320).merges
    assert len(ours) == 320 - 257 and sorted(ours) == sorted(theirs)  # ties have another order


def slow_encode(merges, text):
    """Apply every merge to the whole text, in the order in which they were learned"""
    bytes_of = {char: bytes([byte]) for byte, char in SPELLING.items()}
    words = slow_split(text)
    for merge in merges:
        left, right = (b"".join(bytes_of[c] for c in token) for token in merge.split(" "))
        words = [slow_merge(word, (left, right)) for word in words]
    return [list(map(slow_spell, word)) for word in words]


def test_encoding_applies_the_merges_in_order():
    cases = [(STORIES[:20_000], STORIES[5_000:6_000])]
    cases += [(odd, odd[::-1]) for odd in odd_texts()]
    for source, text in cases:
        tokenizer = Tokenizer.train(source, 450)
        expected = slow_encode(tokenizer.merges, text)
        ids = [tokenizer.vocab[token] for word in expected for token in word]
        assert tokenizer.encode(text) == ids
        words = regex.findall(OPENAI_PATTERN, text)
        assert [tokenizer.apply_merges(word) for word in words] == expected


def test_apply_merges_is_tiktokens_encoding(gpt2_tokenizer, trained_tokenizer):
    words = list(dict.fromkeys(regex.findall(OPENAI_PATTERN, STORIES)))
    odd = [
        word[:40]
        for text in [*random_texts(), *odd_texts()]
        for word in dict.fromkeys(regex.findall(OPENAI_PATTERN, text))
    ]
    # With 50,000 merges a word takes milliseconds
    some_words = words[::40] + odd[::40]
    for tokenizer, some in [(gpt2_tokenizer, some_words), (trained_tokenizer, words + odd)]:
        for word in some:
            tokens = tokenizer.apply_merges(word)
            assert [tokenizer.vocab[token] for token in tokens] == tokenizer.encode(word), word
    assert gpt2_tokenizer.apply_merges(" tokenization") == ["Ġtoken", "ization"]
    assert gpt2_tokenizer.apply_merges("\\\\") == ["\\\\"] and gpt2_tokenizer.apply_merges("") == []


def test_a_merge_joins_whole_tokens_from_left_to_right():
    assert gpt.spell(" thé") == ["Ġ", "t", "h", "Ã", "©"]
    assert gpt.merge_pair(list("theth"), ("t", "h")) == ["th", "e", "th"]
    assert gpt.merge_pair(list("aaaaa"), ("a", "a")) == ["aa", "aa", "a"]
    assert gpt.merge_pair(["ba", "a", "ab"], ("a", "a")) == ["ba", "a", "ab"]


def test_train_sizes():
    text = STORIES[:20_000]
    tokenizer = Tokenizer.train(text, 700)
    assert tokenizer.vocab_size == 700 and tokenizer.eot == 699
    assert sorted(tokenizer.vocab.values()) == list(range(700))
    assert Tokenizer.train(text, 257).merges == []
    assert Tokenizer.train("abc", 1024).vocab_size == 257  # nothing occurs twice
    assert Tokenizer.train("", 1024).vocab_size == 257
    with pytest.raises(ValueError, match="257"):
        Tokenizer.train(text, 256)


def test_save_and_load(tmp_path):
    for text in (STORIES[:5_000], *odd_texts()):
        tokenizer = Tokenizer.train(text, 400)
        tokenizer.save(str(tmp_path))
        again = Tokenizer.load(str(tmp_path))
        assert again.merges == tokenizer.merges and again.vocab == tokenizer.vocab
        assert again.encode(text) == tokenizer.encode(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]


def test_files_of_hugging_face_keep_their_content(tmp_path):
    Tokenizer.load(TINY).save(tmp_path)
    merges, vocab = ((folder / "merges.txt", folder / "vocab.json") for folder in (tmp_path, TINY))
    ours, theirs = (path.read_bytes().split(b"\n") for path in (merges[0], vocab[0]))
    assert ours[1:] == theirs[1:] and ours[0].startswith(b"#version")
    ours, theirs = (json.loads(path.read_text(encoding="utf-8")) for path in (merges[1], vocab[1]))
    assert ours == theirs


def test_only_the_line_with_the_version_is_no_merge():
    assert read_merges("#version: 0.2\n# #\n## ##\n") == ["# #", "## ##"]
    assert read_merges("#version: 0.2\r\n# #\r\n") == ["# #"]
    assert read_merges("# #\n#v ersion") == ["# #", "#v ersion"]
    assert read_merges("") == []


def test_vocabulary_with_other_ids_and_special_tokens():
    tokens = [*gpt.CHARS, "ab", "abc", "<|endoftext|>", "[PAD]"]
    vocab = {token: 2 * i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(["a b", "ab c"], vocab)
    assert tokenizer.vocab_size == 2 * 259 + 1 and tokenizer.eot == 2 * 258
    assert tokenizer.encode("abcab") == [vocab["abc"], vocab["ab"]]
    assert vocab["[PAD]"] not in tokenizer.encode("[PAD]")
    assert tokenizer.decode([vocab["[PAD]"], vocab["ab"], 1]) == "[PAD]ab\ufffd"


def test_a_vocabulary_that_does_not_fit_the_merges_is_refused():
    merges = ["a b", "ab c"]
    vocab = Tokenizer(merges).vocab
    swapped = vocab | {"ab": vocab["abc"], "abc": vocab["ab"]}
    with pytest.raises(ValueError, match="order"):
        Tokenizer(merges, swapped)
    with pytest.raises(ValueError, match="order"):
        Tokenizer(["a b", "a b"])
    for missing in ("abc", "a", "<|endoftext|>"):
        with pytest.raises(KeyError, match=missing.strip("<|>")):
            Tokenizer(merges, {token: i for token, i in vocab.items() if token != missing})


# --------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("container", [list, np.array, torch.tensor])
@pytest.mark.parametrize("n", [6, 7, 10, 11, 16, 103])
def test_every_token_is_a_target_once(container, n):
    dataset = TokenDataset(container([100 + i for i in range(n)]), context_length=5)
    targets = []
    for inputs, shifted in dataset:
        assert inputs.dtype == shifted.dtype == torch.int64 and len(inputs) == len(shifted) == 5
        kept = shifted != -100
        assert torch.equal(shifted[kept], inputs[kept] + 1)
        targets += shifted[kept].tolist()
    assert targets == [100 + i for i in range(1, n)]


def test_stride():
    windows = [
        (inputs.tolist(), targets.tolist())
        for inputs, targets in TokenDataset(list(range(10)), 4, stride=2)
    ]
    assert windows == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([2, 3, 4, 5], [3, 4, 5, 6]),
        ([4, 5, 6, 7], [5, 6, 7, 8]),
        ([5, 6, 7, 8], [-100, -100, -100, 9]),
    ]


def test_stride_longer_than_a_window():
    targets = [targets.tolist() for _, targets in TokenDataset(list(range(20)), 4, stride=10)]
    assert targets == [[1, 2, 3, 4], [11, 12, 13, 14], [16, 17, 18, 19]]
    targets = [targets.tolist() for _, targets in TokenDataset(list(range(17)), 4, stride=10)]
    assert targets == [[1, 2, 3, 4], [11, 12, 13, 14], [-100, -100, 15, 16]]


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="5 tokens are too few"):
        TokenDataset(list(range(5)), context_length=5)


def test_windows_outside_of_the_data_are_refused():
    dataset = TokenDataset(list(range(11)), context_length=5)
    assert len(dataset) == 2
    for i in (-1, 2):
        with pytest.raises(IndexError):
            dataset[i]
    with pytest.raises(ValueError, match="context_length=0"):
        TokenDataset(list(range(11)), 0)
    for stride in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            TokenDataset(list(range(11)), 5, stride)


def test_uint16_ids_reach_the_model_as_int64():
    inputs, targets = TokenDataset(np.array([65535, 0, 50256], dtype=np.uint16), 2)[0]
    assert inputs.tolist() == [65535, 0] and targets.tolist() == [0, 50256]


def test_dataloader():
    dataset = TokenDataset(list(range(101)), context_length=10)
    batches = list(create_dataloader(dataset, batch_size=4))
    assert [inputs.shape for inputs, _ in batches] == [(4, 10), (4, 10), (2, 10)]
    assert torch.cat([targets.flatten() for _, targets in batches]).tolist() == list(range(1, 101))


def test_shuffled_dataloader_is_one_epoch_set_by_the_seed():
    dataset = TokenDataset(list(range(101)), context_length=10)

    def epoch(loader):
        assert len(loader) == 3
        for inputs, targets in loader:
            assert torch.equal(inputs + 1, targets)
            yield from inputs[:, 0].tolist()

    loader = create_dataloader(dataset, batch_size=4, shuffle=True, seed=1)
    first, second = list(epoch(loader)), list(epoch(loader))
    in_order = list(range(0, 100, 10))
    assert sorted(first) == sorted(second) == in_order
    assert first != in_order and first != second
    torch.manual_seed(5)  # the order depends on nothing but the seed
    assert list(epoch(create_dataloader(dataset, 4, shuffle=True, seed=1))) == first
    assert list(epoch(create_dataloader(dataset, 4, shuffle=True, seed=2))) != first
    # The order takes nothing from the global generator either
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    create_dataloader(dataset, 4, shuffle=True)
    assert torch.equal(torch.rand(1), expected)


def test_dataloader_uses_the_collate_function():
    loader = create_dataloader([1, 2, 3], batch_size=2, collate_fn=tuple)
    assert list(loader) == [(1, 2), (3,)]


# --------------------------------------------------------------------------------------------------
# Model


def test_logits_and_loss_are_transformers(tiny):
    expected = read_safetensors(TINY / "expected.safetensors")
    with torch.no_grad():
        logits = tiny(expected["ids"])
        loss = tiny(expected["ids"][:, :-1], expected["ids"][:, 1:])
    assert logits.std() > 1  # or agreement to 1e-5 would mean little
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, expected["loss"][0], rtol=0, atol=1e-5)


def test_fused_attention_is_its_formula(tiny):
    attention = tiny.h[0].attn
    x = torch.randn(2, 20, 24)
    weights = attention.weights(x)
    assert weights.shape == (2, 3, 20, 20)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 20))
    assert weights.triu(1).abs().max() == 0
    _, _, v = attention.project(x)
    y = attention.c_proj((weights @ v).transpose(1, 2).reshape(2, 20, 24))
    torch.testing.assert_close(attention(x), y, rtol=0, atol=2e-5)


def test_gradients_are_finite_differences():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, context_length=6, n_layer=2, n_head=2, n_embd=8)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids, targets = torch.randint(0, 11, (2, 6)), torch.randint(0, 11, (2, 6))
    targets[0, :3] = -100
    model(ids, targets).backward()
    for name, parameter in model.named_parameters():
        flat, step = parameter.data.view(-1), 1e-5
        for i in torch.randint(0, flat.numel(), (3,)).tolist():
            value = flat[i].item()
            losses = []
            for shifted in (value + step, value - step):
                flat[i] = shifted
                losses.append(model(ids, targets).item())
            flat[i] = value
            slope = (losses[0] - losses[1]) / (2 * step)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(slope, abs=1e-8, rel=1e-6), (
                name
            )


def test_masked_targets_do_not_count(tiny):
    ids, targets = torch.randint(0, 320, (2, 8)), torch.randint(0, 320, (2, 8))
    targets[0, 2:] = -100
    logits = tiny(ids)
    kept = torch.cat([logits[0, :2], logits[1]]).log_softmax(-1)
    expected = -kept[range(10), torch.cat([targets[0, :2], targets[1]])].mean()
    torch.testing.assert_close(tiny(ids, targets), expected)


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1000, context_length=512, n_layer=8, n_head=4, n_embd=256))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif parameter.dim() == 1:
            assert (parameter == 1).all()
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(parameter.mean().item()) < std / 50, name


def test_initial_loss_is_a_blind_guess():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=5000, context_length=64, n_layer=4, n_head=4, n_embd=128))
    ids, targets = torch.randint(0, 5000, (4, 64)), torch.randint(0, 5000, (4, 64))
    assert model(ids, targets).item() == pytest.approx(math.log(5000), abs=0.1)


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, context_length=16, n_layer=2, n_head=2, n_embd=64))
    ids, targets = torch.randint(0, 50, (4, 16)), torch.randint(0, 50, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_names_ties_and_buffers(tiny):
    names = set(tiny.state_dict())
    assert {
        "wte.weight",
        "wpe.weight",
        "h.0.ln_1.weight",
        "h.0.attn.c_attn.weight",
        "h.1.mlp.c_proj.bias",
        "ln_f.bias",
    } <= names
    assert len(names) == 2 + 2 * 12 + 2 and not list(tiny.buffers())
    x = torch.randn(3, 24)
    torch.testing.assert_close(tiny.lm_head(x), x @ tiny.wte.weight.T)


def test_dropout_in_training_only():
    model = GPT(
        GPTConfig(vocab_size=20, context_length=8, n_layer=1, n_head=1, n_embd=16, dropout=0.5)
    )
    ids = torch.arange(8)[None]
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    x = torch.randn(1, 8, 16)
    dropped = model.h[0].attn.train()
    dropped.dropout = torch.nn.Identity()  # leaves only the dropout inside the kernel
    dropped.dropout.p = 0.5
    assert not torch.equal(dropped(x), dropped(x))
    assert torch.equal(dropped.eval()(x), dropped(x))


def test_a_text_longer_than_the_context_is_refused(tiny):
    with pytest.raises(ValueError, match="49 tokens"):
        tiny(torch.zeros(1, 49, dtype=torch.long))


# --------------------------------------------------------------------------------------------------
# Generation


@torch.no_grad()
def test_cached_features_are_uncached_features_for_every_split(tiny):
    torch.manual_seed(0)
    lengths = torch.tensor([12, 7, 1])
    ids = torch.randint(0, 320, (3, 20))
    whole = tiny.features(ids)

    def check(x, row, start):
        expected = whole[row, start : start + len(x)]
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)

    for split in range(1, 13):
        # Row r has read min(split, its length) tokens; what stands to the right of them is padding
        read = lengths.clamp(max=split)
        cache = KVCache(3, 20, "cpu")
        padded = torch.where(torch.arange(split) < read[:, None], ids[:, :split], 0)
        x = tiny.features(padded, cache)
        for row in range(3):
            check(x[row, : read[row]], row, 0)
        cache.lengths = read
        # Go on, each row from where it stands, by one token or several at once
        for n_new in (3, 1, 4):
            new_ids = ids.gather(1, read[:, None] + torch.arange(n_new))
            x = tiny.features(new_ids, cache)
            for row in range(3):
                check(x[row], row, read[row])
            read = read + n_new
            assert torch.equal(cache.lengths, read)


@torch.no_grad()
def test_rows_that_a_cache_keeps_go_on_unchanged(tiny):
    torch.manual_seed(0)
    ids = torch.randint(0, 320, (4, 12))
    whole = tiny.features(ids)
    cache = KVCache(4, 12, "cpu")
    tiny.features(ids[:, :5], cache)
    cache.keep([3, 1])
    for start in (5, 8):
        x = tiny.features(ids[[3, 1], start : start + 3], cache)
        expected = whole[[3, 1], start : start + 3]
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    cache.keep([1])
    x = tiny.features(ids[[1], 11:], cache)
    torch.testing.assert_close(x, whole[[1], 11:], rtol=0, atol=1e-5)


def test_cache_gives_positions_mask_and_columns():
    cache = KVCache(2, 6, "cpu")
    k = torch.arange(1.0, 5)[:, None].expand(2, 1, 4, 1)  # (B, H, T, D)
    assert cache.extend(4).tolist() == [[0, 1, 2, 3]] * 2
    keys, values = cache.update("layer", k, -k)
    assert cache.mask is None and torch.equal(keys, k) and torch.equal(values, -k)
    cache.lengths = torch.tensor([4, 2])  # two tokens of row 1 were padding
    assert cache.extend(2).tolist() == [[4, 5], [2, 3]]
    keys, values = cache.update("layer", 10 * k[:, :, :2], -10 * k[:, :, :2])
    assert keys.flatten(1).tolist() == [[1, 2, 3, 4, 10, 20], [1, 2, 10, 20, 0, 0]]
    assert torch.equal(values, -keys)
    assert cache.mask.int().tolist() == [
        [[[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]],
        [[[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]],
    ]


def test_cache_is_no_part_of_the_model(tiny):
    names = set(tiny.state_dict())
    tiny.generate([[1, 2], [3]], 5)
    assert set(tiny.state_dict()) == names and not list(tiny.buffers())


def test_greedy_continuation_is_transformers(tiny):
    ids = read_safetensors(TINY / "expected.safetensors")["ids"]
    (new,) = tiny.generate([ids[0, :8].tolist()], 30, temperature=0)
    assert new == EXPECTED["greedy"]


PROMPTS = [[5, 6, 7], [1], [300, 2, 9, 9, 4, 8, 250], [17, 3]]


def test_a_batch_gives_each_row_what_it_gets_alone(tiny):
    # They outgrow the context of 48, each row at another step
    together = tiny.generate(PROMPTS, 60, temperature=0)
    assert together == [tiny.generate([prompt], 60, temperature=0)[0] for prompt in PROMPTS]
    assert [len(row) for row in together] == [60] * 4


def test_a_text_that_outgrows_the_context_goes_on_from_its_newer_half(tiny):
    text, new = list(range(40)), []
    for _ in range(70):
        i = tiny(torch.tensor([text]))[0, -1].argmax().item()
        text.append(i)
        new.append(i)
        if len(text) == 49:
            text = text[-24:]
    assert tiny.generate([list(range(40))], 70, temperature=0) == [new]


def test_context_of_one_token():
    model = GPT(GPTConfig(vocab_size=20, context_length=1, n_layer=1, n_head=1, n_embd=8))
    assert len(model.generate([[3]], 5)[0]) == 5


def test_stream_is_generate(tiny):
    for options in ({"temperature": 0}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9}):
        generators = [torch.Generator().manual_seed(7) for _ in range(2)]
        streamed = list(tiny.stream([1, 2, 3], 20, generator=generators[0], **options))
        assert tiny.generate([[1, 2, 3]], 20, generator=generators[1], **options) == [streamed]


def test_end_of_text_ends_a_row_and_only_that_row(tiny):
    rows = tiny.generate(PROMPTS, 60, temperature=0)
    for eos_id in {rows[0][10], rows[1][0], rows[2][50], rows[3][59]}:
        ended = tiny.generate(PROMPTS, 60, temperature=0, eos_id=eos_id)
        assert ended == [row[: row.index(eos_id)] if eos_id in row else row for row in rows]
        assert min(map(len, ended)) < 60


def test_generate_and_stream_have_the_same_keywords():
    defaults = {
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "eos_id": None,
        "generator": None,
    }
    for method in (GPT.generate, GPT.stream):
        parameters = inspect.signature(method).parameters.values()
        keywords = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
        assert keywords == defaults


def test_every_keyword_reaches_its_setting(tiny):
    greedy = tiny.generate([[1, 2, 3]], 20, temperature=0)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}):
        assert tiny.generate([[1, 2, 3]], 20, **options) == greedy
        assert list(tiny.stream([1, 2, 3], 20, **options)) == greedy[0]
    eos_id = greedy[0][2]
    n = greedy[0].index(eos_id)
    assert list(tiny.stream([1, 2, 3], 20, temperature=0, eos_id=eos_id)) == greedy[0][:n]


def test_stream_yields_each_id_as_soon_as_it_is_known(tiny):
    calls = []
    handle = tiny.ln_f.register_forward_hook(lambda *_: calls.append(1))
    for n, _ in enumerate(tiny.stream([1, 2, 3], 5), start=1):
        assert len(calls) == n and torch.is_grad_enabled()
    handle.remove()
    assert n == 5


def test_a_new_token_costs_one_token(tiny):
    shapes = []
    handle = tiny.ln_f.register_forward_hook(lambda _, args, y: shapes.append(tuple(y.shape[:2])))
    tiny.generate([[1, 2, 3], [4]], 4)
    handle.remove()
    assert shapes == [(2, 3), (2, 1), (2, 1), (2, 1)]


def test_generation_changes_no_prompt(tiny):
    prompts = [[1, 2, 3], [4]]
    tiny.generate(prompts, 50)
    assert prompts == [[1, 2, 3], [4]]


def test_generation_leaves_the_model_as_it_was(tiny):
    model = GPT(
        GPTConfig(vocab_size=20, context_length=8, n_layer=2, n_head=1, n_embd=16, dropout=0.5)
    )
    modes = [module.training for module in model.modules()]
    first = model.generate([[1, 2]], 5, temperature=0)
    assert first == model.generate([[1, 2]], 5, temperature=0)  # no dropout while it writes
    stream = model.stream([1], 5)
    next(stream)
    stream.close()
    with pytest.raises(ValueError, match="temperature"):  # an error in the middle of it
        model.generate([[1]], 5, temperature=-1)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("mode", [True, False])
def test_eval_mode_restores_the_mode(mode):
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model.train(mode)
    with pytest.raises(RuntimeError, match="inside"), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert all(module.training == mode for module in model.modules())


@pytest.mark.parametrize("prompt", [[], [0] * 49])
def test_prompts_that_cannot_be_read_are_refused(tiny, prompt):
    with pytest.raises(ValueError, match="prompt 1"):
        tiny.generate([[1], prompt], 5)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}],
)
def test_options_that_mean_nothing_are_refused(tiny, options):
    with pytest.raises(ValueError, match="sampling"):
        tiny.generate([[1]], 5, **options)


def test_nothing_to_do(tiny):
    assert list(tiny.stream([1], 0)) == []
    assert tiny.generate([], 5) == [] and tiny.generate([[1], [2]], 0) == [[], []]


def test_cache_takes_the_models_dtype(tiny):
    half = GPT(tiny.config).bfloat16()
    assert len(half.generate([[1, 2], [3]], 5)[0]) == 5
    with torch.autocast("cpu", torch.bfloat16):
        assert len(tiny.generate([[1, 2], [3]], 5)[0]) == 5


def frequencies(logits, n=40_000, **options):
    generator = torch.Generator().manual_seed(0)
    ids = sample(logits.expand(n, -1), generator=generator, **options)
    return torch.bincount(ids, minlength=logits.size(-1)) / n


LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.0, 0.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    expected = torch.exp(LOGITS / temperature) / torch.exp(LOGITS / temperature).sum()
    torch.testing.assert_close(
        frequencies(LOGITS, temperature=temperature), expected, rtol=0, atol=0.01
    )


def test_tiny_temperature_is_greedy():
    assert frequencies(LOGITS, n=100, temperature=1e-40)[1] == 1
    assert frequencies(LOGITS, n=100, temperature=0)[1] == 1


def test_top_k():
    for k, ids in [(1, [1]), (3, [1, 2, 4]), (6, range(6)), (100, range(6))]:
        kept = torch.zeros(6)
        kept[list(ids)] = LOGITS[list(ids)].exp()
        torch.testing.assert_close(
            frequencies(LOGITS, top_k=k), kept / kept.sum(), rtol=0, atol=0.01
        )
    assert (frequencies(torch.zeros(10), top_k=4) > 0).sum() == 4  # ties do not add to k


def test_top_p():
    # The probabilities, sorted: 0.516, 0.190, 0.190, 0.070, 0.026, 0.009
    for p, n in [(0.01, 1), (0.51, 1), (0.52, 2), (0.7, 2), (0.71, 3), (0.9, 4), (1.0, 6)]:
        assert (frequencies(LOGITS, top_p=p) > 0).sum() == n
    # Together, top_p acts on what top_k has left, as in transformers: of the 2 most likely, the
    # first has 0.73
    assert (frequencies(LOGITS, top_k=2, top_p=0.7) > 0).sum() == 1
    assert (frequencies(LOGITS, top_k=2, top_p=0.75) > 0).sum() == 2


def test_rows_are_sampled_independently(tiny):
    rows = tiny.generate([[1, 2, 3]] * 8, 5, generator=torch.Generator().manual_seed(0))
    assert len({row[0] for row in rows}) > 1 and len({tuple(row) for row in rows}) == 8


def test_a_seed_repeats_a_text(tiny):
    texts = [
        tiny.generate(PROMPTS, 10, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_generation_does_not_touch_a_compiled_graph(tiny):
    model = GPT(tiny.config)
    calls = []
    model.compile(backend=lambda graph, inputs: calls.append(graph) or graph.forward)
    model.generate([[1, 2, 3], [4]], 5)
    assert not calls
    model(torch.tensor([[1, 2]]))
    assert calls and not any("_orig_mod" in name for name in model.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_the_same_model():
    model = load_gpt2(TINY, device="cuda")[0]
    expected = read_safetensors(TINY / "expected.safetensors")
    with torch.no_grad():
        logits = model(expected["ids"].cuda()).cpu()
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
    assert model.generate(PROMPTS, 60, temperature=0) == load_gpt2(TINY)[0].generate(
        PROMPTS, 60, temperature=0
    )


# --------------------------------------------------------------------------------------------------
# The file by itself


def test_file_copied_alone_imports_torch_and_tiktoken_and_runs_the_tour(tmp_path):
    shutil.copy(ROOT / "gpt.py", tmp_path)
    code = """if True:
        import runpy, sys
        import numpy, regex, tiktoken, torch, torch.utils.data
        before = {name.partition(".")[0] for name in sys.modules}
        import gpt
        after = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
        print(sorted(after - before))
        runpy.run_path("gpt.py", run_name="__main__")"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": ""},
        timeout=55,
    )
    assert result.returncode == 0, result.stderr
    imported, *lines = result.stdout.splitlines()
    assert imported == "['gpt']"
    # The vocabulary is learned from the file itself, so the tokens change with it
    tokens = lines[1].removeprefix("Tokens").strip(" ")
    sentence = "The cat sat on the mat, and the dog sat on the cat."
    assert tokens.replace("|", "") == sentence and len(tokens) > len(sentence)
    assert lines[-1].removeprefix("It writes").strip(" ") == tokens  # learned by heart

    n = tokens.count("|")  # tokens that are read; the last one is only a target
    rows = [line[-2 * n - 1 : -1] for line in lines if line.endswith("|") and "@@" in line]
    assert len(rows) == n
    for t, row in enumerate(rows):
        assert len(row) == 2 * n and "@@" in row
        assert not row[2 * t + 2 :].strip(), "the causal mask hides the tokens to come"
