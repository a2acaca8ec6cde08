"""
GPT-2 in one file. `python gpt.py` follows one sentence through a small model.

The tokenizer turns a text into token ids. The dataset cuts the ids into windows to learn from. The
model turns each window into logits, one score per vocabulary entry for the next token. Sampling
from these scores, one token at a time, generates text.

Shapes in comments: B batch, T tokens (time), C channels (n_embd), H heads, D head size (C / H),
V vocabulary size.
"""

import codecs
import contextlib
import itertools
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex  # installed with tiktoken; Python's re module does not support \p{L}
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from tiktoken.load import read_file_cached
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

# --------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    context_length: int = 1024  # the most tokens in one sequence (n_positions in Hugging Face)
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    def __post_init__(self):
        *sizes, dropout = vars(self).values()
        if not all(type(size) is int and size > 0 for size in sizes) or not 0 <= dropout < 1:
            raise ValueError(f"sizes must be positive integers, dropout in [0, 1): {self}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")


# Sizes: Radford et al. 2019, table 2; distilgpt2 was made by Hugging Face (Sanh et al. 2019)
GPT2_CONFIGS = {
    "distilgpt2": GPTConfig(n_layer=6),  # 82M parameters
    "gpt2": GPTConfig(),  # 124M
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


# --------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE (byte pair encoding; Sennrich et al. 2016, Radford et al. 2019)
#
# The vocabulary is the 256 bytes, so that every text can be encoded, and then byte sequences that
# occur often, each made by merging two earlier tokens.

# A text is first split into contractions, words, numbers, punctuation and white space. Of several
# spaces, \s+(?!\S) leaves the last to the word after it. Tokens never cross these splits.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# GPT-2's order of the 256 bytes: the 188 printable ones, then the other 68. Its files write the
# printable ones as themselves and the others as characters from U+0100 on, so that a space ("Ġ"
# there) can separate two tokens.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
CHARS = [chr(byte) for byte in PRINTABLE] + [chr(0x100 + i) for i in range(68)]
BYTE_TO_CHAR = dict(zip(BYTES, CHARS))
# For str.translate: a token with these characters in Latin-1, which writes character n as byte n
TO_LATIN1 = {ord(char): byte for byte, char in BYTE_TO_CHAR.items()}
END_OF_TEXT = "<|endoftext|>"


def spell(word):
    """The bytes of a word as characters: " the" -> ["Ġ", "t", "h", "e"]"""
    return [BYTE_TO_CHAR[byte] for byte in word.encode("utf-8")]


def merge_pair(tokens, pair):
    """["t", "h", "e"], ("t", "h") -> ["th", "e"]"""
    merged = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


class Tokenizer:
    """
    GPT-2's byte-level BPE. tiktoken encodes; `train` and `apply_merges` show how it works.

    merges: lines of merges.txt, two tokens with a space between, in the order they were learned in.
    vocab: {token: id} as in vocab.json; by default the 256 bytes, the merges, then <|endoftext|>.
        What is neither a byte nor made by a merge is a special token.
    Raises KeyError for a merge that is not in vocab, ValueError if ids do not follow the merges.
    """

    def __init__(self, merges, vocab=None):
        self.merges = merges
        tokens = CHARS + [merge.replace(" ", "") for merge in merges]
        if vocab is None:
            vocab = {token: i for i, token in enumerate([*tokens, END_OF_TEXT])}
        self.vocab = vocab
        self.eot = vocab[END_OF_TEXT]
        self.vocab_size = max(vocab.values()) + 1
        ids = [vocab[token] for token in tokens]
        # tiktoken first applies the merge with the lowest id, so ids must be in the merges' order
        if ids[256:] != sorted(set(ids[256:])) or len(set(vocab.values())) < len(vocab):
            raise ValueError("ids must differ, and follow the order of the merges")
        token_bytes = [token.translate(TO_LATIN1).encode("latin-1") for token in tokens]
        self.id_to_bytes = dict(zip(ids, token_bytes))
        special_tokens = {token: i for token, i in vocab.items() if i not in self.id_to_bytes}
        self.encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=dict(zip(token_bytes, ids)),
            special_tokens=special_tokens,
        )
        self.id_to_bytes |= {i: token.encode() for token, i in special_tokens.items()}

    def encode(self, text):
        """str -> list of ids. Special tokens in the text are encoded as ordinary characters."""
        return self.encoding.encode(text, disallowed_special=())

    def decode(self, ids):
        """ids -> str. Unknown ids, and bytes that are not valid UTF-8, become U+FFFD."""
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids):
        """ids as they come -> pieces of text; a character comes with the last of its bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in ids:
            yield decoder.decode(self.id_to_bytes.get(int(token_id), b"\xff"))  # \xff: never UTF-8
        yield decoder.decode(b"", final=True)

    def apply_merges(self, word):
        """
        BPE encoding, spelled out: apply the merges in the order they were learned in. " the" ->
        ["Ġt", "he"], if "Ġt he" was not learned. `encode` does the same, faster.
        """
        tokens = spell(word)
        for merge in self.merges:
            tokens = merge_pair(tokens, tuple(merge.split(" ")))
        return tokens

    @classmethod
    def train(cls, text, vocab_size):
        """Repeatedly merge the most frequent pair of adjacent tokens, while one occurs twice."""
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size}: the bytes and {END_OF_TEXT} alone need 257")
        word_counts = Counter(regex.findall(SPLIT_PATTERN, text))
        words = [spell(word) for word in word_counts]  # each a list of tokens
        counts = list(word_counts.values())
        pair_counts = Counter()
        words_with_pair = defaultdict(set)  # pair -> indices of words that contain it, or once did

        def count_pairs(i, sign):
            for pair in itertools.pairwise(words[i]):
                pair_counts[pair] += sign * counts[i]
                words_with_pair[pair].add(i)

        for i in range(len(words)):
            count_pairs(i, 1)
        merges = []
        while len(merges) < vocab_size - 257 and pair_counts:
            # Of equally frequent pairs, the last in the alphabet
            best = max(pair_counts, key=lambda pair: (pair_counts[pair], pair))
            if pair_counts[best] < 2:
                break
            merges.append(" ".join(best))
            # Only words that contain this pair change: subtract their old pairs, add their new ones
            for i in list(words_with_pair[best]):
                count_pairs(i, -1)
                words[i] = merge_pair(words[i], best)
                count_pairs(i, 1)
        return cls(merges)

    @classmethod
    def gpt2(cls):
        """OpenAI's 50,257 tokens. Without data/gpt2-merges.txt, tiktoken downloads the merges."""
        path = Path(__file__).with_name("data") / "gpt2-merges.txt"
        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
        sha256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
        content = path.read_bytes() if path.exists() else read_file_cached(url, sha256)
        return cls(read_merges(content.decode("utf-8")))

    @classmethod
    def load(cls, folder):
        merges = (Path(folder) / "merges.txt").read_text(encoding="utf-8")
        vocab = (Path(folder) / "vocab.json").read_text(encoding="utf-8")
        return cls(read_merges(merges), json.loads(vocab))

    def save(self, folder):
        """Write merges.txt and vocab.json, as Hugging Face's GPT2Tokenizer reads them."""
        merges = "".join(merge + "\n" for merge in ["#version: 0.2", *self.merges])
        (Path(folder) / "merges.txt").write_text(merges, encoding="utf-8", newline="\n")
        (Path(folder) / "vocab.json").write_text(json.dumps(self.vocab), encoding="utf-8")


def read_merges(content):
    """Content of merges.txt -> its lines, without the first if it gives the version"""
    lines = [line for line in content.splitlines() if line]
    return lines[1:] if content.startswith("#version") else lines


# --------------------------------------------------------------------------------------------------
# Data: a long sequence of ids is cut into windows; the target of each token is the token after it


class TokenDataset(Dataset):
    """
    Sliding windows over token ids: pairs (inputs, targets), int64, (T,) each, T = context_length.

    tokens: a list, array, tensor or np.memmap of ids.
    stride: tokens from the start of one window to the start of the next (default: context_length).
        The last window is moved back to end with the data; targets that it shares with the window
        before are -100, which the loss ignores. So by default, every token but the first is a
        target once.
    Raises ValueError if there are not enough tokens for one window.
    """

    def __init__(self, tokens, context_length, stride=None):
        self.tokens = tokens
        self.context_length = context_length
        self.stride = context_length if stride is None else stride
        if context_length < 1 or self.stride < 1:
            raise ValueError(f"{context_length=} and {stride=} must be at least 1")
        self.last_start = len(tokens) - context_length - 1  # the last target needs one more token
        if self.last_start < 0:
            raise ValueError(f"{len(tokens):,} tokens are too few for {context_length=} + 1")

    def __len__(self):
        return math.ceil(self.last_start / self.stride) + 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        start = min(i * self.stride, self.last_start)
        # Token files hold uint16, but an embedding takes int64
        window = np.asarray(self.tokens[start : start + self.context_length + 1], dtype=np.int64)
        inputs = torch.tensor(window[:-1])
        targets = torch.tensor(window[1:])
        if start < i * self.stride:  # moved back
            previous_end = (i - 1) * self.stride + self.context_length
            targets[: max(0, previous_end - start)] = -100
        return inputs, targets


def create_dataloader(dataset, batch_size, *, shuffle=False, seed=0, collate_fn=None):
    """One pass over the dataset in batches; with shuffle, in random order set by the seed."""
    order = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle, generator=order, collate_fn=collate_fn)


# --------------------------------------------------------------------------------------------------
# Model
#
# Each token has a vector; the vectors of a text are the residual stream, (B, T, C). Attention moves
# information between tokens, the MLP works on each token by itself, and both add their output to
# the residual stream. Parameter names are those of the published weights, where linear layers are
# called c_something because OpenAI wrote them as 1x1 convolutions.


class CausalSelfAttention(nn.Module):
    """
    Multi-head causal self-attention (Vaswani et al. 2017, section 3.2). (B, T, C) -> (B, T, C)

    The query of a token is compared with the keys of all tokens up to itself. The better a key
    matches, the more of that token's value is taken. Each head does this in D channels of its own.
    Scores are divided by sqrt(D), because those of more channels vary more.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value side by side
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, x):
        """(B, T, C) -> queries, keys, values, (B, H, T, D) each"""
        qkv = self.c_attn(x).chunk(3, dim=-1)  # (B, T, C) each
        return [y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in qkv]

    def weights(self, x):
        """
        The attention pattern, spelled out: softmax(q k^T / sqrt(D)) under the causal mask.
        (B, T, C) -> (B, H, T, T); row t says how much token t takes from each token.
        For readers; `forward` computes the same inside one fused kernel.
        """
        q, k, _ = self.project(x)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, T)
        future = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
        return scores.masked_fill(future, -math.inf).softmax(dim=-1)

    def forward(self, x, cache=None):
        q, k, v = self.project(x)
        mask = None
        if cache is not None:  # only in generation, see KVCache
            k, v = cache.update(self, k, v)
            mask = cache.mask
        # Unlike nn.Dropout, the function below knows nothing of model.eval()
        dropout_p = self.dropout.p if self.training else 0.0
        # weights(x) @ v in one kernel, which never stores the (T, T) weights (Dao et al. 2022)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=mask is None
        )
        y = y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C): the heads side by side
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with a hidden layer of 4C. (B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # OpenAI's GELU is the tanh approximation
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """
    Transformer block: attention, then MLP, each added to the residual stream through a shortcut
    (skip connection). Each reads a normalized copy of the stream (pre-norm): LayerNorm brings every
    vector to mean 0 and variance 1, then scales and shifts each channel as learned.
    (B, T, C) -> (B, T, C)
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): embeddings, blocks, output head. (B, T) -> (B, T, V)"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # token embedding
        self.wpe = nn.Embedding(config.context_length, config.n_embd)  # learned position embedding
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))  # the blocks
        self.ln_f = nn.LayerNorm(config.n_embd)

        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not parameter.is_meta:  # on meta, the weights come later
                # 2 n_layer outputs are added to the residual stream; scaled by 1 / sqrt(2 n_layer),
                # their sum has the same variance for any number of layers (Radford et al., 2.3)
                n_added = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(n_added))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, ids, cache=None):
        """
        The final hidden states. (B, T) -> (B, T, C)

        With a KVCache, `ids` continue the texts in the cache; the caller makes sure that they fit.
        Raises ValueError for more than context_length ids.
        """
        n_tokens = ids.size(1)
        if n_tokens > self.config.context_length:
            raise ValueError(f"{n_tokens} tokens exceed the {self.config.context_length=}")
        if cache is None:
            positions = torch.arange(n_tokens, device=ids.device)  # (T,)
        else:
            positions = cache.extend(n_tokens)  # (B, T)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            x = block(x, cache)
        return self.ln_f(x)

    def lm_head(self, x):
        """Hidden states to logits. (..., C) -> (..., V)"""
        # The output head shares the token embedding matrix (weight tying, Press and Wolf 2017)
        return F.linear(x, self.wte.weight)

    def forward(self, ids, targets=None):
        """
        ids (B, T) -> logits (B, T, V); with targets (B, T), the mean cross-entropy over the targets
        that are not -100, in nats (natural logarithm).
        """
        logits = self.lm_head(self.features(ids))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    def generate(
        self, prompts, max_new_tokens, *,
        temperature=1.0, top_k=None, top_p=None, eos_id=None, generator=None
    ):  # fmt: skip
        """
        Continue every prompt, all in one batch. -> a list of new ids for each prompt

        prompts: lists of ids, 1 to context_length long; lengths may differ.
        temperature: 1 samples from the model's distribution, 0 is greedy (the most likely token).
        top_k: sample from the k most likely tokens.
        top_p: nucleus sampling (Holtzman et al. 2019): sample from the smallest set of most likely
            tokens that have a total probability of at least p. With top_k, among those k.
        eos_id: this id ends a text and is not returned. generator: a torch.Generator.
        A text that outgrows the context is cut to its last half and read again from position 0.
        Raises ValueError for a prompt of another length, or a setting out of range.
        """
        sampling = (temperature, top_k, top_p, generator)
        new_ids = [[] for _ in prompts]
        for new in decode_steps(self, prompts, max_new_tokens, eos_id, sampling):
            for i, token_id in new.items():
                new_ids[i].append(token_id)
        return new_ids

    def stream(
        self, prompt, max_new_tokens, *,
        temperature=1.0, top_k=None, top_p=None, eos_id=None, generator=None
    ):  # fmt: skip
        """`generate` for one prompt, but yields each new id as soon as it is known."""
        sampling = (temperature, top_k, top_p, generator)
        for new in decode_steps(self, [prompt], max_new_tokens, eos_id, sampling):
            yield from new.values()


# --------------------------------------------------------------------------------------------------
# Generation


class KVCache:
    """
    Keys and values of the tokens read so far. With them, only the new token is computed, instead of
    the whole text again. In the cache, a row is a text, a column a position in it.
    """

    def __init__(self, n_rows, n_columns, device):
        self.n_columns = n_columns
        self.lengths = torch.zeros(n_rows, dtype=torch.long, device=device)  # tokens in each row
        self.layers = {}  # attention layer -> keys, values, (B, H, n_columns, D) each
        self.mask = None  # what the new tokens attend to; None for the first read: plain causal

    def extend(self, n_tokens):
        """Begin to read n_tokens more in each row. -> their positions (B, T)"""
        device = self.lengths.device
        self.positions = self.lengths[:, None] + torch.arange(n_tokens, device=device)
        self.lengths = self.lengths + n_tokens  # with padding, which decode_steps subtracts
        self.n_read = int(self.lengths.max())  # columns in use
        if self.layers:  # not the first read: attend to all columns up to one's own position
            columns = torch.arange(self.n_read, device=device)
            self.mask = columns <= self.positions[:, None, :, None]  # (B, 1, T, n_read)
        return self.positions

    def update(self, layer, k, v):
        """
        Store the keys and values of the new tokens, (B, H, T, D) each, in the columns of their
        positions. -> keys and values of all columns read so far, (B, H, n_read, D) each
        """
        B, H, _, D = k.shape
        if layer not in self.layers:
            # Zeros, because a masked value still counts as 0 * value, and 0 * nan is nan
            self.layers[layer] = [k.new_zeros(B, H, self.n_columns, D) for _ in range(2)]
        keys, values = self.layers[layer]
        rows = torch.arange(B, device=k.device)[:, None]  # (B, 1), beside positions (B, T)
        keys.transpose(1, 2)[rows, self.positions] = k.transpose(1, 2)  # (B, T, H, D)
        values.transpose(1, 2)[rows, self.positions] = v.transpose(1, 2)
        return keys[:, :, : self.n_read], values[:, :, : self.n_read]

    def keep(self, rows):
        """Remove all other rows of the batch."""
        self.lengths = self.lengths[rows]
        for layer, (keys, values) in self.layers.items():
            self.layers[layer] = keys[rows], values[rows]


@torch.no_grad()
def decode_steps(model, prompts, max_new_tokens, eos_id, sampling):
    """Yield {index of a prompt: its new id} for each step, without texts that have ended."""
    device = model.wte.weight.device
    context_length = model.config.context_length
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= context_length:
            raise ValueError(f"prompt {i}: {len(prompt)} tokens, not 1 to {context_length}")
    # Prompts and their new ids, in the order of the rows in the batch
    texts = {i: list(prompt) for i, prompt in enumerate(prompts)}
    cache = None
    with eval_mode(model):
        for n_left in range(max_new_tokens, 0, -1):
            if not texts:
                return
            if cache is None:
                unread = list(texts.values())  # not in a cache yet; later one new id per row
                n_columns = min(max(map(len, unread)) + n_left, context_length)
                cache = KVCache(len(unread), n_columns, device)
            # Padding goes on the right, where the causal mask hides it from the text
            ids = pad_sequence([torch.tensor(row) for row in unread], batch_first=True)
            x = model.features(ids.to(device), cache)  # (B, T) -> (B, T, C)
            lengths = torch.tensor([len(row) for row in unread])
            logits = model.lm_head(x[torch.arange(len(x)), lengths - 1])  # (B, V)
            # The cache counted the padding too; subtract it, so that the next ids overwrite it
            cache.lengths -= ids.size(1) - lengths.to(device)

            next_ids = sample(logits, *sampling).tolist()
            new = {i: token_id for i, token_id in zip(texts, next_ids) if token_id != eos_id}
            if len(new) < len(texts):  # texts that have ended leave the batch
                cache.keep([row for row, i in enumerate(texts) if i in new])
            texts = {i: texts[i] + [token_id] for i, token_id in new.items()}
            unread = [[token_id] for token_id in new.values()]
            for i, text in texts.items():
                if len(text) > context_length:
                    texts[i] = text[-max(1, context_length // 2) :]
                    cache = None  # positions have changed: read all texts again
            yield new


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Choose a token for each row. (B, V) -> (B,). Settings as in GPT.generate."""
    V = logits.size(-1)
    top_k = V if top_k is None else top_k
    top_p = 1.0 if top_p is None else top_p
    if not (temperature >= 0 and top_k >= 1 and 0 < top_p <= 1):
        raise ValueError("sampling needs temperature >= 0, top_k >= 1 and 0 < top_p <= 1")
    logits = logits.float()
    if temperature < 1e-6:  # greedy, also where a division by the temperature would overflow
        return logits.argmax(dim=-1)
    if top_k >= V and top_p == 1:
        probs = (logits / temperature).softmax(dim=-1)
        return torch.multinomial(probs, num_samples=1, generator=generator)[:, 0]
    logits, ids = logits.topk(min(top_k, V))  # (B, k) each, the most likely first
    probs = (logits / temperature).softmax(dim=-1)
    # Nucleus sampling: drop a token if the more likely ones already reach p
    probs[probs.cumsum(dim=-1) - probs >= top_p] = 0
    choice = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1)
    return ids.gather(-1, choice)[:, 0]


@contextlib.contextmanager
def eval_mode(model):
    """Switch dropout off; afterwards the model is in the mode that it was in before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# --------------------------------------------------------------------------------------------------
# The tour


def tour():
    """Follow one sentence through a small model that has learned it by heart."""
    torch.manual_seed(0)
    sentence = "The cat sat on the mat, and the dog sat on the cat."
    source = Path(__file__).read_text(encoding="utf-8")  # any text will do to learn a vocabulary
    tokenizer = Tokenizer.train(source, vocab_size=512)
    ids = tokenizer.encode(sentence)
    tokens = [tokenizer.decode([token_id]) for token_id in ids]
    print(f"Text            {sentence!r}")
    print(f"Tokens          {'|'.join(tokens)}")
    print(f"Ids             {ids}")

    inputs = torch.tensor([ids[:-1]])  # a batch of one, (1, T)
    targets = torch.tensor([ids[1:]])  # the next token of each
    model = GPT(GPTConfig(tokenizer.vocab_size, context_length=64, n_layer=2, n_head=4, n_embd=64))
    print(f"Untrained       loss {model(inputs, targets):.2f}, about ln V: a blind guess")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(50):
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"After 50 steps  loss {loss:.2f}: it overfits, it knows the sentence by heart")

    x = model.wte(inputs) + model.wpe(torch.arange(inputs.size(1)))
    pattern = model.h[0].attn.weights(model.h[0].ln_1(x))
    logits = model(inputs)
    print(f"\nEmbeddings      {list(inputs.shape)} -> {list(x.shape)} (B, T, C): token + position")
    print(f"Attention       {list(pattern.shape)} (B, H, T, T): what each token takes from each")
    print(f"Logits          {list(logits.shape)} (B, T, V): scores of every next token")

    print("\nAttention pattern of the first head: each row is a token that reads, darker is more.")
    print("The causal mask hides the tokens to come, in the upper right.\n")
    for token, row in zip(tokens, pattern[0, 0].tolist()):
        cells = "".join(2 * " .:-=+*#%@"[int(9.9 * weight / max(row))] for weight in row)
        print(f"{token:>8} |{cells}|")

    probs, best = logits[0, -1].softmax(dim=-1).topk(4)
    expected = [f"{tokenizer.decode([token_id])!a} {p:.1%}" for token_id, p in zip(best, probs)]
    print(f"\nIt expects      {', '.join(expected)} after {tokenizer.decode(ids[-5:-1])!r}")
    new_ids = model.generate([ids[:1]], max_new_tokens=len(ids) - 1, temperature=0)[0]
    print(f"It writes       {'|'.join(tokenizer.decode([i]) for i in ids[:1] + new_ids)}")


if __name__ == "__main__":
    tour()
