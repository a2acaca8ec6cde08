import os
import signal
import sys

import pytest
import torch

from load_gpt2 import one_line_errors

# The models of these tests are so small that a second thread costs more than it gives; processes
# that the tests start inherit this
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

TIME_LIMIT = 60  # seconds for one test; the slowest takes a few


@pytest.fixture(autouse=True)
def time_limit():
    """No test can hang: after TIME_LIMIT it fails, where the system has this timer."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"the test took more than {TIME_LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def run_main(script, monkeypatch, capsys, *args):
    """Run a script's main() as the command line does. -> exit code, standard output and error"""
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, args)])
    code = 0
    error = ""
    try:
        with one_line_errors():
            script.main()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):  # Python prints it to standard error and exits with 1
            code, error = 1, code + "\n"
    out, err = capsys.readouterr()
    return code, out, err + error
