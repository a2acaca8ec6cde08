"""
How tests/tiny-gpt2 was made: a GPT-2 with random weights, its tokenizer, and what they compute, all
by Hugging Face's libraries.

    pip install transformers tokenizers safetensors && python tests/make_tiny_gpt2.py
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

here = Path(__file__).parent
folder = here / "tiny-gpt2"

stories = (here.parent / "data" / "stories.txt").read_text(encoding="utf-8")
bpe = ByteLevelBPETokenizer()
bpe.train_from_iterator([stories], vocab_size=319, min_frequency=2, show_progress=False)
bpe.save_model(str(folder))
vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
vocab["<|endoftext|>"] = 319
(folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=320,
    n_positions=48,
    n_embd=24,
    n_layer=2,
    n_head=3,
    bos_token_id=319,
    eos_token_id=319,
)
model = GPT2LMHeadModel(config).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        # Larger than at the start of a training, and no bias 0 or gain 1: so every part of the
        # model shows in the logits
        parameter.normal_(std=0.25).add_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
model.save_pretrained(folder)

ids = torch.randint(0, 320, (2, 24))
with torch.no_grad():
    out = model(ids, labels=ids)
    greedy = model.generate(
        ids[:1, :8], max_new_tokens=30, do_sample=False, pad_token_id=319, eos_token_id=None
    )[0, 8:]
save_file(
    {"ids": ids, "logits": out.logits.contiguous(), "loss": out.loss.reshape(1)},
    folder / "expected.safetensors",
)
texts = [
    "The old man went home.",
    "  two  spaces\n\nand lines\t",
    "It's 12:30, isn't it?!",
    "naïve café – 東京 🙂",
    "<|endoftext|>",
    "",
]
expected = {"greedy": greedy.tolist(), "texts": {text: bpe.encode(text).ids for text in texts}}
(folder / "expected.json").write_text(
    json.dumps(expected, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
)
