"""
GPT-2 in one file, to be read from top to bottom: a text becomes tokens, tokens become windows to learn from, windows go
through attention and MLPs and come out as a guess at the next token, and guesses, taken one by one, become a text.

Shapes in comments: B batch, T tokens (time), C channels (n_embd), H heads, D head size (C / H), V vocabulary.

    python gpt.py       follows one sentence through the model
"""

import codecs
import contextlib
import itertools
import json
import math
import mmap
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

# ---------------------------------------------------------------------------------------------------------------------
# Config: six numbers say what a GPT is; the published ones differ in three of them


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    context_length: int = 1024  # how far back a token can look
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            limit = 1000 if name == "n_layer" else 2**24  # building millions of layers would take for ever
            if name != "dropout" and not (type(value) is int and 0 < value < limit):
                raise ValueError(f"{name}={value!r:.40} is no size; it must be a whole number, at least 1 and below {limit}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads of equal size")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not in [0, 1)")


# Radford et al. 2019, table 2, and the distilled model that Hugging Face published later
GPT2_CONFIGS = {
    "distilgpt2": GPTConfig(n_layer=6),  # 82M parameters
    "gpt2": GPTConfig(),  # 124M
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer: text <-> ids. A vocabulary is the 256 bytes, so that nothing is ever unknown, and then byte strings that
# occur often, each made by merging two earlier ones; its id is its place in that order.

# How GPT-2 cuts a text before it merges anything: contractions, words, numbers, the rest, each with its leading space.
# Merges never cross these cuts, so "dog" and "dog!" share a token.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# GPT-2's order of the 256 bytes, printable ones first. Its files spell these as they are, and the other 68 as characters
# from U+0100 on, so that merges.txt holds no blanks or control characters.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
CHAR_OF_BYTE = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """
    Byte-level BPE as GPT-2 has it, run by tiktoken.

    merges: pairs of byte strings, in the order in which they were learned.
    Ids: the 256 bytes, then one for each merge, then <|endoftext|>; or those of `vocab`, a vocab.json with other ids, which
    may hold more special tokens, but must number the merges in their order: tiktoken merges what has the lowest id.
    """

    def __init__(self, merges, vocab=None):
        self.merges = list(merges)
        tokens = [bytes([byte]) for byte in CHAR_OF_BYTE] + [left + right for left, right in self.merges]
        names = [*map(to_chars, tokens), END_OF_TEXT]  # as vocab.json spells them
        self.vocab = {name: i for i, name in enumerate(names)} if vocab is None else vocab
        check_vocab(self.vocab, names)
        *ids, self.eot = [self.vocab[name] for name in names]
        special_tokens = {name: self.vocab[name] for name in self.vocab.keys() - set(names[:-1])}
        self.tokens = dict(zip(ids, tokens)) | {i: name.encode("utf-8") for name, i in special_tokens.items()}
        self.vocab_size = max(self.tokens) + 1
        self.encoding = tiktoken.Encoding(
            "gpt2", pat_str=SPLIT_PATTERN, mergeable_ranks=dict(zip(tokens, ids)), special_tokens=special_tokens
        )

    def encode(self, text):
        """str -> list of ids. "<|endoftext|>" in a text is plain characters: only `eot` itself ends a document."""
        return self.encoding.encode(text, disallowed_special=())

    def decode(self, ids):
        """Ids -> str. Bytes that are not UTF-8, such as half a character at the end, and unknown ids become U+FFFD."""
        return b"".join(self.tokens.get(int(i), b"\xff") for i in ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids):
        """Ids, one by one as they come -> pieces of text. A character made of several tokens comes with the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.tokens.get(int(i), b"\xff"))
        yield decoder.decode(b"", final=True)

    @classmethod
    def gpt2(cls):
        """OpenAI's 50,257 tokens, from data/gpt2-merges.txt; where this file was copied alone, tiktoken fetches them."""
        path = Path(__file__).with_name("data") / "gpt2-merges.txt"
        if path.exists():
            return cls(parse_merges(path.read_text(encoding="utf-8")))
        from tiktoken.load import read_file_cached

        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
        sha256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
        return cls(parse_merges(read_file_cached(url, sha256).decode("utf-8")))

    @classmethod
    def train(cls, text, vocab_size):
        """
        Learn a vocabulary from a text: cut it into words, then again and again make the most frequent pair of neighbours
        one token (Sennrich et al. 2016). The vocabulary stays smaller where no pair is left that occurs twice.
        """
        import regex  # comes with tiktoken; Python's own re does not know \p{L}

        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and {END_OF_TEXT} need 257")

        count_of_word = Counter(regex.findall(SPLIT_PATTERN, text))
        words = [[bytes([byte]) for byte in word.encode("utf-8")] for word in count_of_word]  # each a list of tokens
        counts = list(count_of_word.values())

        count_of_pair, words_with = Counter(), defaultdict(set)  # pair -> how often, and the numbers of words that hold it
        for i, word in enumerate(words):
            for pair in zip(word, word[1:]):
                count_of_pair[pair] += counts[i]
                words_with[pair].add(i)

        merges = []
        while len(merges) < vocab_size - 257 and count_of_pair:
            best = max(count_of_pair, key=lambda pair: (count_of_pair[pair], pair))  # by count, ties by bytes
            if count_of_pair[best] < 2:
                break
            merges.append(best)
            # Only the words that hold this pair change: take their pairs out of the count, merge, put the new ones in
            for i in words_with.pop(best):
                for pair in zip(words[i], words[i][1:]):
                    count_of_pair[pair] -= counts[i]
                words[i] = merge_pair(words[i], best)
                for pair in zip(words[i], words[i][1:]):
                    count_of_pair[pair] += counts[i]
                    words_with[pair].add(i)
            del count_of_pair[best]
        return cls(merges)

    def save(self, folder):
        """Write merges.txt and vocab.json as Hugging Face's GPT2Tokenizer reads them."""
        merges = "".join(f"{to_chars(left)} {to_chars(right)}\n" for left, right in self.merges)
        with complete_file(Path(folder) / "merges.txt") as part:
            part.write_text("#version: 0.2\n" + merges, encoding="utf-8", newline="\n")
        with complete_file(Path(folder) / "vocab.json") as part:
            part.write_text(json.dumps(self.vocab, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder):
        """Read what `save` wrote, or the files of a published GPT-2. Raises ValueError where they do not fit together."""
        try:
            merges = parse_merges((Path(folder) / "merges.txt").read_text(encoding="utf-8"))
            return cls(merges, json.loads((Path(folder) / "vocab.json").read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder}: merges.txt or vocab.json is damaged ({error!r:.100})") from None


def merge_pair(word, pair):
    """[t, h, e, t, h], (t, h) -> [th, e, th]"""
    merged, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            merged.append(word[i] + word[i + 1])
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def to_chars(token):
    """b" a" -> "Ġa", as the files spell it"""
    return token.decode("latin-1").translate(CHAR_OF_BYTE)


def parse_merges(text):
    """The lines of a merges.txt -> pairs of byte strings, each made of bytes or of what an earlier line has made"""
    lines = text.split("\n")
    if lines[0].startswith("#version"):  # no other line with "#" is a comment: "# #" is a merge
        del lines[0]
    merges, tokens = [], {char: bytes([byte]) for byte, char in CHAR_OF_BYTE.items()}
    for left, right in (line.split(" ") for line in lines if line):
        merges.append((tokens[left], tokens[right]))
        tokens[left + right] = tokens[left] + tokens[right]
    return merges


def check_vocab(vocab, names):
    """Raise ValueError where `vocab` {name: id} cannot hold the tokens `names`: bytes, merges in their order, <|endoftext|>."""
    if len(set(names)) < len(names):
        raise ValueError("two merges make the same token")
    if any(type(i) is not int or not 0 <= i < 2**24 for i in vocab.values()) or len(set(vocab.values())) < len(vocab):
        raise ValueError("ids must be different whole numbers")
    ids = [vocab[name] for name in names[256:-1]]
    if ids != sorted(ids):
        raise ValueError("the ids in vocab.json do not follow the order of the merges")
    for name in vocab.keys() - set(names):
        if name[:1] + name[-1:] not in ("<>", "[]"):  # a special token looks so; another name is that of a missing merge
            raise ValueError(f"no merge makes {name!r:.40}")


@contextlib.contextmanager
def complete_file(path):
    """`with complete_file(path) as part:` write to `part`. Only a block without an error gives it the name `path`."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Data: a long row of token ids becomes windows, and the target of every token is the token after it


class TokenDataset(Dataset):
    """
    Windows of context_length tokens, `stride` apart, each with its targets: ([t0 .. tn-1], [t1 .. tn]), both int64.

    tokens: a list, an array, a tensor, or a np.memmap of a file of any size, of which only the windows asked for are read.
    With stride = context_length (the default) every token but the first is a target exactly once: the last window is moved
    back to end with the text, and what an earlier window has had as a target is -100 there, which the loss leaves out.
    """

    def __init__(self, tokens, context_length, stride=None):
        self.tokens, self.context_length = tokens, context_length
        self.stride = context_length if stride is None else stride
        if context_length < 1 or self.stride < 1:
            raise ValueError(f"context_length={context_length} and stride={self.stride} must be at least 1")
        if len(tokens) <= context_length:
            raise ValueError(f"{len(tokens):,} tokens are shorter than one window of context_length={context_length} + 1")
        self.last_start = len(tokens) - 1 - context_length
        self.file = None
        if isinstance(tokens, np.memmap) and tokens.mode == "r" and hasattr(mmap, "MADV_RANDOM"):
            self.file = tokens._mmap
            self.file.madvise(mmap.MADV_RANDOM)  # else the system also reads megabytes around each window

    def __len__(self):
        return 1 + math.ceil(self.last_start / self.stride)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        start = min(i * self.stride, self.last_start)
        # int64, because that is what an embedding takes; files hold uint16
        window = torch.tensor(np.asarray(self.tokens[start : start + self.context_length + 1], dtype=np.int64))
        if self.file is not None:
            # Pages once read stay counted as this process's memory, up to the whole file, unless they are given back
            self.file.madvise(mmap.MADV_DONTNEED)
        inputs, targets = window[:-1], window[1:].clone()
        if start < i * self.stride:
            targets[: max(0, (i - 1) * self.stride + self.context_length - start)] = -100
        return inputs, targets


class ShuffledBatches:
    """
    Which rows make which batch, without end: one shuffled epoch after the other, cut into batches with no seam between.

    Batch b depends on (seed, b) alone. So a run that stopped goes on with `first`, and one of several processes takes one
    batch in `every`: together they see what one process would have seen.
    """

    def __init__(self, n_rows, batch_size, seed):
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self.first, self.every = 0, 1

    def order(self, epoch):
        """All rows, in the order in which this epoch takes them"""
        rng = np.random.default_rng([self.seed, epoch])
        return rng.permutation(np.arange(self.n_rows, dtype=np.uint32))  # half the memory for hundreds of millions of rows

    def __iter__(self):
        epoch, order = -1, None
        for batch in itertools.count(self.first, self.every):
            rows = []
            for place in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                if place // self.n_rows != epoch:
                    epoch = place // self.n_rows
                    order = self.order(epoch)
                rows.append(int(order[place % self.n_rows]))
            yield rows


def create_dataloader(dataset, batch_size, *, shuffle=False, seed=0, collate_fn=None):
    """Batches in order, once through the data, for measuring; or, with shuffle, without end, for training."""
    order = {"batch_sampler": ShuffledBatches(len(dataset), batch_size, seed)} if shuffle else {"batch_size": batch_size}
    return DataLoader(dataset, collate_fn=collate_fn, pin_memory=torch.cuda.is_available(), **order)


# ---------------------------------------------------------------------------------------------------------------------
# Model: a stream of vectors, one per token. Attention moves information between tokens, the MLP works on each token by
# itself, and each only adds to the stream. Parameter names are those of the published checkpoints, where a linear layer
# is called c_something, because OpenAI wrote it as a convolution.


class CausalSelfAttention(nn.Module):
    """Every token asks (query) all tokens up to itself what they are about (key) and takes in what they say (value)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, x):
        """(B, T, C) -> queries, keys and values, (B, H, T, D) each"""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        return [y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in (q, k, v)]

    def weights(self, x):
        """
        The heart of it, written out: how much token t takes from each token up to t. (B, T, C) -> (B, H, T, T)
        softmax(q k^T / sqrt(D)) with the future at -inf; Vaswani et al. 2017, section 3.2.1. For readers: `forward` fuses it.
        """
        q, k, _ = self.project(x)
        scores = q @ k.mT / math.sqrt(q.size(-1))  # (B, H, T, T)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(diagonal=1)
        return scores.masked_fill(future, -math.inf).softmax(dim=-1)

    def forward(self, x, cache=None, positions=None, mask=None):
        """(B, T, C) -> (B, T, C). The last three are for generation only, see GPT.features; skip them at first."""
        q, k, v = self.project(x)
        if cache is not None:
            keys, values = cache  # (B, H, columns, D), column t for the token at position t
            rows = torch.arange(len(x), device=x.device)[:, None]
            # Indexed by rows (B, 1) and positions (B or 1, T), the columns have the shape of k.transpose(1, 2): (B, T, H, D)
            keys[rows, :, positions] = k.transpose(1, 2).type_as(keys)
            values[rows, :, positions] = v.transpose(1, 2).type_as(values)
            if mask is not None:  # earlier tokens count too
                k, v = keys[:, :, : mask.size(-1)], values[:, :, : mask.size(-1)]
        dropout = self.dropout.p if self.training else 0.0
        # weights(x) @ v in one kernel, which never holds the (T, T) weights in memory
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        return self.dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # (B, H, T, D) -> (B, T, C)


class MLP(nn.Module):
    """What a token makes of what it has gathered, in four times the room. (B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # the form that OpenAI trained with; the exact one shifts the logits
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """Gather, then think; each reads a normalised copy of the stream and adds its result. (B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, positions=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, positions, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """
    GPT-2 (Radford et al. 2019): a vector for each token, the blocks, and a score for every token that may come next.
    (B, T) -> (B, T, V)
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # what each token is
        self.wpe = nn.Embedding(config.context_length, config.n_embd)  # where it stands
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # Each block adds to the stream twice; scaled like this, the sum is as large however many blocks there are
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, ids, cache=None, positions=None):
        """
        What the model knows at each token, before it guesses. (B, T) -> (B, T, C)

        With a cache (see `empty_cache`), it keeps the keys and values of `ids`. With a cache and `positions` (B, T), `ids` are
        what follows there in texts whose beginnings are in the cache; each token sees the columns up to its own position.
        """
        T, mask = ids.size(1), None
        if positions is None:
            if T > self.config.context_length:
                raise ValueError(f"{T} tokens do not fit in a context of {self.config.context_length}")
            positions = torch.arange(T, device=ids.device)[None]  # (1, T)
        else:
            columns = torch.arange(int(positions.max()) + 1, device=ids.device)
            mask = columns <= positions[:, None, :, None]  # (B, 1, T, columns)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        for block, block_cache in zip(self.h, cache or [None] * len(self.h)):
            x = block(x, block_cache, positions, mask)
        return self.ln_f(x)

    def head(self, x):
        """Features to logits: a token scores high where its vector (wte once more) points the same way. (..., C) -> (..., V)"""
        return F.linear(x, self.wte.weight)

    def forward(self, ids, targets=None):
        """ids (B, T) -> logits (B, T, V); with targets (B, T), the mean cross-entropy in nats of those that are not -100"""
        logits = self.head(self.features(ids))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    # -----------------------------------------------------------------------------------------------------------------
    # Generation: read the prompt once, then guess, append, read the one new token, guess again. Keys and values of what
    # was read are kept, so a new token costs one column of attention and not the whole text once more.

    def generate(self, prompts, max_new_tokens, **options):
        """
        Continue every prompt, all in one batch. prompts: lists of ids, of any lengths -> one list of new ids for each.

        temperature: 0 always takes the likeliest token; 1 (the default) samples from the model's own distribution.
        top_k: sample among the k likeliest. top_p: among the fewest likeliest that together have probability p.
        eos_id: ends a text, and is not given out. generator: a torch.Generator, for samples that can be repeated.

        When a text outgrows the context, its newer half is read again from position 0 and the older half is forgotten.
        """
        new_ids = [[] for _ in prompts]
        for step in self._steps(prompts, max_new_tokens, **options):
            for row, i in step.items():
                new_ids[row].append(i)
        return new_ids

    def stream(self, prompt, max_new_tokens, **options):
        """The same for one prompt, but yielding each id as soon as it is known"""
        for step in self._steps([prompt], max_new_tokens, **options):
            yield from step.values()

    @torch.no_grad()
    def _steps(self, prompts, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, eos_id=None, generator=None):
        """Yield {row: its next id} for each step, of the rows that have not ended"""
        limit, device = self.config.context_length, self.wte.weight.device
        texts = [[int(i) for i in prompt] for prompt in prompts]  # what the model has before it, row by row
        for row, text in enumerate(texts):
            if not 0 < len(text) <= limit:
                raise ValueError(f"prompt {row} has {len(text)} tokens; it must have 1 to {limit}")
            if not 0 <= min(text) <= max(text) < self.config.vocab_size:
                raise ValueError(f"prompt {row} has an id outside the vocabulary of {self.config.vocab_size}")
        modes = {module: module.training for module in self.modules()}  # each by itself: parts may be frozen in eval mode
        self.eval()
        try:
            rows, cache = list(range(len(texts))), None  # rows: those that go on
            for _ in range(max_new_tokens):
                if not rows:
                    return
                lengths = torch.tensor([len(texts[row]) for row in rows], device=device)[:, None]  # (B, 1)
                if cache is None:  # read whole texts, padded on the right, where nothing before the padding can see it
                    ids = pad_sequence([torch.tensor(texts[row]) for row in rows], batch_first=True).to(device)
                    # The padding goes into the cache too; each of its columns is overwritten before any token sees it
                    cache = self.empty_cache(len(rows), min(limit, ids.size(1) + max_new_tokens))
                    x = self.features(ids, cache)
                    logits = self.head(x[torch.arange(len(x), device=device), lengths[:, 0] - 1])  # of the last token of each
                else:
                    ids = torch.tensor([texts[row][-1:] for row in rows], device=device)
                    # For a single row, PyTorch's own product of a bfloat16 matrix and a vector is twice as fast as oneDNN's
                    with torch.backends.mkldnn.flags(enabled=len(rows) > 1, allow_tf32=None):
                        logits = self.head(self.features(ids, cache, positions=lengths - 1)[:, 0])
                next_ids = sample(logits, temperature, top_k, top_p, generator).tolist()

                kept = [n for n, i in enumerate(next_ids) if i != eos_id]
                if len(kept) < len(rows):
                    rows, next_ids = [rows[n] for n in kept], [next_ids[n] for n in kept]
                    cache = [(keys[kept], values[kept]) for keys, values in cache]
                for row, i in zip(rows, next_ids):
                    texts[row].append(i)
                    if len(texts[row]) > limit:  # read anew, with all others, what is left
                        del texts[row][: -max(1, limit // 2)]
                        cache = None
                yield dict(zip(rows, next_ids))
        finally:
            for module, training in modes.items():
                module.training = training

    def empty_cache(self, n_rows, n_columns):
        """For each block a pair (keys, values), (B, H, columns, D) each; zeros, since a masked nan would still spread"""
        shape = (n_rows, self.config.n_head, n_columns, self.config.n_embd // self.config.n_head)
        return [(self.wte.weight.new_zeros(shape), self.wte.weight.new_zeros(shape)) for _ in self.h]


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Choose one token for each row. (B, V) -> (B,)"""
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError("sampling needs temperature >= 0, top_k >= 1 and 0 < top_p <= 1")
    logits = logits.float()
    if temperature < 1e-6:  # so near to 0 that nothing but the likeliest could be drawn
        return logits.argmax(dim=-1)
    logits, ids = logits / temperature, None
    if top_k is not None or top_p is not None:
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # the likeliest first
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        probs[probs.cumsum(dim=-1) - probs >= top_p] = 0  # drop what comes after the tokens that already reach p
    choice = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1), each row by itself
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# The tour


def tour():
    """One sentence on its way through a small model, before and after the model has learned it by heart."""
    torch.manual_seed(0)
    sentence = "The cat sat on the mat, and the dog sat on the cat."
    source = Path(__file__).read_text(encoding="utf-8")  # a vocabulary needs a text; this file is one
    tokenizer = Tokenizer.train(source, vocab_size=512)
    ids = tokenizer.encode(sentence)
    pieces = [tokenizer.decode([i]) for i in ids]
    print(f"A text          {sentence!r}")
    print(f"its tokens      {'|'.join(pieces)}")
    print(f"their ids       {ids}")
    inputs, targets = (row[None] for row in TokenDataset(ids, context_length=len(ids) - 1)[0])  # a batch of one, (1, T)
    print(f"to learn        {', '.join(f'{a!r} -> {b!r}' for a, b in zip(pieces[:4], pieces[1:5]))} ...")

    config = GPTConfig(tokenizer.vocab_size, context_length=64, n_layer=2, n_head=4, n_embd=64)
    model = GPT(config)
    x = model.wte(inputs) + model.wpe(torch.arange(inputs.size(1)))
    weights = model.h[0].attn.weights(model.h[0].ln_1(x))
    logits = model(inputs)
    print(f"\nTo vectors      {list(inputs.shape)} -> {list(x.shape)} (B, T, C): what each token is + where it stands")
    print(f"attention       {list(weights.shape)} (B, H, T, T): how much each token takes from each")
    print(f"features        {list(model.features(inputs).shape)} (B, T, C), after {config.n_layer} blocks")
    print(f"logits          {list(logits.shape)} (B, T, V): a score for every token of the vocabulary")

    def show_guesses():
        probs = model(inputs)[0, -1].softmax(dim=-1)
        best = ", ".join(f"{tokenizer.decode([i])!r} {p:.1%}" for p, i in zip(*probs.topk(4)))
        print(f"after {tokenizer.decode(inputs[0, -4:])!r} it expects {best}")

    loss = model(inputs, targets)
    print(f"\nUntrained       loss {loss:.2f}; a blind guess has ln V = {math.log(config.vocab_size):.2f}")
    show_guesses()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(50):
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"\nAfter 50 steps  loss {loss:.2f}")
    show_guesses()
    print(f"\nIt writes       {tokenizer.decode(ids[:2])}", end="")
    for i in model.stream(ids[:2], max_new_tokens=len(ids) - 2, temperature=0):
        print(f"|{tokenizer.decode([i])}", end="", flush=True)
    print()


if __name__ == "__main__":
    tour()
