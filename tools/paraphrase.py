"""Write wordings of tasks' instructions with a model behind a server.

    python -m tools.paraphrase --number 8 --tasks DIR --judge-model NAME --out DIR

paraphrases.json has those that are kept, for --paraphrases; paraphrases.jsonl says of each where it
came from and why it was kept or not.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from eval import DEMO
from extras.formats import read_tasks
from extras.judges import client_from_flags
from extras.judges.writers import paraphrase
from tools import make_main


def write_paraphrases(cfg) -> None:
    """Ask for wordings, check them, and write both files."""
    client, out, kept = client_from_flags(cfg, cfg.out), Path(cfg.out), {}
    tasks = {task.name: task.definition for task in read_tasks(cfg.tasks or DEMO / "tasks")}
    rows = paraphrase(client.ask, tasks, cfg.number, model=client.name)
    (out / "paraphrases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        if row["kept"]:
            kept.setdefault(row["task"], []).append({"text": row["text"], "style": row["style"]})
    (out / "paraphrases.json").write_text(json.dumps(kept, indent=1) + "\n")
    reasons = Counter(row["reason"] or "kept" for row in rows)
    print(f"{len(rows)} wordings:", ", ".join(f"{n} {reason}" for reason, n in reasons.items()))


main = make_main(write_paraphrases, __doc__, number=(8, "wordings to write per task"))

if __name__ == "__main__":
    sys.exit(main())
