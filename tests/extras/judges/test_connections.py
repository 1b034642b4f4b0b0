"""Connections: every answer belongs to its request, deadlines hold, and signals end a program."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
from chatserver import lines, make_client, number_of, say
from rawserver import RawServer, drip, kept_exchange, response

from extras.judges import client
from extras.judges.questions import JudgeStopped
from extras.judges.server import Server

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
INTERIM = [CONTINUE, b"HTTP/1.1 102 Processing\r\n\r\n", b"HTTP/1.1 199 Wait\r\nX: y\r\n\r\n",
           b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n"]


# ----- Every answer belongs to its request -----

def surprise(send, number, dice):
    """An answer with interim responses before it, or with bytes behind it that nobody asked for."""
    kind = dice.choice(["interim", "interim", "twice", "late", "half", "plain"])
    if kind == "interim":
        for _ in range(dice.randint(1, 4)):
            send(dice.choice(INTERIM))
            time.sleep(dice.uniform(0, 0.002))
    whole = response(f"answer {number}")
    if kind == "half":  # the length is right; what follows is the beginning of another response
        whole += response("nobody's")[:dice.randrange(1, 60)]
    send(whole)
    if kind in ("twice", "late"):
        time.sleep(dice.uniform(0.001, 0.01) * (kind == "late"))
        send(response("nobody's"))


def count_foreign(tmp_path, trials):
    """(runs in which a request got or kept another's answer, answers of another request)."""
    runs, foreign = 0, 0
    for seed in range(trials):
        dice, path = random.Random(seed), tmp_path / f"{seed}.jsonl"
        with RawServer(partial(surprise, dice=dice)) as server:
            client = make_client(server, path, judge_workers=dice.choice([1, 2, 4]),
                                 judge_timeout=2.0)
            replies = client.ask(say(map(str, range(20))))
        wrong = [reply for number, reply in enumerate(replies)
                 if reply.text not in (f"answer {number}", "")]
        wrong += [record for record in lines(path) if "key" in record
                  and record["text"] != f"answer {number_of(record['request'])}"]
        lost = [reply for reply in replies if reply.failure]
        runs, foreign = runs + bool(wrong or lost), foreign + len(wrong)
    return runs, foreign


def test_no_request_gets_the_answer_of_another(tmp_path, record_property):
    record_property("trials", 30)
    assert count_foreign(tmp_path, 30) == (0, 0)


def test_a_connection_that_is_kept_mixes_them_up(tmp_path, monkeypatch):
    """The control: answers by their order alone."""
    monkeypatch.setattr(Server, "exchange", kept_exchange)
    runs, foreign = count_foreign(tmp_path, 10)
    assert runs == 10 and foreign > 10


@pytest.mark.parametrize("code", [100, 101, 102, 103, 150, 199])
def test_every_interim_status(code):
    """They are skipped; 101 is final, and no answer."""
    def talk(send, number):
        send(f"HTTP/1.1 {code} X\r\nA: b\r\n\r\n".encode() * 3 + response(f"answer {number}"))
    with RawServer(talk) as server:
        reply, = make_client(server).ask(say(["7"]))
    assert (reply.text, reply.failure) == (("", "http 101") if code == 101 else ("answer 7", ""))


def test_a_body_that_ends_early_is_no_answer():
    """Neither is one whose text would be whole: what is missing may be a part of it."""
    plans = [response("x", **{"Content-Length": 9999}),
             b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"a":\r\n',
             b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", b"SSH-2.0-OpenSSH_9\r\n", b"\x00" * 99,
             b"", b"HTTP/1.1"]
    for plan in plans:
        def talk(send, number, plan=plan):
            send(plan)
            raise OSError("hang up")
        with RawServer(talk) as server:
            reply, = make_client(server, judge_tries=2).ask(say(["7"]))
            assert reply.failure == "connection lost" and server.requests == [7, 7]


# ----- Deadlines -----

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
# (what is sent at once, what is then sent byte by byte, for ever)
DRIPS = {
    "status line": (b"", b"HTTP/1.1 200 " + b"O" * 4000), "version": (b"", b"H"),
    "reason": (b"HTTP/1.1 200 ", b"OK"), "headers": (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
    "one header": (b"HTTP/1.1 200 OK\r\nX: ", b"y"), "continue": (b"", CONTINUE),
    "early hints": (b"", INTERIM[-1]), "chunk size": (CHUNKED, b"0"),
    "chunk extension": (CHUNKED + b"5;a=", b"b"), "chunks": (CHUNKED, b"1\r\n \r\n"),
    "trailers": (CHUNKED + b"1\r\n{\r\n0\r\n", b"a: b\r\n"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b" "),
    "body to the end": (b"HTTP/1.1 200 OK\r\n\r\n", b" "), "silence": (b"HTTP/1.1 2", b"")}


def time_drip(name, dice, servers):
    """(seconds that a request takes beyond its deadline, its failure)."""
    first, rest = DRIPS[name]
    pause, deadline = dice.uniform(0.001, 0.05), dice.uniform(0.2, 0.6)

    def talk(send, number):
        send(first)
        drip(send, rest, pause) if rest else time.sleep(3)
    with RawServer(talk) as server:
        servers.append(server)
        asker, start = make_client(server, judge_deadline=deadline, judge_tries=1), time.monotonic()
        reply, = asker.ask(say(["1"]))
        return time.monotonic() - start - deadline, reply.failure


def time_drips(names, seed):
    """What `time_drip` says of all of them at the same time, after 2.5 seconds at most."""
    found, servers, threads = [], [], []
    for name in names:
        def work(name=name):
            found.append(time_drip(name, random.Random(f"{seed} {name}"), servers))
        threads.append(threading.Thread(target=work, daemon=True))
        threads[-1].start()
    until = time.monotonic() + 2.5
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    in_time = list(found)
    for server in servers:  # so that nothing drips on
        server.stop()
    return in_time


def test_a_deadline_holds_wherever_bytes_are_dripped(record_property):
    found = [time_drips(DRIPS, seed) for seed in range(3)]
    late, causes = zip(*sum(found, []), strict=True)
    record_property("trials", len(late))
    assert len(late) == 3 * len(DRIPS) and max(late) < 1.5, max(late)
    assert set(causes) == {"no answer in time"}


def test_timeouts_alone_end_nothing_that_drips(monkeypatch):
    """The control: what drips outside a body goes on."""
    monkeypatch.setattr(Server, "exchange", kept_exchange)
    assert len(time_drips(["version", "one header", "continue", "chunk extension"], 0)) == 0


def test_a_tunnel_that_drips_ends_at_the_deadline():
    def serve(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 12)
            try:
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                drip(connection.sendall, b"a: b\r\n", 0.01)
            except OSError:
                pass
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
        asker = make_client("https://host.invalid", judge_proxy=proxy, judge_deadline=0.5,
                            judge_tries=1)
        start = time.monotonic()
        with pytest.raises(JudgeStopped, match="connections tried: 1"):
            asker.ask(say(["1"]))
        assert time.monotonic() - start < 2


# ----- TLS -----

@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(a file with a certificate of localhost, a server's context with it)."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    file, key = (tmp_path_factory.mktemp("tls") / name for name in ("cert.pem", "key.pem"))
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout",
                    str(key), "-out", str(file)], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file, key)
    return str(file), context


def tunnel(listener, port):
    """A proxy for one connection: whatever is asked for leads to that port."""
    inside, _ = listener.accept()
    assert inside.recv(1 << 12).startswith(b"CONNECT localhost:")
    inside.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    outside = socket.create_connection(("127.0.0.1", port))

    def copy(source, goal):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                goal.sendall(data)
            goal.shutdown(socket.SHUT_RDWR)
    threading.Thread(target=copy, args=(outside, inside), daemon=True).start()
    copy(inside, outside)


def test_tls_is_checked_and_its_deadlines_hold(certificate, monkeypatch):
    file, context = certificate
    monkeypatch.setenv("JUDGE_API_KEY", "sk-live-9Yq3ZtVb7KxWm2Rf")

    def talk(send, number):
        if number:
            send(CONTINUE + response(f"answer {number}"))
        drip(send, b"HTTP/1.1 200 OK" if number else b"H", 0.01)
    with RawServer(talk, context) as server:
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        trusting = make_client(url, judge_ca=file, judge_deadline=1.0)
        assert [reply.text for reply in trusting.ask(say("12"))] == ["answer 1", "answer 2"]
        start = time.monotonic()
        assert trusting.ask(say("0"))[0].failure == "no answer in time"
        assert time.monotonic() - start < 2.5
        with pytest.raises(JudgeStopped, match="is not trusted. If it should be, name"):
            make_client(url).ask(say("1"))
        with pytest.raises(ValueError, match="--judge-ca .* holds no certificates"):
            make_client(url, judge_ca=__file__)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = int(url.rpartition(":")[2])
            threading.Thread(target=tunnel, args=(listener, port), daemon=True).start()
            proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
            through = make_client(url, judge_ca=file, judge_proxy=proxy)
            assert through.ask(say("7"))[0].text == "answer 7"


# ----- Signals -----

def ask_until_told(url, cache, daemons):
    """A child that ends as programs do: Python waits for threads that are no daemons."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not daemons:
        def make(**how):
            return threading.Thread(**how | {"daemon": False})
        client.threading = SimpleNamespace(**vars(threading) | {"Thread": make})
    try:
        make_client(url, cache, judge_deadline=20.0, judge_workers=4).ask(say(map(str, range(99))))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def interrupt(tmp_path, seed, *, daemons=True):
    """(seconds from the second Ctrl-C to the end, exit status) of a child whose server drips."""
    dice, path = random.Random(seed), tmp_path / f"{seed} {daemons}.jsonl"

    def talk(send, number):
        if number % 2 or number < 8:
            drip(send, DRIPS[dice.choice(["one header", "continue", "chunks"])][1], 0.01)
        send(response(f"answer {number}"))
    with RawServer(talk) as server:
        child = multiprocessing.get_context("fork").Process(
            target=ask_until_told, args=(server.url, path, daemons))
        child.start()
        while len(server.requests) < 4:
            assert child.is_alive()
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.05))
        for pause in (dice.uniform(0.03, 0.1), 0):
            assert child.is_alive()
            os.kill(child.pid, signal.SIGINT)
            time.sleep(pause)
        start = time.monotonic()
        child.join(2)
        seconds, status = time.monotonic() - start, child.exitcode
        if status is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        return seconds, status


def test_a_second_interrupt_always_ends_the_program(tmp_path, record_property):
    found = [interrupt(tmp_path, seed) for seed in range(20)]
    record_property("trials", 20)
    assert {status for _, status in found} == {130}, found
    assert max(seconds for seconds, _ in found) < 1.5


def test_threads_that_are_no_daemons_keep_it_alive(tmp_path):
    """The control: a program waits for them when it ends."""
    assert interrupt(tmp_path, 0, daemons=False)[1] is None


def test_a_first_interrupt_waits_for_what_is_paid_for(tmp_path, capsys):
    """What is under way is written down, and nothing else is begun."""
    over = threading.Event()

    def talk(send, number):
        if len(server.requests) == 3:
            threading.Thread(target=press, daemon=True).start()
        over.wait(9)
        send(response(f"answer {number}"))

    def press():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        over.set()
    with RawServer(talk) as server:
        with pytest.raises(KeyboardInterrupt):
            make_client(server, tmp_path / "a.jsonl", judge_workers=3).ask(say(map(str, range(50))))
        assert len(server.requests) == len(lines(tmp_path / "a.jsonl")) == 3
    assert "waiting for the answers that are under way" in capsys.readouterr().err
