"""Judges behind a server, which never lose a paid answer, and how far any judge can be trusted.

questions.py has prompts and verdicts (their words are in texts.toml). addresses.py has where a
server is and its key, server.py one exchange over HTTP, dialects.py what some servers do not take,
waits.py how long they ask to wait, answers.py the file of answers, flags.py the flags, limits.py
what all clients may spend, and progress.py the bar; client.py puts them together. judges.py has the
judges, local.py the model in a server's place; pairs.py and meta.py LLMBar; writers.py wordings and
revisions; recipes.py, self_instruct.py, evolving.py and dialogues.py training data that a model
writes; asked.py whom eval.py asks, run.py what train.py calls.
"""

from extras.judges.asked import all_answers, make_judge, settle_flags
from extras.judges.client import RUN, ServerFlags, check_flags, client_from_flags
from extras.judges.questions import JudgeStopped
from extras.judges.run import (
           add_flags,
           after_collecting,
           label_pairs,
           make_backend,
           pair_judge,
           revise,
           server_critic,
           server_judge,
)

__all__ = ["RUN", "JudgeStopped", "ServerFlags", "add_flags", "after_collecting", "all_answers",
           "check_flags", "client_from_flags", "label_pairs", "make_backend", "make_judge",
           "pair_judge", "revise", "server_critic", "server_judge", "settle_flags"]
