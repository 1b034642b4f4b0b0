"""Show which tokens CUT would unlearn in judged responses, in [brackets].

    python -m tools.masks --model DIR --adapter runs/cut/sft runs/cut --records FILE

The same text goes to OUT/report.md.
"""

import sys
from argparse import Namespace
from itertools import groupby
from pathlib import Path

from extras.formats import read_judged
from extras.reports.masks import LAMS, find_masks, score_masks
from extras.reports.tables import markdown, table
from methods import Run
from methods.critics import FAILED
from tools import make_main, open_models


def show_masks(cfg) -> None:
    """Print the responses with their masks, model by model."""
    if not cfg.detect_lam:
        raise ValueError("--detect-lam is 0. Expected a positive number.")
    records = [x for x in read_judged(cfg.records) if x["judgment"] not in (None, FAILED)]
    if not records:
        raise ValueError(f"{cfg.records} holds no unsatisfying response: nothing to flag.")
    parts, lam = [], cfg.detect_lam
    for name, model, tokenizer, template in open_models(cfg):
        settings = Namespace(max_len=cfg.max_len or model.config.context)
        run = Run(settings, None, model, tokenizer, template, [], Path(cfg.out), None)
        masks = find_masks(run, records, sorted({*LAMS, lam}))
        parts.append(f"## CUT's mask, {markdown(name)}, lambda {lam:g}")
        for record, mask in list(zip(records, masks, strict=True))[:10]:
            asked = record["instruction"] + " | " + record["input"]
            parts.append(f"- instruction: {markdown(asked, 110)}\n"
                         f"  judgment: {markdown(record['judgment'], 110)}\n"
                         f"  response: {markdown(mark(mask['texts'], mask['flagged'][lam]))}")
        scores = {f"{score.pop('lam'):g}": score for score in score_masks(masks)}
        parts.append(table("lambda", scores))
    Path(cfg.out, "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts))


def mark(texts: list[bytes], flags: list[bool]) -> str:
    """The text with each run of flagged tokens in [brackets]; a flagged EOS shows as </s>."""
    parts = []
    for flagged, run in groupby(zip(texts, flags, strict=True), key=lambda pair: pair[1]):
        part = b"".join(text or b"</s>" * flagged for text, _ in run)
        if flagged:
            bracket = b" [" if part.startswith(b" ") else b"["
            part = bracket + part.removeprefix(b" ") + b"]"
        parts.append(part)
    return b"".join(parts).decode(errors="replace").strip()


main = make_main(show_masks, __doc__, records=(None, "file of judged responses"),
                 detect_lam=(1.1, "flag tokens with p(token | judgment) > this * p(token)"))

if __name__ == "__main__":
    sys.exit(main())
