"""A server on the loopback plays the hub, its storage host and their faults."""

import hashlib
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import requests
import torch
from conftest import run_main
from filelock import FileLock
from test_load_gpt2 import shard, to_tokenizer_json

import load_gpt2
from load_gpt2 import download
from load_gpt2 import load_gpt2 as load

TINY = Path(__file__).parent / "tiny-gpt2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BODY = bytes(i * i % 251 for i in range(300_000))
LARGE = BODY * 10  # larger than the blocks in which a download is written

run = partial(run_main, load_gpt2)


def etag_of(body):
    return f'"{hashlib.sha1(body).hexdigest()}"'


class Hub(ThreadingHTTPServer):
    """
    Serves `files` {path: bytes}; those named *.safetensors by redirection to /storage/, as the hub
    does. `faults` {path: list of functions of the handler} are used up one per request; one that
    returns True has answered. `requests`: (path, headers) of what was asked for.
    """

    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.faults, self.requests = {}, {}, []
        self.closing = threading.Event()
        options = {"poll_interval": 0.01}
        threading.Thread(target=self.serve_forever, kwargs=options, daemon=True).start()

    def publish(self, name, folder):
        for path in folder.iterdir():
            for commit in ("main", COMMIT):
                self.files[f"/{name}/resolve/{commit}/{path.name}"] = path.read_bytes()

    def asked(self, path=""):
        """The headers of all requests for a path that ends so"""
        return [headers for asked, headers in self.requests if asked.endswith(path)]

    def close(self):
        self.closing.set()  # handlers that wait go on
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub = self.server
        self.path = path = unquote(self.path)
        hub.requests.append((path, self.headers))
        self.knows_range, self.announced, self.n_sent = True, None, None
        self.sha256, self.etag = None, "right"
        faults = hub.faults.get(path, [])
        if faults and faults.pop(0)(self):
            return
        if path.startswith("/storage"):
            self.send_file(hub.files[path.removeprefix("/storage")])
        elif path not in hub.files:
            self.answer(404, {"X-Error-Message": "Entry not found"})
        elif path.endswith(".safetensors"):
            sha256 = self.sha256 or hashlib.sha256(hub.files[path]).hexdigest()
            headers = {"X-Linked-ETag": f'"{sha256}"', "X-Repo-Commit": COMMIT}
            self.answer(302, headers | {"Location": "/storage" + path})
        else:
            self.send_file(hub.files[path], {"X-Repo-Commit": COMMIT})

    def send_file(self, body, headers=None):
        """The whole file, or with Range and a fitting If-Range the rest of it (RFC 9110, 13.1.5)"""
        headers = dict(headers or {})
        etag = etag_of(body) if self.etag == "right" else self.etag
        if etag is not None:
            headers["ETag"] = etag
        wanted = self.headers.get("Range")
        if not self.knows_range or self.headers.get("If-Range", etag) != etag:
            wanted = None
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if wanted and start >= len(body):
            return self.answer(416, headers | {"Content-Range": f"bytes */{len(body)}"})
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self.answer(206 if wanted else 200, headers, body[start:])

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        length = len(body) if self.announced is None else self.announced
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body[: self.n_sent])
        return True

    def log_message(self, *args):
        pass


def fails(status, **headers):
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    return lambda handler: handler.answer(status, headers)


def sets(**attributes):
    """A fault that the usual answer takes into account"""
    return lambda handler: vars(handler).update(attributes)


def hangs(handler):
    return handler.server.closing.wait(timeout=10)


def stops_half_way(handler):
    """Sends 2 MB, and then nothing more, but keeps the connection open."""
    body = handler.server.files[handler.path.removeprefix("/storage")]
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.send_header("ETag", etag_of(body))
    handler.end_headers()
    handler.wfile.write(body[:2_000_000])
    handler.wfile.flush()
    return handler.server.closing.wait(timeout=20) or True


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(load_gpt2, "TIMEOUT", 10)
    monkeypatch.setattr(load_gpt2, "WAITS", (0.01, 0.02, 0.03, 0.04, 0.05))
    yield server
    server.close()


@pytest.fixture
def fetch(hub, tmp_path):
    """Fetch a file under these faults -> the headers of the requests for it"""

    def fetch(*faults, kind="safetensors", storage=True, body=BODY):
        path = f"/a/b/resolve/main/x.{kind}"
        hub.files[path] = body
        place = "/storage" + path if storage and kind == "safetensors" else path
        hub.faults[place] = list(faults)
        download(hub.url + path, tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == body
        assert names(tmp_path) == {"x"}  # no part
        return [headers for asked, headers in hub.requests if asked == place]

    return fetch


@pytest.fixture
def sleeps(monkeypatch):
    """time.sleep only makes a note of the seconds."""
    seconds = []
    monkeypatch.setattr(load_gpt2.time, "sleep", seconds.append)
    return seconds


def names(folder):
    """The files in a folder, without locks, which stay"""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def start_of(headers):
    """Range: bytes=123- -> 123"""
    return int(headers["Range"].removeprefix("bytes=").removesuffix("-"))


def write_part(path, part, body):
    """What an interrupted download of this version of the file leaves"""
    Path(f"{path}.part").write_bytes(part)
    Path(f"{path}.etag").write_text(etag_of(body))


# --------------------------------------------------------------------------------------------------
# One file


@pytest.mark.parametrize("kind", ["safetensors", "txt"])
def test_one_request_is_enough(fetch, kind):
    (headers,) = fetch(kind=kind)
    assert "Range" not in headers
    assert headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("kind", [str, Path])
def test_path_is_str_or_path(hub, tmp_path, kind):
    hub.files["/x"] = BODY
    download(hub.url + "/x", kind(tmp_path / "a" / "b" / "x"))  # makes the folders
    assert (tmp_path / "a" / "b" / "x").read_bytes() == BODY


@pytest.mark.parametrize("kind", ["safetensors", "txt"])
def test_resumes_where_the_connection_broke(fetch, capsys, kind):
    breaks = sets(n_sent=1_400_000)
    first, *others = fetch(breaks, breaks, kind=kind, body=LARGE)
    assert "Range" not in first
    starts = [start_of(headers) for headers in others]
    assert len(starts) == 2
    assert 0 < starts[0] <= 1_400_000 < starts[1] <= 2_800_000
    assert {headers["If-Range"] for headers in others} == {etag_of(LARGE)}
    assert capsys.readouterr().err.count("trying again in 0.0") == 2


def test_server_that_ignores_range(fetch):
    assert len(fetch(sets(n_sent=2_000_000), sets(knows_range=False), body=LARGE)) == 2


def test_an_endless_series_of_broken_connections_ends(hub, tmp_path):
    """Without Range the file never comes whole; the attempts must end nevertheless."""
    hub.files["/x"] = LARGE
    hub.faults["/x"] = [sets(n_sent=2_000_000, knows_range=False)] * 50
    with pytest.raises(requests.RequestException):
        download(hub.url + "/x", tmp_path / "x")
    assert len(hub.asked("/x")) == 6
    assert not (tmp_path / "x").exists()


def test_a_failed_download_is_resumed_by_the_next(hub, tmp_path):
    etag = '"../up/1:2?*\\ é"'.encode().decode("latin-1")
    folder = tmp_path / "folder"
    hub.files["/x"] = LARGE
    hub.faults["/x"] = [sets(n_sent=2_000_000, etag=etag), *[fails(503)] * 6]
    with pytest.raises(requests.HTTPError, match="503"):
        download(hub.url + "/x", folder / "x")
    part = folder / "x.part"
    size = part.stat().st_size
    assert part.read_bytes() == LARGE[:size]
    assert os.listdir(tmp_path) == ["folder"]
    assert not (folder / "x").exists()
    hub.faults["/x"] = [sets(etag=etag)]
    download(hub.url + "/x", folder / "x")
    assert (folder / "x").read_bytes() == LARGE
    assert start_of(hub.asked()[-1]) == size > 0
    assert names(folder) == {"x"}


def test_the_part_of_an_earlier_process_is_resumed(fetch, tmp_path):
    write_part(tmp_path / "x", BODY[:123_456], BODY)
    (headers,) = fetch()
    assert headers["Range"] == "bytes=123456-"
    assert headers["If-Range"] == etag_of(BODY)


@pytest.mark.parametrize("part", [b"", b"wrong" * 1000, b"wrong" * 100_000])
@pytest.mark.parametrize("kind", ["safetensors", "txt"])
def test_the_part_of_another_version_is_not_used(fetch, tmp_path, part, kind):
    write_part(tmp_path / "x", part, b"another")
    assert len(fetch(kind=kind)) == 1


@pytest.mark.parametrize("part", [BODY + b"more", BODY])
def test_a_part_that_is_whole_or_too_long(fetch, tmp_path, part):
    write_part(tmp_path / "x", part, BODY)
    fetch()


def test_file_that_changes_between_attempts(hub, tmp_path):
    def changes(handler):
        handler.server.files["/x"] = LARGE

    hub.files["/x"] = LARGE[::-1]
    hub.faults["/x"] = [sets(n_sent=2_000_000), changes]
    download(hub.url + "/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == LARGE
    assert names(tmp_path) == {"x"}


def test_server_without_etag(hub, tmp_path):
    """It cannot say whether a part is of the same version, so the file comes whole."""
    hub.files["/x"] = LARGE
    hub.faults["/x"] = [sets(etag=None, n_sent=2_000_000), sets(etag=None)]
    download(hub.url + "/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == LARGE


def test_server_without_etag_that_knows_no_if_range(hub, tmp_path):
    """Go's file server, for one, takes an empty If-Range for none."""

    def forgets_if_range(handler):
        del handler.headers["If-Range"]
        handler.etag = None

    hub.files["/x"] = LARGE[::-1]
    hub.faults["/x"] = [sets(etag=None, n_sent=2_000_000), *[fails(503)] * 6]
    with pytest.raises(requests.HTTPError):
        download(hub.url + "/x", tmp_path / "x")
    hub.files["/x"] = LARGE
    hub.faults["/x"] = [forgets_if_range] * 2
    download(hub.url + "/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == LARGE


def test_the_part_of_another_file_is_left_alone(hub, tmp_path):
    """model.safetensors and model.safetensors.index.json lie in one folder."""
    write_part(tmp_path / "x.index.json", b"other", b"other")
    hub.files["/x"] = LARGE
    download(hub.url + "/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == LARGE
    assert (tmp_path / "x.index.json.part").read_bytes() == b"other"
    assert "Range" not in hub.asked("/x")[0]


def test_file_name_with_brackets(hub, tmp_path):
    """In a pattern they would mean something else."""
    path = tmp_path / "x[1].txt"
    hub.files["/x"] = LARGE
    hub.faults["/x"] = [sets(n_sent=2_000_000)]
    download(hub.url + "/x", path)
    assert path.read_bytes() == LARGE


def test_waits_for_the_lock(hub, tmp_path):
    """Another process, here a lock of the test's own, downloads the same file."""
    hub.files["/x"] = BODY
    with FileLock(f"{tmp_path / 'x'}.lock"):
        args = (hub.url + "/x", tmp_path / "x")
        thread = threading.Thread(target=download, args=args, daemon=True)
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()
        assert not hub.asked()
        (tmp_path / "x").write_bytes(b"from the other process")
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert not hub.asked()
    assert (tmp_path / "x").read_bytes() == b"from the other process"
    assert names(tmp_path) == {"x"}


def test_announced_length_that_is_too_long(fetch):
    """The part is whole, but the server said otherwise: the file is fetched again."""
    fetch(sets(announced=400_000))


def test_wrong_sha256_is_an_error_and_leaves_no_file(fetch, tmp_path):
    with pytest.raises(ValueError, match=r"the SHA-256 of the download is not 0{64}"):
        fetch(sets(sha256="0" * 64), storage=False)
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob("*.part"))
    fetch()


def test_the_sha256_of_a_resumed_file_is_checked(fetch, tmp_path):
    write_part(tmp_path / "x", b"wrong" * 1000, BODY)
    with pytest.raises(ValueError, match="SHA-256"):
        fetch()
    assert not (tmp_path / "x").exists()
    fetch()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_no_map_of_the_part_is_open_when_it_is_renamed(fetch, monkeypatch):
    """Windows renames no file that is mapped."""
    replace = os.replace
    open_maps = []

    def replace_and_note(source, target):
        open_maps.append(str(source) in Path("/proc/self/maps").read_text())
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_and_note)
    fetch()
    assert open_maps == [False]


@pytest.mark.parametrize("seconds", [2, 300])
def test_retry_after_is_honoured(fetch, sleeps, capsys, seconds):
    assert len(fetch(fails(429, Retry_After=str(seconds)), storage=False)) == 2
    assert sleeps == [seconds]
    assert f"trying again in {seconds} s" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["Wed, 21 Oct 2015 07:28:00 GMT", "-5", "0", "", "1.5"])
def test_other_values_of_retry_after(fetch, sleeps, value):
    assert len(fetch(fails(503, Retry_After=value), storage=False)) == 2
    assert sleeps == [0.01]


def test_a_server_that_asks_for_more_than_five_minutes_is_not_waited_for(hub, fetch, sleeps):
    with pytest.raises(requests.HTTPError, match="429"):
        fetch(fails(429, Retry_After="301"), storage=False)
    assert sleeps == []
    assert len(hub.asked()) == 1


def test_errors_of_the_server_pass(fetch, capsys):
    assert len(fetch(fails(500), fails(502), fails(429))) == 4
    waits = [line.split()[-2] for line in capsys.readouterr().err.splitlines()]
    assert waits == ["0.01", "0.02", "0.03"]


def test_errors_of_the_server_that_stay(hub, fetch, tmp_path):
    with pytest.raises(requests.HTTPError, match="500"):
        fetch(*[fails(500)] * 50, kind="txt")
    assert len(hub.asked()) == 6
    assert not (tmp_path / "x").exists()


def test_a_server_that_does_not_answer(hub, fetch, monkeypatch):
    monkeypatch.setattr(load_gpt2, "TIMEOUT", 0.5)
    assert len(fetch(hangs, kind="txt")) >= 2


def test_a_server_that_stops_half_way(hub, fetch, monkeypatch):
    """The time limit holds between two bytes too, not just for the start of the answer."""
    monkeypatch.setattr(load_gpt2, "TIMEOUT", 0.5)
    assert len(fetch(stops_half_way, body=LARGE)) >= 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_refusals_are_not_tried_again(hub, fetch, tmp_path, status):
    """The error says what the hub says."""
    with pytest.raises(requests.HTTPError, match=f"{status} .*for members only") as caught:
        fetch(*[fails(status, X_Error_Message="for members only")] * 9, kind="txt")
    assert caught.value.response.status_code == status
    assert len(hub.asked()) == 1
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob("*.part"))


def test_a_file_that_exists_is_not_fetched(hub, monkeypatch, tmp_path):
    """Nothing is written either: the cache of a cluster is often read-only."""
    monkeypatch.delattr(load_gpt2, "FileLock")
    (tmp_path / "x").write_bytes(b"here")
    download(hub.url + "/x", tmp_path / "x")
    assert not hub.asked()
    assert names(tmp_path) == {"x"}


def test_token_does_not_reach_the_storage_host(hub, tmp_path):
    storage = Hub()
    try:
        storage.files["/x"] = BODY
        other_host = storage.url.replace("127.0.0.1", "localhost")
        hub.faults["/x"] = [fails(302, Location=other_host + "/x")]
        download(hub.url + "/x", tmp_path / "x", token="secret")
    finally:
        storage.close()
    assert [headers["Authorization"] for headers in hub.asked()] == ["Bearer secret"]
    assert [headers["Authorization"] for headers in storage.asked()] == [None]


def test_progress_line(hub, monkeypatch, capsys, tmp_path):
    hub.files["/x"] = LARGE
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    download(hub.url + "/x", tmp_path / "x")
    lines = capsys.readouterr().err.split("\r\x1b[K")
    assert lines[1].startswith("x: 0 of 3 MB, ")
    assert lines[-2].startswith("x: 3 of 3 MB, ")
    for part in (" MB/s, ", " left"):
        assert part in lines[1]
    assert lines[-1] == ""  # it is cleared at the end


def test_a_clock_that_stands_still(hub, monkeypatch, tmp_path):
    """On Windows it moves in steps of 16 ms."""
    hub.files["/x"] = BODY
    now = time.monotonic()
    monkeypatch.setattr(load_gpt2, "time", type("Clock", (), {"monotonic": lambda: now}))
    download(hub.url + "/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_many_processes_at_once(hub, tmp_path):
    """The first is killed in the middle of its download. The others wait, and one resumes it."""
    path = "/a/b/resolve/main/x.safetensors"
    hub.files[path] = LARGE
    hub.faults["/storage" + path] = [stops_half_way]
    fork = multiprocessing.get_context("fork")
    args = (hub.url + path, tmp_path / "x")
    processes = [fork.Process(target=download, args=args) for _ in range(4)]
    part = tmp_path / "x.part"
    try:
        processes[0].start()
        deadline = time.monotonic() + 20
        while not (part.exists() and part.stat().st_size >= 2**20):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for process in processes[1:]:
            process.start()
        processes[0].kill()
        for process in processes:
            process.join(timeout=20)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    assert [process.exitcode for process in processes[1:]] == [0, 0, 0]
    assert (tmp_path / "x").read_bytes() == LARGE
    assert names(tmp_path) == {"x"}
    assert hub.asked("/storage" + path)[1]["If-Range"] == etag_of(LARGE)


# --------------------------------------------------------------------------------------------------
# Repositories


def same_as_tiny(loaded):
    model, tokenizer = loaded
    expected, expected_tokenizer = load(TINY)
    ids = torch.arange(10)[None]
    return torch.equal(model(ids), expected(ids)) and tokenizer.vocab == expected_tokenizer.vocab


def test_a_name_is_fetched_once_and_then_needs_no_network(hub, monkeypatch, tmp_path):
    hub.publish("some.one/tiny_1", TINY)
    assert same_as_tiny(load("some.one/tiny_1"))
    repository = tmp_path / "hf" / "hub" / "models--some.one--tiny_1"
    files = {"config.json", "model.safetensors", "merges.txt", "vocab.json"}
    assert names(repository / "snapshots" / "main") == files
    asked = Counter(path for path, _ in hub.requests if not path.startswith("/storage"))
    assert asked == {f"/some.one/tiny_1/resolve/main/{name}": 1 for name in files}
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert same_as_tiny(load("some.one/tiny_1"))
    assert not hub.requests


def test_offline_without_a_cache_is_one_line(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, error = run(monkeypatch, capsys, "gpt2")
    assert code == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "config.json: No such file" in error
    assert not hub.requests


def test_short_names(hub):
    hub.publish("openai-community/gpt2", TINY)
    hub.publish("distilbert/distilgpt2", TINY)
    assert same_as_tiny(load("gpt2"))
    assert same_as_tiny(load("distilgpt2"))
    assert load_gpt2.HUB_NAMES["gpt2-xl"] == "openai-community/gpt2-xl"


@pytest.mark.parametrize(
    "variable, cache",
    [("HF_HUB_CACHE", "."), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_cache_of_other_tools_is_read(hub, tmp_path, monkeypatch, variable, cache):
    """Links to blobs, under the name that was asked for; nothing is written"""
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(tmp_path / "theirs"))
    repository = tmp_path / "theirs" / cache / "models--gpt2"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(f"{COMMIT}\n")
    for name in ("config.json", "model.safetensors", "merges.txt", "vocab.json"):
        shutil.copy(TINY / name, repository / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    before = sorted(tmp_path.rglob("*"))
    assert same_as_tiny(load("gpt2"))
    assert not hub.requests
    assert sorted(tmp_path.rglob("*")) == before


def test_shards_and_tokenizer_json(hub, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(TINY, folder)
    shard(folder)
    to_tokenizer_json(folder)
    hub.publish("a/sharded", folder)
    assert same_as_tiny(load("a/sharded"))
    hub.requests.clear()
    assert same_as_tiny(load("a/sharded"))
    assert not hub.requests


def test_a_repository_with_one_file_missing_is_completed(hub, tmp_path):
    hub.publish("a/b", TINY)
    load("a/b")
    snapshot = tmp_path / "hf" / "hub" / "models--a--b" / "snapshots" / "main"
    (snapshot / "vocab.json").unlink()
    hub.requests.clear()
    assert same_as_tiny(load("a/b"))
    assert len(hub.requests) == 1


def test_breaks_in_the_middle_of_a_repository(hub):
    hub.publish("a/b", TINY)
    path = "/storage/a/b/resolve/main/model.safetensors"
    hub.faults[path] = [sets(n_sent=70_000), *[fails(500)] * 6]
    with pytest.raises(ValueError, match="a/b is not a folder.*500.*set HF_ENDPOINT to a mirror"):
        load("a/b")
    hub.faults[path] = [fails(503)]
    assert same_as_tiny(load("a/b"))


def test_the_first_request_is_tried_again_too(hub):
    hub.publish("a/b", TINY)
    hub.faults["/a/b/resolve/main/config.json"] = [fails(503)]
    assert same_as_tiny(load("a/b"))


LOGIN_PAGE = b"<html><body>Please log in to the network.</body></html>"


@pytest.mark.parametrize("name", ["config.json", "merges.txt", "vocab.json"])
@pytest.mark.parametrize("damage", [lambda body: LOGIN_PAGE, lambda body: body[: len(body) // 2]])
def test_small_files_that_came_damaged_are_fetched_again(hub, name, damage):
    hub.publish("a/b", TINY)
    path = f"/a/b/resolve/main/{name}"
    body = damage(hub.files[path])
    hub.faults[path] = [lambda handler: handler.send_file(body)]
    with pytest.raises(ValueError, match=name):
        load("a/b")
    assert not hub.asked(".safetensors")
    assert same_as_tiny(load("a/b"))


def test_a_damaged_index_is_fetched_again(hub, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(TINY, folder)
    shard(folder)
    hub.publish("a/sharded", folder)
    path = "/a/sharded/resolve/main/model.safetensors.index.json"
    hub.faults[path] = [lambda handler: handler.send_file(LOGIN_PAGE)]
    with pytest.raises(ValueError, match="index.json"):
        load("a/sharded")
    assert same_as_tiny(load("a/sharded"))


def test_a_page_in_place_of_the_weights_is_fetched_again(hub):
    """From a mirror that gives no SHA-256"""
    hub.publish("a/b", TINY)
    path = "/a/b/resolve/main/model.safetensors"
    hub.faults[path] = [lambda handler: handler.send_file(LOGIN_PAGE)]
    with pytest.raises(ValueError, match="not a safetensors file"):
        load("a/b")
    assert same_as_tiny(load("a/b"))


def test_files_that_other_tools_downloaded_are_not_removed(hub, tmp_path):
    """Not even if they do not fit: here a model of another kind, without its weights"""
    snapshot = tmp_path / "hf" / "hub" / "models--a--llama" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes(LLAMA["config.json"])
    with pytest.raises(ValueError, match="model_type=llama"):
        load("a/llama")
    assert (snapshot / "config.json").exists()


def test_token(hub, monkeypatch):
    hub.publish("a/b", TINY)
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    load("a/b")
    assert {headers["Authorization"] for headers in hub.asked()} == {"Bearer hf_secret"}


LLAMA = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b""}
PICKLE = {"config.json": b'{"model_type": "gpt2"}', "pytorch_model.bin": b""}


@pytest.mark.parametrize(
    "name, files, faults, message",
    [
        ("outer/storie", {}, [fails(401)], "outer/storie is not a folder"),
        ("outer/storie", {}, [], "outer/storie is not a folder"),
        ("a/b/c", {}, [], "a/b/c is neither a folder nor a name on the hub"),
        ("../b", {}, [], "../b is neither a folder nor a name on the hub"),
        ("a/..", {}, [], "a/.. is neither a folder nor a name on the hub"),
        ("a/llama", LLAMA, [], "model_type=llama is not supported"),
        ("a/pickle", PICKLE, [], "model.safetensors: No such file"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(
    hub, monkeypatch, capsys, name, files, faults, message
):
    for file, body in files.items():
        for revision in ("main", COMMIT):
            hub.files[f"/{name}/resolve/{revision}/{file}"] = body
    hub.faults[f"/{name}/resolve/main/config.json"] = faults
    code, _, error = run(monkeypatch, capsys, name)
    assert code == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not hub.asked(".bin")
    assert name == "a/pickle" or not hub.asked(".safetensors")  # no gigabytes for nothing


def test_no_network_and_no_cache_is_one_line(hub, monkeypatch, capsys):
    hub.close()
    code, _, error = run(monkeypatch, capsys, "gpt2")
    last = error.splitlines()[-1]
    assert code == 1
    assert last.startswith("error: openai-community/gpt2 is not a folder")
    assert "HF_ENDPOINT" in last
    assert "Traceback" not in error
