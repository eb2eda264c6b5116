"""The Ray of a search lets nobody in who has not got its token, and tells nobody of itself."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtbert.errors import UserError
from tune import allocation
from tune.cluster import check_room, joined_ray

ROOT = Path(__file__).parent.parent.parent

CLUSTER = """
import json, os, sys
from tune.cluster import local_ray
with local_ray(1, 0, False):
    import ray
    print(json.dumps([ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN_PATH"]]), flush=True)
    sys.stdin.read()
"""
CLIENT = """
import sys
from tune.cluster import check_room, joined_ray, nodes
with joined_ray(sys.argv[1], 1):
    print(len(nodes()), "node")
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, Any]]:
    """Address, token file and process id of a Ray as a search on this machine starts it."""
    with tempfile.TemporaryDirectory(prefix="s") as tmp:  # a short name: it holds sockets
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": tmp},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        address, token = json.loads(process.stdout.readline())
        yield {"address": address, "token": Path(token), "home": Path(token).parent}
        process.communicate(timeout=600)
        assert not Path(token).exists()


def join(address: str, **variables: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", CLIENT, address],
        cwd=ROOT,
        env={**plain, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_token_is_the_users_alone(cluster: dict[str, Any]) -> None:
    assert stat.S_IMODE(cluster["token"].stat().st_mode) == 0o600
    assert stat.S_IMODE(cluster["home"].stat().st_mode) == 0o700
    assert len(cluster["token"].read_text()) == 64


def test_the_cluster_asks_for_it_and_reports_nothing(cluster: dict[str, Any]) -> None:
    wanted = {"RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={cluster['token']}", "RAY_USAGE_STATS_ENABLED=0"}
    seen = set()  # of Ray's daemons; its agents write their names over their environment
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((process / "environ").read_text().split("\0"))
            name = Path((process / "cmdline").read_text().split("\0")[0]).name
        except (OSError, UnicodeDecodeError):
            continue
        if name in ("gcs_server", "raylet") and f"TMPDIR={cluster['home']}" in environment:
            assert wanted <= environment, name
            seen.add(name)
    assert seen == {"gcs_server", "raylet"}


def test_who_has_the_token_joins_and_nobody_else(cluster: dict[str, Any], tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    welcome = join(cluster["address"], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(cluster["token"]))
    assert welcome.stdout == "1 node\n", welcome.stderr
    refused = join(cluster["address"], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode and refused.stdout == ""
    assert "AuthenticationError" in refused.stderr, refused.stderr[-2000:]


def test_no_cluster_is_joined_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(UserError, match="RAY_AUTH_MODE=token"), joined_ray("127.0.0.1:1", 1):
        pass


@pytest.mark.parametrize(("share", "trials"), [(0.6, 2), (0.5, 4), (0.3, 6), (0.1, 20), (1.0, 2), (0.0, 64)])
def test_a_rank_has_its_part_of_one_gpu(share: float, trials: int) -> None:
    assert check_room([{"CPU": 64, "GPU": 2}], 1, 1, share) == trials


@pytest.mark.parametrize(("fails", "code"), [(0, 0), (2, 0), (9, 1)])
def test_a_node_on_which_ray_does_not_start_in_time_tries_again(
    fails: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's part is played by a process that ends or stays; a node stays until the head is gone."""
    head = socket.create_server(("127.0.0.1", 0))
    started: list[subprocess.Popen[bytes]] = []

    def ray_start(home: Path, *options: str) -> subprocess.Popen[bytes]:
        late = len(started) < fails
        started.append(subprocess.Popen(["sh", "-c", "exit 1" if late else "sleep 600"]))
        if not late:
            head.close()
        return started[-1]

    monkeypatch.setattr(allocation, "_ray_start", ray_start)
    monkeypatch.setattr(allocation, "set_variables", lambda home, token: None)
    try:
        assert allocation._lend(tmp_path, tmp_path, "127.0.0.1", head.getsockname()[1]) == code
    finally:
        head.close()
        for process in started:
            process.kill()
            process.wait()
    assert len(started) == min(fails + 1, allocation.STARTS)


@pytest.mark.parametrize(
    ("told", "hosts", "expected"),
    [
        ("10.0.0.7", ["node1", "node2"], "10.0.0.7"),
        ("127.0.1.1", ["node1"], "127.0.1.1"),
        ("127.0.1.1", ["node1", "127.0.0.1"], "127.0.0.1"),  # the route to the second node begins here
    ],
)
def test_the_head_is_where_the_other_nodes_reach_it(
    told: str, hosts: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: told)
    assert allocation._address(hosts) == expected
