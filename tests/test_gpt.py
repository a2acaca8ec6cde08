import json
import math
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
    ShuffledBatches,
    TokenDataset,
    Tokenizer,
    create_dataloader,
    sample,
)
from load_gpt2 import load_gpt2, read_safetensors

ROOT = Path(__file__).parent.parent
TINY = (
    Path(__file__).parent / "tiny-gpt2"
)  # made by Hugging Face's libraries, see make_tiny_gpt2.py
EXPECTED = json.loads((TINY / "expected.json").read_text(encoding="utf-8"))
STORIES = (ROOT / "data" / "stories.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny():
    return load_gpt2(TINY)[0]


# ---------------------------------------------------------------------------------------------------------------------
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


def test_config_refuses_what_cannot_be_built():
    with pytest.raises(ValueError, match="n_embd=100 does not divide into n_head=3"):
        GPTConfig(n_embd=100, n_head=3)
    with pytest.raises(ValueError, match="at least 1"):
        GPTConfig(n_layer=0)
    with pytest.raises(ValueError, match="dropout"):
        GPTConfig(dropout=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def test_gpt2_ids_are_the_published_ones():
    tokenizer = Tokenizer.gpt2()
    assert tokenizer.vocab_size == 50257 and tokenizer.eot == 50256
    assert tokenizer.encode("Hello, I am") == [15496, 11, 314, 716]
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("Every effort moves you") == [
        6109,
        3626,
        6100,
        345,
    ]  # LLMs-from-scratch, chapter 4
    assert (
        tokenizer.encode("!") == [0]
        and tokenizer.encode(" ") == [220]
        and tokenizer.encode("\n") == [198]
    )


def test_control_token_in_a_text_is_plain_characters():
    tokenizer = Tokenizer.gpt2()
    ids = tokenizer.encode("<|endoftext|>")
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == "<|endoftext|>"
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
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


@pytest.mark.parametrize(
    "tokenizer", [Tokenizer.gpt2(), Tokenizer.train(STORIES, 400)], ids=["gpt2", "trained"]
)
def test_decode_undoes_encode(tokenizer):
    for text in random_texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_more_blanks_than_the_regex_can_take_are_an_error():
    with pytest.raises(ValueError, match="while tokenizing"):
        Tokenizer.gpt2().encode("x" + " " * 2_000_000 + "y")
    assert Tokenizer.gpt2().decode(Tokenizer.gpt2().encode("a\ud83db")) == "a\ufffdb"


def slow_bpe(text, n_merges):
    """Count all pairs of the whole text anew for each merge"""
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(gpt.SPLIT_PATTERN, text)]
    merges = []
    while len(merges) < n_merges:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not pairs or max(pairs.values()) < 2:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [slow_merge(word, best) for word in words]
    return merges


def slow_merge(word, pair):
    for i in range(len(word) - 1):
        if (word[i], word[i + 1]) == pair:
            return word[:i] + [word[i] + word[i + 1]] + slow_merge(word[i + 2 :], pair)
    return word


def test_training_learns_what_slow_counting_learns():
    assert Tokenizer.train(STORIES[:20_000], 500).merges == slow_bpe(STORIES[:20_000], 500 - 257)
    for text in random_texts():
        assert Tokenizer.train(text, 400).merges == slow_bpe(text, 400 - 257)


def test_encoding_applies_the_merges_in_order():
    tokenizer = Tokenizer.train(STORIES, 600)
    text = STORIES[5_000:7_000]
    tokens = []
    for word in regex.findall(gpt.SPLIT_PATTERN, text):
        word = [bytes([b]) for b in word.encode()]
        for pair in tokenizer.merges:
            word = slow_merge(word, pair)
        tokens += word
    assert [tokenizer.tokens[i] for i in tokenizer.encode(text)] == tokens


def test_train_sizes():
    assert Tokenizer.train(STORIES, 1024).vocab_size == 1024
    assert Tokenizer.train("abc", 1024).vocab_size == 257  # nothing occurs twice
    with pytest.raises(ValueError, match="257"):
        Tokenizer.train(STORIES, 256)


def test_save_and_load(tmp_path):
    tokenizer = Tokenizer.train(STORIES, 500)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).merges == tokenizer.merges
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    # The fixture's files come from another program: the same content must give the same bytes' meaning
    Tokenizer.load(TINY).save(tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text("utf-8")) == json.loads(
        (TINY / "vocab.json").read_text("utf-8")
    )
    assert (tmp_path / "merges.txt").read_text("utf-8").split("\n")[1:] == (
        TINY / "merges.txt"
    ).read_text("utf-8").split("\n")[1:]


@pytest.mark.parametrize(
    "name, text",
    [
        ("merges.txt", "#version: 0.2\na b\nthis is no pair\n"),
        ("merges.txt", "#version: 0.2\na b\na b\n"),
        ("merges.txt", "#version: 0.2\n\u4e00 b\n"),
        ("merges.txt", ""),
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("vocab.json", '{"!": 0}'),
    ],
)
def test_damaged_tokenizer_files_are_refused(tmp_path, name, text):
    Tokenizer.train(STORIES, 300).save(tmp_path)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=name):
        Tokenizer.load(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
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
    with pytest.raises(ValueError, match="shorter than one window"):
        TokenDataset(list(range(5)), context_length=5)


def test_uint16_ids_reach_the_model_as_int64():
    inputs, targets = TokenDataset(np.array([65535, 0, 50256], dtype=np.uint16), 2)[0]
    assert inputs.tolist() == [65535, 0] and targets.tolist() == [0, 50256]


def resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_flat_over_a_large_file(tmp_path):
    path = tmp_path / "tokens.bin"
    with open(path, "wb") as file:
        file.truncate(300_000_000)
    dataset = TokenDataset(np.memmap(path, dtype=np.uint16, mode="r"), context_length=2048)
    dataset[0]
    before, most = resident_megabytes(), 0
    for i, (inputs, targets) in enumerate(dataset):
        if i % 1000 == 0:
            most = max(most, resident_megabytes())
    assert most - before < 50


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_file_is_read_window_by_window(tmp_path):
    """VmFlags has "rr" where the system was told that reads are at random, so that it reads nothing ahead of them"""
    np.zeros(10_000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    dataset = TokenDataset(
        np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r"), context_length=16
    )
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    (flags,) = (
        after.split("\n")[0]
        for before, after in zip(mappings, mappings[1:])
        if str(tmp_path) in before
    )
    assert len(dataset) == 625 and "rr" in flags.split()


def test_shuffled_batches_are_epochs_without_a_seam():
    rows = []
    for batch in ShuffledBatches(n_rows=10, batch_size=4, seed=3):
        assert len(batch) == 4
        rows += batch
        if len(rows) == 40:
            break
    epochs = [rows[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_shuffled_batches_can_start_anywhere_and_be_shared_out():
    whole = [batch for batch, _ in zip(ShuffledBatches(7, 3, seed=5), range(12))]
    for rank in range(2):
        part = ShuffledBatches(7, 3, seed=5)
        part.first, part.every = 4 + rank, 2
        assert [batch for batch, _ in zip(part, range(4))] == whole[4 + rank :: 2]
    assert [batch for batch, _ in zip(ShuffledBatches(7, 3, seed=6), range(12))] != whole


def test_dataloader():
    dataset = TokenDataset(list(range(101)), context_length=10)
    batches = list(create_dataloader(dataset, batch_size=4))
    assert [inputs.shape for inputs, _ in batches] == [(4, 10), (4, 10), (2, 10)]
    assert torch.cat([targets.flatten() for _, targets in batches]).tolist() == list(range(1, 101))
    inputs, targets = next(iter(create_dataloader(dataset, batch_size=4, shuffle=True, seed=1)))
    assert inputs.shape == (4, 10) and torch.equal(inputs + 1, targets)


# ---------------------------------------------------------------------------------------------------------------------
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
    torch.testing.assert_close(tiny.head(x), x @ tiny.wte.weight.T)


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
    with pytest.raises(ValueError, match="49 tokens do not fit in a context of 48"):
        tiny(torch.zeros(1, 49, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@torch.no_grad()
def test_cached_logits_are_uncached_logits_for_every_split(tiny):
    torch.manual_seed(0)
    lengths, T = torch.tensor([12, 7, 1]), 12
    ids = torch.randint(0, 320, (3, T))
    whole = tiny.features(ids)
    for split in range(1, T):
        # Rows of different lengths: row r has read min(split, its length) tokens; what stands right of that is padding
        read = lengths.clamp(max=split)
        cache = tiny.empty_cache(3, n_columns=T + 3)
        padded = torch.where(torch.arange(split) < read[:, None], ids[:, :split], 0)
        first = tiny.features(padded, cache, torch.arange(split).expand(3, split))
        for row in range(3):
            torch.testing.assert_close(
                first[row, : read[row]], whole[row, : read[row]], rtol=0, atol=1e-5
            )
        # The rest in steps of two tokens, each row from where it stands
        for _ in range(2):
            positions = read[:, None] + torch.arange(2)
            positions = positions.clamp(max=T - 1)
            x = tiny.features(ids.gather(1, positions), cache, positions)
            torch.testing.assert_close(
                x, whole.gather(1, positions[..., None].expand(-1, -1, 24)), rtol=0, atol=1e-5
            )
            read = (read + 2).clamp(max=T)


def test_greedy_continuation_is_transformers(tiny):
    ids = read_safetensors(TINY / "expected.safetensors")["ids"]
    (new,) = tiny.generate([ids[0, :8].tolist()], 30, temperature=0)
    assert new == EXPECTED["greedy"]


PROMPTS = [[5, 6, 7], [1], [300, 2, 9, 9, 4, 8, 250], [17, 3]]


def test_a_batch_gives_each_row_what_it_gets_alone(tiny):
    together = tiny.generate(
        PROMPTS, 60, temperature=0
    )  # outgrows the context of 48, each row at another step
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
    rows = tiny.generate(PROMPTS, 40, temperature=0)
    eos_id = rows[0][10]
    ended = tiny.generate(PROMPTS, 40, temperature=0, eos_id=eos_id)
    for row, short in zip(rows, ended):
        assert short == (row[: row.index(eos_id)] if eos_id in row else row)
    assert len(ended[0]) <= 10


def test_generation_leaves_the_model_as_it_was(tiny):
    model = GPT(
        GPTConfig(vocab_size=20, context_length=8, n_layer=2, n_head=1, n_embd=16, dropout=0.5)
    )
    model.h[1].eval()
    modes = [module.training for module in model.modules()]
    first = model.generate([[1, 2]], 5, temperature=0)
    assert first == model.generate([[1, 2]], 5, temperature=0)  # no dropout while it writes
    stream = model.stream([1], 5)
    next(stream)
    stream.close()
    with pytest.raises(ValueError):
        model.generate([[99]], 5)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("prompt", [[], [0] * 49, [320], [-1]])
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
    # Together, top_p acts on what top_k has left, as in transformers: of the 2 likeliest, the first has 0.73
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


# ---------------------------------------------------------------------------------------------------------------------
# The file by itself


def test_importing_gpt_imports_torch_and_tiktoken_only():
    code = """if True:
        import sys, torch, tiktoken, torch.utils.data
        before = {name.partition(".")[0] for name in sys.modules}
        import gpt
        after = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
        print(sorted(after - before))"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "['gpt']"


def test_tour_of_the_file_copied_alone(tmp_path):
    shutil.copy(ROOT / "gpt.py", tmp_path)
    result = subprocess.run(
        [sys.executable, "gpt.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "The| c|at| s|at| on| the| m|at" in result.stdout.splitlines()[-1]
