"""A server on the loopback plays the hub, its storage host and their faults."""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import load_gpt2
from load_gpt2 import Unavailable, download, load_gpt2 as load

TINY = Path(__file__).parent / "tiny-gpt2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BODY = bytes(i * i % 251 for i in range(300_000))


class Hub(ThreadingHTTPServer):
    """
    Serves `files` {path: bytes}; large ones (.safetensors) by redirection to /storage/, as the hub does. `faults` {path: list
    of functions of the handler} are used up one per request; one that returns True has answered. `asked`: (path, Range).
    """

    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.faults, self.asked, self.tokens = {}, {}, [], []
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def publish(self, name, folder, revision="main"):
        for path in folder.iterdir():
            for commit in {revision, COMMIT}:
                self.files[f"/{name}/resolve/{commit}/{path.name}"] = path.read_bytes()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, self.path
        hub.asked.append((path, self.headers.get("Range")))
        hub.tokens.append(self.headers.get("Authorization"))
        self.honour_range, self.announced, self.n_sent, self.etag = True, None, None, None
        faults = hub.faults.get(path, [])
        if faults and faults.pop(0)(self):
            return
        if path.startswith("/storage"):
            self.send_file(hub.files[path.removeprefix("/storage")], {})
        elif path not in hub.files:
            self.answer(404, {"X-Error-Message": "Entry not found"})
        elif path.endswith(".safetensors"):
            body = hub.files[path]
            headers = {
                "X-Linked-ETag": self.etag or f'"{hashlib.sha256(body).hexdigest()}"',
                "X-Linked-Size": str(len(body)),
            }
            self.answer(302, {"Location": "/storage" + path, "X-Repo-Commit": COMMIT} | headers)
        else:
            self.send_file(hub.files[path], {"X-Repo-Commit": COMMIT, "ETag": '"0123"'})

    def send_file(self, body, headers):
        start = (
            int(self.headers["Range"].removeprefix("bytes=")[:-1])
            if self.honour_range and "Range" in self.headers
            else 0
        )
        if start >= len(body) and start:
            return self.answer(416, {"Content-Range": f"bytes */{len(body)}"})
        if start:
            headers = headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        self.answer(206 if start else 200, headers, body[start:])

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header(
            "Content-Length", str(len(body) if self.announced is None else self.announced)
        )
        self.end_headers()
        self.wfile.write(body if self.n_sent is None else body[: self.n_sent])
        return True

    def log_message(self, *args):
        pass


def fails(status, **headers):
    return lambda handler: handler.answer(
        status, {key.replace("_", "-"): value for key, value in headers.items()}
    )


def sets(**attributes):
    """A fault that the usual answer takes into account"""

    def fault(handler):
        vars(handler).update(attributes)

    return fault


def hangs(handler):
    time.sleep(0.6)
    return True


def trickles(handler):
    body = handler.server.files[handler.path]
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    for i in range(0, len(body), 30_000):
        handler.wfile.write(body[i : i + 30_000])
        handler.wfile.flush()
        time.sleep(0.03)
    return True


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(load_gpt2, "TIMEOUT", 0.3)
    monkeypatch.setattr(load_gpt2, "WAITS", (0.01, 0.02, 0.03, 0.04, 0.05))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(hub, tmp_path):
    """Fetch BODY under these faults -> the Range headers of the requests"""

    def fetch(*faults, kind="safetensors", storage=True):
        path = f"/a/b/resolve/main/x.{kind}"
        hub.files[path] = BODY
        place = "/storage" + path if storage and kind == "safetensors" else path
        hub.faults[place] = list(faults)
        download(hub.url + path, tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == BODY and not list(tmp_path.glob("*.part"))
        return [wanted for asked, wanted in hub.asked if asked == place]

    return fetch


# ---------------------------------------------------------------------------------------------------------------------
# One file


@pytest.mark.parametrize("kind", ["safetensors", "txt"])
def test_one_request_is_enough(fetch, kind):
    assert fetch(kind=kind) == [None]


@pytest.mark.parametrize("kind", ["safetensors", "txt"])
def test_goes_on_where_the_connection_broke(fetch, capsys, kind):
    ranges = fetch(sets(n_sent=100_000), sets(n_sent=100_000), kind=kind)
    starts = [int(wanted.removeprefix("bytes=")[:-1]) for wanted in ranges[1:]]
    assert (
        ranges[0] is None and len(starts) == 2 and 0 < starts[0] <= 100_000 < starts[1] <= 200_000
    )
    assert (
        capsys.readouterr().err.count("trying again in 0.01 s") == 2
    )  # an attempt that brought more makes waits short again


def test_server_that_ignores_range(fetch):
    assert len(fetch(sets(n_sent=200_000), sets(honour_range=False))) == 2


def test_breaks_again_and_again_without_range(hub, tmp_path):
    """The file cannot come whole; the attempts must end nevertheless."""
    hub.files["/x"] = BODY
    hub.faults["/x"] = [sets(n_sent=200_000, honour_range=False)] * 50
    with pytest.raises(Unavailable, match="/x: "):
        download(hub.url + "/x", tmp_path / "x")
    assert 5 < len(hub.asked) < 15 and not (tmp_path / "x").exists()


def test_a_part_of_an_earlier_process_is_gone_on_with(fetch, tmp_path):
    (tmp_path / "x.part").write_bytes(BODY[:123_456])
    assert fetch() == ["bytes=123456-"]


@pytest.mark.parametrize("part", [b"wrong" * 1000, BODY + b"more", BODY])
@pytest.mark.parametrize("kind", ["safetensors", "txt"])
def test_a_part_that_is_wrong_or_whole(fetch, tmp_path, part, kind):
    """Without a SHA-256 there is no telling whether an old part is of the same file, so it is not gone on with."""
    (tmp_path / "x.part").write_bytes(part)
    assert fetch(kind=kind)[-1] is None


def test_an_old_part_where_the_server_tells_nothing(hub, tmp_path):
    hub.files["/x"] = BODY
    hub.faults["/x"] = [lambda handler: handler.send_file(BODY, {}) or True] * 2
    (tmp_path / "x.part").write_bytes(b"wrong" * 1000)
    download(hub.url + "/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY


def test_waiting_for_one_that_gives_up(hub, tmp_path):
    """It clears its empty part away; whoever waited for that must not write into the void."""
    hub.files["/x"] = BODY
    with load_gpt2.open_part(tmp_path / "x"):
        waiting = threading.Thread(target=download, args=(hub.url + "/x", tmp_path / "x"))
        waiting.start()
        time.sleep(0.2)
        assert not hub.asked or load_gpt2.fcntl is None
    waiting.join()
    assert (tmp_path / "x").read_bytes() == BODY and not list(tmp_path.glob("*.part"))


def test_file_that_changes_between_attempts(hub, tmp_path):
    hub.files["/x"] = BODY[::-1]

    def changes(handler):
        handler.server.files["/x"] = BODY

    def breaks(handler):
        handler.n_sent = 200_000
        handler.send_file(BODY[::-1], {"ETag": '"old"'})
        return True

    hub.faults["/x"] = [breaks, changes]
    download(hub.url + "/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY


def test_wrong_length(fetch):
    assert len(fetch(sets(announced=400_000))) > 1  # and then nothing more comes


def test_wrong_length_on_the_storage_host(hub, fetch):
    def is_short(handler):
        return handler.send_file(BODY[:-5], {}) or True

    assert len(fetch(is_short)) == 2


def test_wrong_hash_is_an_error_and_leaves_nothing(fetch, tmp_path):
    with pytest.raises(ValueError, match="SHA-256 of what came is [0-9a-f]{64}, not 0{64}"):
        fetch(sets(etag=f'"{"0" * 64}"'), storage=False)
    assert not list(tmp_path.glob("x*"))


def test_hash_of_small_hubs_without_storage_host(hub, tmp_path):
    """A mirror that serves the file itself gives the SHA-256 as its ETag."""
    hub.files["/x"] = BODY
    hub.faults["/x"] = [
        lambda handler: (
            handler.send_file(BODY, {"X-Repo-Commit": COMMIT, "ETag": f'"{"1" * 64}"'}) or True
        )
    ]
    with pytest.raises(ValueError, match="SHA-256"):
        download(hub.url + "/x", tmp_path / "x")
    hub.faults["/x"] = [
        lambda handler: handler.send_file(BODY, {"ETag": f'"{"1" * 64}"'}) or True
    ]  # any server: just a name
    download(hub.url + "/x", tmp_path / "x")


def test_retry_after_is_honoured(fetch, capsys):
    start = time.monotonic()
    assert len(fetch(fails(429, Retry_After="1"), storage=False)) == 2
    assert time.monotonic() - start >= 1
    assert "429 Too Many Requests, come back in 1 s; trying again in 1 s" in capsys.readouterr().err


def test_a_server_that_asks_for_an_hour_is_not_waited_for(fetch):
    with pytest.raises(Unavailable, match="429"):
        fetch(fails(429, Retry_After="3600"))


def test_server_errors_pass(fetch, capsys):
    assert len(fetch(fails(500), fails(502), fails(503))) == 4
    waits = [line.split()[-2] for line in capsys.readouterr().err.splitlines()]
    assert waits == ["0.01", "0.02", "0.03"]


def test_server_errors_that_stay(hub, fetch):
    with pytest.raises(Unavailable, match="500 Internal Server Error"):
        fetch(*[fails(500)] * 50, kind="txt")
    assert len(hub.asked) == 6


def test_time_out(fetch):
    assert len(fetch(hangs, hangs)) == 3


def test_slow_trickle_is_waited_for(hub, tmp_path):
    hub.files["/x"] = BODY
    hub.faults["/x"] = [trickles]
    download(hub.url + "/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and len(hub.asked) == 1


@pytest.mark.parametrize(
    "status, error, message",
    [(404, FileNotFoundError, "no such file"), (401, ValueError, "401 Una")],
)
def test_refusals_are_not_tried_again(hub, fetch, tmp_path, status, error, message):
    with pytest.raises(error, match=message):
        fetch(*[fails(status)] * 9, kind="txt")
    assert len(hub.asked) == 1 and not list(tmp_path.glob("x*"))


def test_what_is_there_is_not_fetched(hub, monkeypatch, tmp_path):
    monkeypatch.delattr(
        load_gpt2, "open_part"
    )  # nothing is written either: the cache of a cluster is often read-only
    (tmp_path / "x").write_bytes(b"here")
    download(hub.url + "/x", tmp_path / "x")
    assert not hub.asked


def test_token_does_not_reach_the_storage_host(hub, tmp_path):
    storage = Hub()
    storage.files["/x"] = hub.files["/x"] = BODY
    hub.faults["/x"] = [fails(302, Location=storage.url.replace("127.0.0.1", "localhost") + "/x")]
    download(hub.url + "/x", tmp_path / "x", token="secret")
    storage.shutdown()
    assert hub.tokens == ["Bearer secret"] and storage.tokens == [None]


def test_progress_line(hub, monkeypatch, capsys, tmp_path):
    hub.files["/x"] = BODY * 5
    hub.faults["/x"] = [trickles]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    download(hub.url + "/x", tmp_path / "x")
    lines = capsys.readouterr().err.split("\r\x1b[K")
    assert len(lines) > 3 and all(
        part in lines[2] for part in ("x: ", " of 2 MB, ", " MB/s, ", " left")
    )
    assert lines[-1].startswith("x: 2 MB in 0:0") and lines[-1].endswith("\n")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_many_processes_at_once(hub, tmp_path):
    """Each has the file whole when it is done; one of them is killed in the middle."""
    path = "/a/b/resolve/main/x.safetensors"
    hub.files[path] = BODY * 10
    slow = lambda handler: time.sleep(0.2)  # noqa: E731
    hub.faults["/storage" + path] = [slow] * 9
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=download, args=(hub.url + path, tmp_path / "x")) for _ in range(4)
    ]
    for process in processes:
        process.start()
    while not list(tmp_path.glob("x.part")):
        time.sleep(0.01)
    processes.pop(0).kill()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "x").read_bytes() == BODY * 10 and [
        path.name for path in tmp_path.glob("x*")
    ] == ["x"]
    assert (
        len([path for path, _ in hub.asked if path.startswith("/storage")]) <= 2
    )  # the others waited for the first


@pytest.mark.parametrize("look", [1, 2, 3])
def test_a_part_may_vanish_between_two_looks(fetch, monkeypatch, tmp_path, look):
    """As it does when another process completes or removes it"""
    part, stat, looks = tmp_path / "x.part", Path.stat, []

    def vanishing(path, **options):
        if path == part:
            looks.append(path)
            if len(looks) == look:
                part.unlink()
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", vanishing)
    fetch()
    assert (tmp_path / "x").read_bytes() == BODY and not part.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Repositories


def same_as_tiny(loaded):
    model, tokenizer = loaded
    ids = torch.arange(10)[None]
    return torch.equal(model(ids), load(TINY)[0](ids)) and tokenizer.vocab == load(TINY)[1].vocab


def test_a_name_is_fetched_once_and_then_needs_no_network(hub, tmp_path):
    hub.publish("some.one/tiny_1", TINY)
    assert same_as_tiny(load("some.one/tiny_1"))
    repository = tmp_path / "hf" / "hub" / "models--some.one--tiny_1"
    assert (repository / "refs" / "main").read_text() == COMMIT
    names = {"config.json", "model.safetensors", "merges.txt", "vocab.json"}
    assert {path.name for path in (repository / "snapshots" / COMMIT).iterdir()} == names
    # Once for the commit, then all files of that commit
    asked = Counter(path for path, _ in hub.asked if not path.startswith("/storage"))
    assert asked.pop("/some.one/tiny_1/resolve/main/config.json") == 1
    assert asked == {f"/some.one/tiny_1/resolve/{COMMIT}/{name}": 1 for name in names}
    n = len(hub.asked)
    assert same_as_tiny(load("some.one/tiny_1")) and len(hub.asked) == n


def test_short_names(hub, capsys, monkeypatch):
    hub.publish("openai-community/gpt2", TINY)
    hub.publish("distilbert/distilgpt2", TINY)
    assert same_as_tiny(load("gpt2")) and same_as_tiny(load("distilgpt2"))
    monkeypatch.setattr(sys, "argv", ["load_gpt2.py", "--list"])
    load_gpt2.main()
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    parameters = {
        "distilgpt2": 81_912_576,
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
    }
    for name, n in (parameters | {"gpt2-xl": 1_557_611_200}).items():
        assert rows[name][0] == f"{n:,}" and (rows[name][-1] == "-") == (
            name not in ("gpt2", "distilgpt2")
        )
    assert rows["gpt2"][1:3] == ["548", "MB"]


def test_cache_of_other_tools_is_read(hub, tmp_path, monkeypatch):
    """Links to blobs, under the name that was asked for, in a folder that cannot be written to"""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "theirs"))
    repository = tmp_path / "theirs" / "models--gpt2"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name in ("config.json", "model.safetensors", "merges.txt", "vocab.json"):
        shutil.copy(TINY / name, repository / "blobs" / name)
        (repository / "snapshots" / COMMIT / name).symlink_to(f"../../blobs/{name}")
    before = sorted(tmp_path.rglob("*"))
    assert same_as_tiny(load("gpt2")) and not hub.asked and sorted(tmp_path.rglob("*")) == before


def test_shards_and_tokenizer_json(hub, tmp_path):
    from test_load_gpt2 import shard

    folder = tmp_path / "sharded"
    shutil.copytree(TINY, folder)
    shard(folder)
    merges = [
        line.split(" ") for line in (folder / "merges.txt").read_text("utf-8").splitlines()[1:]
    ]
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    added = [{"id": vocab.pop("<|endoftext|>"), "content": "<|endoftext|>"}]
    cut = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    content = {"normalizer": None, "pre_tokenizer": cut, "added_tokens": added, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    (folder / "merges.txt").unlink()
    (folder / "vocab.json").unlink()
    hub.publish("a/sharded", folder)
    assert same_as_tiny(load("a/sharded"))
    content["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match="tokenizer.json: damaged, or of another kind"):
        load(folder)


def test_breaks_in_the_middle_of_a_repository(hub):
    hub.publish("a/b", TINY)
    path = f"/storage/a/b/resolve/{COMMIT}/model.safetensors"
    hub.faults[path] = [fails(500)] * 6
    with pytest.raises(
        ValueError, match="500.*models--a--b does not hold it.*set HF_ENDPOINT to a mirror"
    ):
        load("a/b")
    hub.faults[path] = [sets(n_sent=70_000), fails(503)]
    assert same_as_tiny(load("a/b")) and hub.asked[-3][1].startswith("bytes=")


def test_mirror_that_tells_no_commit(hub, tmp_path):
    hub.publish("a/b", TINY)
    for path in list(hub.files):
        hub.faults[path] = [
            lambda handler: handler.send_file(handler.server.files[handler.path], {}) or True
        ] * 2
    assert same_as_tiny(load("a/b"))
    assert (
        tmp_path / "hf" / "hub" / "models--a--b" / "snapshots" / "main" / "config.json"
    ).exists()


def test_revision(hub):
    hub.publish("a/b", TINY, revision="v2")
    assert same_as_tiny(load("a/b", revision="v2"))


def test_token(hub, monkeypatch, tmp_path):
    hub.publish("a/b", TINY)
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    load("a/b")
    assert set(hub.tokens[:2]) == {"Bearer hf_secret"}
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "hf" / "token").write_text("hf_of_login\n")
    hub.publish("a/c", TINY)
    load("a/c")
    assert hub.tokens[-1] == "Bearer hf_of_login"


def run(monkeypatch, capsys, *args):
    from test_load_gpt2 import run

    return run(monkeypatch, capsys, *args)


@pytest.mark.parametrize(
    "name, files, faults, message",
    [
        ("out/storie", {}, [fails(401)], "out/storie is not a folder, and the hub refuses"),
        ("out/storie", {}, [], "out/storie is not a folder, and the hub refuses"),
        ("a/b/c", {}, [], "a/b/c is not a folder; names on the hub are"),
        ("../b", {}, [], "../b is not a folder; names on the hub are"),
        (
            "a/llama",
            {"config.json": b'{"model_type": "llama"}'},
            [],
            'not a GPT-2 ("model_type" is not "gpt2")',
        ),
        (
            "a/pickle",
            {"config.json": b'{"model_type": "gpt2"}', "pytorch_model.bin": b""},
            [],
            "pickles (*.bin, *.pt)",
        ),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(
    hub, monkeypatch, capsys, name, files, faults, message
):
    for file, body in files.items():
        for revision in ("main", COMMIT):
            hub.files[f"/{name}/resolve/{revision}/{file}"] = body
    hub.faults[f"/{name}/resolve/main/config.json"] = faults
    code, _, error = run(monkeypatch, capsys, name)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not any(path.endswith(".bin") for path, _ in hub.asked)


def test_no_network_and_no_cache_is_one_line(hub, monkeypatch, capsys):
    hub.shutdown()
    hub.server_close()
    code, _, error = run(monkeypatch, capsys, "gpt2")
    *attempts, last = error.splitlines()
    assert code == 2 and len(attempts) == 5 and last.startswith("error: " + hub.url)
    for part in (
        "Connection refused",
        os.environ["HF_HOME"],
        "--gpt2 does not hold it",
        "give a folder",
        "HF_ENDPOINT",
    ):
        assert part in last
