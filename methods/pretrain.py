"""Pre-training: next-token likelihood on documents, from a fresh model or a trained one.

The demo's base model is made with it (demo/make_base.py). --corpus holds a JSON list per line:
[[text, whether it is learnt], ...], where a last "</s>" stands for EOS.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import data
from eval import extra, open_model, open_tokenizer, pick_device
from methods import Run, save_model_folder, token_step, torch
from methods.flags import flag

title = "base"


@dataclass
class Flags:
    """What stage pretrain reads beside the common flags."""

    corpus: str = flag("", "JSON Lines of documents: [[text, is it learnt], ...]", path=True)
    preset: Literal["tiny", "demo"] = flag("demo", "shape of a new model")
    export: str = flag("", "folder for the finished model (default: RUN/model)")
    quantize: Literal["none"] = flag("none", "a base in 8 or 4 bits has nothing to train",
                                     rare=True)


DEFAULTS = {"full": True, "steps": 3000, "batch_size": 40, "lr": 2.5e-3, "weight_decay": 0.05}
TERMS = {"ce": "tokens"}
step = token_step
TINY = {"vocab_size": 300, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8,
        "hidden_dim": 64, "norm_eps": 1e-5, "context": 512}
DEMO = {"vocab_size": 1200, "dim": 192, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4,
        "head_dim": 48, "hidden_dim": 512, "norm_eps": 1e-5, "context": 1024,
        "tie_embeddings": True}
PRESETS = {"tiny": TINY, "demo": DEMO}


def check(cfg) -> None:
    """Raises ValueError for missing inputs."""
    if not cfg.corpus or not (cfg.tokenizer or cfg.model):
        raise ValueError("stage pretrain needs --corpus FILE and --tokenizer FILE; "
                         "demo/make_base.py makes both.")


def open_run(cfg, guard, method) -> Run:
    """A new model of --preset's shape, or --model trained on."""
    from model import Llama, ModelConfig

    tokenizer = open_tokenizer(cfg)
    if cfg.model:
        model = open_model(cfg).float()  # float32 weights; autocast makes their products cheap
    else:
        about = {"vocab_size": len(tokenizer), "bos_id": tokenizer.bos_id,
                 "eos_ids": [tokenizer.eos_id], "prompt_template": cfg.template or "plain"}
        model = init_weights(Llama(ModelConfig(**PRESETS[cfg.preset] | about)), cfg.seed)
        model.to(pick_device(cfg)[0])
        if extra("fast", cfg.plain):
            extra("fast", cfg.plain).accelerate(model, checkpointing=cfg.checkpointing)
    template = (extra("formats", cfg.plain) or data).find_template(model.config.prompt_template)
    n = sum(p.numel() for p in model.parameters())
    run = Run(cfg, method, model, tokenizer, template, [], Path(cfg.out), guard)
    run.say(f"pretrain: {n / 1e6:.2f} M parameters.")
    return run


def init_weights(model, seed: int):
    """Matrices normal(0, 0.02), biases 0, norms 1, from the seed alone. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            fresh = torch.empty(weight.shape).normal_(0.0, 0.02, generator=generator)
            weight.data.copy_(fresh)
        else:
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def items(run) -> list[dict]:
    """One document per line of the corpus."""
    found = []
    for number, segments in enumerate(read_corpus(run.cfg), 1):
        ends = segments[-1][0] == "</s>"
        if ends:
            segments = segments[:-1]
        document = data.encode_document(run.tokenizer, segments, max_len=run.cfg.max_len)
        if ends and len(document["input_ids"]) < run.cfg.max_len and not document["truncated"]:
            document["input_ids"].append(run.tokenizer.eos_id)
            document["labels"].append(run.tokenizer.eos_id)
        found.append({"documents": [document], "name": f"line {number}"})
    return found


def read_corpus(cfg) -> list[list]:
    """The documents of --corpus."""
    formats = extra("formats", cfg.plain)
    return formats.read_corpus(cfg.corpus) if formats else data.read_records(cfg.corpus)


def save(run, folder: Path) -> None:
    """Write the finished model and its tokenizer as a Hugging Face folder, in bfloat16."""
    target = Path(run.cfg.export or folder / "model")
    save_model_folder(run, target, torch.bfloat16)
    run.say(f"pretrain: wrote {run.cfg.export or run.folder / 'model'}.")
