"""How fast is the judge client? Requests per second against a local server that takes 50 ms, for 1, 8 and 32 workers.

    python bench/judge.py

The most that c workers can do is c / 0.05 s. The server is a process of its own; answers are written to a file as always.
The last line shows that requests which are equal are sent once, and that a second run sends none.
"""

import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from judge import ChatClient, ClientConfig, make_question

LATENCY = 0.05
BODY = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "VERDICT 0: same"}}],
                   "usage": {"prompt_tokens": 200, "completion_tokens": 8}}).encode()
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


def serve(pipe, seen) -> None:
    """Answer every request after LATENCY; sends its port and counts in the shared number `seen`."""
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


def main() -> int:
    """Print the table; returns 1 where a row is below 90 % of what is possible."""
    spawn = multiprocessing.get_context("spawn")
    (ours, theirs), seen = spawn.Pipe(), spawn.Value("i", 0)
    server = spawn.Process(target=serve, args=(theirs, seen), daemon=True)
    server.start()
    url, slow = f"http://127.0.0.1:{ours.recv()}", False
    print("workers | requests | seconds | per second | of c / 0.05 s")
    with tempfile.TemporaryDirectory() as folder:
        for workers, n in ((1, 100), (8, 800), (32, 3200)):
            client = ChatClient(ClientConfig(url=url, model="m", cache=f"{folder}/{workers}.jsonl", workers=workers))
            client.ask([make_question("warm up", {"response": str(k)}) for k in range(workers)])          # connections, threads
            questions = [make_question("Is it right?", {"response": f"{k} " + "word " * 100}) for k in range(n)]
            start = time.perf_counter()
            client.ask(questions)
            seconds = time.perf_counter() - start
            share = n / seconds / (workers / LATENCY)
            slow |= share < 0.9
            print(f"{workers:7d} | {n:8d} | {seconds:7.2f} | {n / seconds:10.1f} | {100 * share:5.1f} %")
        before = seen.value
        questions = [make_question("Is it right?", {"response": str(k % 50)}) for k in range(1000)]
        ChatClient(ClientConfig(url=url, model="m", cache=f"{folder}/same.jsonl", workers=32)).ask(questions)
        first = seen.value - before
        ChatClient(ClientConfig(url=url, model="m", cache=f"{folder}/same.jsonl", workers=32)).ask(questions)
        second = seen.value - before - first
        print(f"1000 questions, 50 of them different: {first} sent; asked again by a second run: {second} sent")
    server.terminate()
    return int(slow or first != 50 or second != 0)


if __name__ == "__main__":
    sys.exit(main())
