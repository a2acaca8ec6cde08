import csv
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import run_main

import finetune as finetune_py
import load_gpt2 as load_gpt2_py
from finetune import (
    ClassificationDataset,
    GPTClassifier,
    InstructionDataset,
    LoRALinear,
    accuracy,
    add_lora,
    batches_by_length,
    collate_instructions,
    collate_texts,
    format_prompt,
    load_classifier,
    load_lora,
    merge_lora,
    predict_all,
    read_rows,
    respond,
    save_classifier,
    save_lora,
    split_rows,
)
from gpt import GPT, GPT2_CONFIGS, GPTConfig, Tokenizer
from load_gpt2 import load_gpt2, read_safetensors, save_gpt2

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny-gpt2"
QUICK = ["--init", TINY, "--epochs", 1, "--batch-size", 8, "--warmup", 2, "--dtype", "float32"]


run = partial(run_main, finetune_py)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("train.plot_history", lambda history, path: None)


def read_losses(folder):
    with open(folder / "losses.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def is_error(code, error):
    return code == 1 and error.startswith("error: ") and error.count("\n") == 1


def small_gpt(**sizes):
    torch.manual_seed(0)
    small = {"vocab_size": 300, "context_length": 64, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return GPT(GPTConfig(**small | sizes)).eval()


# --------------------------------------------------------------------------------------------------
# Batches of like lengths


def test_batches_by_length():
    lengths = np.array([(7 * i) % 101 + 1 for i in range(203)])
    batches = [batch.tolist() for batch in batches_by_length(lengths, 8, 4, seed=3)]
    assert [len(batch) for batch in batches] == 4 * 25 * [8]
    epochs = [batches[i : i + 25] for i in range(0, 100, 25)]
    # In each epoch, each row is seen once, but for 3, which are others in each epoch
    seen = [set(sum(epoch, [])) for epoch in epochs]
    assert all(len(rows) == 200 and rows < set(range(203)) for rows in seen)
    assert len(set(map(frozenset, seen))) == 4
    # More epochs do not change the first ones
    again = [batch.tolist() for batch in batches_by_length(lengths, 8, 2, seed=3)]
    assert again == batches[:50]
    other = [batch.tolist() for batch in batches_by_length(lengths, 8, 2, seed=4)]
    assert other != again

    padded = sum(8 * lengths[batch].max() for batch in batches)
    assert padded < 1.25 * sum(lengths[batch].sum() for batch in batches)
    # Batches come in random order, and have other rows in the next epoch
    first_lengths = [lengths[batch[0]] for batch in epochs[0]]
    assert first_lengths != sorted(first_lengths)
    first, second = ({frozenset(batch) for batch in epoch} for epoch in epochs[:2])
    assert len(first & second) < 5


# --------------------------------------------------------------------------------------------------
# Classifier


def test_padding_does_not_change_the_logits():
    model = GPTClassifier(small_gpt(), 3).eval()
    ids = torch.randint(0, 300, (20,))
    alone = model(ids[None], torch.tensor([20]))
    last = model.transformer.features(ids[None])[:, -1]
    assert torch.allclose(alone, model.score(last), atol=1e-6)
    for padding in range(0, 40, 4):
        for filler in (0, 299):
            padded = F.pad(ids, (0, padding), value=filler)
            batch = torch.stack([padded, torch.randint(0, 300, (20 + padding,))])
            assert torch.allclose(model(batch, torch.tensor([20, 7]))[0], alone[0], atol=1e-6)


def test_classification_rows_and_their_batch():
    tokenizer = Tokenizer([])
    rows = [("abc", "x"), ("defgh", "y"), ("ijklmn", "x")]
    dataset = ClassificationDataset(rows, tokenizer, ["x", "y"], 5)
    assert dataset.n_truncated == 1
    assert [len(ids) for ids, _ in dataset] == [3, 5, 5]
    ids, lengths, labels = collate_texts(dataset)
    texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(ids, lengths)]
    assert texts == ["abc", "defgh", "ijklm"]
    assert ids.shape == (3, 5)
    assert labels.tolist() == [0, 1, 0]
    assert labels.dtype == ids.dtype == torch.int64


def test_classifier_loss_is_the_mean_of_cross_entropies():
    model = GPTClassifier(small_gpt(), 3)
    ids = torch.randint(0, 300, (4, 9))
    lengths = torch.tensor([9, 1, 4, 6])
    labels = torch.tensor([0, 2, 1, 2])
    probs = model(ids, lengths).softmax(-1).tolist()
    expected = -sum(math.log(probs[i][label]) for i, label in enumerate(labels)) / 4
    assert model(ids, lengths, labels).item() == pytest.approx(expected, rel=1e-5)


def test_predict_all_switches_dropout_off_and_on_again():
    model = GPTClassifier(small_gpt(dropout=0.5), 3).train()
    rows = [(torch.randint(0, 300, (9,)), i % 3) for i in range(35)]  # two batches
    logits = predict_all(model, rows)
    assert model.training and model.transformer.h[0].mlp.dropout.training
    model.eval()
    expected = torch.cat([model(ids[None], torch.tensor([9])) for ids, _ in rows])
    assert torch.allclose(logits, expected, atol=1e-6)
    assert not logits.requires_grad
    right = [i == label for i, (_, label) in zip(logits.argmax(1).tolist(), rows)]
    assert accuracy(model, rows) == pytest.approx(sum(right) / 35)


@pytest.mark.parametrize("kind", [str, Path])
def test_classifier_is_saved_and_loaded(tmp_path, kind):
    classes = [f"class {i} é" for i in range(11)]  # "10" must not come before "2"
    model = GPTClassifier(load_gpt2(TINY)[0], 11)
    save_classifier(model, load_gpt2(TINY)[1], classes, kind(tmp_path / "model"))
    again, tokenizer, names = load_classifier(kind(tmp_path / "model"))
    assert names == classes
    assert not again.training
    assert tokenizer.encode("The old man") == load_gpt2(TINY)[1].encode("The old man")
    assert set(again.state_dict()) == set(model.state_dict())
    assert all(torch.equal(again.state_dict()[name], w) for name, w in model.state_dict().items())


# --------------------------------------------------------------------------------------------------
# Instructions

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
)


def test_prompt_is_alpacas():
    assert format_prompt({"instruction": "Add.", "input": "1 and 2"}) == ALPACA
    assert format_prompt({"instruction": "Add.", "input": ""}) == ALPACA_WITHOUT_INPUT
    assert format_prompt({"instruction": "Add."}) == ALPACA_WITHOUT_INPUT


def test_masks_written_out(monkeypatch):
    monkeypatch.setattr(finetune_py, "format_prompt", lambda entry: entry["instruction"])
    tokenizer = Tokenizer([])
    a, b, c, d, e, f = tokenizer.encode("abcdef")
    eot = tokenizer.eot
    entries = [{"instruction": "abc", "output": "de"}, {"instruction": "f", "output": "a"}]
    dataset = InstructionDataset(entries, tokenizer, 16)
    assert [len(ids) for ids, _ in dataset] == [5, 2]
    ids, targets = collate_instructions(dataset)
    assert ids[0].tolist() == [a, b, c, d, e]
    assert ids[1, :2].tolist() == [f, a]
    assert targets.tolist() == [[-100, -100, d, e, eot], [a, eot, -100, -100, -100]]

    # A row that is too long loses its end; one without room for a response is left out
    cut = InstructionDataset(entries, tokenizer, 3)
    assert cut[0][0].tolist() == [a, b, c]
    assert cut[0][1].tolist() == [-100, -100, d]
    assert (cut.n_truncated, len(cut)) == (1, 2)
    left = InstructionDataset(entries, tokenizer, 2)
    assert left.entries == entries[1:]
    assert (left.n_truncated, len(left)) == (1, 1)


def test_responses_in_batches_are_those_one_by_one():
    model, tokenizer = small_gpt(vocab_size=257, context_length=220), Tokenizer([])
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.wpe.weight.data *= 5  # so that each position has a token of its own
    entries = [{"instruction": "x" * n, "input": ""} for n in (30, 1, 17, 60, 30, 2)]
    alone = [respond(model, tokenizer, [entry], 40)[0] for entry in entries]
    assert len(set(alone)) == 5 and alone[0] == alone[4]
    assert respond(model, tokenizer, entries, 40, batch_size=4) == alone
    prompt = tokenizer.encode(format_prompt(entries[3]))  # a response ends with the context
    (ids,) = model.generate([prompt], 221 - len(prompt), temperature=0)
    assert len(ids) < 40
    assert alone[3] == tokenizer.decode(ids).strip()
    tokenizer.eot = ids[10]
    expected = tokenizer.decode(ids[: ids.index(ids[10])]).strip()
    assert respond(model, tokenizer, entries, 40, batch_size=4)[3] == expected


# --------------------------------------------------------------------------------------------------
# LoRA


def randomise(model):
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B.weight)


def test_lora_starts_as_nothing_and_merges_into_the_weights():
    ids = torch.randint(0, 300, (2, 30))
    plain = small_gpt()(ids)
    model = add_lora(small_gpt(), rank=4, alpha=8, dropout=0.5).eval()
    assert torch.equal(model(ids), plain)
    randomise(model)
    adapted = model(ids)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    merged = merge_lora(model)
    assert torch.allclose(merged(ids), adapted, atol=1e-5)
    assert set(merged.state_dict()) == set(small_gpt().state_dict())
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())


def test_lora_is_its_formula():
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 10)
    lora = LoRALinear(linear, rank=2, alpha=6, dropout=0.5).eval()
    assert lora.lora_A.weight.shape == (2, 6)
    assert lora.lora_B.weight.shape == (10, 2)
    assert lora.lora_A.weight.std() > 0.1
    torch.nn.init.normal_(lora.lora_B.weight)
    x = torch.randn(50, 6)
    added = 3 * x @ lora.lora_A.weight.T @ lora.lora_B.weight.T
    assert torch.allclose(lora(x), x @ linear.weight.T + linear.bias + added, atol=1e-5)
    # Dropout is on the input of the adapter alone: where it drops all, W x + b is left
    lora.lora_dropout.p = 1.0
    assert torch.allclose(lora.train()(x), linear(x), atol=1e-6)


@pytest.mark.parametrize(
    "targets, n", [(("c_attn", "c_proj", "c_fc"), 2_359_296), (("c_attn",), 589_824)]
)
def test_lora_parameter_counts(targets, n):
    with torch.device("meta"):
        model = add_lora(GPT(GPT2_CONFIGS["gpt2"]), rank=16, targets=targets)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == n
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"rank": 2, "targets": ["c_attn", "attn"]}])
def test_impossible_adapters_are_refused(settings):
    with pytest.raises(ValueError, match="0|attn"):
        add_lora(small_gpt(), **settings)


def small_classifier():
    torch.manual_seed(0)
    return GPTClassifier(small_gpt(), 3).eval()


def saved_adapter(make, folder, **options):
    """-> a model with random adapters, which are saved in a folder"""
    model = add_lora(make(), rank=4, alpha=8, targets=["attn.c_proj", "c_fc"]).eval()
    randomise(model)
    if isinstance(model, GPTClassifier):
        torch.nn.init.normal_(model.score.weight)  # the head belongs to the adapter
    save_lora(model, folder, "base", **options)
    return model


@pytest.mark.parametrize("kind", [str, Path])
def test_adapter_is_saved_and_loaded(tmp_path, kind):
    folder = kind(tmp_path / "adapter")
    ids = torch.randint(0, 300, (2, 30))
    model = saved_adapter(small_gpt, folder)
    assert torch.equal(load_lora(small_gpt(), folder).eval()(ids), model(ids))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 8, True)
    tensors = read_safetensors(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2  # two matrices, in two layers of each of two blocks
    assert tensors["base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"].shape == (4, 16)


def test_adapter_of_a_classifier_has_its_head(tmp_path):
    ids, lengths = torch.randint(0, 300, (2, 30)), torch.tensor([30, 4])
    model = saved_adapter(small_classifier, tmp_path, classes=["a", "b", "c"])
    again = load_lora(small_classifier(), tmp_path).eval()
    assert torch.equal(again(ids, lengths), model(ids, lengths))
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        load_lora(small_gpt(), tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("rank_pattern", {"c_fc": 2}),
        ("init_lora_weights", "pissa"),
        ("alora_invocation_tokens", [1]),
        ("a_setting_of_tomorrow", 1),
    ],
)
def test_other_variants_of_lora_are_refused_by_name(tmp_path, name, value):
    saved_adapter(small_gpt, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=rf"adapter_config.json: .*{name}"):
        load_lora(small_gpt(), tmp_path)


def test_damaged_adapters_are_refused(tmp_path):
    saved_adapter(small_gpt, tmp_path)
    with pytest.raises(ValueError, match="adapter_model.safetensors"):  # of a larger model
        load_lora(small_gpt(n_embd=32), tmp_path)
    with pytest.raises(ValueError, match="adapter_model.safetensors"):  # of a deeper model
        load_lora(small_gpt(n_layer=1), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        load_lora(small_gpt(), tmp_path)
    del config["lora_alpha"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lora_alpha"):
        load_lora(small_gpt(), tmp_path)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_an_adapter_is_refused(tmp_path, half):
    model = add_lora(small_gpt(), rank=2, targets=["h.0.mlp.c_fc", "h.1.mlp.c_fc"])
    state = model.state_dict()
    del state[f"h.1.mlp.c_fc.{half}.weight"]
    model.state_dict = lambda: state
    save_lora(model, tmp_path, "base")
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.lora_"):
        load_lora(small_gpt(), tmp_path)


# --------------------------------------------------------------------------------------------------
# Data

TEXTS = [
    ("ham", 'He said "hi, you" to me'),
    ("spam", "Win, win; win!"),
    ("ham", "naïve café 🙂"),
    ("spam", 'a "quote'),
]
AS_ROWS = [{"text": text, "label": label} for label, text in TEXTS]


def write_tables(folder):
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("label", "text"), *TEXTS])
    tsv = "".join(f"{label}\t{text}\n" for label, text in TEXTS)
    files = {
        "a.tsv": "label\ttext\n" + tsv,
        "bom.tsv": "\ufefflabel\ttext\textra\n" + tsv.replace("\n", "\tx\n"),
        "uci.tsv": tsv.replace("\n", "\r\n"),
        "SMSSpamCollection": tsv,
        "b.csv": table.getvalue(),
        "c.json": json.dumps(AS_ROWS),
        "d.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in AS_ROWS),
    }
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    return list(files)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    for name in write_tables(tmp_path):
        assert read_rows(str(tmp_path / name), tmp_path, ("text", "label")) == AS_ROWS, name


def test_columns_that_are_asked_for(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,input,output,more\nSay hello.,,Hello.,x\n")
    rows = read_rows(path, tmp_path, ("instruction", "input", "output"), optional=("input",))
    assert rows == [ROW]
    path = tmp_path / "a.json"
    path.write_text('[{"v1": 1, "v2": "text"}, {"v1": "null", "v2": null}, {"v1": 0}]')
    rows = read_rows(path, tmp_path, ("v2", "v1"), optional=("v2",))
    assert rows == [{"v2": "text", "v1": "1"}, {"v2": "", "v1": "null"}, {"v2": "", "v1": "0"}]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve(handler):
    """-> the URL of a server, which is closed at the end"""
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def test_rows_of_a_url_are_downloaded_once(tmp_path):
    write_tables(tmp_path)
    asked = []

    class Files(Handler):
        def do_GET(self):
            asked.append(self.path)
            self.send(200, (tmp_path / self.path[1:]).read_bytes())

    with serve(Files) as url:
        for _ in range(2):
            rows = read_rows(f"{url}/a.tsv", tmp_path / "new", ("text", "label"))
            assert rows == AS_ROWS
    assert asked == ["/a.tsv"]


ROW = {"instruction": "Say hello.", "input": "", "output": "Hello."}
COLUMNS = {"instruct": ("instruction", "input", "output"), "classify": ("text", "label")}


@pytest.mark.parametrize(
    "command, rows, message",
    [
        ("instruct", [ROW, ROW, {"instruction": "x"}], "row 3: output"),
        ("instruct", [ROW, ROW | {"output": " "}], "row 2: output"),
        ("instruct", [ROW | {"instruction": ""}], "row 1: instruction"),
        ("instruct", [ROW | {"input": ["x"]}], "row 1: input"),
        ("instruct", [ROW, "text"], "row 2"),
        ("instruct", {"rows": []}, "no rows"),
        ("instruct", [], "no rows"),
        ("classify", [*AS_ROWS, {"label": "a"}], "row 5: text"),
        ("classify", [*AS_ROWS, {"text": " ", "label": "a"}], "row 5: text"),
        ("classify", [*AS_ROWS, {"text": "t", "label": None}], "row 5: label"),
        ("classify", [*AS_ROWS, {"text": "t", "label": 0.5}], "row 5: label"),
    ],
)
def test_bad_rows_are_named(tmp_path, command, rows, message):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=rf"d\.json: .*{message}"):
        read_rows(path, tmp_path, COLUMNS[command], optional=("input",))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("d.tsv", b"label\ttext\nham\thi\nham\n", "row 2: text"),
        ("d.tsv", b"ham\thi\nham\thi\tho\n", "row 2"),
        ("d.tsv", b"", "no rows"),
        ("d.tsv", b"label\tmessage\nham\thi\n", "text"),  # a header, but of another column
        ("d.csv", b"a,b,c\n1,2,3\n", "row 1: text"),
        ("d.csv", b"text,label\na,b\nc,d,e\n", "row 2"),
        ("d.csv", b'text,label\n"a,b\n', ""),
        ("d.csv", "label,text\nham,café\n".encode("latin-1"), "utf-8"),
        ("d.json", b"[{", ""),
        ("d.jsonl", b'{"text": "a", "label": "b"}\n{"text', ""),
        ("d.zip", b"PK\x05\x06" + bytes(18) + b"\xff", ""),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        read_rows(path, tmp_path, ("text", "label"))


def test_bad_data_ends_the_command_with_one_line(monkeypatch, capsys, tmp_path):
    path = tmp_path / "d.json"
    args = ["classify", "--data", path, "--out", tmp_path / "out", *QUICK]
    one_class = [{"text": f"text {i}", "label": "a"} for i in range(40)]
    for rows in (AS_ROWS + [{"text": ""}], AS_ROWS, one_class):
        path.write_text(json.dumps(rows))
        code, _, error = run(monkeypatch, capsys, *args)
        assert is_error(code, error), error
        assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    code, _, error = run(monkeypatch, capsys, *args)
    assert is_error(code, error) and "d.json" in error


def test_split_is_stratified():
    rows = [(i, label) for i, label in enumerate("a" * 200 + "b" * 40 + "c" * 20)]
    before = list(rows)
    parts = split_rows(rows, 1, key=lambda row: row[1])
    assert rows == before
    assert sorted(sum(parts, [])) == rows
    counts = [Counter(label for _, label in part) for part in parts]
    assert counts[0] == {"a": 160, "b": 32, "c": 16}  # 80, 10 and 10 %
    assert counts[1] == counts[2] == {"a": 20, "b": 4, "c": 2}
    assert split_rows(rows, 1, key=lambda row: row[1]) == parts
    assert split_rows(rows, 2, key=lambda row: row[1]) != parts
    plain = split_rows(rows, 1)
    assert sorted(sum(plain, [])) == rows
    assert all(part != sorted(part) for part in plain)


def test_ten_rows_of_a_class_reach_all_parts():
    for n in range(20):
        rows = list("a" * n + "b" * 10 + "c" * 11)
        assert all({"b", "c"} <= set(part) for part in split_rows(rows, 0, key=str))


# --------------------------------------------------------------------------------------------------
# The commands


def long_base(folder):
    """TINY with room for a prompt"""
    gpt, tokenizer = load_gpt2(TINY)
    torch.manual_seed(0)
    model = GPT(GPTConfig(320, context_length=200, n_layer=2, n_head=3, n_embd=24))
    weights = gpt.state_dict()
    weights["wpe.weight"] = torch.cat([weights["wpe.weight"], model.wpe.weight.data[48:]])
    model.load_state_dict(weights)
    save_gpt2(model, tokenizer, folder)
    return folder


@pytest.fixture
def messages(tmp_path):
    """Two classes that can be told apart by a word, in different numbers"""
    path = tmp_path / "messages.tsv"
    lines = [f"ham\tsee you at {i}\n" for i in range(30)]
    lines += [f"spam\twin {3 * i * 'now '}\n" for i in range(1, 21)]
    path.write_text("label\ttext\n" + "".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def instructions(tmp_path):
    path = tmp_path / "instructions.json"
    rows = [{"instruction": f"Say {i}.", "output": "x" * (1 + i % 7)} for i in range(40)]
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    "how",
    [[], ["--lora-rank", 4, "--learning-rate", 1e-2]],
)
def test_classify_and_predict(monkeypatch, capsys, tmp_path, messages, how):
    out = tmp_path / "out"
    args = ["--data", messages, "--out", out, *QUICK, "--epochs", 6]
    code, output, error = run(monkeypatch, capsys, "classify", *args, *how)
    assert code == 0, error
    tokenizer = load_gpt2(TINY)[1]
    texts = [line.split("\t")[1] for line in messages.read_text().splitlines()]
    n_truncated = sum(len(tokenizer.encode(text)) > 48 for text in texts)
    assert n_truncated > 0 and f"; {n_truncated} were too long" in output
    assert (out / "adapter").exists() == ("--lora-rank" in how)
    curve = [row for row in read_losses(out) if row["val_loss"]]
    assert all(0 <= float(row["val_accuracy"]) <= 1 for row in curve)
    # Once an epoch of 40 rows
    assert [row["step"] for row in curve] == ["0", "5", "10", "15", "20", "25", "30"]

    # Only what was to be trained has changed
    before = load_gpt2(TINY)[0].state_dict()
    after = load_classifier(out)[0].transformer.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if "--lora-rank" in how:
        layers = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        assert changed == {name for name in before if name.endswith(layers)}
    else:
        assert changed == set(before)

    code, output, _ = run(monkeypatch, capsys, "predict", out, "see you at 7", "win now now now")
    lines = [line.split("\t") for line in output.splitlines()]
    assert [line[0] for line in lines] == ["ham", "spam"]
    assert [line[2] for line in lines] == ["see you at 7", "win now now now"]
    assert all(0.5 < float(line[1]) <= 1 for line in lines)
    long = "see you " * 30 + "win now now now"
    code, _, error = run(monkeypatch, capsys, "predict", out, long)
    assert (code, error) == (0, "1 texts are truncated\n")
    if "--lora-rank" in how:  # the adapter does on the base what the merged model does
        args = [TINY, "see you at 7", "win now now now", "--adapter", out / "adapter"]
        assert run(monkeypatch, capsys, "predict", *args)[1] == output
        args = [TINY, long, "--adapter", out / "adapter"]
        assert run(monkeypatch, capsys, "predict", *args)[2] == "1 texts are truncated\n"


def test_predict_reads_lines(monkeypatch, capsys, tmp_path):
    save_classifier(GPTClassifier(load_gpt2(TINY)[0], 2), load_gpt2(TINY)[1], "ab", tmp_path)
    texts = ["see you", "a line\u2028of\x0cone text", "é"]
    expected = run(monkeypatch, capsys, "predict", tmp_path, *texts)[1]
    assert expected.count("\n") == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts) + "\n"))
    assert run(monkeypatch, capsys, "predict", tmp_path) == (0, expected, "")
    code, _, error = run(monkeypatch, capsys, "predict", tmp_path, "a " * 100)
    assert code == 0 and "1 texts are truncated" in error
    for stdin in ("", "a\n\nb\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code, _, error = run(monkeypatch, capsys, "predict", tmp_path)
        assert is_error(code, error) and "empty" in error
    code, _, error = run(monkeypatch, capsys, "predict", TINY, "x")
    assert is_error(code, error) and "config.json: it has no id2label" in error
    code, _, error = run(monkeypatch, capsys, "predict", tmp_path / "none", "x")
    assert is_error(code, error)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    for labels in (None, 5, ["a", "b"], {"0": "a", "2": "b"}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": labels}), "utf-8")
        code, _, error = run(monkeypatch, capsys, "predict", tmp_path, "x")
        assert is_error(code, error) and "config.json: " in error


def test_optimizer_state_is_for_the_adapters_only(monkeypatch, capsys, tmp_path, messages):
    args = ["--data", messages, "--out", tmp_path / "out", *QUICK, "--lora-rank", 4]
    assert run(monkeypatch, capsys, "classify", *args)[0] == 0
    state = torch.load(tmp_path / "out" / "resume.pt", weights_only=True)
    held = sum(entry["exp_avg"].numel() for entry in state["optimizers"][0]["state"].values())
    C, L = 24, 2
    adapters = 4 * L * ((C + 3 * C) + (C + C) + 2 * (C + 4 * C))
    assert held == adapters + 2 * C  # the head has two rows


def test_columns_and_labels_that_are_numbers(monkeypatch, capsys, tmp_path):
    rows = [{"v1": int(i % 3 > 0) * 10 + i % 3, "v2": f"text {i % 3}"} for i in range(60)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    args = ["--data", tmp_path / "d.json", "--out", tmp_path / "out", *QUICK]
    args += ["--text-column", "v2", "--label-column", "v1"]
    code, output, error = run(monkeypatch, capsys, "classify", *args)
    assert code == 0, error
    model, tokenizer, classes = load_classifier(tmp_path / "out")
    assert classes == ["0", "11", "12"]
    n = sum(parameter.numel() for parameter in model.parameters())
    assert f"{n:,} of {n:,} parameters" in output


def test_the_same_command_repeats_the_report_of_a_finished_run(
    monkeypatch, capsys, tmp_path, messages
):
    out = tmp_path / "out"
    args = ["classify", "--data", messages, "--out", out, *QUICK, "--lora-rank", 2]
    code, first, error = run(monkeypatch, capsys, *args)
    assert code == 0, error
    # resume.pt is written again, with the same content but other bytes
    paths = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".pt"]
    before = [path.read_bytes() for path in paths]
    code, second, error = run(monkeypatch, capsys, *args)
    assert code == 0, error
    assert "finished at step 5" in second
    report = second[second.index("  training accuracy ") :]
    assert first.endswith(report) and "      test accuracy " in report
    assert [path.read_bytes() for path in paths] == before


def test_other_rows_and_other_settings_are_refused(monkeypatch, capsys, tmp_path, messages):
    out = tmp_path / "out"
    args = ["--data", messages, "--out", out, *QUICK]
    assert run(monkeypatch, capsys, "classify", *args)[0] == 0
    before = (out / "model.safetensors").read_bytes()
    for change in (["--seed", 2], ["--lora-rank", 3], ["--weight-decay", 0]):
        code, _, error = run(monkeypatch, capsys, "classify", *args, *change)
        setting = change[0].removeprefix("--").replace("-", "_")
        assert is_error(code, error) and f"{setting} was" in error and "--overwrite" in error
    code, _, error = run(monkeypatch, capsys, "instruct", *args)
    assert is_error(code, error)
    moved = messages.rename(tmp_path / "moved.tsv")  # the same rows elsewhere, and more epochs
    args = ["--data", moved, "--out", out, *QUICK, "--epochs", 2]
    code, output, error = run(monkeypatch, capsys, "classify", *args)
    assert code == 0, error
    assert "going on from step 5" in output
    assert len(read_losses(out)) == 11  # 10 steps, for 40 rows twice
    assert (out / "model.safetensors").read_bytes() != before
    moved.write_text(moved.read_text().replace("ham", "eggs"))
    code, _, error = run(monkeypatch, capsys, "classify", *args)
    assert is_error(code, error) and "data" in error


def test_a_model_is_not_replaced_by_accident(monkeypatch, capsys, tmp_path, messages):
    save_gpt2(*load_gpt2(TINY), tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    args = ["--data", messages, *QUICK, "--init", tmp_path / "base", "--out", tmp_path / "base"]
    code, _, error = run(monkeypatch, capsys, "classify", *args)
    assert is_error(code, error) and "holds a model" in error
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_overwriting_waits_until_the_new_run_has_begun(monkeypatch, capsys, tmp_path, messages):
    out = tmp_path / "out"
    args = ["classify", "--data", messages, "--out", out, *QUICK]
    assert run(monkeypatch, capsys, *args, "--lora-rank", 2)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for change in (("--batch-size", 0), ("--epochs", 0), ("--lora-rank", 1.5)):
        code, _, error = run(monkeypatch, capsys, *args, "--overwrite", *change)
        assert is_error(code, error)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert run(monkeypatch, capsys, *args, "--overwrite")[0] == 0
    assert not (out / "adapter").exists()  # it was of the old run
    assert (out / "model.safetensors").read_bytes() != before[out / "model.safetensors"]


def test_the_missing_base_is_explained(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for command in ("classify", "instruct"):
        code, _, error = run(monkeypatch, capsys, command)
        assert is_error(code, error)
        assert "out/stories" in error and "python train.py" in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_instruct_and_its_responses(monkeypatch, capsys, tmp_path, instructions):
    out = tmp_path / "out"
    args = ["--data", instructions, "--out", out, *QUICK, "--max-new-tokens", 8]
    args += ["--init", long_base(tmp_path / "base")]
    code, output, error = run(monkeypatch, capsys, "instruct", *args)
    assert code == 0, error
    losses = [float(row["val_loss"]) for row in read_losses(out) if row["val_loss"]]
    assert losses[-1] < losses[0]
    results = json.loads((out / "responses.json").read_text())
    assert len(results) == 4  # 10 % of the rows
    columns = ["instruction", "input", "output", "response"]
    assert all(list(row) == columns for row in results)
    model, tokenizer = load_gpt2(out)
    assert [row["response"] for row in results] == respond(model, tokenizer, results, 8)
    args = ["--data", instructions, *QUICK, "--out", tmp_path / "none"]  # no prompt fits into TINY
    code, _, error = run(monkeypatch, capsys, "instruct", *args)
    assert is_error(code, error) and "40 were too long" in error


def test_an_adapter_completes_texts_as_the_merged_model(
    monkeypatch, capsys, tmp_path, instructions
):
    base, out = long_base(tmp_path / "base"), tmp_path / "out"
    args = ["--data", instructions, *QUICK, "--init", base, "--out", out, "--lora-rank", 2]
    args += ["--learning-rate", 0.1, "--max-new-tokens", 2]
    code, _, error = run(monkeypatch, capsys, "instruct", *args)
    assert code == 0, error
    options = ["--prompt", "Say 3.", "--temperature", 0, "--max-new-tokens", 20]

    def complete(*args):
        code, output, error = run_main(load_gpt2_py, monkeypatch, capsys, *args, *options)
        assert code == 0, error
        return output

    text = complete(base, "--adapter", out / "adapter")
    assert text == complete(out) != complete(base)
    # The model beside the adapter contains it already
    for script, command in ((load_gpt2_py, []), (finetune_py, ["chat"])):
        args = [*command, out, "--adapter", out / "adapter"]
        code, _, error = run_main(script, monkeypatch, capsys, *args)
        assert is_error(code, error) and "already contain" in error


@pytest.mark.parametrize("lora", [[], ["--lora-rank", 2]])
def test_the_loss_does_not_depend_on_micro_batches(
    monkeypatch, capsys, tmp_path, instructions, lora
):
    args = ["--data", instructions, *QUICK, "--dropout", 0, "--max-new-tokens", 2]
    args += ["--init", long_base(tmp_path / "base"), *lora]
    losses = []
    for size in (8, 3):
        out = tmp_path / str(size)
        options = ["--out", out, "--micro-batch-size", size]
        code, _, error = run(monkeypatch, capsys, "instruct", *args, *options)
        assert code == 0, error
        losses.append([float(row["train_loss"]) for row in read_losses(out)[1:]])
    assert len(losses[0]) == 4  # 32 rows
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    if lora:  # the adapter on its base is the merged model
        adapted = merge_lora(load_lora(load_gpt2(tmp_path / "base")[0], tmp_path / "8" / "adapter"))
        ids = torch.arange(40)[None]
        assert torch.allclose(adapted(ids), load_gpt2(tmp_path / "8")[0](ids), atol=1e-5)


@pytest.mark.parametrize("command", ["classify", "instruct"])
def test_interrupted_and_resumed_is_uninterrupted(
    monkeypatch, capsys, tmp_path, messages, instructions, command
):
    args = [command, *QUICK, "--epochs", 3, "--eval-every", 6]
    if command == "classify":
        args += ["--data", messages, "--lora-rank", 2]
        names = ["adapter/adapter_model.safetensors", "adapter/classes.json"]
    else:
        args += ["--data", instructions, "--max-new-tokens", 4]
        args += ["--init", long_base(tmp_path / "base")]
        names = ["responses.json"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, _, error = run(monkeypatch, capsys, *args, "--out", whole)
    assert code == 0, error

    def interrupt(line):
        if "step     8/" in line:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("train.show_progress", interrupt)
        code, output, error = run(patch, capsys, *args, "--out", cut)
    assert (code, error) == (130, "")
    assert "the same command goes on" in output
    assert len(read_losses(cut)) == 10  # the step after the signal was finished
    assert not (cut / "responses.json").exists()
    code, output, error = run(monkeypatch, capsys, *args, "--out", cut)
    assert code == 0, error
    assert "going on from step 9" in output
    for name in ("losses.csv", "model.safetensors", "config.json", *names):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_two_processes_do_what_one_does(monkeypatch, capsys, tmp_path, messages):
    """Two forks of this process, with the variables of torchrun, which takes 15 s to start them."""
    args = ["classify", "--data", messages, *QUICK, "--lora-rank", 2, "--micro-batch-size", 3]
    args += ["--dropout", 0]

    def work(rank):
        os.environ |= variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        sys.argv = [*map(str, ["finetune.py", *args, "--out", tmp_path / "two"])]
        with open(tmp_path / f"output-{rank}", "w", buffering=1) as sys.stdout:
            finetune_py.main()

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    variables |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=25)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]
    output = (tmp_path / "output-0").read_text()
    assert output.count("finished: ") == 1 and (tmp_path / "output-1").read_text() == ""

    code, one_output, error = run(monkeypatch, capsys, *args, "--out", tmp_path / "one")
    assert code == 0, error
    one, two = read_losses(tmp_path / "one"), read_losses(tmp_path / "two")
    assert len(one) == len(two) == 6
    for name in ("train_loss", "val_loss", "val_accuracy"):
        a, b = ([float(row[name]) for row in rows if row[name]] for rows in (one, two))
        assert a == pytest.approx(b, rel=1e-5), name
    a, b = (read_safetensors(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").exists()


# --------------------------------------------------------------------------------------------------
# Chat


@pytest.fixture
def talker(tmp_path):
    """A folder with a model that never ends a response, and has room for a prompt"""
    model, tokenizer = small_gpt(vocab_size=257, context_length=1000, n_layer=1), Tokenizer([])
    # The logit of end-of-text is the lowest of all: its embedding points away from the bias of
    # the last LayerNorm, which is all that the other embeddings see
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[tokenizer.eot] = -10.0
    save_gpt2(model, tokenizer, tmp_path / "talker")
    return tmp_path / "talker"


def test_chat_gives_each_line_alone_to_the_model(monkeypatch, capsys, talker):
    prompts = []
    stream_text = finetune_py.load_gpt2.stream_text

    def spy(model, tokenizer, prompt, *args, **options):
        prompts.append(prompt)
        yield from stream_text(model, tokenizer, prompt, *args, **options)

    monkeypatch.setattr("load_gpt2.stream_text", spy)
    lines = ["Hello", "", "  Again ", "long " * 1000, "Once more"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    code, output, error = run(monkeypatch, capsys, "chat", talker, "--max-new-tokens", 5)
    assert (code, error) == (0, "")
    assert output.count("\n> ") == 6
    assert "too long" in output
    assert prompts == [format_prompt({"instruction": s}) for s in ("Hello", "Again", "Once more")]


def test_chat_answers_greedily_what_respond_does(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("load_gpt2.fast_dtype", lambda device: torch.float32)
    base = long_base(tmp_path / "base")
    model, tokenizer = load_gpt2(base)
    add_lora(model, rank=2).eval()
    torch.manual_seed(0)
    randomise(model)
    save_lora(model, tmp_path / "adapter", base)
    expected = {}
    for name, options in (("plain", []), ("adapted", ["--adapter", tmp_path / "adapter"])):
        talking = load_gpt2(base)[0] if name == "plain" else merge_lora(model)
        (expected[name],) = respond(talking, tokenizer, [{"instruction": "Hello"}], 20)
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        args = [base, *options, "--temperature", 0, "--max-new-tokens", 20]
        code, output, error = run(monkeypatch, capsys, "chat", *args)
        assert (code, error) == (0, "")
        assert expected[name] in output
    assert expected["plain"] != expected["adapted"]


def test_chat_fills_the_context_and_no_more(monkeypatch, capsys, talker):
    prompt = Tokenizer([]).encode(format_prompt({"instruction": ""}))
    room = 1000 - len(prompt)
    for length, is_too_long in ((room - 3, False), (room, False), (room + 1, True)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("x" * length + "\n"))
        code, output, error = run(monkeypatch, capsys, "chat", talker, "--max-new-tokens", 100)
        assert (code, error) == (0, "")
        assert ("too long" in output) == is_too_long


def test_ctrl_c_stops_a_response_only(monkeypatch, capsys, talker):
    """In this process, with a real signal after the third piece of a response that has no end."""
    stream_text = finetune_py.load_gpt2.stream_text
    n_pieces = []

    def interrupted(*args, **options):
        for n, piece in enumerate(stream_text(*args, **options), 1):
            n_pieces.append(n)
            yield piece
            if n == 3 and len(n_pieces) == 3:  # in the first response only
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("load_gpt2.stream_text", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAgain\n"))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, output, error = run(monkeypatch, capsys, "chat", talker, "--max-new-tokens", 7)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (code, error) == (0, "")
    assert output.count(" ...\n") == 1
    assert output.count("\n> ") == 3
    assert n_pieces == [1, 2, 3, *range(1, 9)]  # the second response is whole: 7 ids and the end


def test_ctrl_c_at_the_prompt_asks_again(monkeypatch, capsys, talker):
    class Lines(io.StringIO):
        n_calls = 0

        def readline(self, *args):
            self.n_calls += 1
            if self.n_calls == 1:
                raise KeyboardInterrupt
            return super().readline(*args)

    monkeypatch.setattr(sys, "stdin", Lines("Hello\n"))
    code, output, error = run(monkeypatch, capsys, "chat", talker, "--max-new-tokens", 3)
    assert (code, error) == (0, "")
    assert output.count("\n> ") == 3


# --------------------------------------------------------------------------------------------------
# Judge


def judge_that_says(replies, asked):
    class Judge(Handler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            message = {"role": "assistant", "content": replies[len(asked) - 1]}
            self.send(200, json.dumps({"choices": [{"message": message}]}).encode())

    return Judge


@pytest.mark.parametrize("key", [None, "secret"])
def test_judge(monkeypatch, capsys, tmp_path, key):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    replies = ["70", "Score: 90/100", "Score: -5", "<think>5 or 6</think>\n50.5"]
    asked = []
    rows = [ROW | {"response": "Hi {0}." if i else ""} for i in range(4)]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    with serve(judge_that_says(replies, asked)) as url:
        args = ["judge", tmp_path / "r.json", "--url", url + "/v1/", "--model", "m"]
        code, output, error = run(monkeypatch, capsys, *args)
    assert code == 0, error
    assert output.startswith(f"mean score {210.5 / 3:.1f} of 3 ") and "of 4" in output
    for i, (path, authorization, body) in enumerate(asked):
        assert path == "/v1/chat/completions"
        assert authorization == (f"Bearer {key}" if key else None)
        assert (body["model"], body["temperature"]) == ("m", 0)
        response = "Hi {0}." if i else ""
        (message,) = body["messages"]
        assert all(text in message["content"] for text in ("Say hello.", "Hello.", response))


def test_judge_counts_only_one_number_up_to_100(monkeypatch, capsys, tmp_path):
    replies = ["", "none", "101", "-1", "5 or 6", "1e3", "<think>50", "7"]
    (tmp_path / "r.json").write_text(json.dumps([ROW | {"response": "Hi."}] * len(replies)))
    with serve(judge_that_says(replies, [])) as url:
        code, output, error = run(monkeypatch, capsys, "judge", tmp_path / "r.json", "--url", url)
    assert code == 0, error
    assert "mean score 7.0 of 1 (of 8 rows)" in output


def test_judge_scores_empty_responses_too(monkeypatch, capsys, tmp_path):
    asked = []
    (tmp_path / "r.json").write_text(json.dumps([ROW | {"response": r} for r in ("Hi.", "")]))
    with serve(judge_that_says(["80", "0"], asked)) as url:
        code, output, error = run(monkeypatch, capsys, "judge", tmp_path / "r.json", "--url", url)
    assert code == 0, error
    assert "mean score 40.0 of 2" in output


def test_judge_of_responses_that_are_not_scored(monkeypatch, capsys, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([ROW | {"response": "Hi."}]))
    with serve(judge_that_says(["I will not"], [])) as url:
        code, _, error = run(monkeypatch, capsys, "judge", tmp_path / "r.json", "--url", url)
    assert is_error(code, error) and url in error
    code, _, error = run(monkeypatch, capsys, "judge", tmp_path / "none.json")
    assert is_error(code, error) and "none.json" in error


@pytest.mark.parametrize(
    "status, body",
    [
        (500, b"{}"),
        (404, b'{"error": {"message": "model \'m\' not found"}}'),
        (200, b"oops"),
        (200, b"[]"),
        (200, b'{"choices": []}'),
        (0, b""),  # closes the connection
    ],
)
def test_faults_of_the_server_are_one_line(monkeypatch, capsys, tmp_path, status, body):
    class Judge(Handler):
        def do_POST(self):
            if status:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send(status, body)

    (tmp_path / "r.json").write_text(json.dumps([ROW | {"response": "Hi."}]))
    with serve(Judge) as url:
        code, _, error = run(monkeypatch, capsys, "judge", tmp_path / "r.json", "--url", url)
    assert is_error(code, error), error
    if status in (404, 500):
        assert f"{url}/chat/completions" in error
        assert f"{status}" in error and body.decode() in error


# --------------------------------------------------------------------------------------------------
# The command line


def test_help_of_every_command(monkeypatch, capsys):
    commands = ("classify", "predict", "instruct", "judge", "chat")
    for command in commands:
        code, output, _ = run(monkeypatch, capsys, command, "--help")
        assert code == 0
        assert "(default: " in output
    code, output, _ = run(monkeypatch, capsys, "--help")
    assert code == 0
    assert all(command in output for command in commands)


@pytest.mark.parametrize(
    "args",
    [
        ["classify", "--lora"],
        ["classify", "--lora-rank", "-1"],
        ["classify", "--epochs", "nan"],
        ["classify", "--batch-size", "0"],
        ["instruct", "--text-column", "text"],
        [],
        ["frobnicate"],
    ],
)
def test_bad_options_are_one_line(monkeypatch, capsys, tmp_path, args):
    if args[:1] == ["classify"]:
        args = [*args, "--init", TINY, "--out", tmp_path / "out"]
    code, _, error = run(monkeypatch, capsys, *args)
    assert is_error(code, error), error
    assert not list(tmp_path.iterdir())
