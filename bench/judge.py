"""How fast is the judge client, how much memory does it take, and how soon does it start?

    python bench/judge.py                           # all three
    python bench/judge.py --only speed --workers 8  # requests per second
    python bench/judge.py --only memory start
    python bench/judge.py --quick                   # does it run?

speed: requests per second against a local server that takes 50 ms. The most that c workers can do
is c / 0.05 s. On a busy machine the server itself is late; the next column is the share of what c
workers can do with the time that it really took. The last one is the client's CPU time per request.
Answers are written to a file as always. The line below shows that equal requests are sent once, and
that a second run sends none.
memory: what a process takes after 2,000 and after 20,000 answers of 2 kB, asked for in blocks of
200 as judges do it. start: seconds, and highest memory, of a program that opens a file of 200 MB of
answers for the first time, which checks every line, and later.

The exit status is 1 if a row is below 92 % of what is possible, if requests are sent twice, if
18,000 answers take more than 30 MB, or if a later start takes 2 s or more.
"""

import argparse
import contextlib
import json
import multiprocessing
import re
import resource
import select
import socket
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from extras.judges.answers import answer_key, write_line  # noqa: E402
from extras.judges.client import ChatClient, ServerFlags  # noqa: E402
from extras.judges.questions import make_question  # noqa: E402

LATENCY = 0.05
HEAD = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
SPAWN = multiprocessing.get_context("spawn")


def make_response(text: str) -> bytes:
    """A whole response that says a text."""
    message = {"role": "assistant", "content": text}
    body = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                       "usage": {"prompt_tokens": 200, "completion_tokens": 8}}).encode()
    return HEAD.format(len(body)).encode() + body


def serve(pipe, seen, took, latency, text) -> None:
    """Answer every request after `latency` seconds; send the port through the pipe.

    seen and took are shared numbers: of requests, and of the seconds that they took here. A server
    on asyncio would limit what is measured: it rounds waits up to a millisecond, and its streams
    take three times the CPU time.
    """
    response, listener = make_response(text), socket.create_server(("127.0.0.1", 0), backlog=256)
    listener.setblocking(False)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)  # wake once a request
    pipe.send(listener.getsockname()[1])
    arrived, due = {}, deque()  # {connection: what it has sent}, (when, connection, its begin)
    while True:
        wait = max(0.0, due[0][0] - time.perf_counter()) if due else None
        ready, _, _ = select.select([listener, *arrived], [], [], wait)
        for connection in ready:
            if connection is listener:
                with contextlib.suppress(BlockingIOError):
                    arrived[listener.accept()[0]] = b""
                continue
            data = arrived[connection] = arrived[connection] + connection.recv(1 << 16)
            if is_whole(data):
                began = time.perf_counter()
                due.append((began + latency, connection, began))
                del arrived[connection]
                seen.value += 1
        while due and due[0][0] <= time.perf_counter():
            _, connection, began = due.popleft()
            connection.sendall(response)
            connection.close()
            took.value += time.perf_counter() - began


def is_whole(data: bytes) -> bool:
    """Whether bytes are a whole request."""
    head, end, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.I)
    return bool(end) and len(body) >= int(length[1])


class Server:
    """That server, as a process of its own."""

    def __init__(self, latency: float, text: str = "VERDICT 0: same"):
        ours, theirs = SPAWN.Pipe()
        self.seen, self.took = SPAWN.Value("i", 0), SPAWN.Value("d", 0.0)
        given = theirs, self.seen, self.took, latency, text
        self.process = SPAWN.Process(target=serve, args=given, daemon=True)
        self.process.start()
        self.url = f"http://127.0.0.1:{ours.recv()}"

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.join()


def ask(client: ChatClient, texts: list[str]) -> float:
    """Ask about each text; the seconds that it takes."""
    questions = [make_question("Is it right?", {"response": text}) for text in texts]
    began = time.perf_counter()
    client.ask(questions)
    return time.perf_counter() - began


def resident_mb() -> float:
    """What this process takes of the memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


# ----- Speed -----
def measure_speed(folder: Path, workers_list: list[int], n: int) -> bool:
    """Print the table, of n requests per worker; whether all is as it should be."""
    server, good = Server(LATENCY), True
    print("workers | requests | seconds | per second | of c / 0.05 s | of c / the server's time | "
          "CPU per request")
    for workers in workers_list:
        flags = ServerFlags(judge_url=server.url, judge_workers=workers)
        client = ChatClient(flags, "m", folder / f"{workers}.jsonl")
        ask(client, [f"warm up {k}" for k in range(workers)])  # so that all is loaded
        before, total = server.took.value, n * workers
        used = time.process_time()
        seconds = ask(client, [f"{k} " + "word " * 100 for k in range(total)])
        used = time.process_time() - used
        rate, latency = total / seconds, (server.took.value - before) / total
        of_ideal, of_server = rate * LATENCY / workers, rate * latency / workers
        good &= of_ideal >= 0.92
        print(f"{workers:7d} | {total:8d} | {seconds:7.2f} | {rate:10.1f} | "
              f"{100 * of_ideal:11.1f} % | {100 * of_server:22.1f} % | "
              f"{1e3 * used / total:12.2f} ms")
    sent, texts = [], [str(k % 50) for k in range(1000)]
    for _ in range(2):  # the second client is that of another run
        before, flags = server.seen.value, ServerFlags(judge_url=server.url, judge_workers=32)
        ask(ChatClient(flags, "m", folder / "same.jsonl"), texts)
        sent.append(server.seen.value - before)
    print(f"1000 questions, 50 of them different: {sent[0]} sent; asked again by a second run: "
          f"{sent[1]} sent")
    server.close()
    return good and sent == [50, 0]


# ----- Memory -----
def ask_in_blocks(url: str, path: str, marks: list[int], pipe) -> None:
    """A process that asks and drops the replies; sends what it takes after so many answers."""
    client = ChatClient(ServerFlags(judge_url=url, judge_workers=32), "m", path)
    for start in range(0, marks[-1], 200):
        ask(client, [f"{k} " + "word " * 300 for k in range(start, start + 200)])
        if start + 200 in marks:
            pipe.send(resident_mb())


def measure_memory(folder: Path, marks: list[int]) -> bool:
    """Print what the memory grows by between two numbers of answers; whether that is little."""
    server = Server(0.0, "word " * 400)
    ours, theirs = SPAWN.Pipe()
    given = server.url, str(folder / "memory.jsonl"), marks, theirs
    child = SPAWN.Process(target=ask_in_blocks, args=given)
    child.start()
    first, last = (ours.recv() for _ in marks)
    child.join()
    server.close()
    size = (folder / "memory.jsonl").stat().st_size / 1e6
    print(f"memory: {first:.1f} MB after {marks[0]} answers, {last:.1f} MB after {marks[1]}, with "
          f"a file of {size:.0f} MB")
    return last - first < 30


# ----- Start -----
def write_answers(path: Path, size: int) -> int:
    """Write a file of answers of so many bytes; their number."""
    n, written = 0, 0
    with path.open("wb") as file:
        while written < size:
            messages = [{"role": "user", "content": f"{n} " + "word " * 240}]
            record = {"address": "http://127.0.0.1:9/v1/chat/completions", "sample": 0,
                      "request": {"model": "m", "messages": messages, "max_tokens": 64},
                      "version": "1", "sent": {}, "nonce": "", "text": "VERDICT: " + "so " * 100,
                      "finish": "stop", "usage": [200, 8], "time": "2026-11-29T10:00:00Z"}
            record = {"key": answer_key(record), **record}
            n, written = n + 1, written + file.write(write_line(record)[1])
    return n


def start(path: str, pipe) -> None:
    """A process that makes a client; sends the seconds that it takes, and its highest memory."""
    began, before = time.perf_counter(), resident_mb()
    ChatClient(ServerFlags(judge_url="http://127.0.0.1:9"), "m", path)
    seconds = time.perf_counter() - began
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3 - before))


def measure_start(folder: Path, size: int) -> bool:
    """Print how long a first and a later start take; whether the later one is short."""
    n, found = write_answers(folder / "start.jsonl", size), []
    for _ in range(2):
        ours, theirs = SPAWN.Pipe()
        child = SPAWN.Process(target=start, args=(str(folder / "start.jsonl"), theirs))
        child.start()
        found.append(ours.recv())
        child.join()
    (first, most), (later, least) = found
    print(f"start: {first:.2f} s and {most:.0f} MB for {n} answers in {size / 1e6:.0f} MB that are "
          f"checked for the first time, {later:.2f} s and {least:.0f} MB later")
    return later < 2


def main() -> int:
    """Print what is measured; returns 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--only", nargs="+", choices=["speed", "memory", "start"],
                        default=["speed", "memory", "start"])
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    args = parser.parse_args()
    less, good = 10 if args.quick else 1, True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "speed" in args.only:
            good &= measure_speed(folder, args.workers, 400 // less)
        if "memory" in args.only:
            good &= measure_memory(folder, [2000 // less, 20000 // less])
        if "start" in args.only:
            good &= measure_start(folder, 200_000_000 // less)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
