"""Other people's files: models, tokenizers, templates, tasks, records and adapters.

Each name is imported from its file on first use, so that reading tasks does not import torch.
"""

import importlib

DOORS = {
    "config": "read_config", "opening": "open_all", "weights": "open_model save_model",
    "peft": "open_adapter",
    "tokenizer": "open_tokenizer check_vocabulary", "export": "export_model",
    "templates": "find_template check_template encode_conversation keep_template",
    "tasks": "read_tasks add_paraphrases frame_bare_tasks questions",
    "records": "read_judged read_labelled read_corpus", "preferences": "read_candidates",
    "conversations": "read_examples read_instructions",
    "runs": "check_inputs fitting_records usable_candidates example_items"}


def __getattr__(name):
    for file, names in DOORS.items():
        if name in names.split():
            return getattr(importlib.import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def add_flags(add) -> None:
    """The flags of eval.py that only this room reads; `add` is argparse's add_argument."""
    add("--quantize", choices=("none", "int8", "nf4"), default="none", help="8 or 4 bits")
