import os
import sys

import torch

from load_gpt2 import one_line_errors

# The models of these tests are so small that a second thread costs more than it gives; their processes inherit this
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def run_main(script, monkeypatch, capsys, *args):
    """A script's main() as a user starts it, in this process -> exit code, standard output, standard error"""
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, args)])
    code = 0
    try:
        with one_line_errors():
            script.main()
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()
