"""A chat-completions server on loopback whose every answer a test decides; it remembers what it was asked and what it sent."""

import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, finish="stop", *, prompt_tokens=1000, completion_tokens=5, **message):
    """The body of a chat completion."""
    return {"id": "x", "object": "chat.completion", "model": "m", "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}}


class ChatServer:
    """`decide(request, number)` returns what to do with a request, a dict: body (dict, str, bytes) and, if wanted, status, headers,
    delay (seconds), drop ("early": no answer, "late": half of it), drip (seconds between bytes).

    `requests` holds (parsed body, headers, path) in order of arrival, `sent` the parsed bodies that got a whole answer of status 200.
    """

    def __init__(self, decide=lambda request, number: {"body": completion("ok")}):
        self.decide, self.requests, self.sent, self.lock = decide, [], [], threading.Lock()
        self.visits = []                                            # headers of what came without a body
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args):
                pass

            def do_GET(self):
                outer.visits.append(dict(self.headers))
                self.reply({"body": {"data": [{"id": "m"}, {"id": "other"}]}})

            def do_POST(self):
                size = int(self.headers["Content-Length"])
                data = self.rfile.read(size)
                if len(data) < size:                                # the client died while it was sending
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
                body = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
                if plan.get("drop") == "early":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))     # reset, not a polite end
                    self.close_connection = True
                    return self.connection.close()
                self.send_response(plan.get("status", 200))
                for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **plan.get("headers", {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if plan.get("drop") == "late":
                    self.wfile.write(body[:len(body) // 2])
                    self.close_connection = True
                    return
                try:
                    for start in range(0, len(body), 1) if plan.get("drip") else [0]:
                        self.wfile.write(body[start:start + 1] if plan.get("drip") else body)
                        time.sleep(plan.get("drip", 0))
                    if request is not None and plan.get("status", 200) == 200:
                        with outer.lock:
                            outer.sent.append(request)
                except OSError:                                     # the client has gone
                    self.close_connection = True

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 256

            def handle_error(self, request, client_address):
                pass                                                # clients are killed on purpose

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
