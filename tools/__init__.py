"""Small programs, one job each: `python -m tools.NAME --help`. What they share is here.

A program has a few flags of its own, and takes those of eval.py that say which model, which
questions, which judge and which folder.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from eval import fail, find_template, open_model, open_tokenizer
from eval import parse_flags as parse_eval_flags
from methods import merged_copy
from methods.flags import spelled

# Flags of eval.py about answers that no program here compares.
ANSWERS = ("--server", "--server-model", "--server-key-env", "--server-extra", "--responses",
           "--similar", "--samples", "--temperature", "--controls")


def make_main(work: Callable, about: str, *, demo: bool = False, **own) -> Callable:
    """main(argv=None) of a program: parse its flags, make the folder --out, work(settings).

    about: its docstring. own: {name: (default, help)}; a default of None must be given, a tuple is
    of choices. The exit status is 2 for a mistake, 1 if a judge cannot go on.
    """
    def main(argv: list[str] | None = None) -> int:
        parser = argparse.ArgumentParser(usage=about, allow_abbrev=False)
        parser.epilog = "The other flags are those of eval.py, see python eval.py --help."
        parser.error = fail
        for name, (default, help) in own.items():
            options = {"default": default, "type": type(default), "required": default is None}
            if isinstance(default, tuple):
                options = {"default": default[0], "choices": default}
            elif default is None:
                options["type"] = str
            elif isinstance(default, list):
                options |= {"type": str, "nargs": "+"}
            parser.add_argument(spelled(name), help=help, metavar="", **options)
        given, rest = parser.parse_known_args(argv)
        for word in rest:
            if word.partition("=")[0] in ANSWERS:
                fail(f"{word.partition('=')[0]} is for eval.py alone. Leave it out.")
        cfg = parse_eval_flags(rest, demo)
        vars(cfg).update(vars(given))
        for name, (default, _) in own.items():
            value, least = getattr(cfg, name), 0
            if type(default) is int:
                least = min(default, 1)
            if type(default) in (int, float) and not least <= value < float("inf"):
                fail(f"{spelled(name)} is {value}. Expected {least} or more.")
        from extras.runtime import run_program  # torch: after what flags can be wrong about

        return run_program(work, cfg)
    return main


def open_models(cfg) -> Iterator[tuple]:
    """(name, model, tokenizer, template) of the model, and of it with each adapter merged in."""
    tokenizer = open_tokenizer(cfg)
    for adapter in ["", *cfg.adapter]:
        model = merged_copy(open_model(cfg, adapter))
        yield adapter or Path(cfg.model).name, model, tokenizer, find_template(cfg, model, adapter)
