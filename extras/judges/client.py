"""A client of an OpenAI-compatible server that never loses a paid answer, nor asks for it again.

Every answer is on file before anyone sees it. Its key covers all that was sent but the nonce: the
address, the prompt, the settings, the number of the sample and the version of the prompts. Requests
that fail are tried again within limits; --max-requests and --budget hold for all clients of a run
together.
"""

import math
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from extras.judges import questions as prompts
from extras.judges.addresses import describe_ignored_proxies, explain, redact
from extras.judges.answers import EMPTY, AnswerFile, answer_key, usable
from extras.judges.dialects import INSTEAD, TOO_LONG, fold_system, name_optional, translate
from extras.judges.flags import ServerFlags, check_flags, read_extra, role_of
from extras.judges.limits import RUN, Ledger
from extras.judges.progress import Progress, warn
from extras.judges.questions import JudgeStopped, Question, Reply, describe_problem
from extras.judges.server import Server

__all__ = ["RUN", "ChatClient", "Ledger", "ServerFlags", "check_flags", "client_from_flags"]

WATCH_SECONDS = 0.1  # between two looks at the deadlines of what is under way
FAILURES_IN_A_ROW = 10  # requests that fail for good, with none answered between them
TOP_LOGPROBS = 20  # the likeliest first tokens, as many as servers give
EMPTY_TRIES = 2  # of a request whose answers are empty: each may be paid for
REFUSED = "http 429"
# What helps against a failure: the name of a sentence in texts.toml.
HINTS = {"cut at max_tokens": "hint_cut", "cut while thinking": "hint_cut", EMPTY: "hint_empty",
         REFUSED: "hint_rate"}


def client_from_flags(flags, out, model: str = "") -> "ChatClient":
    """The client that the flags describe; its answers go to --judge-cache, or into folder `out`.

    Raises ValueError for flags that cannot work. `model` is one of several in --judge-model. With
    flags.role = "server", sentences speak of --server and --server-model in place of the judge.
    """
    check_flags(flags, asked=True)
    cache = Path(flags.judge_cache or Path(out) / f"{role_of(flags)}.jsonl")
    cache.parent.mkdir(parents=True, exist_ok=True)
    return ChatClient(flags, (model or flags.judge_model).strip(), cache, ledger=RUN)


class ChatClient:
    """Asks many questions at a time; flags: ServerFlags, or settings that hold its fields.

    Clients with the same `ledger` share their limits.
    """

    backoff = 0.5  # seconds before the second try; doubles with each, up to 16 times this
    longest_backoff = 120  # the same, where a server refuses requests for their rate

    def __init__(self, flags, model: str, cache, *, ledger: Ledger | None = None):
        self.flags, self.name, self.cache = flags, model, cache
        self.server, self.answers = Server(flags), AnswerFile(cache)
        self.extra = read_extra(flags.judge_extra, self.server.key, self.server.role)
        self.lock = threading.Lock()
        self.halted, self.stopped = threading.Event(), None  # why nothing more can be asked
        self.sleep, self.clock = self.halted.wait, time.monotonic
        self.counts, self.reported, self.failures = Counter(), Counter(), Counter()
        self.spent = 0.0
        self.in_a_row = 0  # requests that failed for good, without an answer between them
        # What the server wants in place of OPTIONAL names; "" leaves one out.
        self.dialect = dict(self.answers.dialects.get((self.server.address, model), {}))
        self.ledger = ledger or Ledger()
        self.ledger.clients.append(self)
        self.pace = self.ledger.pace(self.server.address, flags.judge_rate)
        self.progress = Progress(f"{self.server.role} {model}")

    def ask(self, questions: list[Question], *, temperature: float = 0.0,
            sample: int = 0) -> list[Reply]:
        """One reply per question, in order; equal requests are sent once, answered ones never.

        A question without a nonce is sent as it is. Raises JudgeStopped when nothing more can be
        asked.
        """
        if self.flags.verdict == "keyword":
            questions = [prompts.ask_for_keyword(question) for question in questions]
        replies, done = {}, deque()
        keys = [self.request(question, temperature, sample)[0] for question in questions]
        wanted = dict(zip(keys, questions, strict=True))
        with self.answers.locked():
            known = [key for key in wanted if key in self.answers]
        for key in known:
            reply = self._reply(self.answers.read(key))
            if reply.failure != EMPTY:  # such an answer is asked for again
                replies[key] = reply
        todo = [key for key in wanted if key not in replies]
        self._settle(cached=len(replies), repeated=len(keys) - len(wanted))
        work, workers = iter([(key, wanted[key], temperature, sample) for key in todo]), []
        for _ in range(min(self.flags.judge_workers, len(todo))):
            # Daemons: no worker keeps a program alive that is told to end.
            workers.append(threading.Thread(target=self._work, args=(work, done), daemon=True))
        self.progress.begin(len(todo))
        try:
            for worker in workers:
                worker.start()
            for key, reply in self._watch(workers, done):
                if isinstance(reply, BaseException):
                    raise reply
                replies[key] = reply
                self.progress.add(reply.failure)
        except BaseException as error:
            self._finish(workers, error)
            if not isinstance(error, JudgeStopped):
                raise
            raise JudgeStopped(describe_problem(
                "saved", error=error, n=len(self.answers), cache=self.cache)) from None
        finally:
            self.progress.close()
            self.answers.sync()
        return [prompts.read_keyword(question, replies[key])
                for question, key in zip(questions, keys, strict=True)]

    def _watch(self, workers: list[threading.Thread], done: deque) -> Iterator[tuple]:
        """The workers' results, a few times a second: to be woken for each would cost them time.

        The deadlines of all of them are kept meanwhile.
        """
        while workers:
            workers[0].join(WATCH_SECONDS)
            workers = [worker for worker in workers if worker.is_alive()]
            self.server.end_late()
            self.progress.look()
            while done:
                yield done.popleft()

    def _work(self, work: Iterator[tuple], done: deque) -> None:
        """Answer requests until there are none left. After an error, none is sent any more."""
        for key, *asked in work:
            reply = self.stopped
            if not reply:
                try:
                    reply = self._answer(key, *asked)
                except BaseException as error:
                    self._halt(error)
                    reply = error
            done.append((key, reply))

    def _finish(self, workers: list[threading.Thread], error: BaseException) -> None:
        """Let workers finish what is under way, which may be paid for, and begin nothing."""
        stopped = isinstance(error, (JudgeStopped, OSError))
        self._halt(error if stopped else JudgeStopped("stopped."))
        workers = [worker for worker in workers if worker.is_alive()]
        if workers and not isinstance(error, Exception):  # a signal: somebody is waiting
            warn(describe_problem("finishing", seconds=self.flags.judge_deadline))
        for worker in workers:
            while worker.is_alive():
                self.server.end_late()
                worker.join(WATCH_SECONDS)

    def request(self, question: Question, temperature: float, sample: int) -> tuple[str, dict]:
        """(key of the answer, all that the key covers)."""
        request = self.make_request(question, temperature, sample)
        return answer_key(request), request

    def make_request(self, question: Question, temperature: float, sample: int) -> dict:
        """All that the key of the answer covers."""
        messages = question.messages
        if self.flags.judge_fold_system:
            messages = fold_system(messages)
        body = {"model": self.name, "messages": messages, "temperature": temperature,
                "max_tokens": max(question.max_tokens, self.flags.judge_max_tokens)}
        if question.one_token:
            body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if self.flags.judge_temperature == "none":
            del body["temperature"]
        if temperature > 0:
            body["seed"] = sample  # else a server with a fixed seed says the same in every sample
        return {"address": self.server.address, "request": body | self.extra, "sample": sample,
                "version": prompts.PROMPT_VERSION}

    def _answer(self, key: str, question: Question, temperature: float, sample: int) -> Reply:
        """One request, from its preparation to its answer on file, or to its failure."""
        request = self.make_request(question, temperature, sample)
        nonce, sent = "", request["request"]
        if question.nonce:
            nonce, messages = prompts.draw_nonce(sent["messages"], question.nonce)
            sent = sent | {"messages": messages}
        return self._send(key, request, sent, nonce)

    def _send(self, key: str, request: dict, sent: dict, nonce: str) -> Reply:
        """Send a request until it is answered, fails for good, or its tries or time are up.

        A server that refuses it for its rate uses up its time, but none of its tries. `sent` is
        what the key covers, with the nonce in its place.
        """
        flags, until, cause = self.flags, math.inf, "no answer in time"
        tries, refused, empty = 0, 0, []
        while tries < flags.judge_tries and self._take_turn(until):
            # The wait for the first turn is no part of the request's time.
            until = min(until, self.clock() + flags.judge_deadline)
            held, dialect = self._reserve(sent), dict(self.dialect)
            body = translate(sent, dialect)
            kind, value, pause = self.server.exchange(
                body, name_optional(body, dialect), until - self.clock())
            if kind == "answer":
                record = {"key": key, **request, "sent": dialect, "nonce": nonce, **value}
                if usable(record)[1] != EMPTY:
                    return self._record(record, held)
                self._pay(record, held)
                empty.append(record["text"])
                kind, value = "fail" if len(empty) == EMPTY_TRIES else "retry", EMPTY
            else:
                # A try that broke off may have been paid for: its highest cost counts as spent.
                unsure = kind == "retry" and not value.startswith(("http", "no server"))
                self._settle(held, held if unsure else 0.0, possibly_paid=int(unsure))
            if kind == "stop":
                self._halt(JudgeStopped(redact(value, self.server.key)))
                raise self.stopped
            if kind == "dialect":
                self._adapt(value, dialect)
                continue
            cause = value
            if cause == REFUSED:
                refused += 1
                self._hold_all(pause, refused)
                continue
            tries += 1
            if kind == "fail":
                break
            if tries < flags.judge_tries:
                self._settle(retries=1)
                if pause is None:
                    pause = self.backoff * min(2 ** (tries - 1), 16) * random.uniform(0.75, 1)
                self.sleep(min(pause, max(0.0, until - self.clock())))
        return self._give_up(key, redact(cause, self.server.key), tries + refused, empty)

    def _take_turn(self, until: float) -> bool:
        """Wait until a request may begin; whether that is in time."""
        while not self.halted.is_set():
            now = self.clock()
            if now >= until:
                return False
            wait = self.pace.enter(now)
            if not wait:
                break
            self.sleep(min(wait, until - now))
        return True  # where nothing may begin any more, `_reserve` says so

    def _hold_all(self, told: float | None, refused: int) -> None:
        """Let all workers pause as told; without a word longer and longer, as from the second time.

        refused: how often this request has been refused for its rate.
        """
        pause = self.backoff * min(2 ** (refused - 1), self.longest_backoff)
        if told is None:
            pause *= random.uniform(0.75, 1)
        else:
            pause = told if refused == 1 else max(told, pause)
        self._settle(retries=1)
        self.pace.hold(self.clock() + pause)

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

    def _adapt(self, refusal: str, tried: dict) -> None:
        """The server does not take a name: from now on it gets another name, or nothing."""
        name, _, reason = refusal.partition(":")
        other, shown = INSTEAD.get(name, ("", f"no {name}"))
        with self.lock:
            if self.dialect != tried:  # another worker has found out already
                return
            self.dialect = {**tried, name: other}
        warn(f"warning: {self.server.address} does not take {name}; from now on it gets {shown}. "
             f"(It said: {reason})")

    def _record(self, record: dict, held: float) -> Reply:
        """Write an answer down, then count it, then hand it out."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        text = redact(record["text"], self.server.key)
        kept = self.answers.append({**record, "time": now, "text": text}, replace=True)
        self._pay(record, held, answered=1)
        self.in_a_row = 0
        return self._reply(kept)

    def _pay(self, record: dict, held: float, **counts: int) -> None:
        """Book what an answer cost."""
        prompt, completion = record["usage"] or (0, 0)
        cached = record.get("cached", 0)
        if cached > prompt:  # then it is no part of it
            prompt += cached
        cost = self._price(prompt, completion) if record["usage"] else held
        self._settle(held, cost, prompt_tokens=prompt, completion_tokens=completion,
                     without_usage=int(not record["usage"]), **counts)

    def _reply(self, record: dict) -> Reply:
        """An answer on file as a reply."""
        text, failure = usable(record)
        with self.lock:
            self.failures.update([failure] * bool(failure))
        return Reply(text, failure, nonce=record.get("nonce", ""), first=record.get("first"))

    def _give_up(self, key: str, cause: str, tries: int, texts: list[str]) -> Reply:
        """Write a failed request down; it is asked again in the next run. Ten in a row stop.

        texts: those of its answers, which are empty but for thoughts.
        """
        record = {"failed": key, "cause": cause, "tries": tries}
        if any(texts):
            record["texts"] = [redact(text, self.server.key) for text in texts]
        self.answers.append(record)
        with self.lock:
            self.failures[cause.split(":")[0]] += 1
            self.in_a_row += cause != EMPTY and not TOO_LONG.search(cause)
        if cause == "no server" or self.in_a_row >= FAILURES_IN_A_ROW:
            self._halt(JudgeStopped(self._describe_stop(cause, tries)))
        if self.stopped:
            raise self.stopped
        return Reply("", cause)

    def _describe_stop(self, cause: str, tries: int) -> str:
        """Why nothing more is asked after this request, and what to do."""
        server, flags = self.server, self.flags
        if cause == "no server":
            text = explain("no_server", server.role, address=server.address, tries=tries)
            return text + describe_ignored_proxies(server.address, flags.judge_proxy)
        text = describe_problem(
            "in_a_row", address=server.address, n=FAILURES_IN_A_ROW, cause=cause)
        if cause in HINTS:
            text += " " + explain(HINTS[cause], server.role)
        return text

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
        text = f"{self.server.role} {self.name}: {', '.join(parts)}."
        for hint in sorted({HINTS[cause] for cause in self.failures if cause in HINTS}):
            text += " " + explain(hint, self.server.role)
        return text
