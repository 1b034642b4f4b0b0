"""What the tests of this room share: a chat server that a test scripts, clients, questions.

ChatServer runs on loopback; every answer is decided by the test, and the server remembers what it
was asked and what it sent.
"""

import json
import socket
import struct
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from extras.judges.client import ChatClient, ServerFlags
from extras.judges.questions import Reply, make_question

FOLDER = tempfile.TemporaryDirectory()  # of answer files that a test does not look at
ITEM = {"instruction": "name the colour", "input": "a lamp", "target": "red"}


def completion(text, finish="stop", *, prompt_tokens=1000, completion_tokens=5, **message):
    """The body of a chat completion."""
    message = {"role": "assistant", "content": text, **message}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}


class ChatServer:
    """`decide(request, number)` returns what to do with a request, a dict: body (dict, str, bytes)
    and, if wanted, status, headers, delay (seconds), drop ("early": no answer, "late": half of it),
    drip (seconds between bytes).

    `requests` holds (parsed body, headers, path) in order of arrival, `sent` the parsed bodies that
    got a whole answer of status 200, `visits` the headers of what came without a body.
    """

    def __init__(self, decide=lambda request, number: {"body": completion("ok")}):
        self.decide, self.requests, self.sent, self.visits = decide, [], [], []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args):
                pass

            def do_GET(self):
                outer.visits.append(dict(self.headers))
                self.reply({"body": {"data": []}})

            def do_POST(self):
                size = int(self.headers["Content-Length"])
                data = self.rfile.read(size)
                if len(data) < size:  # the client died while it was sending
                    self.close_connection = True
                    return
                request = json.loads(data)
                with outer.lock:
                    outer.requests.append((request, dict(self.headers), self.path))
                    number = len(outer.requests)
                self.reply(outer.decide(request, number), request)

            def reply(self, plan, request=None):
                time.sleep(plan.get("delay", 0))
                body = plan.get("body", b"")
                if not isinstance(body, bytes):
                    body = (body if isinstance(body, str) else json.dumps(body)).encode()
                if plan.get("drop") == "early":  # a reset, not a polite end
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.close_connection = True
                    return self.connection.close()
                self.send_response(plan.get("status", 200))
                headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
                for name, value in (headers | plan.get("headers", {})).items():
                    self.send_header(name, value)
                self.end_headers()
                if plan.get("drop") == "late":
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return
                try:
                    size = 1 if plan.get("drip") else max(1, len(body))
                    for start in range(0, len(body), size):
                        self.wfile.write(body[start : start + size])
                        time.sleep(plan.get("drip", 0))
                    if request is not None and plan.get("status", 200) == 200:
                        with outer.lock:
                            outer.sent.append(request)
                except OSError:  # the client has gone
                    self.close_connection = True

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 256

            def handle_error(self, request, client_address):
                pass  # clients are killed on purpose

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()

    def texts(self):
        """The user's message of every request."""
        return [request["messages"][-1]["content"] for request, *_ in self.requests]


def make_client(server, cache="", ledger=None, **flags):
    """A client of model "m" that waits for next to nothing between tries."""
    url = server if isinstance(server, str) else server.url
    if not cache:
        with tempfile.NamedTemporaryFile(dir=FOLDER.name, delete=False) as file:
            cache = file.name
    flags = {"judge_url": url, "judge_model": "m"} | flags
    client = ChatClient(ServerFlags(**flags), flags["judge_model"], str(cache), ledger=ledger)
    client.backoff = 0.001
    return client


def fake_time(client):
    """Let a client sleep in no time; the list of its pauses."""
    now, pauses = [0.0], []

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += seconds
    client.sleep, client.clock = sleep, lambda: now[0]
    return pauses


def say(texts, **how):
    """Questions that say "say TEXT"."""
    return [make_question(f"say {text}", {}, **how) for text in texts]


def number_of(request):
    """The number K of a request for "say K"."""
    return int(request["messages"][-1]["content"].split()[1])


def lines(path):
    """The records of a JSON Lines file."""
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]


def fenced(question, name="response"):
    """What a question shows between the fences of that name."""
    text = question.messages[-1]["content"].partition(f"<{name} {question.nonce}>\n")[2]
    return text.partition(f"\n</{name} {question.nonce}>")[0]


class Says:
    """A backend that answers by a function of (question, prompt), and keeps what it was asked.

    {n} in an answer becomes the nonce of its question.
    """

    def __init__(self, decide):
        self.decide, self.asked, self.calls = decide, [], []

    def __call__(self, questions, **how):
        self.asked += questions
        self.calls += [how] * len(questions)
        replies = []
        for question in questions:
            reply = self.decide(question, question.messages[-1]["content"])
            if not isinstance(reply, Reply):
                reply = Reply(reply)
            replies.append(Reply(reply.text.replace("{n}", question.nonce), reply.failure))
        return replies


def item(response, **more):
    """An item to judge."""
    return ITEM | {"response": response} | more


def answered(server: ChatServer, n: int) -> bool:
    """Whether it has sent n whole answers; its threads note the last ones a moment after."""
    until = time.monotonic() + 5
    while len(server.sent) < n and time.monotonic() < until:
        time.sleep(0.01)
    return len(server.sent) == n
