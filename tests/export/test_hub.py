"""Downloads, against a hub on the loopback interface that drops connections."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from typing import ClassVar

import pytest
from clapsep.export.hub import fetch
from clapsep.runtime.errors import CheckpointError

CONTENT = bytes(range(256)) * 60000  # 15 MB
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the Hugging Face hub that a download needs."""

    drops = 0
    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body):
        if self.path != "/someone/clapsep/resolve/main/model/best_model.ckpt":
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        span = self.headers.get("Range")
        if body:
            type(self).seen.append((self.path, span))
        start = int(span.removeprefix("bytes=").split("-")[0]) if span and body else 0
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"' + hashlib.sha256(CONTENT).hexdigest() + '"')
        self.send_header("Content-Length", str(len(CONTENT) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        if not body:
            return
        if type(self).drops:
            type(self).drops -= 1
            self.wfile.write(CONTENT[start : start + 12_000_000])
            self.wfile.flush()
            self.connection.close()
        else:
            self.wfile.write(CONTENT[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    Hub.drops, Hub.seen = 0, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def download(location, endpoint, home):
    """`fetch` in a process of its own, because the hub client reads its settings once."""
    code = (
        "import sys; from clapsep.export.hub import fetch; from clapsep.runtime.errors import ClapsepError\n"
        "try: print(fetch(sys.argv[1]))\nexcept ClapsepError as error: print(type(error).__name__, error); sys.exit(error.exit_code)"
    )
    environment = {k: v for k, v in os.environ.items() if k.lower() not in ("http_proxy", "https_proxy", "all_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    return subprocess.run([sys.executable, "-c", code, location], capture_output=True, text=True, check=False, env=environment, timeout=300)


@pytest.mark.parametrize("drops", [0, 1])
def test_download_resumes_and_is_cached(hub, tmp_path, drops):
    Hub.drops = drops
    location = "hf://someone/clapsep/model/best_model.ckpt"
    for _ in range(1 + drops):
        done = download(location, hub, tmp_path)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    path = done.stdout.strip().splitlines()[-1]
    with open(path, "rb") as file:
        assert file.read() == CONTENT
    assert os.path.basename(path) == "best_model.ckpt"
    if drops:
        assert any(span and int(span.removeprefix("bytes=").split("-")[0]) > 0 for _, span in Hub.seen), Hub.seen
    requests = len(Hub.seen)
    assert download(location, hub, tmp_path).stdout.strip().splitlines()[-1] == path
    assert len(Hub.seen) == requests


def test_a_file_that_is_not_there(hub, tmp_path):
    done = download("hf://someone/clapsep/nothing.ckpt", hub, tmp_path)
    assert done.returncode == 1
    assert "DownloadError 'hf://someone/clapsep/nothing.ckpt' cannot be downloaded" in done.stdout


@pytest.mark.slow
def test_offline_says_what_to_do(tmp_path):
    done = download("hf://someone/clapsep/model.ckpt", "http://127.0.0.1:9", tmp_path)
    assert done.returncode == 1
    assert "check the network or give a local file" in done.stdout


@pytest.mark.parametrize("location", ["hf://", "hf://a/b", "hf://a//b", "hf://a/b/../../c", "hf://a/b/@x"])
def test_malformed_addresses(location):
    with pytest.raises(CheckpointError, match="not a hub address"):
        fetch(location)


def test_local_paths_pass_through():
    assert str(fetch("some/where.ckpt")) == "some/where.ckpt"
