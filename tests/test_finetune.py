import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import finetune as finetune_py
from conftest import run_main
from finetune import (
    ClassificationDataset,
    GPTClassifier,
    InstructionDataset,
    LikeLengths,
    LoRALinear,
    add_lora,
    answer,
    collate_instructions,
    collate_texts,
    format_prompt,
    load_classifier,
    load_lora,
    merge_lora,
    read_instructions,
    read_texts,
    save_lora,
)
from gpt import GPT, GPT2_CONFIGS, GPTConfig, Tokenizer
from load_gpt2 import load_gpt2, read_safetensors, save_gpt2
from train import read_losses

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny-gpt2"
QUICK = ["--init", TINY, "--epochs", 1, "--batch-size", 8, "--warmup", 2, "--dtype", "float32"]


run = partial(run_main, finetune_py)


def start(*args):
    """The same as a process of its own, on one core, since there may be two of them"""
    command, env = (
        [*map(str, [sys.executable, ROOT / "finetune.py", *args])],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def small_gpt(**sizes):
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            **{"vocab_size": 300, "context_length": 64, "n_layer": 2, "n_head": 2, "n_embd": 16}
            | sizes
        )
    ).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Batches of like lengths


def test_batches_of_like_lengths():
    lengths = [(7 * i) % 101 + 1 for i in range(203)]
    sampler = LikeLengths(lengths, 8, seed=3, group_size=8)
    orders = [sampler.order(epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(203)) for order in orders)
    assert all((sampler.order(epoch) == orders[epoch]).all() for epoch in (2, 0, 3))
    batches = iter(sampler)
    batches = [next(batches) for _ in range(4 * 203 // 8)]
    assert [i for batch in batches for i in batch] == [
        i for order in orders for i in order.tolist()
    ][: 8 * len(batches)]
    in_first_epoch = [frozenset(batch) for batch in batches[:25]]
    assert not set(in_first_epoch) & {
        frozenset(batch) for batch in batches[26:51]
    }  # other company in the next epoch
    padded = sum(8 * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.25 * sum(lengths[i] for batch in batches for i in batch)
    firsts = [lengths[batch[0]] for batch in batches[:25]]
    assert firsts != sorted(firsts)  # groups are shuffled


def test_batches_are_the_same_however_they_are_cut():
    lengths = [(7 * i) % 11 + 1 for i in range(50)]
    whole = LikeLengths(lengths, 8, seed=3, group_size=8)
    for size in (4, 2, 1):
        cut = LikeLengths(lengths, size, seed=3, group_size=8)
        assert all((cut.order(epoch) == whole.order(epoch)).all() for epoch in range(5))
    assert sorted(LikeLengths([1, 2, 3], 8, seed=0, group_size=8).order(1)) == [0, 1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Classifier


def test_the_same_text_at_ten_paddings_and_in_any_batch():
    model = GPTClassifier(small_gpt(), 3).eval()
    ids = torch.randint(0, 300, (20,))
    alone = model(ids[None], torch.tensor([20]))
    assert torch.allclose(
        alone, model.score(model.transformer.features(ids[None])[:, -1]), atol=1e-6
    )
    for padding in range(0, 40, 4):
        for filler in (0, 299):
            padded = F.pad(ids, (0, padding), value=filler)
            batch = torch.stack([padded, torch.randint(0, 300, (20 + padding,))])
            assert torch.allclose(model(batch, torch.tensor([20, 7]))[0], alone[0], atol=1e-6)


def test_classification_rows_and_their_batch():
    tokenizer = Tokenizer([])
    dataset = ClassificationDataset(
        [("abc", "x"), ("defgh", "y"), ("ijklmn", "x")], tokenizer, ["x", "y"], 5
    )
    assert dataset.n_cut == 1 and [len(ids) for ids, _ in dataset] == [3, 5, 5]
    ids, lengths, labels = collate_texts([dataset[i] for i in range(3)])
    assert [tokenizer.decode(row[:n].tolist()) for row, n in zip(ids, lengths)] == [
        "abc",
        "defgh",
        "ijklm",
    ]
    assert (
        ids.shape == (3, 5)
        and labels.tolist() == [0, 1, 0]
        and labels.dtype == ids.dtype == torch.int64
    )


def test_classifier_loss_is_the_mean_of_cross_entropies():
    model = GPTClassifier(small_gpt(), 3)
    ids, lengths, labels = (
        torch.randint(0, 300, (4, 9)),
        torch.tensor([9, 1, 4, 6]),
        torch.tensor([0, 2, 1, 2]),
    )
    probs = model(ids, lengths).softmax(-1).tolist()
    expected = -sum(math.log(probs[i][label]) for i, label in enumerate(labels)) / 4
    assert model(ids, lengths, labels).item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Instructions

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
)


def test_prompt_is_alpacas():
    assert format_prompt({"instruction": "Add.", "input": "1 and 2"}) == ALPACA
    short = ALPACA.replace(", paired with an input that provides further context", "").replace(
        "### Input:\n1 and 2\n\n", ""
    )
    assert (
        format_prompt({"instruction": "Add.", "input": ""})
        == format_prompt({"instruction": "Add."})
        == short
    )


def test_masks_written_out(monkeypatch):
    monkeypatch.setattr(finetune_py, "format_prompt", lambda entry: entry["instruction"])
    tokenizer = Tokenizer([])
    (a, b, c, d, e, f), eot = tokenizer.encode("abcdef"), tokenizer.eot
    entries = [{"instruction": "abc", "output": "de"}, {"instruction": "f", "output": "a"}]
    dataset = InstructionDataset(entries, tokenizer, 16)
    assert [len(ids) for ids, _ in dataset] == [5, 2]
    ids, targets = collate_instructions([dataset[0], dataset[1]])
    assert ids[0].tolist() == [a, b, c, d, e] and ids[1, :2].tolist() == [f, a]
    assert targets.tolist() == [[-100, -100, d, e, eot], [a, eot, -100, -100, -100]]
    with_prompt = InstructionDataset(entries, tokenizer, 16, train_on_prompt=True)
    assert collate_instructions([with_prompt[0], with_prompt[1]])[1].tolist() == [
        [b, c, d, e, eot],
        [a, eot, -100, -100, -100],
    ]
    cut = InstructionDataset(entries, tokenizer, 3)
    assert cut[0][0].tolist() == [a, b, c] and cut[0][1].tolist() == [-100, -100, d]
    assert (cut.n_cut, cut.n_left_out, len(cut)) == (1, 0, 2)
    assert (
        InstructionDataset(entries, tokenizer, 2).n_left_out
    ) == 1  # no room for a response: it would have no target


def test_answers_in_batches_are_those_one_by_one():
    model, tokenizer = small_gpt(vocab_size=257, context_length=220), Tokenizer([])
    model.wte.weight.data *= 20
    entries = [{"instruction": "x" * n, "input": ""} for n in (30, 1, 17, 60, 30, 2)]
    alone = [answer(model, tokenizer, [entry], 40)[0] for entry in entries]
    assert answer(model, tokenizer, entries, 40, batch_size=4) == alone
    prompt = tokenizer.encode(format_prompt(entries[3]))  # an answer ends with the context
    (ids,) = model.generate([prompt], 221 - len(prompt), temperature=0)
    assert len(ids) < 40 and alone[3] == tokenizer.decode(ids).strip()


# ---------------------------------------------------------------------------------------------------------------------
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
    linear = torch.nn.Linear(6, 10)
    lora = LoRALinear(linear, rank=2, alpha=6, dropout=0.5).eval()
    torch.nn.init.normal_(lora.lora_B.weight)
    x = torch.randn(5, 6)
    expected = (
        x @ linear.weight.T + linear.bias + 3 * x @ lora.lora_A.weight.T @ lora.lora_B.weight.T
    )
    assert torch.allclose(lora(x), expected, atol=1e-6)
    assert (
        lora.lora_A.weight.shape == (2, 6)
        and lora.lora_B.weight.shape == (10, 2)
        and lora.lora_A.weight.std() > 0.1
    )
    outputs = lora.train()(x) - linear(x)  # dropout is on the detour alone
    assert not torch.allclose(outputs, expected - linear(x))


@pytest.mark.parametrize(
    "targets, n", [(("c_attn", "c_proj", "c_fc"), 2_359_296), (("c_attn",), 589_824)]
)
def test_lora_parameter_counts(targets, n):
    with torch.device("meta"):
        model = add_lora(GPT(GPT2_CONFIGS["gpt2"]), rank=16, targets=targets)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == n and all(".lora_" in name for name in trained)


def test_an_adapter_is_saved_and_loaded(tmp_path):
    ids = torch.randint(0, 300, (2, 30))
    for make in (small_gpt, lambda: GPTClassifier(small_gpt(), 3).eval()):
        model = make()
        args = (ids, torch.tensor([30, 4])) if isinstance(model, GPTClassifier) else (ids,)
        add_lora(model, rank=4, alpha=8, targets=["attn.c_proj", "c_fc"]).eval()
        randomise(model)
        folder = tmp_path / type(model).__name__
        save_lora(model, folder, "base")
        assert torch.equal(load_lora(make(), folder).eval()(*args), model(*args))
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["r"] == 4 and config["lora_alpha"] == 8 and config["fan_in_fan_out"] is True
    names = read_safetensors(tmp_path / "GPT" / "adapter_model.safetensors")
    assert names["base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"].shape == (4, 16)
    for key, value in [
        ("use_dora", True),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("rank_pattern", {"c_fc": 2}),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match="only plain LoRA"):
            load_lora(make(), folder)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        load_lora(make(), folder)


# ---------------------------------------------------------------------------------------------------------------------
# Data

TEXTS = [
    ("ham", 'He said "hi, you" to me'),
    ("spam", "Win, win; win!"),
    ("ham", "naïve café 🙂"),
    ("spam", 'a "quote'),
]


def write_tables(folder):
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("v1", "text"), *TEXTS])
    uci = "".join(f"{label}\t{text}\n" for label, text in TEXTS)
    rows = [{"text": text, "label": label} for label, text in TEXTS]
    files = {
        "a.tsv": "label\ttext\n" + uci,
        "b.csv": table.getvalue(),
        "c.json": json.dumps(rows),
        "d.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "uci.tsv": uci.replace("\n", "\r\n"),
    }
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    with zipfile.ZipFile(folder / "sms+spam+collection.zip", "w") as archive:
        archive.writestr("readme", "About")
        archive.writestr("SMSSpamCollection", uci)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    write_tables(tmp_path)
    expected = [(text, label) for label, text in TEXTS]
    for name in ("a.tsv", "c.json", "d.jsonl", "uci.tsv", "sms+spam+collection.zip"):
        assert [row[1:] for row in read_texts(str(tmp_path / name), tmp_path)] == expected, name
    assert [
        row[1:] for row in read_texts(str(tmp_path / "b.csv"), tmp_path, label_column="v1")
    ] == expected


class Stub(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def serve(handler):
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def test_several_files_are_refused(tmp_path):
    write_tables(tmp_path)
    with pytest.raises(ValueError, match="one file is needed, and here are 2"):
        read_texts(str(tmp_path / "*.tsv"), tmp_path)


def test_instructions_may_be_a_table(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,input,output\nSay hello.,,Hello.\n")
    assert read_instructions(str(tmp_path / "a.csv"), tmp_path) == [ROW]


def test_a_zip_by_its_url(tmp_path):
    write_tables(tmp_path)

    class Files(Stub):
        def do_GET(self):
            self.send(200, (tmp_path / self.path[1:]).read_bytes())

    server, url = serve(Files)
    (tmp_path / "new").mkdir()
    rows = read_texts(url + "/sms+spam+collection.zip", tmp_path / "new")
    server.shutdown()
    assert [row[1:] for row in rows] == [(text, label) for label, text in TEXTS]


def damaged_lzma():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.tsv", "ham\thello\n" * 100)
    data = bytearray(file.getvalue())
    start = 30 + len("a.tsv")  # of what is compressed, after the header and the name
    data[start + 9 : start + 30] = b"\xff" * 21
    return bytes(data)


ROW = {"instruction": "Say hello.", "input": "", "output": "Hello."}
LABELLED = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(12)]


@pytest.mark.parametrize(
    "command, rows, message",
    [
        ("instruct", [ROW, ROW, {"instruction": "x"}], "d.json, row 3: 'output' is missing"),
        ("instruct", [ROW, ROW | {"output": " "}], "d.json, row 2: 'output' is empty"),
        ("instruct", [ROW | {"instruction": ""}], "d.json, row 1: 'instruction' is empty"),
        ("instruct", [ROW | {"input": 3}], "d.json, row 1: 'input' is not a text"),
        ("instruct", [ROW, "text"], "d.json, row 2: not an object"),
        ("instruct", [ROW, ROW], "d.json: 2 rows, but"),
        ("instruct", {"rows": []}, "d.json: not a list of rows"),
        ("instruct", [], "d.json: no rows"),
        ("classify", [*LABELLED, {"label": "a"}], "d.json, row 13: 0 columns are named text"),
        (
            "classify",
            [*LABELLED, {"text": "t", "message": "m", "label": "a"}],
            "d.json, row 13: 2 columns are named text",
        ),
        ("classify", [*LABELLED, {"text": 7, "label": "a"}], "d.json, row 13: 7 is no text"),
        ("classify", [*LABELLED, {"text": " ", "label": "a"}], "d.json, row 13: ' ' is no text"),
        ("classify", [*LABELLED, {"text": "t", "label": None}], "d.json, row 13: None is no label"),
        (
            "classify",
            [*LABELLED, {"text": "t", "label": "c"}],
            "d.json, row 13: the class 'c' has less than 3 rows",
        ),
        ("classify", LABELLED[::2], "d.json: one class only, 'a'"),
        (
            "classify",
            [*LABELLED, {"text": "\ud83d", "label": "a"}],
            "d.json, row 13: half a character",
        ),
    ],
)
def test_bad_rows_are_named(monkeypatch, capsys, tmp_path, command, rows, message):
    (tmp_path / "d.json").write_text(json.dumps(rows))
    args = [command, "--data", tmp_path / "d.json", "--out", tmp_path / "out", *QUICK]
    code, _, error = run(monkeypatch, capsys, *args)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("d.tsv", b"label\ttext\nham\thi\nham\n", "d.tsv, line 3: 1 columns"),
        ("d.csv", b"a,b,c\n1,2,3\n", "d.csv, line 1: 3 columns"),
        (
            "d.csv",
            "label,text\nham,caf\u00e9\n".encode("latin-1"),
            "d.csv: damaged, or not a UTF-8 text",
        ),
        ("d.json", b"[{", "d.json: damaged"),
        ("d.jsonl", b'{"text": "a", "label": "b"}\n{"text', "d.jsonl, line 2: damaged"),
        ("d.zip", b"PK\x05\x06" + bytes(18), "d.zip"),
        ("d.tsv", b"", "d.tsv: empty"),
        ("d.zip", damaged_lzma(), "d.zip: damaged"),
        ("d.csv", b"text,label,text\na,b,c\n", "d.csv, line 1: two columns have the same name"),
    ],
)
def test_bad_files_are_named(monkeypatch, capsys, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    code, _, error = run(
        monkeypatch,
        capsys,
        "classify",
        "--data",
        tmp_path / name,
        "--out",
        tmp_path / "out",
        *QUICK,
    )
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


# ---------------------------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def messages(tmp_path):
    """Two classes that can be told apart by a word, in different numbers"""
    path = tmp_path / "messages.tsv"
    lines = [f"ham\tsee you at {i}\n" for i in range(30)] + [
        f"spam\twin {i * 'now '}\n" for i in range(1, 21)
    ]
    path.write_text("label\ttext\n" + "".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "how",
    [[], ["--lora-rank", 4, "--learning-rate", 1e-2], ["--train", "last", "--learning-rate", 1e-2]],
)
def test_classify_and_predict(monkeypatch, capsys, tmp_path, messages, how):
    out = tmp_path / "out"
    args = [
        "classify",
        "--data",
        messages,
        "--out",
        out,
        *QUICK,
        "--epochs",
        6,
        "--balance",
        "--context-length",
        30,
        *how,
    ]
    code, output, error = run(monkeypatch, capsys, *args)
    assert code == 0, error
    assert (
        "30 ham, 20 spam; 20 of each are used" in output
        and "longer than 30 tokens" in output
        and "recall" in output
    )
    assert (out / "adapter").exists() == ("--lora-rank" in how)
    curve = [row for row in read_losses(out / "losses.csv") if row["val_loss"]]
    assert all(
        0 <= float(row[name]) <= 1 for row in curve for name in ("train_accuracy", "val_accuracy")
    )
    assert [row["step"] for row in curve] == [
        "0",
        "4",
        "8",
        "12",
        "16",
        "20",
        "21",
    ]  # once an epoch of 28 rows, and at the end
    # Only what was to be trained has changed
    before, after = (
        load_gpt2(TINY)[0].state_dict(),
        load_classifier(out)[0].transformer.state_dict(),
    )
    before["wpe.weight"] = before["wpe.weight"][
        :30
    ]  # what is predicted later is read as far as what was learned
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if "last" in how:
        assert changed and all(name.startswith(("h.1.", "ln_f.")) for name in changed)
    elif not how:
        assert changed == set(before)
    else:
        assert changed == {
            name
            for name in before
            if name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and "weight" in name
        }

    code, output, _ = run(monkeypatch, capsys, "predict", out, "see you at 7", "win now now now")
    lines = [line.split("\t") for line in output.splitlines()]
    assert [line[0] for line in lines] == ["ham", "spam"] and lines[1][2] == "win now now now"
    assert all(0.5 < float(line[1]) <= 1 for line in lines)
    monkeypatch.setattr(sys, "stdin", io.StringIO("win now now now\nsee you at 7\n"))
    assert run(monkeypatch, capsys, "predict", out)[1].splitlines() == output.splitlines()[::-1]
    code, _, error = run(monkeypatch, capsys, "predict", out, " ")
    assert code == 2 and error == "error: text 1 is empty\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("a line\u2028of\x0cone text\nsee you at 7\n"))
    output = run(monkeypatch, capsys, "predict", out)[1]
    assert output.count("\n") == 2 and "a line\u2028of\x0cone text" in output
    monkeypatch.setattr(sys, "stdin", None)
    code, _, error = run(monkeypatch, capsys, "predict", out)
    assert code == 2 and error == "error: text 1 is empty\n"
    code, _, error = run(monkeypatch, capsys, "predict", TINY, "x")
    assert code == 2 and "no classifier" in error
    code, _, error = run(monkeypatch, capsys, *args)
    assert code == 2 and "--resume" in error and "--overwrite" in error


def test_optimizer_state_for_the_adapters_only(monkeypatch, capsys, tmp_path, messages):
    args = ["--data", messages, "--out", tmp_path / "out", *QUICK, "--lora-rank", 4]
    assert run(monkeypatch, capsys, "classify", *args)[0] == 0
    state = torch.load(tmp_path / "out" / "resume.pt", weights_only=True)
    held = sum(entry["exp_avg"].numel() for entry in state["optimizers"][0]["state"].values())
    C, L = 24, 2
    assert (
        held == 4 * L * ((C + 3 * C) + (C + C) + 2 * (C + 4 * C)) + 2 * C
    )  # the head has two rows


def test_random_weights_and_a_vocabulary_of_the_rows(monkeypatch, capsys, tmp_path, messages):
    args = [
        "classify",
        "--init",
        "random",
        "--data",
        messages,
        "--out",
        tmp_path / "out",
        "--epochs",
        1,
    ]
    code, output, error = run(monkeypatch, capsys, *args)
    assert code == 0, error
    model, tokenizer, classes = load_classifier(tmp_path / "out")
    assert (
        tokenizer.vocab_size < 400
        and model.transformer.config.n_layer == 2
        and classes == ["ham", "spam"]
    )


def test_other_rows_and_other_settings_are_refused_on_resume(
    monkeypatch, capsys, tmp_path, messages
):
    monkeypatch.chdir(tmp_path)
    assert (
        run(monkeypatch, capsys, "classify", "--data", messages.name, "--out", "out", *QUICK)[0]
        == 0
    )
    monkeypatch.chdir("/")
    assert (
        run(monkeypatch, capsys, "classify", "--resume", tmp_path / "out")[0] == 0
    )  # from anywhere
    for option in ("--seed", 2), ("--lora-rank", 3), ("--out", "x"), ("--balance",):
        code, _, error = run(monkeypatch, capsys, "classify", "--resume", tmp_path / "out", *option)
        assert code == 2 and error.startswith(f"error: {option[0]} does not go with --resume")
    messages.write_text(messages.read_text().replace("ham", "eggs"))
    code, _, error = run(monkeypatch, capsys, "classify", "--resume", tmp_path / "out")
    assert (
        code == 2
        and f"{messages} is not what it was when the run in {tmp_path / 'out'} began" in error
    )
    code, _, error = run(monkeypatch, capsys, "instruct", "--resume", tmp_path / "out")
    assert code == 2 and "not the state of a run of instruct" in error


def test_a_run_needs_its_base_no_more(monkeypatch, capsys, tmp_path, messages):
    save_gpt2(*load_gpt2(TINY), tmp_path / "base")
    args = ["--data", messages, "--out", tmp_path / "out", *QUICK, "--init", tmp_path / "base"]
    assert run(monkeypatch, capsys, "classify", *args)[0] == 0
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    code, _, error = run(
        monkeypatch, capsys, "classify", *args, "--out", tmp_path / "base", "--overwrite"
    )
    assert code == 2 and "--init and --out are both" in error
    (tmp_path / "base" / "model.safetensors").unlink()
    assert run(monkeypatch, capsys, "classify", "--resume", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first


def test_overwriting_waits_until_the_new_run_has_begun(monkeypatch, capsys, tmp_path, messages):
    out = tmp_path / "out"
    args = ["classify", "--data", messages, "--out", out, *QUICK]
    assert run(monkeypatch, capsys, *args, "--lora-rank", 2)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(monkeypatch, capsys, *args, "--overwrite", "--batch-size", 0)[0] == 2
    assert run(monkeypatch, capsys, *args, "--overwrite", "--micro-batch-size", 3)[0] == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with monkeypatch.context() as patch:
        patch.setattr("load_gpt2.os.replace", None)  # a disk that takes no more files
        with pytest.raises(TypeError):
            run(monkeypatch, capsys, *args, "--overwrite")
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    # The old model is whole, and no state of the old run can be taken for that of the new one
    assert after == {
        out / name: before[out / name]
        for name in ("config.json", "model.safetensors", "merges.txt", "vocab.json")
    }
    assert run(monkeypatch, capsys, *args, "--overwrite")[0] == 0
    assert not list(out.glob("adapter/*"))  # which was of the old run


def test_the_missing_base_is_explained(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for command in ("classify", "instruct"):
        code, _, error = run(monkeypatch, capsys, command)
        assert code == 2 and error.startswith(
            "error: out/stories: no such folder; `python train.py`"
        )
    assert not list(tmp_path.iterdir())


@pytest.fixture
def instructions(tmp_path):
    path = tmp_path / "instructions.json"
    path.write_text(
        json.dumps(
            [ROW | {"instruction": f"Say {i}.", "output": "x" * (1 + i % 7)} for i in range(40)]
        )
    )
    return path


def test_instruct_and_its_answers(monkeypatch, capsys, tmp_path, instructions):
    out = tmp_path / "out"
    args = ["--data", instructions, "--out", out, *QUICK, "--compare", "--max-new-tokens", 8]
    code, output, error = run(monkeypatch, capsys, "instruct", *args)
    assert code == 0, error
    losses = [float(row["val_loss"]) for row in read_losses(out / "losses.csv") if row["val_loss"]]
    assert losses[-1] < losses[0]
    results = json.loads((out / "responses.json").read_text())
    assert len(results) == 4
    assert all(
        list(row) == ["instruction", "input", "output", "response", "base_response"]
        for row in results
    )
    model, tokenizer = load_gpt2(out)
    assert (
        model.config.context_length == 256
    )  # it has grown, since the prompt alone is longer than 48


@pytest.mark.parametrize("lora", [[], ["--lora-rank", 2, "--lora-dropout", 0]])
def test_the_loss_does_not_depend_on_micro_batches(
    monkeypatch, capsys, tmp_path, instructions, lora
):
    if lora:  # a base whose context is long enough
        args = ["--data", instructions, "--out", tmp_path / "base", *QUICK]
        assert run(monkeypatch, capsys, "instruct", *args)[0] == 0
        lora = [*lora, "--init", tmp_path / "base"]
    losses = []
    for size in (8, 4, 1):
        args = [
            "--data",
            instructions,
            "--out",
            tmp_path / str(size),
            *QUICK,
            "--dropout",
            0,
            *lora,
        ]
        code, _, error = run(
            monkeypatch,
            capsys,
            "instruct",
            *args,
            "--micro-batch-size",
            size,
            "--max-new-tokens",
            2,
        )
        assert code == 0, error
        losses.append(
            [
                float(row["train_loss"])
                for row in read_losses(tmp_path / str(size) / "losses.csv")[1:]
            ]
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(
        losses[0], rel=1e-4
    )


@pytest.mark.parametrize("command", ["classify", "instruct"])
def test_interrupted_and_resumed_is_uninterrupted(
    monkeypatch, capsys, tmp_path, messages, instructions, command
):
    args = [
        command,
        *QUICK,
        "--epochs",
        8,
        "--eval-every",
        6,
        "--data",
        {"classify": messages, "instruct": instructions}[command],
    ]
    if command == "classify":
        args += ["--lora-rank", 2]
        names = ["adapter/adapter_model.safetensors"]
    else:
        args += ["--max-new-tokens", 4]
        names = ["responses.json"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, _, error = run(monkeypatch, capsys, *args, "--out", whole)
    assert code == 0, error
    with monkeypatch.context() as patch:
        patch.setattr(
            "train.show_progress",
            lambda line: signal.raise_signal(signal.SIGINT) if "step     8/" in line else None,
        )
        code, output, error = run(patch, capsys, *args, "--out", cut)
    assert (
        code == 130
        and error == ""
        and f"{command} --resume {cut}" in output
        and len(read_losses(cut / "losses.csv")) == 10
    )
    code, _, error = run(monkeypatch, capsys, command, "--resume", cut)
    assert code == 0, error
    for name in ("losses.csv", "model.safetensors", "config.json", *names):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name


@pytest.fixture
def talker(tmp_path):
    """A folder with a model that talks on and on, with room for a prompt"""
    model, tokenizer = small_gpt(vocab_size=257, context_length=2000, n_layer=1), Tokenizer([])
    model.wte.weight.data[tokenizer.eot] = -10 * model.wte.weight.data.abs()[tokenizer.eot]
    save_gpt2(model, tokenizer, tmp_path / "talker")
    return tmp_path / "talker"


def test_chat(monkeypatch, capsys, talker):
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("Hello\n\nAgain\n" + "long " * 1000 + "\nOnce more\n")
    )
    code, output, error = run(monkeypatch, capsys, "chat", talker, "--max-new-tokens", 5)
    assert code == 0 and error == "" and output.count("\n> ") == 6
    assert "That is too long" in output


def test_ctrl_c_stops_an_answer_only(talker):
    process = start("chat", talker, "--max-new-tokens", 1500)
    process.stdin.write("Hello\n")
    process.stdin.flush()
    process.stdout.readline(), process.stdout.readline()
    process.stdout.read(12)  # the answer has begun
    process.send_signal(signal.SIGINT)
    output, error = process.communicate("Again\n", timeout=120)
    assert process.returncode == 0 and error == "", error[-3000:]
    assert " ...\n" in output and output.count("\n> ") == 2


def test_judge(monkeypatch, capsys, tmp_path):
    replies = [
        "70",
        "Score: 90/100",
        "Score: -5",
        "<think>5 or 6</think>\n50.5",
        "30",
        "40",
        None,
        "60",
    ]
    asked = []

    class Judge(Stub):
        def do_POST(self):
            asked.append(
                (self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            )
            reply = replies[len(asked) - 1]
            self.send(
                200,
                json.dumps(
                    {"choices": [{"message": {"role": "assistant", "content": reply}}]}
                ).encode(),
            )

    server, url = serve(Judge)
    rows = [ROW | {"response": f"Hi {i}.", "base_response": "No."} for i in range(4)]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    code, output, error = run(
        monkeypatch, capsys, "judge", tmp_path / "r.json", "--url", url + "/v1/", "--model", "m"
    )
    server.shutdown()
    assert (
        code == 0
        and f"response: mean {210.5 / 3:.1f} of 3 scores" in output
        and "base_response: mean 43.3 of 3" in output
    )
    assert "of 3 scores, 4 asked for" in output
    path, body = asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 0
    assert all(text in body["messages"][0]["content"] for text in ("Say hello.", "Hello.", "Hi 0."))


@pytest.mark.parametrize(
    "status, body",
    [(500, b"{}"), (200, b"oops"), (200, b"[]"), (200, b'{"choices": []}'), (0, b"")],
)
def test_faults_of_the_judge_are_one_line(monkeypatch, capsys, tmp_path, status, body):
    class Judge(Stub):
        def do_POST(self):
            if status:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send(status, body)

    server, url = serve(Judge)
    (tmp_path / "r.json").write_text(json.dumps([ROW | {"response": "Hi."}]))
    code, _, error = run(monkeypatch, capsys, "judge", tmp_path / "r.json", "--url", url)
    server.shutdown()
    assert (
        code == 2
        and error.startswith(f"error: {url}: ")
        and error.count("\n") == 1
        and "r.json, row 1" in error
    )


def test_help_of_every_command(monkeypatch, capsys):
    commands = ("classify", "predict", "instruct", "judge", "chat")
    for command in commands:
        code, output, _ = run(monkeypatch, capsys, command, "--help")
        assert code == 0 and "(default: " in output and "None" not in output
    code, output, _ = run(monkeypatch, capsys, "--help")
    assert code == 0 and all(command in output for command in commands)
    for args in (
        ["classify", "--lora"],
        ["classify", "--train", "all", "--lora-rank", "2"],
        ["classify", "--lora-rank", "-1"],
        [],
        ["frobnicate"],
    ):
        code, _, error = run(monkeypatch, capsys, *args)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
