import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import train as train_py
from conftest import run_main
from gpt import GPT, GPTConfig, Tokenizer, create_dataloader
from load_gpt2 import load_gpt2
from train import (
    TrainConfig,
    create_optimizers,
    data_fingerprint,
    read_chunks,
    read_losses,
    read_tokens,
    scheduled_learning_rate,
    tokenize,
    train,
)

ROOT = Path(__file__).parent.parent
STORIES = ROOT / "data" / "stories.txt"

TINY = ROOT / "tests" / "tiny-gpt2"

# A run of seconds: a tiny model, short windows, and float32, so that runs cut in different ways can be compared
SHORT = [
    *["--context-length", 16, "--steps", 12, "--eval-every", 4, "--eval-windows", 8],
    *["--warmup", 2, "--dtype", "float32", "--batch-size", 8],
]
QUICK = ["--init", TINY, *SHORT]
FRESH = ["--vocab-size", 300, *SHORT]  # with a vocabulary and a model of its own


run = partial(run_main, train_py)


def start(*args, launcher=()):
    """The same as a process of its own"""
    command = [sys.executable, *launcher, ROOT / "train.py", *args]
    return subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def quick(monkeypatch, capsys, tmp_path):
    """A function that trains for seconds on the stories -> rows of losses.csv"""

    def go(name, *args, base=QUICK):
        code, _, error = run(monkeypatch, capsys, "--out", tmp_path / name, *base, *args)
        assert code == 0, error
        return read_losses(tmp_path / name / "losses.csv")

    return go


# ---------------------------------------------------------------------------------------------------------------------
# The schedule and the optimizer


def test_schedule_at_its_corners():
    config = TrainConfig(steps=100, warmup=10, learning_rate=1.0)
    assert scheduled_learning_rate(0, config) == pytest.approx(
        0.1
    )  # not 0, which would waste a step
    assert scheduled_learning_rate(9, config) == scheduled_learning_rate(10, config) == 1.0
    assert scheduled_learning_rate(55, config) == pytest.approx(0.55)  # half way down
    assert scheduled_learning_rate(100, config) == pytest.approx(0.1)
    assert scheduled_learning_rate(1000, config) == pytest.approx(0.1)  # and not up again
    assert scheduled_learning_rate(0, TrainConfig(warmup=0, learning_rate=1.0)) == 1.0
    assert scheduled_learning_rate(
        3, TrainConfig(steps=3, warmup=5, learning_rate=1.0)
    ) == pytest.approx(0.8)
    rates = [scheduled_learning_rate(step, config) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_weight_decay_on_matrices_only():
    model = GPT(GPTConfig(vocab_size=20, context_length=8, n_layer=2, n_head=1, n_embd=8))
    names = {parameter: name for name, parameter in model.named_parameters()}
    (adamw,) = create_optimizers(model, TrainConfig(weight_decay=0.3))
    decayed, others = adamw.param_groups
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0
    assert all(
        names[p].split(".")[-2] in ("wte", "wpe", "c_attn", "c_proj", "c_fc")
        for p in decayed["params"]
    )
    assert all(names[p].endswith("bias") or ".ln_" in "." + names[p] for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    adamw, muon = create_optimizers(model, TrainConfig(weight_decay=0.3, optimizer="muon"))
    of_muon = {names[p] for p in muon.param_groups[0]["params"]}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert of_muon == {f"h.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert muon.param_groups[0]["weight_decay"] == 0.3
    of_adamw = [[names[p] for p in group["params"]] for group in adamw.param_groups]
    assert of_adamw[0] == ["wte.weight", "wpe.weight"] and len(of_adamw[1]) == len(others["params"])


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def newton_schulz(x):
    """Muon's: five steps that bring all singular values near 1, in bfloat16 (Jordan 2024)"""
    y = x.bfloat16()
    y = y.T if len(y) > y.size(1) else y
    y = y / y.norm()
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return (y if y.shape == x.shape else y.T).float()


def toy_rows():
    """Rows whose numbers of targets differ widely, so that a mean of means is not the mean"""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(16):
        ids, targets = torch.randint(0, 20, (2, 8), generator=generator)
        targets[: i % 8] = -100
        rows.append((ids, targets))
    return rows


def toy_losses(out, micro_batch_size, **settings):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=20, context_length=8, n_layer=1, n_head=2, n_embd=16))
    config = TrainConfig(
        batch_size=8,
        dtype="float32",
        warmup=0,
        **{"steps": 10, "eval_every": 5, "grad_clip": 0.5} | settings,
    )
    loaders = [
        create_dataloader(toy_rows(), micro_batch_size, shuffle=shuffle)
        for shuffle in (True, False)
    ]
    out.mkdir()
    train(model, *loaders, config, out, save=lambda: None)
    return [
        [float(row[name]) for row in read_losses(out / "losses.csv") if row[name]]
        for name in ("train_loss", "val_loss")
    ]


def test_the_loss_does_not_depend_on_how_a_batch_is_cut(tmp_path):
    whole, whole_val = toy_losses(tmp_path / "8", 8)
    for size in (4, 2, 1):
        cut, cut_val = toy_losses(tmp_path / str(size), size)
        assert cut == pytest.approx(whole, rel=1e-5) and cut_val == pytest.approx(
            whole_val, rel=1e-5
        )


@pytest.mark.parametrize("name, peak", [("adamw", 1e-3), ("muon", 5e-2)])
def test_losses_are_those_of_a_loop_written_out(tmp_path, name, peak):
    losses, val_losses = toy_losses(tmp_path / "out", 2, optimizer=name, learning_rate=peak)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=20, context_length=8, n_layer=1, n_head=2, n_embd=16))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    muon = [p for p in model.h.parameters() if p.dim() == 2] if name == "muon" else []
    groups = [
        {"params": [p for p in matrices if not any(p is q for q in muon)], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0},
    ]
    optimizer, momenta = torch.optim.AdamW(groups, betas=(0.9, 0.95)), [0] * len(muon)
    rows = toy_rows()

    def mean_loss(chosen):
        logits = model(torch.stack([ids for ids, _ in chosen]))
        targets = torch.stack([targets for _, targets in chosen])
        kept = targets != -100
        return -logits.log_softmax(-1)[kept].gather(-1, targets[kept][:, None]).mean()

    expected, expected_val = [], [mean_loss(rows).item()]
    for step in range(10):
        order = np.random.default_rng([0, step // 2]).permutation(16)
        loss = mean_loss([rows[i] for i in order[8 * (step % 2) : 8 * (step % 2) + 8]])
        optimizer.zero_grad()
        loss.backward()
        length = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1, 0.5 / length)
        lr = peak * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for i, p in enumerate(muon):
            momenta[i] = 0.95 * momenta[i] + 0.05 * p.grad
            update = newton_schulz(0.05 * p.grad + 0.95 * momenta[i])
            p.data = p.data * (1 - lr * 0.1) - lr * 0.2 * math.sqrt(max(p.shape)) * update
        expected.append(loss.item())
        if step in (4, 9):
            expected_val.append(mean_loss(rows).item())
    rel = (
        1e-5 if name == "adamw" else 2e-3
    )  # bfloat16 rounds otherwise where products and sums come in another order
    assert losses == pytest.approx(expected, rel=rel) and val_losses == pytest.approx(
        expected_val, rel=rel
    )
    if name == "muon":
        assert losses != pytest.approx(
            toy_losses(tmp_path / "adamw", 2, learning_rate=peak)[0], rel=rel
        )


def test_gradients_are_clipped_as_a_whole_step(tmp_path):
    """A clip that bites changes the run; it would bite differently on parts of a batch (test above has it on)"""
    assert (
        toy_losses(tmp_path / "a", 8, grad_clip=0.1)[0]
        != toy_losses(tmp_path / "b", 8, grad_clip=100.0)[0]
    )


@pytest.mark.parametrize("batch_size, micro_batch_size", [(8, 3), (4, 8)])
def test_a_batch_that_does_not_divide_is_refused(
    monkeypatch, capsys, tmp_path, batch_size, micro_batch_size
):
    sizes = ["--batch-size", batch_size, "--micro-batch-size", micro_batch_size]
    code, _, error = run(monkeypatch, capsys, "--out", tmp_path / "out", *QUICK, *sizes)
    assert code == 2 and error == (
        f"error: a batch of {batch_size} rows does not divide into micro-batches of {micro_batch_size} for 1 process(es)\n"
    )


def test_two_processes_do_what_one_does(monkeypatch, capsys, quick, tmp_path):
    one = quick("one", "--dropout", 0.1, "--micro-batch-size", 4)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start(
        "--out",
        tmp_path / "two",
        *QUICK,
        "--dropout",
        0.1,
        "--micro-batch-size",
        4,
        launcher=launcher,
    )
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    two = read_losses(tmp_path / "two" / "losses.csv")
    assert len(one) == len(two) == 13
    for name in ("train_loss", "val_loss"):
        a, b = ([float(row[name]) for row in rows if row[name]] for rows in (one, two))
        assert a == pytest.approx(b, rel=1e-5)
    assert output.count("step    12/12") == 1  # only one of them speaks
    # and one process can go on with what two began
    assert run(monkeypatch, capsys, "--resume", tmp_path / "two", "--steps", 16)[0] == 0
    assert len(read_losses(tmp_path / "two" / "losses.csv")) == 17


# ---------------------------------------------------------------------------------------------------------------------
# A run as a whole


def test_a_run_leaves_a_folder_that_opens(quick, tmp_path, capsys):
    rows = quick("out", "--steps", 40, "--eval-every", 20, "--learning-rate", 3e-3, base=FRESH)
    assert [int(row["step"]) for row in rows] == list(range(41))
    val_losses = {int(row["step"]): float(row["val_loss"]) for row in rows if row["val_loss"]}
    assert list(val_losses) == [0, 20, 40]
    assert (
        val_losses[0] == pytest.approx(math.log(300), abs=0.2)
        and val_losses[40] < val_losses[0] - 1
    )
    names = {path.name for path in (tmp_path / "out").iterdir()} - {"losses.png"}
    assert names == {
        "config.json",
        "model.safetensors",
        "merges.txt",
        "vocab.json",
        "losses.csv",
        "resume.pt",
    }
    model, tokenizer = load_gpt2(tmp_path / "out")
    assert (
        model.config.vocab_size == tokenizer.vocab_size == 300 and model.config.context_length == 16
    )
    # The folder holds the weights with the best validation loss: measured again, they give it
    ids = tokenizer.encode(STORIES.read_text("utf-8")) + [tokenizer.eot]
    ids = ids[-(len(ids) // 10) :]
    stride, last = max(16, math.ceil(len(ids) / 8)), len(ids) - 17
    total, counted = 0.0, set()
    for i in range(1 + math.ceil(last / stride)):
        start = min(i * stride, last)
        with torch.no_grad():
            log_probs = model(torch.tensor([ids[start : start + 16]]))[0].log_softmax(-1)
        for place in {*range(start + 1, start + 17)} - counted:
            total -= log_probs[place - start - 1, ids[place]].item()
            counted.add(place)
    assert total / len(counted) == pytest.approx(min(val_losses.values()), abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_losses_are_the_same(quick):
    one, other = (quick(device, "--device", device, "--no-compile") for device in ("cpu", "cuda"))
    for name in ("train_loss", "val_loss"):
        a, b = ([float(row[name]) for row in rows if row[name]] for rows in (one, other))
        assert a == pytest.approx(b, rel=1e-3)


def test_the_best_weights_stay_when_later_ones_are_worse(quick, tmp_path):
    rows = quick("out", "--steps", 24, "--learning-rate", 3, "--grad-clip", 1000)
    losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert min(losses) < losses[-1]
    state = torch.load(tmp_path / "out" / "resume.pt", weights_only=True)
    assert state["best_loss"] == min(losses) and state["step"] == 24
    best = load_gpt2(tmp_path / "out")[0].state_dict()
    assert not torch.equal(best["wte.weight"], state["model"]["wte.weight"])


def test_progress_and_samples_are_shown(monkeypatch, capsys, tmp_path):
    code, out, error = run(
        monkeypatch, capsys, "--out", tmp_path / "out", *QUICK, "--prompt", "The door"
    )
    assert code == 0 and error == ""
    assert out.count("    The door") == 4
    assert "step     4/12 | loss " in out and " tokens/s | 0:00:00 left | val " in out
    assert "load_gpt2.py" in out.splitlines()[-1]


def test_a_second_run_destroys_nothing_unasked(monkeypatch, capsys, quick, tmp_path):
    quick("out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code, _, error = run(monkeypatch, capsys, "--out", tmp_path / "out", *QUICK)
    assert (
        code == 2 and error.startswith("error: ") and "--resume" in error and "--overwrite" in error
    )
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(quick("out", "--overwrite", "--steps", 4)) == 5


def test_overwriting_waits_until_the_new_run_has_begun(monkeypatch, capsys, quick, tmp_path):
    quick("out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    args = ["--out", tmp_path / "out", "--overwrite", *QUICK]
    for bad in (
        ["--micro-batch-size", 5],
        ["--prompt", "word " * 100],
        ["--context-length", 100_000],
    ):
        assert run(monkeypatch, capsys, *args, *bad)[0] == 2
        assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_two_runs_do_not_share_a_folder(monkeypatch, capsys, quick, tmp_path):
    quick("out")
    with train_py.sole_run(tmp_path / "out"):
        for args in (["--resume", tmp_path / "out"], ["--out", tmp_path / "out", "--overwrite"]):
            code, _, error = run(monkeypatch, capsys, *args)
            assert code == 2 and "another run is at work" in error


def test_a_text_that_has_changed_is_not_taken_for_the_same(monkeypatch, capsys, quick, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(STORIES.read_text("utf-8")[:20_000], encoding="utf-8")
    quick("out", "--text", text)
    text.write_text(STORIES.read_text("utf-8")[:19_000], encoding="utf-8")
    code, _, error = run(monkeypatch, capsys, "--resume", tmp_path / "out", "--steps", 16)
    assert code == 2 and "have another place, size or time" in error and "--init" in error
    (old,) = tmp_path.glob("out-*.bin")
    quick("out", "--text", text, "--overwrite")
    (new,) = {*tmp_path.glob("out-*.bin")} - {old}
    tokenizer = load_gpt2(TINY)[1]
    assert read_tokens(new).tolist() == [*tokenizer.encode(text.read_text("utf-8")), tokenizer.eot]


def test_init_goes_on_from_a_folder(monkeypatch, capsys, quick, tmp_path):
    losses = [
        float(row["val_loss"])
        for row in quick("first", "--learning-rate", 3e-3, base=FRESH)
        if row["val_loss"]
    ]
    args = [
        "--init",
        tmp_path / "first",
        "--steps",
        4,
        "--eval-every",
        4,
        "--eval-windows",
        8,
        "--dtype",
        "float32",
    ]
    code, _, error = run(monkeypatch, capsys, "--out", tmp_path / "second", *args)
    assert code == 0, error
    again = read_losses(tmp_path / "second" / "losses.csv")
    assert float(again[0]["val_loss"]) == pytest.approx(min(losses), rel=1e-6)
    assert load_gpt2(tmp_path / "second")[1].merges == load_gpt2(tmp_path / "first")[1].merges
    code, _, error = run(monkeypatch, capsys, "--out", tmp_path / "x", *args, "--vocab-size", 400)
    assert code == 2 and "--vocab-size 400 does not fit" in error
    code, _, error = run(
        monkeypatch, capsys, "--out", tmp_path / "x", *args, "--context-length", 17
    )
    assert code == 2 and "--context-length 17 is more than the 16" in error


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch, capsys, quick, tmp_path):
    quick("out", "--steps", 8)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    args = ["--resume", tmp_path / "out", "--steps", 100, "--learning-rate", 1e38]
    code, _, error = run(monkeypatch, capsys, *args)
    assert (
        code == 2
        and error.startswith("error: the loss is ")
        and error.count("\n") == 1
        and "last good state" in error
    )
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# Resuming

LONG = [*QUICK, "--steps", 120, "--dropout", 0.1, "--eval-every", 30, "--optimizer", "muon"]


def wait_for_step(out, step, process):
    while process.poll() is None:
        if (out / "resume.pt").exists() and len(read_losses(out / "losses.csv")) > step:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def test_stopped_and_killed_and_resumed_is_uninterrupted(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uninterrupted, process = start("--out", whole, *LONG), start("--out", cut, *LONG)
    for step, number, code in [
        (0, signal.SIGKILL, -9),
        (30, signal.SIGINT, 130),
        (60, signal.SIGTERM, 143),
    ]:
        wait_for_step(cut, step, process)
        time.sleep(0.05)  # somewhere between two saves
        process.send_signal(number)
        output, error = process.communicate(timeout=60)
        assert process.returncode == code and error == ""
        if code > 0:  # it had time to say how to go on, and to save what it had done
            assert f"--resume {cut}" in output and len(read_losses(cut / "losses.csv")) - 1 not in (
                0,
                30,
                60,
                90,
                120,
            )
        process = start("--resume", cut)
    for process in (process, uninterrupted):
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    for name in ("losses.csv", "model.safetensors", "config.json", "merges.txt", "vocab.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name


def test_the_state_alone_is_enough_to_go_on(monkeypatch, capsys, quick, tmp_path):
    out = tmp_path / "out"
    quick("out", "--steps", 4)
    before = read_losses(out / "losses.csv")
    (out / "losses.csv").unlink()
    assert (
        run(monkeypatch, capsys, "--resume", out)[0] == 0
        and read_losses(out / "losses.csv") == before
    )
    (out / "losses.csv").write_text("nonsense")
    assert run(monkeypatch, capsys, "--resume", out, "--steps", 8)[0] == 0
    after = read_losses(out / "losses.csv")
    assert after[:5] == before and [row["step"] for row in after] == [
        str(step) for step in range(9)
    ]
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    code, _, error = run(monkeypatch, capsys, "--resume", out)
    assert (
        code == 2
        and error.startswith(f"error: {out / 'resume.pt'}: does not fit the model of ")
        and error.count("\n") == 1
    )
    state = torch.load(out / "resume.pt", weights_only=True)
    for wrong in (
        {"history": []},
        {"step": 9},
        {"settings": None},
        {"step": "8"},
        {"model": None},
        {"optimizers": [{}]},
    ):
        torch.save(state | wrong, out / "resume.pt")
        code, _, error = run(monkeypatch, capsys, "--resume", out)
        assert (
            code == 2
            and error.startswith(f"error: {out / 'resume.pt'}: ")
            and error.count("\n") == 1
        )


def test_run_in_the_folder_at_hand(monkeypatch, capsys, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(monkeypatch, capsys, "--out", ".", *QUICK)[0] == 0
    code, _, error = run(monkeypatch, capsys, "--resume", ".", "--steps", 16)
    assert code == 0, error


def test_variables_of_other_launchers_say_nothing(monkeypatch, quick):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert len(quick("out")) == 13


# ---------------------------------------------------------------------------------------------------------------------
# Texts and token files


def test_chunks_have_the_tokens_of_the_whole(tmp_path):
    tokenizer = Tokenizer.gpt2()
    rng = np.random.default_rng(0)
    for alphabet in (
        ["word", " ", "\n", "  ", "don't", "\t", "!?", "\x1c", "\u2003", "東京", "12", "\x85"],
        ["a"],
        [" ", "\n"],
    ):
        text = "".join(rng.choice(alphabet, 400))
        (tmp_path / "text").write_text(text, encoding="utf-8", newline="")
        text = (tmp_path / "text").read_text("utf-8")
        for n in (64, 100, 1000):
            chunks = list(read_chunks(tmp_path / "text", n))
            assert "".join(chunks) == text
            if len(alphabet) > 2:
                assert [i for chunk in chunks for i in tokenizer.encode(chunk)] == tokenizer.encode(
                    text
                )


def test_token_file(tmp_path):
    texts = {"a.txt": "One text.", "b.txt": "Another <|endoftext|> text,\nüber two lines."}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    tokenizer, path = Tokenizer.gpt2(), tmp_path / "tokens.bin"
    tokenize([tmp_path / name for name in texts], tokenizer, path)
    expected = [i for text in texts.values() for i in [*tokenizer.encode(text), tokenizer.eot]]
    assert read_tokens(path).tolist() == expected
    header = np.fromfile(
        path, dtype=np.int32, count=256
    )  # llm.c's: magic, version, number of tokens
    assert header[:3].tolist() == [
        20240520,
        1,
        len(expected),
    ] and path.stat().st_size == 1024 + 2 * len(expected)
    # A second time there is nothing to do
    written = path.stat().st_mtime_ns
    tokenize([tmp_path / name for name in texts], tokenizer, path)
    assert path.stat().st_mtime_ns == written


def test_fingerprint_of_texts_and_vocabulary(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("One text.")
    b.write_text("One text.")
    fingerprints = [data_fingerprint(paths, Tokenizer([])) for paths in ([a], [b], [a, b], [b, a])]
    fingerprints.append(data_fingerprint([a], Tokenizer([(b"O", b"n")])))
    a.write_text("Another.")
    fingerprints.append(data_fingerprint([a], Tokenizer([])))
    assert len(set(fingerprints)) == 6 and fingerprints[1] == data_fingerprint([b], Tokenizer([]))


def test_tokenizing_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    texts = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, path in enumerate(texts):
        path.write_text(f"Text {i} has so many words. " * 40, encoding="utf-8")
    tokenizer, path, part = (
        Tokenizer.load(TINY),
        tmp_path / "tokens.bin",
        tmp_path / "tokens.bin.part",
    )
    monkeypatch.setattr("train.read_chunks", lambda path: read_chunks(path, 100))
    monkeypatch.setattr("train.CHUNKS_AT_ONCE", 1)
    tokenize(texts, tokenizer, path)
    whole = path.read_bytes()
    path.unlink()
    n_written = 0

    class Killed(BaseException):
        pass

    def killed_after(n):
        def show_progress(line):
            nonlocal n_written
            n_written += 1
            if n_written == n:
                raise Killed

        return show_progress

    for n in (1, 7, 20):
        n_written = 0
        monkeypatch.setattr("train.show_progress", killed_after(n))
        with pytest.raises(Killed):
            tokenize(texts, tokenizer, path)
        assert not path.exists() and part.stat().st_size < len(whole)
        with open(part, "ab") as file:
            file.write(b"half of a chunk, which the header does not count")
    n_written = 0
    monkeypatch.setattr("train.show_progress", killed_after(0))
    tokenize(texts, tokenizer, path)
    assert path.read_bytes() == whole and not part.exists()
    assert n_written == 11  # 39 chunks and ends of texts, of which 1 + 7 + 20 were there


def test_a_run_of_finetune_is_not_resumed_here(monkeypatch, capsys, tmp_path):
    state = {
        "step": 0,
        "best_loss": 1.0,
        "history": [{}],
        "model": {},
        "optimizers": [],
        "settings": {"command": "classify"},
    }
    torch.save(state, tmp_path / "resume.pt")
    code, _, error = run(monkeypatch, capsys, "--resume", tmp_path)
    assert code == 2 and "is a run of finetune.py: python finetune.py classify --resume" in error


def write_llmc(path, ids, n=None):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(ids) if n is None else n
    path.write_bytes(header.tobytes() + np.array(ids, dtype=np.uint16).tobytes())


def test_bin_takes_the_files_of_nanogpt_and_llmc(quick, tmp_path):
    ids = Tokenizer.load(TINY).encode(STORIES.read_text("utf-8"))[:3000]
    (tmp_path / "nanogpt").mkdir()
    np.array(ids[:2000], dtype=np.uint16).tofile(tmp_path / "nanogpt" / "train.bin")
    np.array(ids[2000:], dtype=np.uint16).tofile(tmp_path / "nanogpt" / "val.bin")
    (tmp_path / "llmc").mkdir()
    write_llmc(tmp_path / "llmc" / "x_train_000001.bin", ids[:2000])
    write_llmc(tmp_path / "llmc" / "x_val_000000.bin", ids[2000:])
    first = quick("a", "--bin", tmp_path / "nanogpt" / "*.bin")
    second = quick("b", "--bin", tmp_path / "llmc" / "*.bin")
    assert first == second and len(first) == 13
    assert first != quick(
        "c", "--bin", tmp_path / "nanogpt" / "train.bin"
    )  # which is cut for validation then


def test_links_keep_their_names_on_resume(monkeypatch, capsys, quick, tmp_path):
    """As a cache of a hub has them: the name that says what a shard is for is that of the link"""
    ids = load_gpt2(TINY)[1].encode(STORIES.read_text("utf-8"))
    for name, blob, part in [("train", "a", ids[:2000]), ("val", "b", ids[2000:4000])]:
        np.array(part, dtype=np.uint16).tofile(tmp_path / blob)
        (tmp_path / f"{name}.bin").symlink_to(tmp_path / blob)
    args = ["--out", tmp_path / "out", "--bin", tmp_path / "*.bin", *QUICK]
    began = run(monkeypatch, capsys, *args)[1].split("\n")[0]
    goes_on = run(monkeypatch, capsys, "--resume", tmp_path / "out")[1].split("\n")[0]
    assert began == goes_on and "125 windows of 16 tokens" in began


def test_text_takes_files_folders_and_globs(quick, tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    stories = STORIES.read_text("utf-8")
    (tmp_path / "texts" / "1.txt").write_text(stories[:5000], encoding="utf-8")
    (tmp_path / "texts" / "deep" / "2.txt").write_text(stories[5000:10000], encoding="utf-8")
    (tmp_path / "a [1].txt").write_text(
        stories[:5000], encoding="utf-8"
    )  # a name, not a glob for "a 1.txt"
    (tmp_path / "a 1.txt").write_text("no")
    files = [tmp_path / "a [1].txt", tmp_path / "texts" / "deep" / "2.txt"]
    for i, names in enumerate([files, [tmp_path / "texts"], [tmp_path / "texts" / "**" / "*.txt"]]):
        rows = quick(str(i), "--text", *names, "--steps", 2)
        if i == 0:
            first = rows
        assert rows == first


def test_a_text_may_have_val_in_its_name(quick, tmp_path):
    (tmp_path / "carnival.txt").write_text(STORIES.read_text("utf-8"), encoding="utf-8")
    assert quick("interval", "--text", tmp_path / "carnival.txt", "--steps", 2) == quick(
        "a", "--steps", 2
    )


def test_text_from_a_url_is_fetched_once(quick, tmp_path):
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = STORIES.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/texts/stories.txt?raw=1"
    rows = quick("a", "--text", url, "--steps", 2)
    assert rows == quick("b", "--text", url, "--steps", 2) == quick("c", "--steps", 2)
    server.shutdown()
    assert asked == ["/texts/stories.txt?raw=1"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def make_bad_inputs(folder):
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin1.txt").write_bytes("Caf\u00e9 au lait. ".encode("latin-1") * 100)
    (folder / "short.txt").write_text("Too short.")
    (folder / "no-texts").mkdir()
    np.array([1, 2, 60000] * 100, dtype=np.uint16).tofile(folder / "ids.bin")
    (folder / "odd.bin").write_bytes(b"123")
    write_llmc(folder / "cut.bin", range(100), n=200)
    np.arange(100, dtype=np.uint16).tofile(folder / "only_val.bin")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "resume.pt").write_bytes(b"not a checkpoint")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--text", "{}/missing.txt"], "missing.txt: no such file"),
        (["--text", "{}/empty.txt"], "empty.txt: empty"),
        (["--text", "{}/latin1.txt"], "latin1.txt: not a UTF-8 text"),
        (["--text", "{}/short.txt"], "shorter than one window of context_length=128"),
        (["--text", "{}/no-texts"], "no *.txt in this folder"),
        (["--text", "http://127.0.0.1:PORT/x.txt"], "http://127.0.0.1"),
        (["--bin", "{}/ids.bin"], "token id 60000 does not fit a vocabulary of 50257"),
        (["--bin", "{}/odd.bin"], "odd.bin: not a file of 16-bit token ids"),
        (["--bin", "{}/cut.bin"], "cut.bin: 100 tokens, but its header says 200"),
        (["--bin", "{}/only_val.bin"], "all token files are for validation"),
        (["--model", "gpt5"], "invalid choice: 'gpt5'"),
        (["--init", "{}/nowhere"], "nowhere is not a folder"),
        (["--resume", "{}/nowhere"], "nowhere/resume.pt: no such file"),
        (["--resume", "{}/damaged"], "damaged/resume.pt: damaged"),
        (["--vocab-size", "100"], "vocab_size=100 is too small"),
        (["--vocab-size", "70000", "--text", "{}/ids.bin"], "not a UTF-8 text"),
        (["--vocab-size", "0"], "vocab_size=0 is too small"),
        (["--eval-windows", "0"], "--eval-windows"),
        (["--prompt", "word " * 200], "more than the context of 128"),
        (["--seed", "99999999999"], "32 bits"),
        (["--text", "x", "--bin", "y"], "--text and --bin"),
        (["--resume", "{}/damaged", "--overwrite"], "--overwrite does not go with --resume"),
        (["--steps", "0"], "at least 1"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--learning-rate", "nan"], "learning rate"),
        (["--dtype", "float16"], "dtype=float16"),
        (["--dropout", "1.5"], "dropout=1.5"),
        (["--context-length", "0"], "context_length"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, args, message):
    make_bad_inputs(tmp_path)
    monkeypatch.setattr("load_gpt2.WAITS", ())
    args = [arg.replace("{}", str(tmp_path)).replace("PORT", str(free_port())) for arg in args]
    out = [] if "--resume" in args else ["--out", tmp_path / "new" / "out"]
    code, _, error = run(monkeypatch, capsys, *args, *out)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "new" / "out").exists() and not list(tmp_path.rglob("*.part"))


def test_help_shows_every_option_with_its_default(monkeypatch, capsys):
    code, output, _ = run(monkeypatch, capsys, "--help")
    assert code == 0
    text = " ".join(output.split())
    for option in (
        "--steps",
        "--batch-size",
        "--learning-rate",
        "--resume",
        "--bin",
        "--device",
        "--compile",
    ):
        assert option in text
    assert text.count("(default: ") >= 15 and "None" not in text
