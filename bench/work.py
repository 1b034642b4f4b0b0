"""What the benchmarks share: random work of fixed lengths, our models, one step of training.

Weights and tokens are random, and every system gets the same lengths. Nothing of the project is
imported before a function needs it, so that speed.py can time another checkout (--code).
"""

import contextlib
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# The model of speed.py, 56 million parameters.
SHAPE = {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64,
         "hidden_dim": 1376, "vocab_size": 32000, "context": 2048}
SIZES = {"documents": 16, "prompts": 80, "stream": 128, "groups": 4, "judged": 40}
SMALL = {"documents": 3, "prompts": 6, "stream": 8, "groups": 1, "judged": 4}  # --quick
RANK = 16


# ----- Random texts -----
def ragged(n: int, mean: int, low: int, high: int, seed: int) -> list[int]:
    """n lengths between low and high with a mean of about `mean`: many short, few long."""
    dice, lengths = random.Random(seed), []
    for _ in range(n):
        length = round(dice.lognormvariate(0, 0.6) * mean * 0.85)
        lengths.append(min(high, max(low, length)))
    return lengths


def tokens(n: int, seed: int, vocab_size: int = SHAPE["vocab_size"]) -> list[int]:
    """n random token ids."""
    dice = random.Random(seed)
    return [dice.randrange(3, vocab_size) for _ in range(n)]


def document(prompt: list[int], response: list[int]) -> dict:
    """A prompt without labels and a response with them."""
    labels = [-100] * len(prompt) + response
    return {"input_ids": prompt + response, "labels": labels, "truncated": 0}


def ranked_item(prompt: list[int], responses: list[list[int]]) -> dict:
    """An item of cat: the first response is better than the others."""
    n = len(responses)
    return {"documents": [document(prompt, response) for response in responses],
            "indices": {"better": [0] * (n - 1), "worse": list(range(1, n))},
            "values": {"weights": [1.0] + [0.0] * (n - 1)}}


def padded(rows: list[list[int]], fill: int, left: bool = False) -> torch.Tensor:
    """Rows of one length, (B, T)."""
    width, found = max(map(len, rows)), []
    for row in rows:
        padding = [fill] * (width - len(row))
        found.append(padding + row if left else row + padding)
    return torch.tensor(found)


def mask(rows: list[list[int]], left: bool = False) -> torch.Tensor:
    """1 for the tokens of `padded`, 0 for its padding, (B, T)."""
    return padded([[1] * len(row) for row in rows], 0, left)


# ----- The work of speed.py -----
def documents() -> list[dict]:
    """The examples of sft; the last quarter of each is labelled."""
    found = []
    for seed, length in enumerate(ragged(SIZES["documents"], 192, 32, 640, 1)):
        ids, labelled = tokens(length, seed), length // 4
        found.append(document(ids[:-labelled], ids[-labelled:]))
    return found


def count_labels(rows: list[dict]) -> int:
    """The labelled tokens of documents."""
    return sum(label != -100 for row in rows for label in row["labels"])


def sample_work() -> tuple[list[list[int]], list[int]]:
    """The prompts of sample, and how long each response is to be."""
    n = SIZES["prompts"]
    prompts = [tokens(length, seed) for seed, length in enumerate(ragged(n, 225, 60, 600, 2))]
    return prompts, ragged(n, 43, 4, 96, 3)


def rank_work() -> list[dict]:
    """The items of rank: a prompt of 300 tokens and four responses of 40."""
    items = []
    for seed in range(0, 10 * SIZES["groups"], 10):
        responses = [tokens(40, seed + 1 + j) for j in range(4)]
        items.append(ranked_item(tokens(300, seed), responses))
    return items


def judge_work() -> tuple[list[int], list[list[int]], list[int]]:
    """The header of judge, its items, the two words that are asked for."""
    lengths = ragged(SIZES["judged"], 60, 20, 160, 4)
    return tokens(600, 1), [tokens(n, 100 + k) for k, n in enumerate(lengths)], [17, 29]


def effort(workload: str, system: str, dtype) -> dict:
    """How often the work is timed, what comes of it, and what it takes: flops or bytes read."""
    c = SHAPE
    attention = 2 * c["dim"] * c["head_dim"] * (c["n_heads"] + c["n_kv_heads"])
    linears = c["n_layers"] * (attention + 3 * c["dim"] * c["hidden_dim"])  # met by every token
    head = c["dim"] * c["vocab_size"]  # met by every token that predicts
    if workload == "sft":
        made = documents()
        useful = sum(len(row["input_ids"]) for row in made)
        flops = 4 * useful * linears + 4 * count_labels(made) * head
        return {"times": 2, "useful": useful, "flops": flops}
    if workload == "sample":
        prompts, lengths = sample_work()
        read, new = sum(map(len, prompts)) + sum(lengths), sum(lengths)
        flops = 2 * (read * linears + new * head)
        return {"times": 1, "warm": False, "useful": new, "flops": flops}
    if workload == "stream":
        width = 1 if "int8" in system else dtype.itemsize
        return {"times": 3, "useful": SIZES["stream"],
                "bytes": linears * width + head * dtype.itemsize}
    if workload == "rank":
        n = SIZES["groups"]
        return {"times": 2, "useful": n, "flops": 4 * n * (460 * linears + 160 * head)}
    if workload == "judge":
        header, items, _ = judge_work()
        flops = 2 * (len(header) + sum(map(len, items))) * linears
        return {"times": 2, "useful": len(items), "flops": flops}
    return {"times": 1, "warm": False, "useful": 3600}


# ----- Our side -----
def shape():
    """The config of speed.py's model."""
    from model import ModelConfig

    return ModelConfig(**SHAPE)


@contextlib.contextmanager
def new_weights(device, dtype):
    """Inside, new parameters are random numbers of this type, on this device."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def own_model(config, dtype, *, device="cpu", adapt: bool = False, plain: bool = False):
    """A random model of ours, with `adapt` under LoRA on all linears; `plain`: without extras."""
    from lora import LoraConfig, apply_lora
    from model import Llama

    with new_weights(device, dtype):
        model = Llama(config)
    if not plain:
        from extras.fast import accelerate

        accelerate(model)
    if not adapt:
        return model.eval()
    return apply_lora(model, LoraConfig(rank=RANK, alpha=2 * RANK)).train()


def make_run(model, stage: str, **settings):
    """A run as train.py makes it, without texts and files."""
    from methods import Run
    from methods.finding import find_method
    from methods.settings import config_class
    from train import Alone

    method = find_method(stage)
    settings = config_class(method)(stage=stage, **settings)
    return Run(settings, method, model, None, None, [], Path(), Alone())


def gradients(run, items: list[dict]) -> None:
    """What train.py does for a step's gradients: batches, forward, backward."""
    from data import micro_batches
    from methods import collate
    from train import backward

    device = next(run.model.parameters()).device
    parts = micro_batches(items, run.cfg.micro_tokens)
    backward(run, [collate(part, run.model, device) for part in parts])


def training_step(model, loss):
    """A whole step as a trainer takes it; `loss` calls backward itself."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step():
        loss()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def own_step(model, items: list[dict], stage: str = "sft", **settings):
    """A step of one of our stages."""
    run = make_run(model, stage, **settings)
    return training_step(model, lambda: gradients(run, items))


def answer(model, prompts: list[list[int]], lengths: list[int], *, temperature: float = 1.0,
           batch_size: int = 32) -> None:
    """Responses of imposed lengths by `generate`, which knows one limit for all prompts."""
    from model import Sampling, generate

    def impose_length(row):
        row.most = int(row.stream.partition(",")[0])
    seeds = [f"{length},{number}" for number, length in enumerate(lengths)]
    generate(model, prompts, Sampling(max(lengths), temperature), seeds=seeds, eos_ids=[-1],
             batch_size=batch_size, watch=impose_length)


# ----- Memory -----
def memory(name: str) -> int:
    """Bytes of this process: VmRSS, what is resident now; VmHWM, the most there ever was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}. These benchmarks need Linux.")
