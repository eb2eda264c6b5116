"""The HTTP service, as a process of its own, from the outside."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import PATIENCE_S
from pydantic import ValidationError

from mtbert import serve
from mtbert.cli import main
from mtbert.readers import Row, read_rows
from mtbert.serve import EmbedRequest, Limits, PredictRequest, make_server
from mtbert.trained import Trained, load_run

ROOT = Path(__file__).parent.parent
Address = tuple[str, int]


@pytest.fixture(scope="module")
def run(trained_run: Path) -> Trained:
    return load_run(trained_run, "latest")


@pytest.fixture(scope="module")
def service(trained_run: Path) -> Iterator[Address]:
    command = [sys.executable, "-m", "mtbert", "serve", str(trained_run), "--checkpoint", "latest", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    told = re.match(r"mtbert: http://(127\.0\.0\.1):(\d+) ", process.stdout.readline())
    assert told, process.communicate()
    yield told[1], int(told[2])
    assert process.poll() is None  # whatever was sent, it stayed up
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in errors, errors


def ask(address: Address, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """GET without a body; bytes go out as they are, anything else as JSON."""
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
    try:
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(
            "GET" if body is None else "POST", path, content, {"Content-Type": "application/json"} | headers
        )
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def texts_of(corpus: Path, file: str, columns: list[str]) -> list[tuple[str, ...]]:
    return [row.values for row in read_rows(corpus / file, columns) if isinstance(row, Row)]


def test_answers_are_those_of_predict_with_64_clients_at_once(service: Address, run: Trained, corpus: Path) -> None:
    singles = texts_of(corpus, "ids-sst-dev.csv", ["sentence"])
    pairs = texts_of(corpus, "sts-dev.csv", ["sentence1", "sentence2"])
    expected = {
        "sst": run.answer("sst", run.tokenise(singles)),
        "joint": run.answer("joint", run.tokenise(pairs)),
        "sts": run.answer("sts", run.tokenise(pairs)),
    }
    vectors = run.embed(run.tokenise(singles))

    def client(number: int) -> None:
        task = ("sst", "joint", "sts", None)[number % 4]
        chosen = [(number + step) % 60 for step in range(1 + number % 5)]
        if task is None:
            status, answer = ask(service, "/embed", {"inputs": [singles[i][0] for i in chosen]})
            assert status == 200
            np.testing.assert_allclose(answer["vectors"], vectors[chosen], atol=1e-5)
            return
        inputs = [singles[i][0] if task == "sst" else pairs[i] for i in chosen]
        status, answer = ask(service, "/predict", {"task": task, "inputs": inputs})
        assert (status, answer["task"]) == (200, task)
        for i, found in zip(chosen, answer["predictions"], strict=True):
            values = [array[i] for array in (expected[task].scores_N, expected[task].predictions_N)]
            np.testing.assert_allclose([found["score"], found["prediction"]], values, atol=1e-5)
            assert (found["probability"] is None) == (task == "sts")

    with ThreadPoolExecutor(64) as clients:
        list(clients.map(client, range(320)))
    assert ask(service, "/healthz")[1]["waiting"] == 0


def sst(*inputs: Any, **more: Any) -> dict[str, Any]:
    return {"task": "sst", "inputs": list(inputs), **more}


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        ("/predict", b"{", 422, "JSON decode error"),
        ("/predict", b"\xff\xfe", 422, "JSON decode error"),
        ("/predict", b"[" * 100_000, 400, "error parsing the body"),
        ("/predict", [], 422, "valid dictionary"),
        ("/predict", {}, 422, "task: Field required"),
        ("/predict", sst(3), 422, r"inputs\.0"),
        ("/predict", sst("good", None), 422, r"inputs\.1"),
        ("/predict", {"task": "sst", "inputs": "good"}, 422, "inputs: Input should be a valid list"),
        ("/predict", sst("good", colour=1), 422, "colour: Extra inputs are not permitted"),
        ("/predict", sst("good", **{"a\n\tb": 1}), 422, "^a b: Extra inputs are not permitted$"),
        ("/predict", sst("good", **{"x" * 10_000: 1}), 422, "^x{100}: Extra inputs are not permitted$"),
        ("/predict", sst("good", **{"\ud800": 1}), 422, "unable to parse raw data as a unicode string"),
        ("/predict", sst(), 422, "inputs: 0 of them; a request takes 1 to 64"),
        ("/predict", sst(*["good"] * 65), 422, "inputs: 65 of them; a request takes 1 to 64"),
        ("/predict", sst("good", " \n"), 422, r"inputs\.1: the text is empty"),
        ("/predict", sst("x" * 100_000), 422, r"inputs\.0: 100,000 characters; a text may have 10,000"),
        ("/predict", sst("\x00"), 422, r"U\+0000 is no text"),
        ("/predict", b'{"task": "sst", "inputs": ["\\ud800"]}', 422, "."),
        ("/predict", sst("\x01"), 422, r"inputs\.0: nothing in the text is a wordpiece"),
        ("/predict", sst(["one", "two"]), 422, r"inputs\.0: task sst takes a text"),
        ("/predict", {"task": "sts", "inputs": ["one"]}, 422, r"inputs\.0: task sts takes a pair of texts"),
        ("/predict", {"task": "../../etc/passwd", "inputs": ["a"]}, 422, "no such task; this run has sst, para"),
        ("/predict", b"x" * 10_000_000, 413, "the body is larger than 1,048,576 bytes"),
        ("/embed", {"inputs": [""]}, 422, r"inputs\.0: the text is empty"),
        ("/embed", {"inputs": [["a", "b"]]}, 422, r"inputs\.0"),
        ("/nowhere", None, 404, "Not Found"),
        ("/predict", None, 405, "Method Not Allowed"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_request_has_a_reason_and_the_service_stays_up(
    service: Address, path: str, body: Any, status: int, told: str
) -> None:
    found, answer = ask(service, path, body)
    assert (found, list(answer)) == (status, ["detail"])
    assert re.search(told, answer["detail"]) and len(answer["detail"]) < 200
    assert ask(service, "/predict", sst("good"))[0] == 200


@pytest.mark.parametrize("one", [b"0", b"[]"])
def test_a_body_full_of_mistakes_is_refused_at_the_first(service: Address, one: bytes) -> None:
    """Each would otherwise be a record of its own, gigabytes for a body of a megabyte."""
    found, answer = ask(service, "/predict", b'{"task": "sst", "inputs": [' + b",".join([one] * 250_000) + b"]}")
    assert found == 422 and answer["detail"].startswith("inputs.0")
    for request, task in ((PredictRequest, {"task": "sst"}), (EmbedRequest, {})):
        with pytest.raises(ValidationError) as found_wrong:
            request.model_validate({**task, "inputs": [json.loads(one)] * 1000})
        assert found_wrong.value.error_count() <= 6


def test_a_body_without_a_length_is_measured(service: Address) -> None:
    with socket.create_connection(service, timeout=PATIENCE_S) as connection:
        head = (
            "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode())
        for _ in range(3):
            connection.sendall(b"80000\r\n" + b" " * 0x80000 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert ask(service, "/healthz")[0] == 200


def test_clients_that_go_away_do_no_harm(service: Address) -> None:
    request = json.dumps(sst(*["a good film"] * 64)).encode()
    for length in (len(request), len(request) + 1):  # gone while the model works; gone before the body was there
        for _ in range(8):
            with socket.create_connection(service) as connection:
                kind = "Content-Type: application/json"
                head = f"POST /predict HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {length}\r\n\r\n"
                connection.sendall(head.encode() + request)
    assert ask(service, "/predict", sst("good"))[0] == 200


def test_what_it_says_of_itself(service: Address) -> None:
    kinds = {"sst": "classification", "para": "pair_classification", "joint": "pair_classification"}
    health = {"status": "ok", "run": "run", "step": 6, "tasks": kinds | {"sts": "pair_regression"}, "waiting": 0}
    assert ask(service, "/healthz") == (200, health)
    paths = ask(service, "/openapi.json")[1]["paths"]
    assert set(paths) == {"/predict", "/embed", "/healthz"}
    assert {"200", "413", "422", "503"} <= set(paths["/predict"]["post"]["responses"])


def test_an_address_that_is_taken(service: Address, trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(trained_run), "--port", str(service[1])]) == 2
    assert re.fullmatch(r"mtbert: --host 127.0.0.1 --port \d+: cannot listen there: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--port=70000", "--port 70000: ports are 1 to 65535; 0 takes a free one"),
        ("--port=-1", "--port -1: ports are 1 to 65535; 0 takes a free one"),
        ("--host=", "--host: is empty; 127.0.0.1 is this machine only, 0.0.0.0 every network"),
        ("--max-batch=0", "--max-batch 0: every request would be refused; give 1 or more"),
        ("--max-body=-1", "--max-body -1: every request would be refused; give 1 or more"),
        ("--max-text=0", "--max-text 0: every request would be refused; give 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused_before_the_run_is_opened(
    tmp_path: Path, option: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path / "no run"), option]) == 2
    assert capsys.readouterr().err == f"mtbert: {told}\n"


def test_a_host_that_is_no_name(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(trained_run), "--host", "a..b"]) == 2
    assert re.fullmatch(r"mtbert: --host a\.\.b --port 8000: cannot listen there: .*\n", capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------ under load


class Held:
    """A service whose model waits at a gate, so that a test decides what gathers meanwhile."""

    def __init__(self, run: Trained, limits: Limits) -> None:
        self.gate = threading.Event()
        self.sizes: list[int] = []  # of the batches that reached the model, in sequences
        run.model.register_forward_pre_hook(self._hold)
        self.server = make_server(run, limits)
        listening = socket.create_server(("127.0.0.1", 0))
        self.address: Address = listening.getsockname()
        self.thread = threading.Thread(target=self.server.run, args=([listening],))

    def _hold(self, _: Any, arguments: tuple[Any, ...]) -> None:
        self.sizes.append(len(arguments[1].lengths_B))
        assert self.gate.wait(PATIENCE_S)

    def waiting(self) -> int:
        return int(ask(self.address, "/healthz")[1]["waiting"])

    def sent(self, *texts: str) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE_S)
        connection.request("POST", "/predict", json.dumps(sst(*texts)), {"Content-Type": "application/json"})
        return connection

    def busy(self) -> http.client.HTTPConnection:
        """A request that the model has begun on."""
        connection = self.sent("good")
        until(lambda: self.sizes == [1])
        return connection


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_classes_that_have_names_are_answered_by_them(run: Trained) -> None:
    names = ["awful", "poor", "so so", "good", "great"]
    task = run.config.tasks["sst"].model_copy(update={"classes": names})
    named = replace(run, config=run.config.model_copy(update={"tasks": {**run.config.tasks, "sst": task}}))
    service = Held(named, Limits())
    service.gate.set()
    service.thread.start()
    try:
        status, answer = ask(service.address, "/predict", sst("good", "bad"))
        _, pair = ask(service.address, "/predict", {"task": "joint", "inputs": [["a", "b"]]})
    finally:
        service.server.should_exit = True
        service.thread.join()
    found = run.answer("sst", run.tokenise([("good",), ("bad",)])).predictions_N
    assert status == 200 and [each["prediction"] for each in answer["predictions"]] == [names[int(n)] for n in found]
    assert pair["predictions"][0]["prediction"] in (0, 1)


@contextmanager
def held(trained_run: Path, limits: Limits) -> Iterator[Held]:
    service = Held(load_run(trained_run, "latest"), limits)
    service.thread.start()
    try:
        yield service
    finally:
        service.gate.set()
        service.server.should_exit = True
        service.thread.join(PATIENCE_S)
    assert not service.thread.is_alive()


def status(connection: http.client.HTTPConnection) -> int:
    with connection.getresponse() as answer:
        answer.read()
    connection.close()
    return answer.status


def test_what_waits_is_answered_together_and_what_is_too_much_is_turned_away(trained_run: Path) -> None:
    with held(trained_run, Limits(waiting=6)) as service:
        connections = [service.busy(), *(service.sent("good", "bad") for _ in range(3))]
        until(lambda: service.waiting() == 6)
        assert ask(service.address, "/predict", sst("good"))[0] == 503
        service.gate.set()
        assert [status(connection) for connection in connections] == [200] * 4
        assert service.sizes == [1, 6]
        assert status(service.sent(*["good"] * 10)) == 200  # more than may wait, but nobody does


def test_who_has_gone_waits_no_longer(trained_run: Path) -> None:
    with held(trained_run, Limits(waiting=6)) as service:
        busy = service.busy()
        gone = [service.sent("good", "bad") for _ in range(3)]
        until(lambda: service.waiting() == 6)
        for connection in gone:
            connection.close()
        until(lambda: service.waiting() == 0)
        stays = service.sent("good", "bad", "dull")
        until(lambda: service.waiting() == 3)
        service.gate.set()
        assert [status(busy), status(stays)] == [200, 200]
        assert service.sizes == [1, 3]


def test_a_body_that_does_not_come(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.2)
    with (
        held(trained_run, Limits()) as service,
        socket.create_connection(service.address, timeout=PATIENCE_S) as connection,
    ):
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost:"])
def test_who_sends_no_request_is_let_go(sent: bytes, trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.5)
    with held(trained_run, Limits()) as service, socket.create_connection(service.address, timeout=20) as silent:
        silent.sendall(sent)
        with suppress(ConnectionResetError):
            assert silent.recv(1) == b""


def test_who_reads_no_answer_is_let_go(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the service sees it: its system may keep what was not read for longer."""
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.5)
    with held(trained_run, Limits()) as service, socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(service.address)
        silent.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 999)
        until(lambda: service.server.server_state.total_requests > 0)
        deadline = time.monotonic() + 25  # at the end of keep-alive it would go, too
        while service.server.server_state.connections:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_who_reads_slowly_is_waited_for(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "BODY_SECONDS", 1.0)
    with held(trained_run, Limits()) as service, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(service.address)
        requests = 300
        slow.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * requests)
        began, read = time.monotonic(), b""
        while read.count(b"HTTP/1.1 200 OK") < requests:
            time.sleep(0.01 if time.monotonic() - began < 3 else 0)  # for longer than it takes to be let go
            more = slow.recv(16384)
            assert more, "it was let go"
            read += more


def test_no_more_connections_than_files_that_may_be_open(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "max_connections", lambda: 2)
    with held(trained_run, Limits()) as service:
        with socket.create_connection(service.address) as one, socket.create_connection(service.address) as two:
            until(lambda: len(service.server.server_state.connections) == 2)
            with pytest.raises((ConnectionError, http.client.HTTPException)):
                ask(service.address, "/healthz")
            one.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert one.recv(1000).startswith(b"HTTP/1.1 200 ") and two
        until(lambda: not service.server.server_state.connections)
        assert ask(service.address, "/healthz")[0] == 200


def test_a_stop_waits_for_what_is_in_flight(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "STOP_SECONDS", int(PATIENCE_S))
    with held(trained_run, Limits()) as service:
        connections = [service.busy(), service.sent("good", "bad")]
        until(lambda: service.waiting() == 2)
        service.server.should_exit = True
        time.sleep(0.5)
        service.gate.set()
        assert [status(connection) for connection in connections] == [200, 200]


def test_a_stop_does_not_wait_for_ever(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "STOP_SECONDS", 0.5)
    with (
        held(trained_run, Limits()) as service,
        socket.create_connection(service.address, timeout=PATIENCE_S) as stalled,
    ):
        stalled.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        connections = [service.busy(), service.sent("good", "bad")]
        until(lambda: service.waiting() == 2)
        service.server.should_exit = True
        assert [status(connection) for connection in connections] == [503, 503]
        service.gate.set()  # what the model has begun on is waited for
        assert stalled.recv(1000).startswith(b"HTTP/1.1 503 ")
    assert service.sizes == [1] and "Traceback" not in capsys.readouterr().err
