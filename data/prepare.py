"""
Turn texts of any size into token files for `train.py --bin`.

    python data/prepare.py corpus/*.txt --out data/corpus
    python train.py --bin 'data/corpus/*.bin' --model gpt2

All cores encode, each one piece of a text at a time, so memory stays flat. The same command, given
again, makes the files that are missing. A line <|endoftext|> separates documents in a text.
"""

import os
import re
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


# A place between a byte that ends no white space of Unicode and a space or line break. GPT-2 never
# merges across it, so cutting there leaves the tokens as they are. But not after ">", which may end
# a line <|endoftext|>.
CUT = re.compile(rb"(?<=[!-=?-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf])(?=[ \n])")


def find_cut(file, place):
    """A place soon after `place` where a text can be cut, or else its end, in bytes"""
    file.seek(place)
    while block := file.read(2**16):
        match = CUT.search(block)
        if match:
            return file.tell() - len(block) + match.start()
    return file.seek(0, os.SEEK_END)


def plan_pieces(paths):
    """-> list of (path, first byte, byte after the last)"""
    pieces = []
    for path in paths:
        size = path.stat().st_size
        if size == 0:
            raise ValueError(f"{path}: no text")
        begin = 0
        with open(path, "rb") as file:
            while begin < size:
                end = find_cut(file, begin + PIECE_BYTES)
                pieces.append((str(path), begin, end))
                begin = end
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
    if not plan_path.exists() and any(args.out.glob("*.bin")):
        raise ValueError(f"{args.out} holds other token files; name another --out")
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
