"""A stand-in for the Hugging Face hub on loopback: enough for its client to list, fetch and resume repositories."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

Repositories = Mapping[str, Mapping[str, Mapping[str, bytes]]]
"""`models/owner/name` or `datasets/owner/name` → commit, the newest last → path → content."""


@contextmanager
def stand_in_hub(repositories: Repositories) -> Iterator[str]:
    """Serves them until the block ends; the address for `HF_ENDPOINT`. What is added meanwhile is served, too."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.wfile.write(self.answer())

        def answer(self) -> bytes:
            content, headers = find(repositories, self.path.split("?")[0])
            if not content:
                self.send_response(404)
                self.send_header("X-Error-Code", headers)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return b""
            first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(first[1]) if first else 0
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", headers)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            return content[start:]

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    with serving(Hub) as address:
        yield address


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serves on loopback until the block ends; the address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """Points the hub's client, which reads its environment only once, to another hub and an empty cache."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))


def find(repositories: Repositories, path: str) -> tuple[bytes, str]:
    """Content and commit; nothing and an error code where there is none."""
    api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path)
    file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
    if api:
        kind, name, what, revision = api.groups()
    elif file:
        kind, name, what, revision = (file[1] or "models/")[:-1], file[2], "file", file[3]
    else:
        return b"", "RepoNotFound"
    commits = repositories.get(f"{kind}/{name}")
    if not commits:
        return b"", "RepoNotFound"
    commit = revision if revision in commits else list(commits)[-1]
    files = commits[commit]
    if what == "file":
        assert file
        return (files[file[4]], commit) if file[4] in files else (b"", "EntryNotFound")
    entries = [{"type": "file", "path": each, "size": len(files[each]), "oid": "1" * 40} for each in files]
    siblings = [{"rfilename": each} for each in files]
    return json.dumps(entries if what == "tree" else {"id": name, "sha": commit, "siblings": siblings}).encode(), commit
