"""A client of an OpenAI-compatible server that never loses a paid answer, nor asks for it again.

Every answer is on file before anyone sees it. Its key covers all that was sent but the nonce: the
address, the prompt, the settings, the number of the sample and the version of the prompts. Requests
that fail are tried again within limits; --max-requests and --budget hold for all clients of a run
together.
"""

import queue
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from extras.judges import questions as prompts
from extras.judges.answers import AnswerFile, answer_key, usable
from extras.judges.questions import JudgeStopped, Question, Reply, describe_problem
from extras.judges.server import OPTIONAL, TOO_LONG, Server, chat_address, read_key, redact
from methods.flags import check_flags as check_limits
from methods.flags import flag, spelled

WATCH_SECONDS = 0.1  # between two looks at the deadlines of what is under way
PROXY = re.compile(r"http://(\[[\da-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?/?")
TOP_LOGPROBS = 20  # the likeliest first tokens, as many as servers give
FAILURES_IN_A_ROW = 10  # requests that fail for good, with none answered between them


@dataclass
class ServerFlags:
    """The flags of a judge behind a server."""

    judge_url: str = flag("http://127.0.0.1:8000/v1", "address of an OpenAI-compatible server")
    judge_model: str = flag("", "the judge's name there (to compare several, with commas between)")
    judge_key_env: str = flag("JUDGE_API_KEY", "environment variable that holds the server's key")
    judge_cache: str = flag("", "file of all answers (default: judge.jsonl in --out)")
    judge_workers: int = flag(8, "requests under way at a time", at_least=1)
    judge_tries: int = flag(5, "tries per request", at_least=1)
    judge_timeout: float = flag(60.0, "seconds of silence from the server", above=0)
    judge_deadline: float = flag(300.0, "seconds for a request with all its tries", above=0)
    judge_proxy: str = flag("", "http://host:port (proxies of the environment are not used)")
    judge_ca: str = flag("", "certificates to trust instead of the usual ones", path=True)
    judge_max_tokens: int = flag(0, "let every answer have at least so many tokens", at_least=0)
    max_requests: int = flag(0, "stop before more requests than this (0: no limit)", at_least=0)
    budget: float = flag(0.0, "stop before spending more than this (0: no limit)", at_least=0)
    price_in: float = flag(0.0, "price of a million prompt tokens", at_least=0)
    price_out: float = flag(0.0, "price of a million completion tokens", at_least=0)
    max_unparsed: float = flag(0.1, "share of unread verdicts, of 100, that stops", at_least=0)
    verdict: Literal["line", "keyword"] = flag("line", "written, or the likelier of two words")


def check_flags(flags, asked: bool) -> None:
    """Raise ValueError for flags that cannot work, or are given though no server is `asked`."""
    given = ServerFlags(**{item.name: getattr(flags, item.name) for item in fields(ServerFlags)})
    for item in fields(ServerFlags):
        if not asked and getattr(given, item.name) != item.default:
            raise ValueError(describe_problem("not_asked", flag=spelled(item.name)))
    if not asked:
        return
    check_limits(given)
    if not given.judge_model.split(",")[0].strip():
        raise ValueError(describe_problem("no_model"))
    if given.budget and not (given.price_in or given.price_out):
        raise ValueError(describe_problem("no_prices", budget=given.budget))
    if given.judge_proxy and not PROXY.fullmatch(given.judge_proxy):
        raise ValueError(describe_problem("bad_proxy"))
    read_key(given.judge_key_env, chat_address(given.judge_url), given.judge_proxy)


def client_from_flags(flags, out, model: str = "") -> "ChatClient":
    """The client that the flags describe; its answers go to --judge-cache, or into folder `out`.

    Raises ValueError for flags that cannot work. `model` is one of several in --judge-model.
    """
    check_flags(flags, asked=True)
    cache = Path(flags.judge_cache or Path(out) / "judge.jsonl")
    cache.parent.mkdir(parents=True, exist_ok=True)
    return ChatClient(flags, (model or flags.judge_model).strip(), cache, ledger=RUN)


@dataclass
class Ledger:
    """What all clients of one run have sent and spent together."""

    requests: int = 0
    spent: float = 0.0
    held: float = 0.0  # what requests under way can cost at most
    clients: list = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, say: Callable[[str], None]) -> None:
        """Report what each client was asked and what it cost, if that is news."""
        for client in self.clients:
            if client.counts != client.reported:
                client.reported = Counter(client.counts)
                say(client.summary())

    def close(self, say: Callable[[str], None]) -> None:
        """The run is over, however it ended: report, and count from zero."""
        self.tell(say)
        self.requests, self.spent, self.held, self.clients = 0, 0.0, 0.0, []


RUN = Ledger()  # that of this process


class ChatClient:
    """Asks many questions at a time; flags: ServerFlags, or settings that hold its fields.

    Clients with the same `ledger` share their limits.
    """

    backoff = 0.5  # seconds before the second try; doubles with each, up to 16 times this

    def __init__(self, flags, model: str, cache, *, ledger: Ledger | None = None):
        self.flags, self.name, self.cache = flags, model, cache
        self.server, self.answers = Server(flags), AnswerFile(cache)
        self.lock = threading.Lock()
        self.halted, self.stopped = threading.Event(), None  # why nothing more can be asked
        self.sleep = self.halted.wait
        self.counts, self.reported, self.failures = Counter(), Counter(), Counter()
        self.spent, self.seen = 0.0, set()  # money; keys of answers
        self.in_a_row = 0  # requests that failed for good, without an answer between them
        self.dialect = {}  # what the server wants in place of OPTIONAL names; "" leaves one out
        for record in self.answers.records.values():
            if (record["address"], record["request"]["model"]) == (self.server.address, model):
                self.dialect = dict(record["sent"])
        self.ledger = ledger or Ledger()
        self.ledger.clients.append(self)

    def ask(self, questions: list[Question], *, temperature: float = 0.0,
            sample: int = 0) -> list[Reply]:
        """One reply per question, in order; equal requests are sent once, answered ones never.

        Raises JudgeStopped when nothing more can be asked.
        """
        if self.flags.verdict == "keyword":
            questions = [prompts.ask_for_keyword(question) for question in questions]
        keys, wanted, done = [], {}, queue.SimpleQueue()
        for question in questions:
            key, request = self.request(question, temperature, sample)
            keys.append(key)
            wanted[key] = key, request, question.nonce
        with self.answers.locked():
            known = self.answers.records.keys() & wanted.keys()
        replies = {key: self._read(key) for key in known}
        todo = [wanted[key] for key in wanted if key not in known]
        self._settle(cached=len(known), repeated=len(keys) - len(wanted))
        work, workers = iter(todo), []
        for _ in range(min(self.flags.judge_workers, len(todo))):
            # Daemons: no worker keeps a program alive that is told to end.
            workers.append(threading.Thread(target=self._work, args=(work, done), daemon=True))
        try:
            for worker in workers:
                worker.start()
            for _ in todo:
                key, reply = self._next(done)
                if isinstance(reply, BaseException):
                    raise reply
                replies[key] = reply
        except BaseException as error:
            self._finish(workers, error)
            if not isinstance(error, JudgeStopped):
                raise
            raise JudgeStopped(describe_problem(
                "saved", error=error, n=len(self.seen), cache=self.cache)) from None
        finally:
            self.answers.sync()
        return [prompts.read_keyword(question, replies[key])
                for question, key in zip(questions, keys, strict=True)]

    def _next(self, done: queue.SimpleQueue) -> tuple:
        """The next result of a worker. The deadlines of all of them are kept meanwhile."""
        while True:
            self.server.end_late()
            try:
                return done.get(timeout=WATCH_SECONDS)
            except queue.Empty:
                continue

    def _work(self, work: Iterator[tuple], done: queue.SimpleQueue) -> None:
        """Answer requests until there are none left. After an error, none is sent any more."""
        for key, request, nonce in work:
            reply = self.stopped
            if not reply:
                try:
                    reply = self._answer(key, request, nonce)
                except BaseException as error:
                    self._halt(error)
                    reply = error
            done.put((key, reply))

    def _finish(self, workers: list[threading.Thread], error: BaseException) -> None:
        """Let workers finish what is under way, which may be paid for, and begin nothing."""
        stopped = isinstance(error, (JudgeStopped, OSError))
        self._halt(error if stopped else JudgeStopped("stopped."))
        workers = [worker for worker in workers if worker.is_alive()]
        if workers and not isinstance(error, Exception):  # a signal: somebody is waiting
            print(describe_problem("finishing", seconds=self.flags.judge_deadline),
                  file=sys.stderr, flush=True)
        for worker in workers:
            while worker.is_alive():
                self.server.end_late()
                worker.join(WATCH_SECONDS)

    def request(self, question: Question, temperature: float, sample: int) -> tuple[str, dict]:
        """(key of the answer, all that the key covers)."""
        body = {"model": self.name, "messages": question.messages, "temperature": temperature,
                "max_tokens": max(question.max_tokens, self.flags.judge_max_tokens)}
        if question.one_token:
            body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if temperature > 0:
            body["seed"] = sample  # else a server with a fixed seed says the same in every sample
        request = {"address": self.server.address, "request": body, "sample": sample,
                   "version": prompts.PROMPT_VERSION}
        return answer_key(request), request

    def _answer(self, key: str, request: dict, own: str) -> Reply:
        """Send one request until it is answered, fails for good, or its tries or time are up."""
        flags, tries, cause = self.flags, 0, "no answer in time"
        until = time.monotonic() + flags.judge_deadline
        nonce, messages = prompts.draw_nonce(request["request"]["messages"], own)
        sent = request["request"] | {"messages": messages}
        while tries < flags.judge_tries and (left := until - time.monotonic()) > 0:
            held, dialect, body = self._reserve(sent), dict(self.dialect), {}
            for name, value in sent.items():
                if dialect.get(name, name):
                    body[dialect.get(name, name)] = value
            optional = [name for name in OPTIONAL if name in body and name not in dialect]
            kind, value, pause = self.server.exchange(body, optional, left)
            if kind == "answer":
                return self._record({"key": key, **request, "sent": dialect, "nonce": nonce,
                                     **value}, held)
            # A try that broke off may have been paid for: what it can have cost counts as spent.
            unsure = kind == "retry" and not value.startswith(("http", "no server"))
            self._settle(held, held if unsure else 0.0, possibly_paid=int(unsure))
            if kind == "stop":
                self._halt(JudgeStopped(redact(value, self.server.key)))
                raise self.stopped
            if kind == "dialect":
                self._adapt(value, dialect)
                continue
            tries, cause = tries + 1, value
            if kind == "fail":
                break
            if tries < flags.judge_tries:
                self._settle(retries=1)
                if pause is None:
                    pause = self.backoff * min(2 ** (tries - 1), 16) * random.uniform(0.75, 1)
                self.sleep(min(pause, max(0.0, until - time.monotonic())))
        return self._give_up(key, redact(cause, self.server.key), tries)

    def _reserve(self, body: dict) -> float:
        """Count a request; returns what it can cost at most. Raises JudgeStopped at a limit."""
        flags, book, size, problem = self.flags, self.ledger, 0, ""
        for message in body["messages"]:  # a token has a byte or more
            size += len(message["content"].encode(errors="surrogatepass")) + 16
        most = self._price(size, body["max_tokens"])
        with self.lock, book.lock:
            if 0 < flags.max_requests <= book.requests:
                problem = describe_problem("max_requests", n=flags.max_requests)
            elif 0 < flags.budget < book.spent + book.held + most:
                problem = describe_problem(
                    "budget", budget=flags.budget, spent=book.spent, held=book.held)
            if self.stopped or problem:
                self.stopped = self.stopped or JudgeStopped(problem)
                self.halted.set()
                raise self.stopped
            self.counts["requests"] += 1
            book.requests += 1
            book.held += most
        return most

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        flags = self.flags
        return (prompt_tokens * flags.price_in + completion_tokens * flags.price_out) / 1e6

    def _settle(self, held: float = 0.0, cost: float = 0.0, **counts: int) -> None:
        """Free what was held back for a request, book what it cost, add to the counts."""
        with self.lock, self.ledger.lock:
            self.spent += cost
            self.ledger.spent += cost
            self.ledger.held -= held
            self.counts.update(counts)

    def _halt(self, error: BaseException) -> None:
        """Let no worker begin another request."""
        with self.lock:
            self.stopped = self.stopped or error
        self.halted.set()

    def _adapt(self, name: str, tried: dict) -> None:
        """The server does not take `name`: from now on it gets another name, or nothing."""
        with self.lock:
            if self.dialect != tried:  # another worker has found out already
                return
            other = "max_completion_tokens" if name == "max_tokens" else ""
            self.dialect = {**tried, name: other}
        print(f"warning: {self.server.address} does not take {name}; from now on it gets "
              f"{other or 'no ' + name}.", file=sys.stderr)

    def _record(self, record: dict, held: float) -> Reply:
        """Write an answer down, then count it, then hand it out."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        text = redact(record["text"], self.server.key)
        self.answers.append({**record, "time": now, "text": text})
        prompt, completion = record["usage"] or (0, 0)
        cost = self._price(prompt, completion) if record["usage"] else held
        self._settle(held, cost, answered=1, prompt_tokens=prompt, completion_tokens=completion,
                     without_usage=int(not record["usage"]))
        self.in_a_row = 0
        return self._read(record["key"])

    def _read(self, key: str) -> Reply:
        """The answer on file as a reply."""
        record = self.answers.records[key]
        text, failure = usable(record)
        with self.lock:
            self.seen.add(key)
            self.failures.update([failure] * bool(failure))
        return Reply(text, failure, nonce=record.get("nonce", ""), first=record.get("first"))

    def _give_up(self, key: str, cause: str, tries: int) -> Reply:
        """Write a failed request down; it is asked again in the next run. Ten in a row stop."""
        self.answers.append({"failed": key, "cause": cause, "tries": tries})
        with self.lock:
            self.failures[cause.split(":")[0]] += 1
            self.in_a_row += not TOO_LONG.search(cause)
        problem = "in_a_row" if self.in_a_row >= FAILURES_IN_A_ROW else ""
        if cause == "no server":
            problem = "no_server"
        if problem:
            self._halt(JudgeStopped(describe_problem(
                problem, address=self.server.address, tries=tries, n=FAILURES_IN_A_ROW,
                cause=cause)))
        if self.stopped:
            raise self.stopped
        return Reply("", cause)

    def usage(self) -> dict:
        """All that was counted, for metrics.json."""
        names = ("requests", "answered", "cached", "repeated", "retries", "possibly_paid",
                 "prompt_tokens", "completion_tokens", "without_usage")
        return {"model": self.name, "address": self.server.address,
                **{name: self.counts[name] for name in names}, "cost": round(self.spent, 6),
                "dialect": dict(self.dialect), "failures": dict(sorted(self.failures.items()))}

    def summary(self) -> str:
        """The same in one line."""
        found = self.usage()
        parts = [f"{name.replace('_', ' ')} {value}" for name, value in found.items()
                 if value and name not in ("model", "address")]
        return f"judge {self.name}: {', '.join(parts)}."
