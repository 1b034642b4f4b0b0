"""Answer a file of instructions, in the form that alpaca_eval's --model_outputs reads.

    python -m tools.outputs --model DIR --adapter runs/x --instructions FILE

Writes OUT/NAME-outputs.json for the model and for each adapter.
"""

import json
import re
import sys
from pathlib import Path

from eval import complete
from extras.formats import read_instructions
from tools import make_main, open_models


def write_outputs(cfg) -> None:
    """A JSON list of {instruction, output, generator, ...} for each model."""
    from model import Sampling

    rows = read_instructions(cfg.instructions)
    for name, model, tokenizer, template in open_models(cfg):
        prompts = [template.render(row["instruction"], row.get("input") or "", literal=True)
                   for row in rows]
        made = complete(model, tokenizer, prompts, Sampling(cfg.max_new_tokens),
                        batch_size=cfg.batch_size, max_len=cfg.max_len or None)
        generator, found = re.sub(r"[^\w.-]+", "-", name).strip("-"), []
        for row, answer in zip(rows, made, strict=True):
            asked = "\n".join(filter(None, (row["instruction"], row.get("input"))))
            found.append({"instruction": asked, "output": answer.text, "generator": generator})
            if isinstance(row.get("dataset"), str):
                found[-1]["dataset"] = row["dataset"]
        path = Path(cfg.out, f"{generator}-outputs.json")
        path.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        unfinished = sum(not answer.finished for answer in made)
        print(f"{name}: {len(found)} answers, {unfinished} of them unfinished after "
              f"--max-new-tokens {cfg.max_new_tokens}: {path}")


main = make_main(write_outputs, __doc__,
                 instructions=(None, "JSON or JSON Lines of {instruction, input}"))

if __name__ == "__main__":
    sys.exit(main())
