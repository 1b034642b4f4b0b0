"""Constitutional AI, its supervised part (SL-CAI): learn from answers revised by principles.

Sampled answers are criticised and revised by principles drawn for each   (arXiv 2212.08073). The
loss is that of SFT on the revision. Critiques and revisions come from the model or from a server.

DEVIATION: trains on the last revision only; the paper on all.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import data
from eval import extra
from methods import candidates, merged_copy, record_name, token_step
from methods.candidates import SampleFlags, answered, not_kept, unanswered
from methods.flags import flag, rare

title = "SFT(IA)+constitutional"
needs, beside = "sft-ia", ("sft",)
kind = "candidates"
inspect = candidates.inspect


@dataclass
class Flags(SampleFlags):
    """What stage constitutional reads beside the common flags."""

    judge: Literal["self", "http"] = flag("self", "who writes critiques and revisions")
    principles: str = flag("", "text file, a principle per line (default: six of ours)", path=True)
    revisions: int = flag(1, "rounds of critique and revision", at_least=1)
    wordings: int = flag(10, "training wordings per task beside the instruction", at_least=0)
    augment: Literal["assign", "product"] = flag("assign", "one wording per instance, or all")
    pool_wordings: int = flag(6, "wordings per instance to sample under", at_least=1)
    fresh_wordings: int = rare(0, "sample under so many wordings unseen in SFT(IA)", at_least=0)


DEFAULTS = {"steps": 100, "batch_size": 16, "lr": 1e-4, "samples": 1}
TERMS = {"ce": "tokens"}
step = token_step


def check(cfg) -> None:
    """Raises ValueError for flags that do not fit together."""
    if not extra("judges", cfg.plain):
        raise ValueError("stage constitutional needs extras/judges. Leave out --plain.")
    if cfg.principles and not Path(cfg.principles).read_text(encoding="utf-8").split():
        raise ValueError(f"{cfg.principles} holds no principle. Expected one sentence per line.")


def collect(run) -> None:
    """revisions.jsonl: sampled answers with the history of their revisions."""
    cfg, path, principles = run.cfg, run.folder / "revisions.jsonl", []
    if cfg.principles:
        lines = Path(cfg.principles).read_text(encoding="utf-8").splitlines()
        principles = [line.strip() for line in lines if line.strip()]
    todo = not_kept(run, path, unanswered(run))
    run = replace(run, model=merged_copy(run.model))
    judges = extra("judges", cfg.plain)
    for chunk in run.chunks(todo, "revise"):
        run.guard.keep(path, judges.revise(run, answered(run, chunk), principles))


def items(run) -> list[dict]:
    """The last revision of each answer."""
    records, found, failures = data.read_records(run.folder / "revisions.jsonl"), [], Counter()
    for record in records:
        failures.update(turn["failure"] for turn in record["history"] if turn["failure"])
        if (record["revision"] or "").strip():
            document = run.document(record["wording"], record["input"], record["revision"])
            found.append({"documents": [document], "name": record_name(record)})
    causes = ", ".join(f"{n} {name}" for name, n in failures.most_common(3))
    run.say(f"constitutional: {len(found)} of {len(records)} answers were revised"
            + (f"; failures: {causes}." if causes else "."))
    return found
