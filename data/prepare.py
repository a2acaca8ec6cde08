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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import load_gpt2
from gpt import END_OF_TEXT, Tokenizer
from load_gpt2 import atomic_write, named_errors, print_line, read_tokenizer, show_progress

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
    """-> list of [path, first byte, byte after the last]"""
    pieces = []
    for path in paths:
        begin = 0
        with open(path, "rb") as file:
            while begin < path.stat().st_size:
                end = find_cut(file, begin + PIECE_BYTES)
                pieces.append([str(path), begin, end])
                begin = end
    return pieces


def encode_piece(piece, bin_path, tokenizer):
    """Write the token file of a piece: 256 int32 (llm.c's header), then uint16 ids."""
    path, begin, end = piece
    with open(path, "rb") as file, named_errors(path):
        file.seek(begin)
        text = file.read(end - begin).decode("utf-8").removeprefix("\ufeff")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if begin == 0:
        text = f"{END_OF_TEXT}\n{text}"
    ids = load_gpt2.encode_documents(text, tokenizer).astype("<u2")
    header = np.zeros(256, dtype="<i4")
    header[:3] = (20240520, 1, len(ids))
    with atomic_write(bin_path) as part, open(part, "wb") as file:
        file.write(header.tobytes() + ids.tobytes())


def main():
    parser = load_gpt2.CommandLine(description="Turn texts of any size into token files.")
    parser.add_argument("texts", nargs="+", type=Path, help="UTF-8 text files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the token files")
    parser.add_argument("--tokenizer", help="folder of a tokenizer (default: GPT-2's)")
    args = parser.parse_args()
    tokenizer = read_tokenizer(args.tokenizer, 2**16) if args.tokenizer else Tokenizer.gpt2()
    pieces = plan_pieces(args.texts)
    if not pieces:
        raise ValueError("no text")
    args.out.mkdir(parents=True, exist_ok=True)
    times = [path.stat().st_mtime for path in args.texts]
    plan = {"pieces": pieces, "times": times, "vocab": tokenizer.vocab}
    plan_path = args.out / "plan.json"
    is_same = plan_path.exists() and load_gpt2.read_json(plan_path) == plan
    if not is_same and any(args.out.glob("*.bin")):
        raise ValueError(f"{args.out} holds other token files; remove it, or name another --out")
    load_gpt2.write_json(plan_path, plan)
    jobs = [(piece, args.out / f"train_{i:06d}.bin") for i, piece in enumerate(pieces)]
    jobs = [(piece, bin_path) for piece, bin_path in jobs if not bin_path.exists()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: encode_piece(*job, tokenizer), jobs)
        for i, _ in enumerate(results, 1):
            show_progress(f"{i} of {len(jobs)} files")
    print_line(f"{args.out}: {len(pieces)} token files, {len(jobs)} of them made now")


if __name__ == "__main__":
    with load_gpt2.one_line_errors():
        main()
