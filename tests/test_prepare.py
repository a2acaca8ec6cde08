import re
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from conftest import run_main

from data import prepare
from gpt import Tokenizer
from load_gpt2 import load_gpt2
from train import read_tokens

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny-gpt2"
STORIES = ROOT / "data" / "stories.txt"

run = partial(run_main, prepare)


@pytest.fixture
def made(monkeypatch, capsys, tmp_path):
    """A function that makes token files -> their paths, all ids"""

    def go(name, *args, piece_bytes=50):
        monkeypatch.setattr(prepare, "PIECE_BYTES", piece_bytes)
        code, _, error = run(monkeypatch, capsys, *args, "--out", tmp_path / name)
        assert (code, error) == (0, "")
        paths = sorted((tmp_path / name).glob("*.bin"))
        return paths, [i for path in paths for i in read_tokens(path, 2**16).tolist()]

    return go


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*")}


def is_one_error(code, error):
    return code == 1 and error.startswith("error: ") and error.count("\n") == 1


ALPHABETS = {
    "words": ["word", " ", " ", "\n", "  ", "don't", "'s", "\t", "!?", "12", "x1", ">", "\n\n"],
    "unicode": [
        "a",
        " ",
        "\n",
        "\x1c",
        "\u2003",
        "東京",
        "\x85",
        "é",
        "\u00a0",
        "🙂",
        ".",
        "\u3000",
    ],
    "no cuts": ["a"],
    "blanks": [" ", "\n"],
}


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_pieces_have_the_tokens_of_the_whole(made, tmp_path, alphabet):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(ALPHABETS[alphabet], n)) for n in (400, 1, 300)]
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    for path, text in zip(paths, texts):
        path.write_bytes(text.encode())
    tiny = load_gpt2(TINY)[1]
    for size in (7, 50, 10_000):
        # An end-of-text begins each text
        expected = [i for text in texts for i in [tiny.eot, *tiny.encode(text)]]
        bins, ids = made(f"tiny-{size}", *paths, "--tokenizer", TINY, piece_bytes=size)
        assert ids == expected
        assert len(bins) == 3 or size < 10_000
        assert len(bins) > 20 or size == 10_000 or alphabet != "words"
    if alphabet == "words":
        gpt2 = Tokenizer.gpt2()
        expected = [i for text in texts for i in [gpt2.eot, *gpt2.encode(text)]]
        assert made("gpt2", *paths)[1] == expected


def test_pieces_have_about_the_size_asked_for(monkeypatch):
    """And begin with a blank, after a printable character"""
    monkeypatch.setattr(prepare, "PIECE_BYTES", 1000)
    pieces = prepare.plan_pieces([STORIES])
    data = STORIES.read_bytes()
    assert [begin for _, begin, _ in pieces] == [0, *(end for _, _, end in pieces[:-1])]
    assert pieces[-1][2] == len(data)
    assert all(0 <= end - begin - 1000 < 30 for _, begin, end in pieces[:-1])
    for _, begin, _ in pieces[1:]:
        assert re.fullmatch(rb"[!-~][ \n]", data[begin - 1 : begin + 1])


def test_a_cut_is_found_beyond_a_block(tmp_path):
    path = tmp_path / "text"
    for n in (10, 100_000):
        path.write_bytes(b"\n" * n + b"x y")
        with open(path, "rb") as file:
            assert prepare.find_cut(file, 1) == n + 1  # the space after x
            assert prepare.find_cut(file, n + 1) == n + 3  # there is none: the end


def test_paragraphs_and_a_byte_order_mark_within(made, tmp_path):
    """Blank lines between paragraphs are no obstacle; a mark is dropped at the beginning only."""
    path = tmp_path / "text"
    path.write_bytes(("\ufeffOne line.\n\n\ufeffAnother one.\n\n" * 40).encode())
    tokenizer = load_gpt2(TINY)[1]
    bins, ids = made("out", path, "--tokenizer", TINY)
    assert len(bins) > 20
    expected = path.read_text(encoding="utf-8-sig")
    assert ids == [tokenizer.eot, *tokenizer.encode(expected)]


def test_a_folder_with_other_token_files_is_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "train_000000.bin").write_bytes(b"others")
    code, _, error = run(monkeypatch, capsys, STORIES, "--out", tmp_path)
    assert is_one_error(code, error) and "other token files" in error
    assert (tmp_path / "train_000000.bin").read_bytes() == b"others"


def test_texts_without_ascii_are_cut_too(tmp_path, monkeypatch):
    """A Chinese text has no spaces, and its lines end with signs of its own."""
    monkeypatch.setattr(prepare, "PIECE_BYTES", 1000)
    path = tmp_path / "text"
    path.write_text("今天天气很好。我们去公园」\n他们也来了\n" * 300, encoding="utf-8")
    assert len(prepare.plan_pieces([path])) > 10


def test_a_line_with_the_mark_separates_documents(made, tmp_path):
    tokenizer = load_gpt2(TINY)[1]
    mark = "<|endoftext|>"
    path = tmp_path / "text"
    text = f"\ufeffOne {mark} in a line.\n{mark}\n\nTwo.\n{mark}\nThree.\n{mark} not\nFour."
    path.write_bytes(text.encode())
    documents = [f"One {mark} in a line.\n", "\nTwo.\n", f"Three.\n{mark} not\nFour."]
    expected = [i for document in documents for i in [tokenizer.eot, *tokenizer.encode(document)]]
    assert made("whole", path, "--tokenizer", TINY, piece_bytes=1000)[1] == expected
    # Cut in every place, also beside a mark
    assert made("pieces", path, "--tokenizer", TINY, piece_bytes=1)[1] == expected


def test_line_breaks_of_windows_are_line_breaks(made, tmp_path):
    """As in the texts that train.py reads"""
    texts = [tmp_path / "unix.txt", tmp_path / "windows.txt"]
    texts[0].write_bytes(b"One.\n<|endoftext|>\nTwo.\n")
    texts[1].write_bytes(b"One.\r\n<|endoftext|>\r\nTwo.\r\n")
    eot = load_gpt2(TINY)[1].eot
    unix, windows = (made(path.stem, path, "--tokenizer", TINY)[1] for path in texts)
    assert unix.count(eot) == windows.count(eot) == 2


def test_a_token_file_is_that_of_llmc(made, tmp_path):
    path = tmp_path / "text"
    path.write_text("One text, über two lines.\nNo more.")
    tokenizer = Tokenizer.gpt2()
    (file,), ids = made("out", path, piece_bytes=1000)
    assert ids == [50256, *tokenizer.encode("One text, über two lines.\nNo more.")]
    assert file.name == "train_000000.bin"
    header = np.fromfile(file, dtype="<i4", count=256)
    assert header[:3].tolist() == [20240520, 1, len(ids)] and not header[3:].any()
    assert file.read_bytes()[1024:] == np.array(ids, dtype="<u2").tobytes()


def test_the_same_command_makes_what_is_missing(monkeypatch, capsys, made, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(STORIES.read_text("utf-8")[:2000], encoding="utf-8")
    args = [path, "--tokenizer", TINY]
    made("whole", *args, piece_bytes=200)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    encode_piece = prepare.encode_piece
    calls = count()

    def interrupted(*args):
        if next(calls) >= 3:
            raise KeyboardInterrupt
        return encode_piece(*args)

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "encode_piece", interrupted)
        assert run(patch, capsys, *args, "--out", out)[0] == 130
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    assert len(times) == 3 and len(whole) == 11
    missing = next(name for name in whole if not (out / name).exists())
    (out / f"{missing}.part").write_bytes(b"half")
    for _ in range(2):  # the second time there is nothing to do
        code, _, error = run(monkeypatch, capsys, *args, "--out", out)
        assert (code, error) == (0, "")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
        assert times.items() <= {path: path.stat().st_mtime_ns for path in out.iterdir()}.items()
        times = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}


def test_other_texts_are_refused(monkeypatch, capsys, made, tmp_path):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in texts:
        path.write_text("So many words. " * 20)
    args = [*texts, "--tokenizer", TINY]
    made("out", *args)
    out = tmp_path / "out"
    before = contents(out)

    def is_refused(*args):
        code, _, error = run(monkeypatch, capsys, *args, "--out", out)
        return is_one_error(code, error) and str(out) in error and contents(out) == before

    assert is_refused(texts[0], "--tokenizer", TINY)
    assert is_refused(*texts[::-1], "--tokenizer", TINY)
    assert is_refused(*texts)  # with another tokenizer
    texts[1].write_text("So many words: " * 20)
    assert is_refused(*args)
    texts[1].write_text("So many words. " * 30)
    assert is_refused(*args)


@pytest.mark.parametrize(
    "args, message",
    [
        (["{}/missing.txt"], "missing.txt"),
        (["{}/empty.txt"], "no text"),
        (["{}/latin1.txt"], "latin1.txt"),
        (["{}/good.txt", "{}/latin1.txt"], "latin1.txt"),
        (["{}"], ""),
        ([], "texts"),
        (["{}/good.txt", "--tokenizer", "{}/missing"], "missing"),
        (["{}/good.txt", "--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, args, message):
    (tmp_path / "good.txt").write_text("A good text. " * 20)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin1.txt").write_bytes("Caf\u00e9 au lait. ".encode("latin-1") * 10)
    filled = [arg.replace("{}", str(tmp_path)) for arg in args]
    filled = ["--out", tmp_path / "out", "--tokenizer", TINY, *filled]
    code, _, error = run(monkeypatch, capsys, *filled)
    assert is_one_error(code, error) and message in error
    assert not list(tmp_path.rglob("*.part"))
    n_good = sum("good" in arg for arg in args)
    assert len(list(tmp_path.rglob("*.bin"))) <= n_good  # nothing of a damaged text


def test_out_is_required_and_help_says_so(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("A text.")
    code, _, error = run(monkeypatch, capsys, tmp_path / "a.txt")
    assert is_one_error(code, error) and "--out" in error
    code, output, _ = run(monkeypatch, capsys, "--help")
    assert code == 0 and "--tokenizer" in output


def test_train_takes_what_prepare_made(made, monkeypatch, capsys, tmp_path):
    """Also where the last text, or the end of a text, is shorter than a window"""
    import train

    monkeypatch.setattr(train, "plot_history", lambda *args: None)
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_text(STORIES.read_text("utf-8")[:3000], encoding="utf-8")
    texts[1].write_text("Short.")
    made("corpus", *texts, "--tokenizer", TINY, piece_bytes=2990)
    args = ["--bin", tmp_path / "corpus" / "*.bin", "--init", TINY, "--out", tmp_path / "out"]
    args += ["--steps", 1, "--context-length", 16, "--device", "cpu", "--no-compile"]
    code, output, error = run_main(train, monkeypatch, capsys, *args)
    assert (code, error) == (0, "") and "finished" in output
