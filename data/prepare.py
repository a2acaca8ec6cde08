"""
Turn texts of any size into token files for `train.py --bin`.

    python data/prepare.py corpus/*.txt --out data/corpus
    python train.py --bin 'data/corpus/*.bin' --model gpt2

All cores encode, each one piece of a text at a time, so memory stays flat. The same command, given
again, makes the files that are missing. A line <|endoftext|> separates documents in a text.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from gpt import END_OF_TEXT, Tokenizer
from load_gpt2 import (
    CommandLine,
    atomic_write,
    encode_documents,
    named_errors,
    one_line_errors,
    print_line,
    read_json,
    read_tokenizer,
    show_progress,
    write_json,
)

PIECE_BYTES = 2**23  # 8 MB of text make about 2M tokens


def find_cut(file, place):
    """
    The first place after `place` where a text can be cut, in bytes: a line break that has no white
    space around it. GPT-2 never merges across it, so cutting there leaves the tokens as they are.
    """
    file.seek(place)
    file.readline()  # it may begin within a character
    line = file.readline().decode(errors="replace")
    while line:
        end = file.tell()
        next_line = file.readline().decode(errors="replace")
        before = line.removesuffix("\n").removesuffix("\r")[-1:]
        if before and not before.isspace() and not next_line[:1].isspace():
            return end
        line = next_line
    return file.tell()


def plan_pieces(paths):
    """-> list of (path, first byte, byte after the last)"""
    pieces = []
    for path in paths:
        size = path.stat().st_size
        if size == 0:
            raise ValueError(f"{path}: no text")
        with open(path, "rb") as file:
            cuts = [find_cut(file, place) for place in range(PIECE_BYTES, size, PIECE_BYTES)]
        edges = sorted({0, *cuts, size})
        pieces += [(str(path), begin, end) for begin, end in zip(edges, edges[1:])]
    return pieces


def encode_piece(piece, tokenizer, bin_path):
    """Write the token file of a piece: 256 int32 (llm.c's header), then uint16 ids."""
    path, begin, end = piece
    with open(path, "rb") as file, named_errors(path):
        file.seek(begin)
        text = file.read(end - begin).decode("utf-8").removeprefix("\ufeff")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if begin == 0:
        text = f"{END_OF_TEXT}\n{text}"
    ids = encode_documents(text, tokenizer).astype("<u2")
    header = np.zeros(256, dtype="<i4")
    header[:3] = (20240520, 1, len(ids))
    with atomic_write(bin_path) as part, open(part, "wb") as file:
        file.write(header.tobytes())
        file.write(ids.tobytes())
    return end - begin, len(ids)


def main():
    parser = CommandLine(description="Turn texts of any size into token files.")
    parser.add_argument("texts", nargs="+", type=Path, help="UTF-8 text files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the token files")
    parser.add_argument("--tokenizer", help="folder of a tokenizer (default: GPT-2's)")
    args = parser.parse_args()
    tokenizer = read_tokenizer(Path(args.tokenizer), 2**16) if args.tokenizer else Tokenizer.gpt2()
    pieces = plan_pieces(args.texts)
    args.out.mkdir(parents=True, exist_ok=True)
    stats = {str(path): [path.stat().st_size, path.stat().st_mtime] for path in args.texts}
    plan = {"pieces": [list(piece) for piece in pieces], "texts": stats, "vocab": tokenizer.vocab}
    plan_path = args.out / "plan.json"
    if plan_path.exists() and read_json(plan_path) != plan:
        raise ValueError(f"{args.out} was made from other texts; remove it, or name another --out")
    write_json(plan_path, plan)

    jobs = [(piece, args.out / f"train_{i:06d}.bin") for i, piece in enumerate(pieces)]
    jobs = [(piece, path) for piece, path in jobs if not path.exists()]
    size = sum(end - begin for (_, begin, end), _ in jobs)
    n_bytes = n_tokens = 0
    start_time = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for done in pool.map(lambda job: encode_piece(job[0], tokenizer, job[1]), jobs):
                n_bytes += done[0]
                n_tokens += done[1]
                speed = n_bytes / (time.monotonic() - start_time)
                left = timedelta(seconds=round((size - n_bytes) / speed))
                show_progress(f"{n_bytes / size:.0%}, {speed / 1e6:.1f} MB/s, {left} left")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print_line(f"{args.out}: {len(pieces)} token files; {n_tokens:,} tokens made now")


if __name__ == "__main__":
    with one_line_errors():
        main()
