"""One command from start to end: streams, signals, processes, one line for an error, a summary."""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import data
from eval import fail, pick_device
from extras.judges import RUN, JudgeStopped
from extras.runtime import identity, ranks
from extras.runtime.guard import Guard, Stopped, remove_leftovers
from extras.runtime.streams import Disturbed, check_texts, lasting_streams

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
KEPT = "What was finished is kept"  # in the run folder


@lasting_streams()
def supervise(cfg, method, run_method) -> int:
    """Call run_method(cfg, method, guard) and return the exit status. For the main thread.

    2: a mistake in what was given; 1: failed; 143, 130 or 129: told to stop. Raises what is a bug.
    """
    started, guard, status, handlers = time.monotonic(), Guard(cfg), 0, {}
    for number in SIGNALS:
        if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):  # as by nohup
            handlers[number] = signal.signal(number, guard.hear)
    try:
        check_texts(cfg)
        identity.check_adapters(cfg)
        guard.size = ranks.join(cfg, method)
        run_method(cfg, method, guard)
        guard.first(lambda: summarise(cfg, time.monotonic() - started))
    except (Stopped, Disturbed, ValueError, RuntimeError, FloatingPointError, OSError,
            MemoryError) as error:
        status, message = explain(error, guard)
        if not message:
            raise
        complain(message, guard.rank)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        RUN.close(lambda message: print(message, flush=True))
        for file in filter(None, (guard.lock, guard.watch and guard.watch.file)):
            file.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    if "RANK" in os.environ:  # threads of gloo can abort a process that ends in the usual way
        sys.stdout.flush()
        os._exit(status)
    return status


def run_program(work, cfg) -> int:
    """Call work(cfg) and return the exit status, for programs that need nothing of a run.

    2: a mistake in what was given; 1: a judge cannot go on; 130: Ctrl-C; 141: nobody reads on, as
    behind `| head -1`. Raises what is a bug.
    """
    open_stderr()
    try:
        if hasattr(cfg, "adapter"):  # flags, not a list of words
            check_texts(cfg)
            check_program(cfg)
            identity.check_adapters(cfg)
        try:
            work(cfg)
        finally:
            RUN.close(lambda message: print(message, flush=True))  # what a server was asked
        if work.__name__ == "evaluate":  # eval.py
            identity.note_inputs(cfg)
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout once more
        return 141
    except (ValueError, OSError) as error:
        fail(str(error))
    except JudgeStopped as error:
        complain(str(error), 0)
        return 1
    except KeyboardInterrupt:
        complain("stopped by Ctrl-C.", 0)
        return 130
    return 0


def open_stderr() -> None:
    """Give a process whose stderr is closed, as by 2>&-, one that nobody reads."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")


def check_program(cfg) -> None:
    """Make the folder --out. Raises ValueError for flags of eval.py that would fail late."""
    for adapter in cfg.adapter:
        if not Path(adapter, "adapter_config.json").is_file():
            raise ValueError(f"no adapter at {adapter} (no adapter_config.json). Give a folder in "
                             "PEFT's format.")
    if cfg.max_len is not None and cfg.max_len < 1:
        raise ValueError(f"--max-len is {cfg.max_len}. Expected 1 or more.")
    if not 0 <= cfg.rouge_threshold <= 1:
        raise ValueError(f"--rouge-threshold is {cfg.rouge_threshold}. Expected a share between 0 "
                         "and 1.")
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {cfg.out} cannot be made ({error.strerror}). Give another "
                         "folder.") from None


def summarise(cfg, seconds: float) -> None:
    """Say, and write to summary.json, time, peak memory, and how fast the run's stage trained."""
    remove_leftovers(Path(cfg.out))
    memory = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if pick_device(cfg)[0] != "cpu":
        memory["gpu"] = torch.cuda.max_memory_allocated(pick_device(cfg)[0])
    used = ", ".join(f"{n / 1e9:.2f} GB ({place})" for place, n in memory.items())
    words, tokens, speed = "", None, None
    for row in data.read_records(Path(cfg.out) / "log.jsonl")[-1:]:
        tokens, took = row.get("tokens"), row.get("seconds")
        if not isinstance(tokens, int) or not isinstance(took, (int, float)):
            raise ValueError(f"{cfg.out}/log.jsonl: the last line lacks tokens or seconds. Restore "
                             "it, or use another --out.")
        speed = round(tokens / max(1e-9, took))
        words = f"; {cfg.stage} trained at {speed:,} tok/s"
    found = {"seconds": round(seconds, 1), "peak_memory_bytes": memory,
             "tokens_per_second": speed, "tokens": tokens}
    (Path(cfg.out) / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"done in {seconds / 60:.1f} min; peak memory {used}{words}.", flush=True)


def explain(error: BaseException, guard: Guard) -> tuple[int, str]:
    """The exit status for an error, and a sentence for the user; "" for a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, Stopped) or guard.heard and not guard.waiting:  # renamed by a library
        number, where = error.args if isinstance(error, Stopped) else (guard.heard, "")
        return 128 + number, (f"stopped by {signal.Signals(number).name}{where}. The same command "
                              "goes on from there.")
    if isinstance(error, OSError):
        text = f"{error.filename or guard.cfg.out}: {error.strerror or text}. "
        if not Path(guard.cfg.out).is_dir():
            return 2, text + "Nothing was started. Give another path, or make this one usable."
        return 1, (f"{text}{KEPT}; give another --out, or make room, and run the same command "
                   "again.")
    if isinstance(error, (ValueError, JudgeStopped, FloatingPointError, Disturbed)):
        return 2 if isinstance(error, ValueError) else 1, str(error)
    if isinstance(error, MemoryError) or "allocate" in text:  # torch raises RuntimeError
        return 1, (f"out of memory: {text[:200]}. {KEPT}; lower --micro-tokens or --eval-batch, or "
                   "add --checkpointing.")
    if guard.size > 1 and any(word in text.lower() for word in ("connection", "socket", "peer")):
        return 1, ("another process of this job ended before its work was done. "
                   f"{KEPT}; run the same command again.")
    return 1, ""


def complain(message: str, rank: int) -> None:
    """Print an error in one line, once for all processes, which count in their common store."""
    try:
        first = dist.distributed_c10d._get_default_store().add("complaints", 1) == 1
    except ValueError:  # they have not met
        first = True
    except RuntimeError:  # the process that kept the store has spoken and is gone
        first = False
    if first:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        print(f"error: {f'rank {rank}: ' if rank else ''}{line}", file=sys.stderr, flush=True)
