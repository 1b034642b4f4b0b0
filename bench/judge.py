"""How fast is the judge client? Requests per second against a local server that takes 50 ms.

    python bench/judge.py                      # with 1, 8 and 32 workers
    python bench/judge.py --workers 8 --quick  # does it run?

The most that c workers can do is c / 0.05 s. The server is a process of its own; answers are
written to a file as always. The last line shows that equal requests are sent once, and that a
second run sends none. The exit status is 1 if a row is below 85 % of what is possible.
"""

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from extras.judges.client import ChatClient, ServerFlags  # noqa: E402
from extras.judges.questions import make_question  # noqa: E402

LATENCY = 0.05
MESSAGE = {"role": "assistant", "content": "VERDICT 0: same"}
BODY = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": MESSAGE}],
                   "usage": {"prompt_tokens": 200, "completion_tokens": 8}}).encode()
HEAD = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
RESPONSE = HEAD.format(len(BODY)).encode() + BODY


def serve(pipe, seen) -> None:
    """Answer every request after LATENCY; send the port, count in the shared number `seen`."""
    async def talk(reader, writer):
        while head := await reader.readline():
            length = 0
            while head not in (b"\r\n", b""):
                if head.lower().startswith(b"content-length:"):
                    length = int(head.split(b":")[1])
                head = await reader.readline()
            await reader.readexactly(length)
            seen.value += 1
            await asyncio.sleep(LATENCY)
            writer.write(RESPONSE)

    async def run():
        server = await asyncio.start_server(talk, "127.0.0.1", 0, backlog=256)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()
    asyncio.run(run())


def ask(client: ChatClient, texts: list[str]) -> float:
    """Ask about each text; the seconds that it takes."""
    questions = [make_question("Is it right?", {"response": text}) for text in texts]
    began = time.perf_counter()
    client.ask(questions)
    return time.perf_counter() - began


def main() -> int:
    """Print the table; returns 1 where a row is below 85 % of what is possible."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    (ours, theirs), seen = spawn.Pipe(), spawn.Value("i", 0)
    server = spawn.Process(target=serve, args=(theirs, seen), daemon=True)
    server.start()
    url, slow = f"http://127.0.0.1:{ours.recv()}", False
    print("workers | requests | seconds | per second | of c / 0.05 s")
    with tempfile.TemporaryDirectory() as folder:
        for workers in args.workers:
            flags = ServerFlags(judge_url=url, judge_workers=workers)
            client = ChatClient(flags, "m", Path(folder, f"{workers}.jsonl"))
            ask(client, [f"warm up {k}" for k in range(workers)])  # so that all is loaded
            n = workers * (10 if args.quick else 100)
            seconds = ask(client, [f"{k} " + "word " * 100 for k in range(n)])
            share = n / seconds / (workers / LATENCY)
            slow |= share < 0.85
            print(f"{workers:7d} | {n:8d} | {seconds:7.2f} | {n / seconds:10.1f} | "
                  f"{100 * share:5.1f} %")
        sent, texts = [], [str(k % 50) for k in range(1000)]
        for _ in range(2):  # the second client is that of another run
            before, flags = seen.value, ServerFlags(judge_url=url, judge_workers=32)
            ask(ChatClient(flags, "m", Path(folder, "same.jsonl")), texts)
            sent.append(seen.value - before)
    print(f"1000 questions, 50 of them different: {sent[0]} sent; asked again by a second run: "
          f"{sent[1]} sent")
    server.terminate()
    return int(slow or sent != [50, 0])


if __name__ == "__main__":
    sys.exit(main())
