"""How long does the whole CAT job take, beside the same steps with transformers and peft?

    python -m tools.convert smollm2 models/smollm2     # the model, once
    python bench/job.py                                # three rounds
    python bench/job.py --quick                        # does it run? one tiny round

"own" is `train.py --stage cat` on a pretrained model in bfloat16, with the sizes of
docs/results.md, "A pretrained model". First, one such run notes in --work what each phase works on.
"peer" (job_peer.py) is given exactly this: the examples of each step, the prompts and the lengths
of their answers, the judge's questions, the items of CAT. Each measured run is a new one, in a
process of its own, timed from the start of Python. The systems take turns.

    load          programs, model, tokenizer, and all tokenising
    SFT(IA)       45 steps of 24 examples, 5 wordings
    sampling      answers to 20 inputs of each task, under fresh wordings, temperature 1
    self-judging  what the self-judge is asked about these answers
    CAT           30 steps of 8 items
    evaluation    greedy answers to 15 questions of each task under 8 held-out wordings
    checks        of the self-judge, and of agreement before and after CAT; own only
    all else      metrics, report, checkpoints, files; own only

As the peer does less, there are two totals. Equal losses show that both do the same work. Those of
the first step of SFT(IA) agree within 1e-5 in float32; in bfloat16 the peer's is about 1 % higher
(perhaps since transformers also rounds the logits). Later, adapters that began with other random
numbers add to the difference. Memory is the most that a process had resident, without the bytes of
the weights in bfloat16.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from speed import ENVIRONMENT, busy
from work import ROOT, memory

JOB = {"--tasks": "demo/real/tasks", "--paraphrases": "demo/real/paraphrases.json",
       "--dtype": "bfloat16", "--max-new-tokens": 12, "--per-task": 24, "--wordings": 5,
       "--sft-steps": 45, "--sft-lr": 5e-4, "--fresh-wordings": 9, "--pool-per-task": 20,
       "--judge": "self", "--steps": 30, "--batch-size": 8, "--lr": 1e-4, "--split": "test",
       "--eval-per-task": 15, "--seed": 11}
SMALL = {"--sft-steps": 2, "--pool-per-task": 1, "--pool-wordings": 3, "--steps": 2,
         "--batch-size": 2, "--eval-per-task": 1, "--eval-wordings": 2, "--probe-inputs": 1}
SHARED = ("load", "SFT(IA)", "sampling", "self-judging", "CAT", "evaluation")
CHECKS, REST = "checks", "all else"
HEADER = "| phase | own, s | peer, s | peer / own | own, min to max | peer, min to max |"
TOKENIZER = "extras.formats.tokenizer_json.JsonTokenizer"
STAGES = {"sft-ia": "SFT(IA)", "cat": "CAT"}
# Where phases begin and end: {function or method: its phase, or that by the stage of its run}.
PARTS = {
    "methods.open_model": "load",
    "methods.open_tokenizer": "load",
    f"{TOKENIZER}.encode_prompt": "load",
    f"{TOKENIZER}.encode_continuation": "load",
    "train.train": STAGES,
    "methods.candidates.merged_copy": "sampling",
    "methods.candidates.answered": "sampling",
    "methods.candidates.rewarded": "self-judging",
    "methods.judge_auc.measure": CHECKS,
    "extras.judges.after_collecting": CHECKS,
    "methods.probe.measure": CHECKS,
    "train.merged_copy": "evaluation",
    "methods.Run.answers": "evaluation",
}


class Clock:
    """The seconds of each phase. Those of a phase inside another are not counted for the other."""

    def __init__(self, began: float):
        self.seconds, self.open, self.last = Counter(), ["load"], began

    def switch(self, phases: list[str]) -> None:
        """From now on the last one of these is timed."""
        now = time.monotonic()
        self.seconds[self.open[-1]] += now - self.last
        self.open, self.last = phases, now

    @contextlib.contextmanager
    def phase(self, name: str):
        """Inside, this phase is timed; checks have no phases inside."""
        before = self.open
        if before[-1] == CHECKS:
            name = CHECKS
        self.switch([*before, name])
        try:
            yield
        finally:
            self.switch(before)


# ----- Our side -----
def wrap(place: str, clock: Clock, phase="", note=None) -> None:
    """Time the calls of a function or method, given by its path; note(result, *its arguments)."""
    owner, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    work = getattr(owner, name)

    def wrapped(*args, **more):
        inside = phase or clock.open[-1]
        if isinstance(phase, dict):
            inside = phase[args[0].cfg.stage]
        with clock.phase(inside):
            found = work(*args, **more)
        if note and clock.open[-1] != CHECKS:
            note(found, *args)
        return found
    setattr(owner, name, wrapped)


class Notes:
    """What a run of ours works on, for the peer to do the same."""

    def __init__(self, clock: Clock):
        self.clock, self.stages, self.headers, self.texts = clock, {}, {}, {}
        self.work = {"sampling": [], "evaluation": [], "words": {}}

    def listen(self) -> None:
        """Note what goes through the functions that every phase uses."""
        notes = {"train.items_to_train": self.note_items, "model.generate": self.note_answers,
                 "methods.examples.keyword_logprobs": self.note_questions,
                 f"{TOKENIZER}.encode_prompt": self.note_text,
                 f"{TOKENIZER}.encode_continuation": self.note_text}
        for place, note in notes.items():
            wrap(place, self.clock, note=note)

    def note_items(self, items, run) -> None:
        """What a stage trains on."""
        self.stages[STAGES[run.cfg.stage]] = (run, items)

    def note_answers(self, made, model, prompts, *more) -> None:
        """Prompts, and how long the answers were, with EOS."""
        for ids, answer in zip(prompts, made, strict=True):
            self.work[self.clock.open[-1]].append((ids, len(answer)))

    def note_questions(self, found, model, tokenizer, prefixes, suffixes, keywords) -> None:
        """The judge's headers, what stands behind each, and where keywords are predicted."""
        from extras.fast.keywords import make_branches

        for prefix, suffix, pair in zip(prefixes, suffixes, keywords, strict=True):
            self.texts |= dict.fromkeys((prefix, suffix))
            header = self.headers.setdefault(prefix, {"header": tokenizer.encode_prompt(prefix)})
            words = self.work["words"].setdefault(pair[0], [])
            for ids, targets in make_branches(tokenizer, suffix, pair).items():
                places = sorted({place for _, place, _ in targets})
                header.setdefault(pair[0], []).append((ids, places))
                for _, _, token in targets:
                    if token not in words:
                        words.append(token)

    def note_text(self, ids, tokenizer, text, *more) -> None:
        """What is tokenised; the judge's texts, which are encoded several times, see above."""
        if self.clock.open[-1] != "self-judging":
            self.texts[text] = None

    def written(self) -> dict:
        """All of it, as JSON can hold it."""
        from lora import LLAMA_TARGETS

        for phase, (run, items) in self.stages.items():
            self.work[phase] = steps_of(run.cfg, items)
        names = "seed rank alpha clip weight_decay temperature".split()
        settings = {name: getattr(run.cfg, name) for name in names}  # those of CAT, the last
        weights = sum(p.nbytes for p in run.model.parameters() if not p.requires_grad)
        return self.work | {"settings": settings | {"targets": LLAMA_TARGETS}, "weights": weights,
                            "texts": list(self.texts), "self-judging": list(self.headers.values())}


def steps_of(cfg, items: list[dict]) -> dict:
    """A stage's items, constants of its loss, and of each step the rate and the items' numbers."""
    from data import batch_indices
    from train import learning_rate

    found, rates, steps = [], [], []
    for item in items:
        rows = item["documents"]
        plain = {"better": [], "worse": [], "weights": [1.0] * len(rows)}
        found.append({"documents": rows} | plain | item.get("indices", {}) | item.get("values", {}))
    for step in range(cfg.steps):
        rates.append(learning_rate(step, cfg))
        steps.append(batch_indices(len(items), cfg.batch_size, step, cfg.seed))
    loss = {"lam": getattr(cfg, "lam", 1.0), "margin": getattr(cfg, "margin", 0.0)}
    return {"items": found, "rates": rates, "steps": steps} | loss


def job_flags(args) -> list[str]:
    """The words behind `train.py --stage cat`, without --out."""
    job = JOB | SMALL if args.quick else JOB
    words = ["--no-compare", "--model", args.model]
    for name, value in job.items():
        words += [name, str(ROOT / value if "/" in str(value) else value)]
    return words


def run_own(args, clock: Clock, out: str, notes: Notes | None) -> dict:
    """Do the job in this process; returns its losses and a hash of what it sampled."""
    import train
    from data import read_records

    for place, phase in PARTS.items():
        wrap(place, clock, phase)
    if notes:
        notes.listen()
    if args.quick:  # else the judge's check takes most of the time
        pkgutil.resolve_name("methods.judge_auc").INPUTS = 11
    with clock.phase(REST):
        status = train.main(["--stage", "cat", "--out", out, *job_flags(args)])
    if status:
        raise RuntimeError(f"train.py ended with status {status}")
    losses = {}
    for folder, phase in (("sft-ia", "SFT(IA)"), ("", "CAT")):
        log = read_records(Path(out, folder, "log.jsonl"))
        losses[f"{phase} ce"] = [log[0]["ce"], log[-1]["ce"]]
    losses["CAT rank"] = [log[0]["rank"], log[-1]["rank"]]
    answers = [record["response"] for record in read_records(Path(out, "candidates.jsonl"))]
    return {"losses": losses, "answers": hashlib.sha256(repr(answers).encode()).hexdigest()}


# ----- Measuring -----
def be_worker(args) -> None:
    """Do a run in this process, and write what was found: "own", "peer", or "note" for the work."""
    torch.set_num_threads(args.threads)
    system, out, began = args.worker
    clock, notes = Clock(float(began)), None
    if system == "peer":
        import job_peer

        work = json.loads(Path(args.work, "work.json").read_text())
        found = {"losses": job_peer.run(args.model, work, clock)}
    else:
        if system == "note":
            notes = Notes(clock)
        found = run_own(args, clock, out, notes)
    clock.switch([REST])
    found |= {"seconds": clock.seconds, "peak": memory("VmHWM"), "cpu": sum(os.times()[:4])}
    if notes:
        found["work"] = notes.written()
    Path(f"{out}.json").write_text(json.dumps(found))


def measure(args, system: str) -> dict:
    """A run in a process of its own; what it prints goes to --work. Raises RuntimeError."""
    log = Path(args.work, f"{system}.log")
    with tempfile.TemporaryDirectory(dir=args.work) as folder, open(log, "w") as file:
        out, before, began = Path(folder, "run"), busy(), time.monotonic()
        command = [sys.executable, __file__, "--worker", system, str(out), str(began),
                   "--model", args.model, "--work", args.work, "--threads", str(args.threads)]
        done = subprocess.run(command + ["--quick"] * args.quick, stdout=file, stderr=file,
                              env=ENVIRONMENT)
        elapsed, used, result = time.monotonic() - began, busy() - before, Path(f"{out}.json")
        if done.returncode or not result.exists():
            raise RuntimeError(f"the run of {system} failed; see {log}")
        found = json.loads(result.read_text())
    return found | {"system": system, "others": max(0.0, (used - found["cpu"]) / elapsed)}


def make_work(args) -> dict:
    """The work in --work, noted first if it is not there. Raises ValueError if it is of another."""
    file = Path(args.work, "work.json")
    if not file.exists():
        print("one run of our own, not measured, notes what there is to do", flush=True)
        found = measure(args, "note")
        made = found["work"] | {"flags": job_flags(args), "answers": found["answers"]}
        file.write_text(json.dumps(made))
    work = json.loads(file.read_text())
    if work["flags"] != job_flags(args):
        raise ValueError(f"{file} is of a job with other settings. Give another --work, or delete "
                         "that file.")
    return work


# ----- The table -----
def line(title: str, own: list, peer: list, form: str = ".1f", compare: bool = True) -> str:
    """A row of the table from the numbers of each round; of one system there may be none."""
    middles, spreads, ratio = [], [], ""
    for every in (own, peer):
        middles.append(f"{statistics.median(every):{form}}" if every else "")
        spreads.append(f"{min(every):{form}} to {max(every):{form}}" if every else "")
    if own and peer and compare:
        ratio = f"{statistics.median(peer) / statistics.median(own):.2f}"
    return "| " + " | ".join([title, *middles, ratio, *spreads]) + " |"


def seconds(rows: list[dict], *phases: str) -> list[float]:
    """The seconds of some phases together, in each round."""
    return [sum(row["seconds"].get(phase, 0.0) for phase in phases) for row in rows]


def table(rows: list[dict], work: dict) -> str:
    """Markdown: a line for each phase, two totals, memory; below it the losses."""
    own = [row for row in rows if row["system"] == "own"]
    peer = [row for row in rows if row["system"] == "peer"]
    lines = [HEADER, "|---" * 6 + "|"]
    for phase in SHARED:
        lines.append(line(phase, seconds(own, phase), seconds(peer, phase)))
    lines.append(line("what both do", seconds(own, *SHARED), seconds(peer, *SHARED)))
    for phase in (CHECKS, REST):
        lines.append(line(phase, seconds(own, phase), []))
    every = (*SHARED, CHECKS, REST)
    totals = (seconds(found, *every) for found in (own, peer))
    lines.append(line("**total**", *totals, compare=False))  # the peer does less
    peaks = []
    for found in (own, peer):
        peaks.append([(row["peak"] - work["weights"]) / 2**20 for row in found])
    lines.append(line("most memory beside the weights, MB", *peaks, ".0f"))
    for row in (*own[:1], *peer[:1]):
        losses = []
        for name, (first, last) in row["losses"].items():
            losses.append(f"{name} {first:.4f}, {last:.4f}")
        lines.append(f"\nLosses of the first and last step, {row['system']}: {'; '.join(losses)}.")
    differ = sum(row["answers"] != work["answers"] for row in own)
    if differ:
        lines.append(f"\n{differ} of {len(own)} rounds of own sampled other answers than the run "
                     "that the peer's work is from.")
    return "\n".join(lines)


def describe(args, rows: list[dict]) -> str:
    """Threads, versions, and how busy the machine was."""
    names = ("torch", "transformers", "peft")[:1 if args.only == "own" else 3]
    words = [f"{name} {importlib.metadata.version(name)}" for name in names]
    others = [row["others"] for row in rows]
    return (f"{args.threads} threads; {', '.join(words)}; other programs used {min(others):.2f} to "
            f"{max(others):.2f} cores meanwhile.")


# ----- Start -----
def read_flags(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models/smollm2"),
                        help="folder of a LLaMA with tokenizer.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", help="folder for the work, logs and measurements (default: "
                        "runs/job, with --quick runs/job-quick)")
    parser.add_argument("--only", choices=("own", "peer"))
    parser.add_argument("--quick", action="store_true",
                        help="little work, one round: only shows that it runs")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.model = str(Path(args.model).resolve())
    args.work = args.work or str(ROOT / "runs/job") + "-quick" * args.quick
    if args.quick:
        args.rounds = min(args.rounds, 1)
    return args


def check(args) -> None:
    """Raises ValueError for what would fail later."""
    for name in ("config.json", "tokenizer.json"):
        if not Path(args.model, name).is_file():
            raise ValueError(f"no {name} in {args.model}. `python -m tools.convert smollm2 "
                             "models/smollm2` makes such a folder.")
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}. Expected 1 or more.")
    lacking = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    if lacking and args.only != "own":
        raise ValueError(f"not installed: {', '.join(lacking)}. Install requirements-test.txt, or "
                         "give --only own.")


def main(argv: list[str] | None = None) -> int:
    """Measure in turn, then print; returns 1 for a mistake in what was given, or a failed run."""
    args, rows = read_flags(argv), []
    if args.worker:
        be_worker(args)
        return 0
    try:
        check(args)
        Path(args.work).mkdir(parents=True, exist_ok=True)
        work = make_work(args)
        for number in range(1, args.rounds + 1):
            for system in ("own", "peer"):
                if args.only in (None, system):
                    rows.append(measure(args, system))
                    print(f"round {number}, {system}: {sum(rows[-1]['seconds'].values()):.1f} s, "
                          f"others used {rows[-1]['others']:.2f} cores", flush=True)
                    with open(Path(args.work, "rounds.jsonl"), "a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(rows, work)}\n\n{describe(args, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
