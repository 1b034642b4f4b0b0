"""Did a refactoring change a result? Keeps checksums of short runs of every stage, and compares.

    python tests/unchanged.py keep before.json --code DIR   # run the code in DIR (default: this)
    python tests/unchanged.py compare before.json           # run it again; says what differs

Kept are the checksums of adapters, models, records, metrics and logs (without the clock) of a few
steps from the demo's base, one thread, fixed seeds. They hold for one machine and one version of
torch, so they are not part of the repository. `--old` runs the commands in the spelling of commit
257974d. The commands stand in unchanged.txt.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
TASKS = ("purchase_colour", "purchase_who_what", "review_word")
KEPT = ("adapter_model.safetensors", "value_head.safetensors", "model.safetensors", "log.jsonl",
        "candidates.jsonl", "judged.jsonl", "refined.jsonl", "preferences.jsonl",
        "rollouts.jsonl", "metrics.json", "questions.jsonl", "judge.json", "canaries.json",
        "mask.json", "rewards.json", "probe.jsonl", "self_judge.json", "best_of.json",
        "verdicts.jsonl", "demo-base-outputs.json", "base-outputs.json")
CLOCK = ("seconds",)  # what a log may differ in
MEASURED = ("metrics.json", "questions.jsonl", "verdicts.jsonl", "best_of.json")


def read_commands() -> tuple[dict, dict, dict]:
    """unchanged.txt: {part of commands: text}, {run: (what it needs, command)}, {run: old one}."""
    text = Path(__file__).with_suffix(".txt").read_text()
    lines = re.sub("\n    +", " ", re.sub("(?m)^#.*\n", "", text)).splitlines()
    parts, runs, old = {}, {}, {}
    for line in filter(None, lines):
        kind, name, needed, command = re.fullmatch(
            r"(old )?(\{?[\w-]+\}?)(?: \(([\w-]+)\))?: (.*)", line).groups()
        if name.startswith("{"):
            parts[name] = command
        elif kind:
            old[name] = command
        else:
            runs[name] = needed or "", command
    return parts, runs, old


def make_world(folder: Path) -> None:
    """A few of the demo's tasks, and small files of every other kind of input."""
    demo = ROOT / "demo"
    for kind in ("tasks", "records", "llmbar"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        task = json.loads((demo / f"tasks/{name}.json").read_text())
        (folder / f"tasks/{name}.json").write_text(json.dumps(task))
    wordings = json.loads((demo / "paraphrases.json").read_text())
    (folder / "paraphrases.json").write_text(json.dumps({name: wordings[name] for name in TASKS}))
    records = json.loads((demo / "records/purchase_record.json").read_text())
    records["Instances"] = records["Instances"][:120]
    (folder / "records/purchase_record.json").write_text(json.dumps(records))
    examples, pairs, corpus, benchmark = [], [], [], []
    for k in range(16):
        examples.append({"instruction": f"give the colour of hat {k} .",
                         "input": "" if k % 2 else "anna has a red hat",
                         "output": "red hat " * (k % 3 + 1)})
        pairs.append({"prompt": f"what is hat {k} ?", "chosen": "red", "rejected": "a blue one"})
        document = [[f"anna bought hat {k} .", False], [" again :", False], [f" hat {k} ;", True],
                    ["</s>", True]]
        corpus.append(document[:4 - k % 2])
        benchmark.append({"input": f"name the colour of hat {k} .", "output_1": "red" * (k % 2 + 1),
                          "output_2": "a blue hat", "label": k % 2 + 1})
    for name, rows in (("examples", examples[:12]), ("pairs", pairs[:8]), ("corpus", corpus)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "llmbar/LLMBar_Natural.json").write_text(json.dumps(benchmark[:4]))


def checksums(out: Path) -> dict[str, str]:
    """{file: checksum} of everything that a run left and that must not change."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.name not in KEPT or "checkpoints" in path.parts:
            continue
        blob = path.read_bytes()
        if path.name in MEASURED:  # names of models are folders; 0 is 0.0
            rows = blob.replace(str(out.parent).encode(), b"").splitlines()
            rows = [b"".join(rows)] if path.suffix == ".json" else rows
            rows = [json.loads(row, parse_int=float) for row in rows]
            blob = json.dumps(rows, sort_keys=True).encode()
        elif path.name == "log.jsonl":
            rows = [json.loads(row) for row in blob.splitlines()]
            rows = [{name: x for name, x in row.items() if name not in CLOCK} for row in rows]
            blob = json.dumps(rows).encode()
        found[str(path.relative_to(out))] = hashlib.sha256(blob).hexdigest()[:16]
    return found


def run_all(code: Path, work: Path, names: set, use_old: bool) -> dict[str, dict]:
    """{run: {file: checksum}} of the named runs; what a run needs comes first. Two at a time."""
    parts, runs, old = read_commands()
    make_world(work / "world")
    done, futures, environment = {}, {}, {**os.environ, "OMP_NUM_THREADS": "1"}
    places = {"{world}": str(work / "world")} | {f"{{{name}}}": str(work / name) for name in runs}

    def fill(command):
        while "{" in command:
            command = re.sub(r"\{[\w-]+\}", lambda x: (places | parts)[x[0]], command)
        return command

    def run(name):
        needed, command = runs[name]
        if needed:
            futures[needed].result()
        command = old.get(name, command) if use_old else command
        words = fill(command.replace("{out}", str(work / name))).split()
        if not words[0].endswith(".py") and words[0] != "-m":
            words = ["train.py", "--stage", *words]
        if "{out}" not in command:
            words += ["--out", str(work / name)]
        with open(work / f"{name}.log", "w") as log:
            status = subprocess.run([sys.executable, *words], cwd=code, stdout=log, stderr=log,
                                    env=environment).returncode
        done[name] = checksums(work / name) if status == 0 else {"status": str(status)}
        print(f"{name}: {len(done[name])} files" if status == 0 else f"{name}: FAILED, see "
              f"{work / name}.log", flush=True)

    with ThreadPoolExecutor(2) as pool:
        for name in runs:  # in this order: what is needed stands before who needs it
            if name in names:
                futures[name] = pool.submit(run, name)
    for future in futures.values():
        future.result()
    return done


def wanted(names: list[str]) -> set:
    """The named runs, or all, and what they need."""
    _, runs, _ = read_commands()
    found = set(names or runs)
    while more := {runs[name][0] for name in found} - found - {""}:
        found |= more
    return found


def main() -> int:
    """Keep or compare; the exit status is 1 if something differs or failed."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("action", choices=("keep", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("names", nargs="*", help="runs (default: all)")
    parser.add_argument("--code", type=Path, default=ROOT)
    parser.add_argument("--old", action="store_true")
    parser.add_argument("--work", help="keep the run folders here")
    args = parser.parse_args()
    work = Path(args.work or tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    found = run_all(args.code, work, wanted(args.names), args.old)
    if args.action == "keep":
        args.file.write_text(json.dumps(found, indent=1) + "\n")
        return int(any("status" in files for files in found.values()))
    before, differs = json.loads(args.file.read_text()), 0
    for name in found:
        for file in sorted(before[name].keys() | found[name].keys()):
            old, new = before[name].get(file), found[name].get(file)
            if old != new:
                differs += 1
                print(f"{name}/{file}: was {old}, is {new}")
    print(f"{len(found)} runs, {differs} files differ.")
    return int(differs > 0)


if __name__ == "__main__":
    sys.exit(main())
