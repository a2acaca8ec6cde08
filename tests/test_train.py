import csv
import math
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_main
from filelock import FileLock

import load_gpt2 as load_gpt2_py
import train as train_py
from gpt import GPT, GPTConfig, create_dataloader
from load_gpt2 import load_gpt2, write_safetensors
from train import (
    PretrainConfig,
    TrainConfig,
    create_optimizers,
    read_texts,
    read_tokens,
    scheduled_learning_rate,
    train,
    update,
)

ROOT = Path(__file__).parent.parent
STORIES = ROOT / "data" / "stories.txt"
TINY = ROOT / "tests" / "tiny-gpt2"

# A run of a tenth of a second: a tiny model, short windows, and float32 on the CPU, so that runs
# that are cut in different ways can be compared
SHORT = ["--device", "cpu", "--no-compile", "--dtype", "float32", "--context-length", 16]
SHORT += ["--steps", 6, "--eval-every", 3, "--eval-windows", 8, "--warmup", 2, "--batch-size", 8]
QUICK = ["--init", TINY, *SHORT]

REAL_STREAM, REAL_PLOT = GPT.stream, train_py.plot_history

run = partial(run_main, train_py)


@pytest.fixture(autouse=True)
def small_and_quiet(monkeypatch, tmp_path):
    """By default, runs have little text and a small model, write no samples and draw nothing."""
    text = tmp_path / "text.txt"
    text.write_text(STORIES.read_text("utf-8")[:5000], encoding="utf-8")
    monkeypatch.setattr(train_py, "STORIES", text)
    sizes = GPTConfig(300, context_length=16, n_layer=1, n_head=2, n_embd=16, dropout=0.1)
    monkeypatch.setitem(train_py.MODELS, "nano", sizes)
    monkeypatch.setattr(GPT, "stream", lambda *args, **options: iter(()))
    monkeypatch.setattr(train_py, "plot_history", lambda *args: None)


def read_losses(out):
    with open(out / "losses.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return [float(row[name]) for row in rows if row[name]]


def contents(folder):
    """The files in a folder, without locks, which are empty and stay"""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.read_bytes() for path in paths}


def is_one_error(code, error):
    return code == 1 and error.startswith("error: ") and error.count("\n") == 1


@pytest.fixture
def quick(monkeypatch, capsys, tmp_path):
    """A function that trains for a moment -> rows of losses.csv"""

    def go(name, *args, base=QUICK):
        code, _, error = run(monkeypatch, capsys, "--out", tmp_path / name, *base, *args)
        assert code == 0 and error == ""
        return read_losses(tmp_path / name)

    return go


@pytest.fixture
def captured(monkeypatch, capsys, tmp_path):
    """A function: command line -> what `train` would be given, and the first batches"""

    def go(*args, base=QUICK):
        given = {}

        def fake_train(model, get_batch, val_loader, config, **others):
            given.update(model=model, get_batch=get_batch, config=config)
            batches = [*map(get_batch, range(3)), *val_loader]
            given.update(batches=[x.tolist() for batch in batches for x in batch])

        with monkeypatch.context() as patch:
            patch.setattr(train_py, "train", fake_train)
            args = ["--out", tmp_path / "captured", *base, *args]
            code, output, error = run(monkeypatch, capsys, *args)
        assert code == 0, error
        n_windows = int(re.search(r"([\d,]+) windows", output)[1].replace(",", ""))
        return SimpleNamespace(**given, n_windows=n_windows)

    return go


# --------------------------------------------------------------------------------------------------
# The schedule and the optimizer


def test_schedule_at_its_corners():
    config = TrainConfig(steps=100, warmup=10, learning_rate=1.0)
    assert scheduled_learning_rate(0, config) == pytest.approx(0.1)  # 0 would waste a step
    assert scheduled_learning_rate(9, config) == scheduled_learning_rate(10, config) == 1.0
    assert scheduled_learning_rate(55, config) == pytest.approx(0.55)  # half way down
    assert scheduled_learning_rate(100, config) == pytest.approx(0.1)
    assert scheduled_learning_rate(1000, config) == pytest.approx(0.1)  # and not up again
    assert scheduled_learning_rate(0, TrainConfig(warmup=0, learning_rate=1.0)) == 1.0
    short = TrainConfig(steps=3, warmup=5, learning_rate=1.0)
    assert scheduled_learning_rate(3, short) == pytest.approx(0.8)
    rates = [scheduled_learning_rate(step, config) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_weight_decay_is_for_matrices_only():
    model = GPT(GPTConfig(vocab_size=20, context_length=8, n_layer=2, n_head=1, n_embd=8))
    names = {parameter: name for name, parameter in model.named_parameters()}
    (adamw,) = create_optimizers(model, TrainConfig(weight_decay=0.3))
    decayed, others = adamw.param_groups
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0
    layers = ("wte", "wpe", "c_attn", "c_proj", "c_fc")
    assert all(names[p].split(".")[-2] in layers for p in decayed["params"])
    assert all(names[p].endswith("bias") or ".ln_" in "." + names[p] for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    adamw, muon = create_optimizers(model, TrainConfig(weight_decay=0.3, optimizer="muon"))
    of_muon = {names[p] for p in muon.param_groups[0]["params"]}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert of_muon == {f"h.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert muon.param_groups[0]["weight_decay"] == 0.3
    of_adamw = [[names[p] for p in group["params"]] for group in adamw.param_groups]
    assert of_adamw[0] == ["wte.weight", "wpe.weight"] and len(of_adamw[1]) == len(others["params"])


def test_muon_without_a_matrix_in_a_block_is_refused():
    model = GPT(TOY)
    model.h.requires_grad_(False)
    for without in (model, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="empty parameter list"):
            create_optimizers(without, TrainConfig(optimizer="muon"))
    assert len(create_optimizers(model, TrainConfig())) == 1


# --------------------------------------------------------------------------------------------------
# The loop, on a toy: it knows nothing of texts

TOY = GPTConfig(vocab_size=20, context_length=8, n_layer=1, n_head=2, n_embd=16)


def toy_rows():
    """Rows whose numbers of targets differ widely, so that a mean of means is not the mean"""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(16):
        ids, targets = torch.randint(0, 20, (2, 8), generator=generator)
        targets[: i % 8] = -100
        rows.append((ids, targets))
    return rows


def stack(rows):
    return [torch.stack(tensors) for tensors in zip(*rows)]


def toy_order(epoch):
    return np.random.default_rng([0, epoch]).permutation(16)


def toy_batch(step):
    rows = toy_rows()
    places = range(6 * step, 6 * step + 6)
    return stack([rows[toy_order(place // 16)[place % 16]] for place in places])


def toy_run(out, *, get_batch=toy_batch, dropout=0.0, val_loader=None, **settings):
    """Train the toy, or go on with it. -> whether a signal stopped it"""
    settings = {"steps": 10, "eval_every": 5, "grad_clip": 0.5, **settings}
    config = TrainConfig(batch_size=6, dtype="float32", warmup=0, device="cpu", out=out, **settings)
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**vars(TOY) | {"dropout": dropout}))
    try:
        train(
            model, toy_batch if get_batch is None else get_batch,
            val_loader or create_dataloader(toy_rows(), 3), config, content="the toy",
            save=lambda: write_safetensors(out / "model.safetensors", model.state_dict()),
        )  # fmt: skip
    except KeyboardInterrupt:
        return True
    return False


def mean_loss(model, ids, targets):
    """Cross-entropy, written out"""
    kept = targets != -100
    log_probs = model(ids).log_softmax(-1)
    return -log_probs[kept].gather(-1, targets[kept][:, None]).mean()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


NO_AUTOCAST = torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("size", [None, 16, 5, 4, 1])
def test_an_update_does_not_depend_on_micro_batches(size):
    batch = stack(toy_rows())
    torch.manual_seed(0)
    model = GPT(TOY)
    expected = mean_loss(model, *batch)
    expected.backward()
    whole = gradients(model)
    for clip in (1e9, whole.norm().item() / 3):
        model.zero_grad()
        config = TrainConfig(micro_batch_size=size, grad_clip=clip)
        loss, norm = update(model, [], 0.1, batch, config, NO_AUTOCAST)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert norm == pytest.approx(whole.norm().item(), rel=1e-5)  # before it is clipped
        scale = min(1, clip / whole.norm().item())
        assert torch.allclose(gradients(model), whole * scale, atol=1e-6)


def test_shares_of_processes_make_up_the_whole(monkeypatch):
    """Each process has some rows; their losses add up, and the mean of the gradients is right."""
    batch = [x[:7] for x in stack(toy_rows())]
    torch.manual_seed(0)
    model = GPT(TOY)
    n_not_synced = 0

    def no_sync():
        nonlocal n_not_synced
        n_not_synced += 1
        return nullcontext()

    model.no_sync = no_sync
    expected = mean_loss(model, *batch)
    expected.backward()
    whole = gradients(model)
    losses, parts = [], []
    config = TrainConfig(micro_batch_size=1, grad_clip=1e9)
    for rank in range(3):
        monkeypatch.setattr(train_py, "process_rank", lambda rank=rank: (rank, 3))
        model.zero_grad()
        losses.append(update(model, [], 0.1, batch, config, NO_AUTOCAST)[0])
        parts.append(gradients(model))
    assert sum(losses) == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(sum(parts) / 3, whole, atol=1e-6)
    assert n_not_synced == 7 - 3  # all but the last micro-batch of each process


def newton_schulz(x):
    """Muon's: five steps that bring all singular values near 1, in bfloat16 (Jordan 2024)"""
    y = x.bfloat16()
    y = y.T if len(y) > y.size(1) else y
    y = y / y.norm()
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return (y if y.shape == x.shape else y.T).float()


@pytest.mark.parametrize("name, peak", [("adamw", 1e-3), ("muon", 2e-2)])
def test_losses_are_those_of_a_loop_written_out(tmp_path, name, peak):
    toy_run(tmp_path / "out", micro_batch_size=4, optimizer=name, learning_rate=peak)
    result = read_losses(tmp_path / "out")
    torch.manual_seed(0)
    model = GPT(TOY)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    muon = [p for p in model.h.parameters() if p.dim() == 2] if name == "muon" else []
    groups = [
        {"params": [p for p in matrices if not any(p is q for q in muon)], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0},
    ]
    optimizer, momenta = torch.optim.AdamW(groups, betas=(0.9, 0.95)), [0] * len(muon)
    rows = toy_rows()
    order = [i for epoch in range(4) for i in toy_order(epoch)]
    losses, val_losses = [], [mean_loss(model, *stack(rows)).item()]
    for step in range(10):
        loss = mean_loss(model, *stack([rows[i] for i in order[6 * step : 6 * step + 6]]))
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1, 0.5 / norm)
        lr = peak * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for i, p in enumerate(muon):
            momenta[i] = 0.95 * momenta[i] + 0.05 * p.grad
            change = newton_schulz(0.05 * p.grad + 0.95 * momenta[i])
            p.data = p.data * (1 - lr * 0.1) - lr * 0.2 * math.sqrt(max(p.shape)) * change
        losses.append(loss.item())
        if step in (4, 9):
            val_losses.append(mean_loss(model, *stack(rows)).item())
    # bfloat16 rounds otherwise where products and sums come in another order
    rel = 1e-5 if name == "adamw" else 1e-2
    assert column(result, "train_loss") == pytest.approx(losses, rel=rel)
    assert column(result, "val_loss") == pytest.approx(val_losses, rel=rel)
    assert [row["step"] for row in result if row["val_loss"]] == ["0", "5", "10"]
    if name == "muon":
        toy_run(tmp_path / "adamw", learning_rate=peak)
        assert column(read_losses(tmp_path / "adamw"), "train_loss") != pytest.approx(losses, rel)


def test_the_best_weights_stay_when_later_ones_are_worse(tmp_path):
    toy_run(tmp_path, learning_rate=3.0, grad_clip=1e9, eval_every=2)
    losses = column(read_losses(tmp_path), "val_loss")
    assert min(losses) < losses[-1]
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert min(row["val_loss"] for row in state["history"] if "val_loss" in row) == min(losses)
    assert state["history"][-1]["step"] == 10
    best = load_gpt2_py.read_safetensors(tmp_path / "model.safetensors")
    model = GPT(TOY)
    model.load_state_dict(best)
    assert mean_loss(model, *stack(toy_rows())).item() == pytest.approx(min(losses), rel=1e-5)
    assert not torch.equal(best["wte.weight"], state["model"]["wte.weight"])


def test_report_adds_columns_and_tokens_per_second_count_all_rows(tmp_path, monkeypatch, capsys):
    ticks = count()
    monkeypatch.setattr(train_py.time, "perf_counter", lambda: next(ticks))  # a step is a second
    model = GPT(TOY)
    config = TrainConfig(
        steps=4, batch_size=6, micro_batch_size=2, eval_every=4, dtype="float32", out=tmp_path
    )
    val_loader = create_dataloader(toy_rows(), 16)
    numbers = count()
    train(
        model, toy_batch, val_loader, config,
        save=lambda: None, report=lambda: {"accuracy": next(numbers)},
    )  # fmt: skip
    assert [row["accuracy"] for row in read_losses(tmp_path)] == ["0", "", "", "", "1"]
    assert "| 48 tokens/s |" in capsys.readouterr().out  # 6 rows of 8 tokens


# --------------------------------------------------------------------------------------------------
# Stopping and going on

SAME = ("losses.csv", "model.safetensors")
STOPPABLE = {"steps": 4, "eval_every": 2, "dropout": 0.2, "optimizer": "muon"}


class Killed(BaseException):
    pass


def test_a_kill_at_any_moment_goes_on_to_the_same_end(tmp_path, monkeypatch):
    """Every file comes by a rename: kill the run before the first of them, the second, ..."""
    toy_run(tmp_path / "whole", **STOPPABLE)
    real_replace = os.replace
    for n in count():
        out = tmp_path / f"killed-{n}"
        n_left = n

        def replace(*args):
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                raise Killed
            real_replace(*args)

        monkeypatch.setattr(os, "replace", replace)
        try:
            toy_run(out, **STOPPABLE)
        except Killed:
            monkeypatch.setattr(os, "replace", real_replace)
            for name in ("resume.pt.part", "model.safetensors.part", "losses.csv.part"):
                (out / name).write_bytes(b"half")  # a real kill leaves it behind
            toy_run(out, **STOPPABLE)
        else:
            break
        for name in SAME:
            expected = (tmp_path / "whole" / name).read_bytes()
            assert (out / name).read_bytes() == expected, f"{name}, killed before rename {n}"
    assert n >= 2 + 3 * 2  # state and losses at the start; and at the validations, weights at one


@pytest.mark.parametrize("stop", range(4))
def test_a_run_stopped_in_any_step_goes_on_to_the_same_end(tmp_path, stop):
    """Also in a step before a validation"""
    toy_run(tmp_path / "whole", **STOPPABLE)
    number = (signal.SIGINT, signal.SIGTERM)[stop % 2]

    def get_batch(step):
        if step == stop:
            os.kill(os.getpid(), number)
        return toy_batch(step)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert toy_run(tmp_path / "cut", get_batch=get_batch, **STOPPABLE)
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    state = torch.load(tmp_path / "cut" / "resume.pt", weights_only=True)
    assert state["history"][-1]["step"] == stop + 1  # the step is finished and saved
    assert not toy_run(tmp_path / "cut", **STOPPABLE)
    for name in SAME:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("steps", [7, 5])
def test_a_run_that_ends_where_it_was_stopped_is_validated(tmp_path, steps):
    def get_batch(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return toy_batch(step)

    assert toy_run(tmp_path, get_batch=get_batch)  # after step 7, between two validations
    assert not toy_run(tmp_path, steps=steps)
    rows = read_losses(tmp_path)
    assert len(rows) == 8 and rows[-1]["val_loss"]
    state = torch.load(tmp_path / "resume.pt", weights_only=True)["model"]
    best = load_gpt2_py.read_safetensors(tmp_path / "model.safetensors")
    assert all(torch.equal(best[name], state[name]) for name in state)


def test_a_second_signal_interrupts_at_once(tmp_path):
    def get_batch(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still there")

    assert toy_run(tmp_path, get_batch=get_batch)
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert state["history"][-1]["step"] == 0


def test_the_state_is_saved_before_the_first_validation(tmp_path):
    class Failing:
        def __iter__(self):
            raise Killed

    with pytest.raises(Killed):
        toy_run(tmp_path, val_loader=Failing())
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert state["history"] == [{"step": 0}] and state["settings"]["batch_size"] == 6
    assert not (tmp_path / "model.safetensors").exists()


def command(args, log, environment, stop):
    """python train.py ARGS, in a process that has the imports already. stop: (step, signal)"""
    os.environ.update(environment)
    for number, end in [(1, "out"), (2, "err")]:
        with open(f"{log}.{end}", "wb") as file:
            os.dup2(file.fileno(), number)
    GPT.stream = lambda *args, **options: iter(())
    sys.modules["matplotlib.figure"] = None  # as if it was not installed
    clip = torch.nn.utils.clip_grad_norm_
    steps = count(1)

    def clip_and_stop(*args):
        if stop and next(steps) == stop[0]:
            os.kill(os.getpid(), stop[1])
        return clip(*args)

    torch.nn.utils.clip_grad_norm_ = clip_and_stop
    sys.argv = ["train.py", *map(str, args)]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts the command. Its process is forked from one that waits for that."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    forks = multiprocessing.get_context("forkserver")
    # The first step of an optimizer imports torch._dynamo, which takes seconds
    forks.set_forkserver_preload([__name__, "torch._dynamo"])
    processes = []

    def start(*args, stop=None, **environment):
        log = tmp_path / f"log-{len(processes)}"
        process = forks.Process(target=command, args=(args, log, environment, stop))
        process.start()
        process.log = log
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join(10)


def finish(process):
    """-> exit code, standard output and error"""
    process.join(30)
    return (process.exitcode, *(Path(f"{process.log}.{end}").read_text() for end in ("out", "err")))


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_the_same_command_goes_on_after_kill_and_signals(start, quick, tmp_path):
    args = ["--steps", 24, "--dropout", 0.1, "--eval-every", 6, "--optimizer", "muon"]
    args += ["--text", tmp_path / "text.txt"]
    quick("whole", *args)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    step = 0
    for n_steps, number, code in [
        (9, signal.SIGKILL, -9),
        (4, signal.SIGINT, 130),
        (5, signal.SIGTERM, 130),
        (0, None, 0),
    ]:
        process = start("--out", cut, *QUICK, *args, stop=(n_steps, number))
        result, output, error = finish(process)
        assert (result, error) == (code, "")
        if step:
            assert f"going on from step {step}" in output
        if number == signal.SIGKILL:  # steps after the last validation are lost
            step = 6
        else:
            step += n_steps
            assert ("the same command goes on" in output.splitlines()[-1]) == (number is not None)
        assert len(read_losses(cut)) == (step if number else 24) + 1
    for name in (*SAME, "config.json", "merges.txt", "vocab.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name


def test_two_processes_have_the_losses_of_one(quick, start, monkeypatch, capsys, tmp_path):
    args = ["--batch-size", 7, "--micro-batch-size", 2, "--dropout", 0]
    args += ["--text", tmp_path / "text.txt"]
    one = quick("one", *args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        start("--out", tmp_path / "two", *QUICK, *args, RANK=rank, LOCAL_RANK=rank, **torchrun)
        for rank in ("0", "1")
    ]
    (code, output, error), (code_1, output_1, _) = map(finish, processes)
    assert code == code_1 == 0, error
    assert "step     6/6 | loss" in output and "step" not in output_1  # only one of them speaks
    two = read_losses(tmp_path / "two")
    for name in ("train_loss", "val_loss"):
        assert column(one, name) == pytest.approx(column(two, name), rel=1e-5)
    # One process can go on with what two began
    rows = quick("two", *args, "--steps", 8)
    assert rows[:7] == two and len(rows) == 9


def test_a_finished_run_says_so_and_trains_nothing(monkeypatch, capsys, quick, tmp_path):
    out = tmp_path / "out"
    quick("out")

    def files():  # resume.pt is written again, with the same content but other bytes
        return {path: content for path, content in contents(out).items() if path.suffix != ".pt"}

    before = files()

    def fail(*args):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(train_py, "update", fail)
        patch.setattr(load_gpt2_py, "save_gpt2", fail)  # the best weights stay as they are
        code, output, error = run(patch, capsys, "--out", out, *QUICK)
    assert (code, error) == (0, "") and "finished at step 6" in output
    assert files() == before


def test_a_run_goes_on_with_more_steps_and_other_means(monkeypatch, capsys, quick, tmp_path):
    """--steps may grow; device, compilation, micro-batches and the place of the data may differ."""
    assert PretrainConfig.may_change == {
        *("steps", "micro_batch_size", "device", "compile", "out", "overwrite", "text", "bin")
    }
    before = quick("out")
    moved = (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    args = ["--text", moved, "--steps", 9, "--micro-batch-size", 3, "--compile"]
    code, output, error = run(monkeypatch, capsys, "--out", tmp_path / "out", *QUICK, *args)
    assert (code, error) == (0, "") and "going on from step 6" in output
    rows = read_losses(tmp_path / "out")
    assert rows[:7] == before and len(rows) == 10 and rows[9]["val_loss"]
    load_gpt2(tmp_path / "out")  # compiled weights have their usual names


@pytest.mark.parametrize(
    "args, message",
    [
        (["--learning-rate", 0.002], "learning_rate was 0.006 and is 0.002"),
        (["--optimizer", "adamw"], "optimizer was muon and is adamw"),
        (["--dropout", 0.3], "dropout was None and is 0.3"),
        (["--prompt", "The"], "prompt was One day"),
        (["--text", "{}/other.txt"], "checksum of the data was"),
    ],
)
def test_other_settings_are_refused_by_name(monkeypatch, capsys, quick, tmp_path, args, message):
    out = tmp_path / "out"
    quick("out", "--steps", 1)
    (tmp_path / "other.txt").write_text(STORIES.read_text("utf-8")[:4990], encoding="utf-8")
    args = [str(arg).replace("{}", str(tmp_path)) for arg in args]
    before = contents(out)
    code, _, error = run(monkeypatch, capsys, "--out", out, *QUICK, *args)
    assert is_one_error(code, error) and message in error and "--overwrite" in error
    assert contents(out) == before
    assert len(quick("out", *args, "--overwrite", "--steps", 2)) == 3
    assert len(quick("out", *args, "--steps", 3)) == 4  # the folder is now that of the new run


def test_a_folder_that_holds_something_else_is_refused(monkeypatch, capsys, quick, tmp_path):
    out = tmp_path / "out"
    quick("out", "--steps", 1)
    state = torch.load(out / "resume.pt", weights_only=True)
    settings = {"data": "messages.tsv", "learning_rate": 0.001}  # a run of finetune.py
    torch.save(state | {"settings": settings}, out / "resume.pt")
    code, _, error = run(monkeypatch, capsys, "--out", out, *QUICK)
    assert is_one_error(code, error) and "--overwrite" in error
    (out / "resume.pt").unlink()
    before = contents(out)
    code, _, error = run(monkeypatch, capsys, "--out", out, *QUICK)
    assert is_one_error(code, error) and "holds a model" in error and "--overwrite" in error
    assert contents(out) == before
    assert len(quick("out", "--overwrite")) == 7


def test_a_damaged_state_is_one_line(monkeypatch, capsys, quick, tmp_path):
    out = tmp_path / "out"
    quick("out", "--steps", 1)
    whole = (out / "resume.pt").read_bytes()
    state = torch.load(out / "resume.pt", weights_only=True)
    wrong = [{"settings": None}, {"model": None}, {"optimizers": [{}]}, {"optimizers": []}]
    states = [state | change for change in wrong]
    states += [{key: state[key] for key in state if key != missing} for missing in state]
    place = whole.index(state["model"]["wte.weight"].numpy().tobytes())  # a bit of a weight
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for damaged in [b"not a checkpoint", b"", whole[:-1000], flipped, *states]:
        if isinstance(damaged, bytes):
            (out / "resume.pt").write_bytes(damaged)
        else:
            torch.save(damaged, out / "resume.pt")
        code, _, error = run(monkeypatch, capsys, "--out", out, *QUICK)
        assert is_one_error(code, error) and str(out / "resume.pt") in error


@pytest.mark.parametrize(
    "args",
    [
        ["--learning-rate", "nan"],
        ["--text", "{}/missing.txt"],
        ["--vocab-size", 100, "--init", ""],
        ["--prompt", "word " * 200],
        ["--context-length", 49],
    ],
)
def test_overwriting_waits_until_the_new_run_can_begin(monkeypatch, capsys, quick, tmp_path, args):
    quick("out", "--steps", 1)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(GPT, "stream", REAL_STREAM)
    args = [str(arg).replace("{}", str(tmp_path)) for arg in args]
    args = ["--out", tmp_path / "out", "--overwrite", *QUICK, *args]
    code, _, error = run(monkeypatch, capsys, *args)
    assert is_one_error(code, error) and contents(tmp_path / "out") == before


def test_two_runs_do_not_share_a_folder(monkeypatch, capsys, quick, tmp_path):
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)
    with FileLock(out / ".lock"):
        for args in ([], ["--overwrite"]):
            code, _, error = run(monkeypatch, capsys, "--out", out, *QUICK, *args)
            assert is_one_error(code, error) and str(out / ".lock") in error
    assert [path.name for path in out.iterdir()] == [".lock"]
    quick(Path("new") / "out", "--steps", 1)  # a lock file that a killed run left is no obstacle


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    args = [*QUICK, "--learning-rate", 1e30, "--grad-clip", 1e30]
    code, _, error = run(monkeypatch, capsys, "--out", out, *args)
    assert is_one_error(code, error) and "loss" in error and "last good state" in error
    state = torch.load(out / "resume.pt", weights_only=True)
    assert len(state["history"]) == 1 and torch.isfinite(state["model"]["wte.weight"]).all()
    model, _ = load_gpt2(out)
    assert all(torch.equal(p, state["model"][name]) for name, p in model.named_parameters())


# --------------------------------------------------------------------------------------------------
# A run as a whole


def test_a_run_leaves_a_folder_that_opens(monkeypatch, quick, tmp_path, capsys):
    monkeypatch.setattr(train_py, "plot_history", REAL_PLOT)
    settings = ["--vocab-size", 300, "--steps", 40, "--eval-every", 20, "--learning-rate", 1e-2]
    rows = quick("out", *SHORT, *settings, base=[])
    assert [int(row["step"]) for row in rows] == list(range(41))
    val_losses = {int(row["step"]): float(row["val_loss"]) for row in rows if row["val_loss"]}
    assert list(val_losses) == [0, 20, 40]
    assert val_losses[0] == pytest.approx(math.log(300), abs=0.2)
    assert val_losses[40] < val_losses[0] - 0.5
    names = {path.name for path in (tmp_path / "out").iterdir()} - {"losses.png", ".lock"}
    folder = {
        "config.json",
        "model.safetensors",
        "merges.txt",
        "vocab.json",
        "tokenizer_config.json",
    }
    assert names == folder | {"losses.csv", "resume.pt"}
    model, tokenizer = load_gpt2(tmp_path / "out")
    assert model.config.vocab_size == tokenizer.vocab_size == 300
    assert model.config.context_length == 16
    # The folder holds the weights with the best validation loss: measured again, they give it
    text = (tmp_path / "text.txt").read_text("utf-8") + "\n"  # the text has none at its end
    documents = text.split("<|endoftext|>\n")
    ids = [i for document in documents for i in [tokenizer.eot, *tokenizer.encode(document)]]
    ids = ids[-(len(ids) // 10) :]
    stride, last = max(16, math.ceil(len(ids) / 8)), len(ids) - 17
    total, counted = 0.0, set()
    for i in range(1 + math.ceil(last / stride)):
        begin = min(i * stride, last)
        with torch.no_grad():
            log_probs = model(torch.tensor([ids[begin : begin + 16]]))[0].log_softmax(-1)
        for place in {*range(begin + 1, begin + 17)} - counted:
            total -= log_probs[place - begin - 1, ids[place]].item()
            counted.add(place)
    assert total / len(counted) == pytest.approx(min(val_losses.values()), abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_losses_are_the_same(quick):
    one, other = (quick(device, "--device", device) for device in ("cpu", "cuda"))
    for name in ("train_loss", "val_loss"):
        assert column(one, name) == pytest.approx(column(other, name), rel=1e-3)


def test_init_starts_from_the_weights_of_a_folder(quick, monkeypatch, tmp_path):
    first = quick("first", *SHORT, "--learning-rate", 1e-2, base=[])
    monkeypatch.setitem(train_py.MODELS, "nano", None)  # its sizes are not asked for
    again = quick("second", *SHORT, "--steps", 1, "--init", tmp_path / "first", base=[])
    best = min(column(first, "val_loss"))
    assert float(again[0]["val_loss"]) == pytest.approx(best, rel=1e-6)
    model, tokenizer = load_gpt2(tmp_path / "second")
    base, base_tokenizer = load_gpt2(tmp_path / "first")
    assert model.config == base.config and tokenizer.vocab == base_tokenizer.vocab


def test_progress_and_samples_are_shown(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(GPT, "stream", REAL_STREAM)
    args = ["--out", tmp_path / "out", *QUICK, "--prompt", "The door", "--steps", 1]
    code, output, error = run(monkeypatch, capsys, *args)
    assert (code, error) == (0, "")
    assert output.count("\nThe door") == 2
    assert "step     1/1 | loss " in output and " tokens/s | 0:00:00 left | val " in output
    assert f"load_gpt2.py {tmp_path / 'out'}" in output.splitlines()[-1]


def test_the_folder_has_the_name_of_the_data(monkeypatch, capsys, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(monkeypatch, capsys, *QUICK, "--steps", 1)[0] == 0
    assert (Path("out") / "text" / "config.json").exists()
    # The folder at hand has a name, too
    assert run(monkeypatch, capsys, *QUICK, "--steps", 1, "--out", ".")[0] == 0
    code, output, _ = run(monkeypatch, capsys, *QUICK, "--steps", 2, "--out", ".")
    assert code == 0 and "going on from step 1" in output


def test_a_pattern_of_token_files_does_not_fill_the_folder_out(monkeypatch, capsys, tmp_path):
    (tmp_path / "corpus").mkdir()
    save_ids(tmp_path / "corpus" / "1.bin", range(300))
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, capsys, *QUICK, "--steps", 1, "--bin", "corpus/*.bin")[0] == 0
    assert all(path.is_dir() for path in Path("out").iterdir())


def test_variables_of_other_launchers_say_nothing(monkeypatch, quick):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert len(quick("out", "--steps", 1)) == 2


# --------------------------------------------------------------------------------------------------
# Texts and token files


def save_ids(path, ids):
    np.array(ids, dtype=np.uint16).tofile(path)


def write_llmc(path, ids, n=None, magic=20240520):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, 1, len(ids) if n is None else n
    path.write_bytes(header.tobytes() + np.array(ids, dtype=np.uint16).tobytes())


def test_a_line_with_the_mark_separates_documents(captured, tmp_path):
    text = "\ufeffOne, <|endoftext|> in a line.\n<|endoftext|>\n\nTwo.\r\n<|endoftext|>\nThree.\n"
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_bytes(text.encode())
    texts[1].write_bytes("Four, über 東京.".encode())
    documents = ["One, <|endoftext|> in a line.\n", "\nTwo.\n", "Three.\n", "Four, über 東京.\n"]
    assert read_texts(texts) == "".join("<|endoftext|>\n" + document for document in documents)
    tokenizer = load_gpt2(TINY)[1]
    ids = [i for document in documents for i in [tokenizer.eot, *tokenizer.encode(document)]]
    given = captured("--text", *texts, "--context-length", 4)
    n_val = len(ids) // 10
    windows = [ids[i : i + 4] for i in range(0, len(ids) - n_val - 5, 4)]
    seen = {tuple(row) for step in range(20) for row in given.get_batch(step)[0].tolist()}
    assert set(map(tuple, windows)) <= seen
    assert given.batches[-2][-1] == ids[-5:-1] and given.batches[-1][-1] == ids[-4:]


def test_a_vocabulary_of_any_size_is_learned(captured):
    """Also one as large as GPT-2's; it ends where no pair is left."""
    assert (
        captured(*SHORT, "--vocab-size", GPTConfig.vocab_size, base=[]).model.config.vocab_size
        < 5000
    )


def test_a_text_that_does_not_fit_in_memory_is_refused(monkeypatch, capsys, tmp_path):
    with open(tmp_path / "long.txt", "wb") as file:
        file.truncate(100_000_001)  # takes no space on the disk
    args = [*QUICK, "--text", tmp_path / "text.txt", tmp_path / "long.txt"]
    code, _, error = run(monkeypatch, capsys, "--out", tmp_path / "out", *args)
    assert is_one_error(code, error) and "data/prepare.py" in error


def test_an_epoch_has_every_window_of_every_file_once(captured, tmp_path):
    """And a batch has windows of several files."""
    ids = [*range(320), *range(80)]
    for i, (begin, end) in enumerate([(0, 100), (100, 200), (200, 400)]):
        save_ids(tmp_path / f"{i}.bin", ids[begin:end])
    args = ["--bin", *sorted(tmp_path.glob("?.bin"))]
    given = captured(*args, "--steps", 10**9)  # epochs are drawn when they are needed
    assert given.batches == captured(*args, "--steps", 3).batches  # more steps change no batch
    assert given.get_batch(0)[0].dtype == given.get_batch(0)[1].dtype == torch.int64
    assert given.n_windows == 7 + 7 + 12  # of 16 tokens; 20 tokens are for validation
    inputs = torch.cat([given.get_batch(step)[0] for step in range(13)])  # 13 x 8 rows: 4 epochs
    first_ids = inputs[:, 0].tolist()
    counts = Counter(first_ids)
    assert len(counts) == 26 and set(counts.values()) == {4}
    assert len({ids.index(first) // 100 for first in first_ids[:8]}) > 1
    assert first_ids[:26] != first_ids[26:52]
    assert given.config.micro_batch_size == 2048 // 16  # on a CPU


def test_bin_takes_the_files_of_nanogpt_and_llmc(captured, tmp_path):
    ids = load_gpt2(TINY)[1].encode((tmp_path / "text.txt").read_text("utf-8"))[:2000]
    (tmp_path / "nanogpt").mkdir()
    save_ids(tmp_path / "nanogpt" / "train.bin", ids[:1500])
    save_ids(tmp_path / "nanogpt" / "val.bin", ids[1500:])
    (tmp_path / "llmc").mkdir()
    write_llmc(tmp_path / "llmc" / "x_train_000001.bin", ids[:1500])
    write_llmc(tmp_path / "llmc" / "x_val_000000.bin", ids[1500:])
    first = captured("--bin", tmp_path / "nanogpt" / "*.bin")
    assert first.batches == captured("--bin", tmp_path / "llmc" / "*.bin").batches
    alone = captured("--bin", tmp_path / "nanogpt" / "train.bin")  # is cut for validation
    assert first.n_windows == 94 and alone.n_windows == 85
    # A tokenizer of one's own gives the vocabulary; without it, that is GPT-2's
    args = ["--bin", tmp_path / "llmc" / "*.bin"]
    given = captured(*SHORT, *args, "--tokenizer", TINY, base=[])
    assert given.model.config.vocab_size == 320 and given.batches == first.batches
    given = captured(*SHORT, *args, base=[])
    assert given.model.config.vocab_size == 50257 and given.batches == first.batches


def test_files_with_the_same_name_are_different_files(captured, tmp_path):
    for i, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        save_ids(tmp_path / name / "train.bin", range(100 * i, 100 * i + 100))
    assert captured("--bin", *tmp_path.glob("?/train.bin")).n_windows == 20


def test_links_keep_their_names(captured, tmp_path):
    """As a cache of a hub has them: the name that says what a file is for is that of the link"""
    for name, blob, n in [("train", "a", 170), ("val", "b", 100)]:
        save_ids(tmp_path / blob, range(n))
        (tmp_path / f"{name}.bin").symlink_to(tmp_path / blob)
    assert captured("--bin", tmp_path / "*.bin").n_windows == 11


def test_token_files_may_hold_short_texts(captured, tmp_path):
    """The last one, of which validation is cut, or any other"""
    for i, n in enumerate([200, 5, 300, 3]):
        save_ids(tmp_path / f"{i}.bin", range(i, i + n))
    assert captured("--bin", tmp_path / "*.bin").n_windows > 20


def test_ids_out_of_range_are_found_in_a_late_file(monkeypatch, capsys, tmp_path):
    save_ids(tmp_path / "1.bin", range(320))
    save_ids(tmp_path / "2.bin", [*range(200), 320, *range(200)])
    args = ["--out", tmp_path / "out", *QUICK, "--bin", tmp_path / "*.bin"]
    code, _, error = run(monkeypatch, capsys, *args)
    assert is_one_error(code, error) and "2.bin" in error and "320" in error
    assert not (tmp_path / "out").exists()
    assert read_tokens(tmp_path / "1.bin", 320).tolist() == list(range(320))


def test_text_takes_files_and_patterns(captured, tmp_path):
    (tmp_path / "texts").mkdir()
    stories = STORIES.read_text("utf-8")
    (tmp_path / "texts" / "1.txt").write_text(stories[:3000], encoding="utf-8")
    (tmp_path / "texts" / "2.txt").write_text(stories[3000:6000], encoding="utf-8")
    first = captured("--text", tmp_path / "texts" / "1.txt", tmp_path / "texts" / "2.txt")
    assert captured("--text", tmp_path / "texts" / "*.txt").batches == first.batches
    # A name of a file is no pattern, and "val" in it has no meaning
    name = tmp_path / "carnival [1].txt"
    name.write_text(stories[:3000], encoding="utf-8")
    (tmp_path / "carnival 1.txt").write_text("no")
    given = captured("--text", name, tmp_path / "texts" / "2.txt")
    assert given.batches == first.batches


def test_text_from_a_url_is_fetched_once(captured, tmp_path):
    asked = []
    body = (tmp_path / "text.txt").read_bytes()

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/texts/stories.txt?raw=1"
            first = captured("--text", url)
            assert first.batches == captured("--text", url).batches == captured().batches
        finally:
            server.shutdown()
    assert asked == ["/texts/stories.txt?raw=1"]


def make_bad_inputs(folder):
    (folder / "empty.txt").write_bytes(b"")
    (folder / "marks.txt").write_text("<|endoftext|>\n<|endoftext|>\n")
    (folder / "latin1.txt").write_bytes("Caf\u00e9 au lait. ".encode("latin-1") * 100)
    (folder / "short.txt").write_text("Too short.")
    (folder / "folder").mkdir()
    save_ids(folder / "ids.bin", [1, 2, 60000] * 100)
    (folder / "odd.bin").write_bytes(b"123")
    (folder / "empty.bin").write_bytes(b"")
    write_llmc(folder / "cut.bin", range(100), n=200)
    write_llmc(folder / "no-ids.bin", [])
    write_llmc(folder / "llama3.bin", range(100), magic=20240801)
    (folder / "characters").mkdir()
    save_ids(folder / "characters" / "train.bin", [1, 2, 60] * 100)
    (folder / "characters" / "meta.pkl").touch()
    save_ids(folder / "only_val.bin", range(100))
    save_ids(folder / "good.bin", range(200))


@pytest.mark.parametrize(
    "args, message",
    [
        (["--text", "{}/missing.txt"], "missing.txt: no such file"),
        (["--text", "{}/*.missing"], "no such file"),
        (["--text", "{}/empty.txt"], "as long as a window"),
        (["--text", "{}/marks.txt"], ""),
        (["--text", "{}/latin1.txt"], "latin1.txt"),
        (["--text", "{}/short.txt"], "as long as a window"),
        (["--text", "{}/folder"], "folder"),
        (["--text", "http://127.0.0.1:9/x.txt"], "127.0.0.1"),
        (["--bin", "{}/ids.bin"], "60000"),
        (["--bin", "{}/odd.bin"], "odd.bin: Size of"),
        (["--bin", "{}/empty.bin"], "empty.bin"),
        (["--bin", "{}/no-ids.bin"], "no-ids.bin"),
        (
            ["--bin", "{}/cut.bin"],
            "cut.bin: the header [20240520, 1, 200] should be [20240520, 1, 100]",
        ),
        (["--bin", "{}/llama3.bin"], "llama3.bin: the header [20240801"),
        (["--bin", "{}/characters/train.bin"], "meta.pkl"),
        (["--bin", "{}/only_val.bin"], "for training"),
        (["--bin", "{}/good.bin", "--tokenizer", "{}/nowhere", "--init", ""], "nowhere"),
        (["--bin", "{}/good.bin", "--text", "{}/text.txt"], "--text"),
        (["--model", "gpt5"], "invalid choice: 'gpt5'"),
        (["--init", "{}/nowhere"], "nowhere is neither a folder"),
        (["--vocab-size", "400"], "--vocab-size"),
        (["--vocab-size", "100", "--init", ""], "vocab_size=100"),
        (["--vocab-size", "0", "--init", ""], ""),
        (["--context-length", "0", "--init", ""], "positive"),
        (["--context-length", "-1"], ""),
        (["--context-length", "49"], "--context-length"),
        (["--eval-windows", "0"], ""),
        (["--prompt", "word " * 200], "prompt"),
        (["--seed", "-1"], ""),
        (["--steps", "0"], "positive"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--batch-size", "0"], "positive"),
        (["--micro-batch-size", "0"], "positive"),
        (["--grad-clip", "nan"], "positive"),
        (["--learning-rate", "nan"], "learning rate"),
        (["--learning-rate", "-1"], "learning rate"),
        (["--optimizer", "sgd"], "sgd"),
        (["--dtype", "float16"], "float16"),
        (["--dropout", "1.5"], "dropout"),
        (["--device", "abacus"], "abacus"),
        (["--resume", "{}/out"], "--resume"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(monkeypatch, capsys, tmp_path, args, message):
    make_bad_inputs(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(load_gpt2_py, "WAITS", ())
    monkeypatch.setattr(GPT, "stream", REAL_STREAM)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if "--init" in args else "0")
    args = [arg.replace("{}", str(tmp_path)) for arg in args]
    out = tmp_path / "new" / "out"
    code, _, error = run(monkeypatch, capsys, "--out", out, *QUICK, *args)
    assert is_one_error(code, error) and message.lower() in error.lower()
    assert not out.exists() and contents(tmp_path) == before


def test_help_shows_every_option_with_its_default(monkeypatch, capsys):
    code, output, _ = run(monkeypatch, capsys, "--help")
    assert code == 0
    text = " ".join(output.split())
    assert all("--" + f.name.replace("_", "-") in text for f in fields(PretrainConfig))
    assert text.count("default: ") >= 20 and "None" not in text
