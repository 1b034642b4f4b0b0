"""Write a model with its adapter merged in as one folder, for other programs.

    python -m tools.merge --model DIR --adapter runs/x --out DIR

Weights keep the types that they are stored in, unless --dtype names another.
"""

import sys
from pathlib import Path

import lora
from data import read_json
from eval import open_tokenizer, pick_device
from extras import formats
from tools import make_main


def merge(cfg) -> None:
    """Write the folder."""
    if cfg.plain:
        raise ValueError("--plain has no part in a merge. Leave it out.")
    if len(cfg.adapter) > 1 or Path(cfg.out).resolve() == Path(cfg.model).resolve():
        raise ValueError("one adapter at most is merged, into another folder than the model's. "
                         "Give one --adapter, and another --out.")
    tokenizer, (device, dtype) = open_tokenizer(cfg), pick_device(cfg)
    model = formats.open_model(cfg.model, dtype=None if cfg.dtype == "auto" else dtype,
                               device=device)
    template = cfg.template
    for adapter in cfg.adapter:
        lora.merge_lora(formats.open_adapter(model, adapter), in_place=True)
        if Path(adapter, "config.json").is_file():
            template = template or read_json(Path(adapter, "config.json")).get("template")
    formats.export_model(model, tokenizer, template or model.config.prompt_template, cfg.model,
                         cfg.out, *cfg.adapter)
    print(f"wrote {cfg.out}: {', '.join(sorted(path.name for path in Path(cfg.out).iterdir()))}")


main = make_main(merge, __doc__)

if __name__ == "__main__":
    sys.exit(main())
