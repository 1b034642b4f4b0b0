"""A server of bare bytes, for what no HTTP library would send, and the client as it was before.

RawServer remembers the words of the requests that it got; `talk(send, word)` answers one of them.
"""

import contextlib
import json
import socket
import threading
import time

import requests
import urllib3
from chatserver import completion, number_of

from extras.judges.server import read_response


def response(text, *, head="HTTP/1.1 200 OK", **headers):
    """The bytes of a whole response that says a text."""
    body = json.dumps(completion(text)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": len(body)} | headers
    lines = [head, *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class RawServer:
    """Calls talk(send, number) for each request for "say NUMBER"; connections stay open."""

    def __init__(self, talk, context=None):
        self.talk, self.context, self.requests, self.connections = talk, context, [], []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.stop()

    def stop(self):
        """End all connections."""
        self.listener.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # closed
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections.append(connection)
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        try:
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True)
                self.connections.append(connection)
            with connection, connection.makefile("rb") as reader:
                while line := reader.readline():
                    size = 0
                    while line not in (b"\r\n", b""):
                        if line.lower().startswith(b"content-length:"):
                            size = int(line.split(b":")[1])
                        line = reader.readline()
                    number = number_of(json.loads(reader.read(size)))
                    self.requests.append(number)
                    self.talk(connection.sendall, number)
        except (OSError, ValueError):  # the client has gone
            pass


def drip(send, data, pause):
    """Send bytes one by one, for ever the same when they are at an end."""
    while True:
        for start in range(len(data)):
            send(data[start:start + 1])
            time.sleep(pause)


def kept_exchange(server, body, optional, left):
    """`Server.exchange` as it was: by requests, over one connection for each thread that is kept.

    It takes a 102 or 103 for the answer, and looks at its deadline between parts of a body only.
    """
    if not hasattr(server, "local"):
        server.local = threading.local()
    if not hasattr(server.local, "adapter"):
        server.local.adapter = requests.adapters.HTTPAdapter()
    request = requests.Request("POST", server.address, data=json.dumps(body)).prepare()
    until, data = time.monotonic() + left, b""
    timeout = min(5, left), min(server.flags.judge_timeout, left)
    try:
        with server.local.adapter.send(request, stream=True, timeout=timeout) as found:
            while chunk := found.raw.read1(1 << 14, decode_content=True):
                data += chunk
                if time.monotonic() > until:
                    return "retry", "no answer in time", None
            return read_response(found.status_code, found.headers, data, sent=optional)
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError):
        return "retry", "connection lost", None
