"""What will a run take? Memory, tokens and operations, by arithmetic; no weights are read.

    python -m tools.estimate --stage cat --model llama2-7b --quantize nf4 ...

The flags are those of `train.py --stage X`. --model may be a folder, a config.json or one of
SHAPES. Numbers are upper bounds, as if every document had --max-len tokens.
"""

import sys
from pathlib import Path

from extras.formats import read_config
from methods import torch
from methods.finding import find_method
from methods.pretrain import PRESETS
from methods.settings import parse_config, stage_config

SHAPES = PRESETS | {
    "tinyllama": {"dim": 2048, "n_layers": 22, "n_kv_heads": 4, "head_dim": 64, "hidden_dim": 5632,
                  "norm_eps": 1e-5},
    "llama2-7b": {"norm_eps": 1e-5, "context": 4096},
    "llama2-13b": {"dim": 5120, "n_layers": 40, "n_heads": 40, "n_kv_heads": 40,
                   "hidden_dim": 13824, "norm_eps": 1e-5, "context": 4096}}


def read_flags(argv: list[str]) -> tuple:
    """Settings and method of the run, and the config of its model."""
    from model import ModelConfig

    words = [part for word in argv for part in word.split("=", word.startswith("--"))]
    given = dict(zip(words, words[1:], strict=False))
    name = given.get("--model", "")
    if name in SHAPES:
        words += ["--model", "."]  # the last one counts, and "." is a path that exists
    elif name and not Path(name).exists():
        raise ValueError(f"--model {name} is no folder, no config.json and no known shape. Shapes: "
                         f"{', '.join(SHAPES)}.")
    judged = find_method(given.get("--stage", "cat")).kind == "judged"
    if judged and name and not {"--tasks", "--records"} & given.keys():
        words += ["--tasks", "."]  # answers are not read, so none need be given
    cfg, method = parse_config(words)
    name = name or cfg.model or cfg.preset  # pretrain makes a model of a preset's shape
    return cfg, method, ModelConfig(**SHAPES[name]) if name in SHAPES else read_config(name)


def count_parameters(cfg, config) -> tuple[int, int, int]:
    """All parameters, those of the blocks' linears, and those that are trained."""
    import lora
    from model import Llama

    with torch.device("meta"):
        model = Llama(config)
    everything, inside, adapters = sum(p.numel() for p in model.parameters()), 0, 0
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear):
            inside += part.weight.numel() if ".layers." in name else 0
            if not cfg.full and lora.matches(name, tuple(cfg.adapt) or lora.LLAMA_TARGETS):
                adapters += cfg.rank * (part.in_features + part.out_features)
    return everything, inside, adapters or everything


def documents_per_item(cfg) -> int:
    """How many documents an item has at most: answers that are compared, twins under a judgment."""
    known = {"expert": 1, "forward": 2, "rlaif": 2, "rlcd": 2}  # whatever their flags say
    if cfg.stage in known:
        return known[cfg.stage]
    worse = getattr(cfg, "max_worse", 0)
    gold = cfg.stage == "slic" and cfg.ce_target == "gold"
    if getattr(cfg, "condition", "") == "worse" and hasattr(cfg, "pairs"):
        return 2 * worse + gold  # the best answer under the wording of each other
    return getattr(cfg, "rso_keep", 1 + worse + getattr(cfg, "use_l1", False) + gold)


def estimate_memory(cfg, config, per_item: int) -> dict[str, tuple]:
    """{what: (bytes, remark)} of one process; an item of per_item documents is never torn."""
    everything, inside, trained = count_parameters(cfg, config)
    on_gpu = cfg.device.startswith("cuda") or cfg.device == "auto" and torch.cuda.is_available()
    size = 2  # bytes of a number
    if cfg.full or cfg.dtype == "float32" or cfg.dtype == "auto" and not on_gpu:
        size = 4
    packed = {"none": size, "int8": 1, "nf4": 0.5 + size / 64}[cfg.quantize]
    weights = (everything - inside) * size + inside * packed
    tokens = max(cfg.micro_tokens, per_item * cfg.max_len)
    # what a block keeps of a token: the inputs of both norms in float32, those of the linears and
    # of attention, and what the MLP computes
    heads = (config.n_heads + config.n_kv_heads) * config.head_dim
    block = 8 * config.dim + size * (2 * config.dim + 2 * heads + 4 * config.hidden_dim)
    kept = tokens * config.n_layers * block
    if cfg.checkpointing:
        kept = tokens * (config.n_layers * config.dim * size + block)
    # a frozen head's logits come in pieces, and only a vector of each token is kept
    whole = cfg.full or cfg.plain or "lm_head" in cfg.adapt
    logits = tokens * (config.vocab_size * 3 * size if whole else config.dim * size)
    optimiser = (12 if cfg.full else 16) * trained
    merged = 0 if cfg.full or cfg.quantize != "none" else weights
    places = getattr(cfg, "eval_batch", 0) * min(cfg.max_len, config.context)
    cache = 2 * places * config.n_layers * config.n_kv_heads * config.head_dim * size
    return {"weights": (weights, f"{everything:,} parameters"),
            "gradients and AdamW": (optimiser, f"{trained:,} trained parameters, float32"),
            "activations": (kept, f"of {tokens:,} tokens: --micro-tokens, or {per_item} documents"),
            "logits": (logits, "if all tokens are targets; usually a fraction"),
            "training": (weights + optimiser + kept + logits, "the four above"),
            "sampling": (weights + merged + cache, "weights, a merged copy, the cache")}


def estimate(argv: list[str]) -> None:
    """Print the estimate."""
    if not argv or "--help" in argv:
        print(__doc__)
        return
    cfg, method, config = read_flags(argv)
    per_item = documents_per_item(cfg)
    for what, (size, remark) in estimate_memory(cfg, config, per_item).items():
        print(f"{what:20} {size / 1e9:>14,.2f} GB   {remark}")
    stages = {cfg.stage: cfg.steps * cfg.batch_size * per_item}  # documents
    if method.needs and cfg.tasks:
        before = stage_config(cfg, method.needs)
        stages[method.needs] = before.steps * before.batch_size
    for stage, documents in stages.items():
        tokens = documents * cfg.max_len
        operations = (6 if cfg.full else 4) * count_parameters(cfg, config)[0] * tokens
        print(f"{stage:20} {tokens:>10,} tokens   {operations:.1e} operations, "
              f"{operations / 4e14 / 3600:.2g} hours at 400 TFLOP/s (arithmetic, not measured)")


def main(argv: list[str] | None = None) -> int:
    """Run `estimate`; returns the exit status."""
    from extras.runtime import run_program

    return run_program(estimate, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
