"""How fast is the project beside transformers, peft, trl and llama.cpp? Every figure from one run, peers and project in turn.

    python bench/speed.py                                   # all workloads, three rounds
    python bench/speed.py --only sft sample --dtypes float32 --rounds 1
    python bench/speed.py --profile sft own float32         # where the time of one goes

Each measurement is a process of its own: it builds the model, does the work once to warm up (but for sample, which takes minutes), then times it. "limit" is the share of
what this machine's plainest matrix products allow for the same arithmetic (measured here, in the same run); "grow" is how much
memory the work took beyond the loaded model. Weights and tokens are random; lengths are the same for everyone.

    sft      16 ragged examples (mean 192 tokens, a quarter labelled), LoRA of rank 16 on all linears, AdamW included; useful tokens/s
    sample   80 prompts (mean 225 tokens, nothing in common), answers of imposed lengths (mean 43, at most 96), temperature 1, 32 at a time; new tokens/s
    stream   one prompt of 64 tokens, 128 new ones, greedy; new tokens/s
    rank     groups of one better and three worse answers (40 tokens each) to one prompt of 300, LoRA, AdamW included; groups/s
    judge    40 items of about 60 tokens behind one header of 600, two words asked; items/s

Needs transformers, peft and trl; generate_batch wants transformers 5, llama.cpp the packages xllamacpp and gguf; what is absent is said.
"""

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch                                                # noqa: E402

CONFIG = {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "hidden_dim": 1376, "vocab_size": 32000, "max_position_embeddings": 2048}
LINEARS = 8 * (512 * 512 * 2 + 512 * 256 * 2 + 3 * 512 * 1376)      # weights that every token meets
HEAD = 512 * 32000                                          # ... and every token that is predicted
RANK = 16


# ---------------------------------------------------------------------------------------------------------------------
# The work


def ragged(n: int, mean: int, low: int, high: int, seed: int) -> list[int]:
    """n lengths between low and high whose mean is about `mean`, many short and few long."""
    dice = random.Random(seed)
    return [min(high, max(low, round(dice.lognormvariate(0, 0.6) * mean * 0.85))) for _ in range(n)]


def tokens(n: int, seed: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(3, CONFIG["vocab_size"]) for _ in range(n)]


def documents() -> list[dict]:
    """The examples of sft: ids and labels, the last quarter of each labelled."""
    made = []
    for k, length in enumerate(ragged(16, 192, 32, 640, 1)):
        ids = tokens(length, k)
        made.append({"input_ids": ids, "labels": [-100] * (length - length // 4) + ids[length - length // 4:], "cut": False})
    return made


def prompts() -> tuple[list[list[int]], list[int]]:
    """The prompts of sample, and how long every answer is to be."""
    return [tokens(length, k) for k, length in enumerate(ragged(80, 225, 60, 600, 2))], ragged(80, 43, 4, 96, 3)


def ranked(n: int = 4) -> list[dict]:
    """The groups of rank: a prompt of 300 tokens and four answers of 40, the first of them better."""
    groups = []
    for k in range(n):
        prompt = tokens(300, 10 * k)
        answers = [tokens(40, 10 * k + 1 + j) for j in range(4)]
        made = [{"input_ids": prompt + answer, "labels": [-100] * 300 + answer, "cut": False} for answer in answers]
        groups.append({"documents": made, "n_best": 1, "pairs": [(0, 1), (0, 2), (0, 3)], "name": str(k)})
    return groups


def judged() -> tuple[list[int], list[list[int]], list[int]]:
    """The header of judge, its items, the two words that are asked for."""
    return tokens(600, 1), [tokens(length, 100 + k) for k, length in enumerate(ragged(40, 60, 20, 160, 4))], [17, 29]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def memory(name: str) -> int:
    """A line of /proc/self/status, MB."""
    return int(dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())[name].split()[0]) // 1024


def timed(work, times: int, useful: float, warm: bool = True, **more) -> dict:
    """Warm up once, then the mean of `times` runs; memory beyond what was loaded before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")           # forget the peak of building
    loaded = memory("VmRSS")
    if warm:
        work()
    began = time.perf_counter()
    for _ in range(times):
        work()
    seconds = (time.perf_counter() - began) / times
    return {"rate": useful / seconds, "seconds": seconds, "grow": memory("VmHWM") - loaded, "peak": memory("VmHWM"), **more}


def profiled(work, *_, **__) -> dict:
    """In the place of `timed`: print which operators the second run of the work spends its time in."""
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=50))
    return {}


def busy() -> float:
    """CPU seconds that all processes of the machine have used."""
    return sum(map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:4])) / os.sysconf("SC_CLK_TCK")


def own_model(dtype, adapt: bool = False):
    from lora import LoraConfig, apply_lora
    from model import Llama, ModelConfig

    model = Llama(ModelConfig(**CONFIG)).init_weights(0).to(dtype)
    return apply_lora(model, LoraConfig(rank=RANK, alpha=2 * RANK, dropout=0.0)).train() if adapt else model.eval()


def peer_model(dtype, adapt: bool = False, float32_adapters: bool = True):
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
             "hidden_dim": "intermediate_size", "vocab_size": "vocab_size", "max_position_embeddings": "max_position_embeddings"}
    config = transformers.LlamaConfig(**{names[key]: value for key, value in CONFIG.items() if key in names}, attn_implementation="sdpa",
                                      bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"), autocast_adapter_dtype=float32_adapters).train() if adapt else model.eval()


def stepped(model, loss):
    """One whole step as a trainer takes it: `loss` calls backward by itself."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step():
        loss()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def padded(rows: list[list[int]], fill: int, left: bool = False) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[fill] * (width - len(row)) + row if left else row + [fill] * (width - len(row)) for row in rows])


# ---------------------------------------------------------------------------------------------------------------------
# sft


def packed_rows(made: list[dict], most: int) -> list[list[dict]]:
    rows, size = [[]], 0
    for document in made:
        if rows[-1] and size + len(document["input_ids"]) > most:
            rows.append([])
            size = 0
        rows[-1].append(document)
        size += len(document["input_ids"])
    return rows


def sft_own(dtype, stage="sft", groups=None, micro_tokens=None, **flags):
    import data
    import train

    model = own_model(dtype, adapt=True)
    groups = groups or [{"documents": [document]} for document in documents()]
    cfg = train.TrainConfig(stage=stage, **{"micro_tokens": micro_tokens} if micro_tokens else {}, **flags)

    def loss():
        batches = [train.collate(part, "cpu") for part in data.micro_batches(groups, cfg.micro_tokens)]
        train.backward(model, train.STAGES[stage], batches, cfg)
    return stepped(model, loss)


def sft_padded(dtype, rows: int = 16, sort: bool = False, labelled: bool = False):
    model, made = peer_model(dtype, adapt=True), documents()
    made = sorted(made, key=lambda document: len(document["input_ids"])) if sort else made
    total = sum(label != -100 for document in made for label in document["labels"])

    def loss():
        for start in range(0, len(made), rows):
            part = made[start:start + rows]
            ids, labels = padded([d["input_ids"] for d in part], 0), padded([d["labels"] for d in part], -100)
            mask = padded([[1] * len(d["input_ids"]) for d in part], 0)
            model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, num_items_in_batch=torch.tensor(total)).loss.backward()
    return stepped(model, loss)


def sft_packed(dtype, float32_adapters: bool = True, most: int = 512):
    """The best setting of transformers that was found: rows without padding of at most 512 tokens, logits of labelled places only."""
    model, rows = peer_model(dtype, True, float32_adapters), packed_rows(documents(), most)
    total = sum(label != -100 for row in rows for document in row for label in document["labels"])

    def loss():
        for row in rows:
            ids = torch.tensor([[i for d in row for i in d["input_ids"]]])
            places = torch.tensor([[i for d in row for i in range(len(d["input_ids"]))]])
            labels = torch.tensor([i for d in row for i in d["labels"]])
            wanted = (labels != -100).nonzero().squeeze(1)
            logits = model(input_ids=ids, position_ids=places, logits_to_keep=wanted - 1, use_cache=False).logits[0]     # with a cache documents would mix
            (torch.nn.functional.cross_entropy(logits.float(), labels[wanted], reduction="sum") / total).backward()
    return stepped(model, loss)


def sft_trl(dtype):
    """trl's SFTTrainer as it computes its loss, on the padded batch."""
    import datasets
    import trl

    made, model = documents(), peer_model(dtype, adapt=True)
    total = sum(label != -100 for document in made for label in document["labels"])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = trl.SFTTrainer(model, args=trl.SFTConfig(output_dir=folder, report_to=[], use_cpu=True, bf16=False, max_length=None),
                                 train_dataset=datasets.Dataset.from_list([{"input_ids": d["input_ids"], "labels": d["labels"]} for d in made]),
                                 processing_class=tiny_tokenizer())
    batch = {"input_ids": padded([d["input_ids"] for d in made], 0), "labels": padded([d["labels"] for d in made], -100),
             "attention_mask": padded([[1] * len(d["input_ids"]) for d in made], 0)}
    return stepped(model, lambda: trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(total)).backward())


def tiny_tokenizer():
    import tokenizers
    import transformers

    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def sft(system, dtype):
    useful = sum(len(document["input_ids"]) for document in documents())
    build = {"own": lambda: sft_own(dtype), "own --micro-tokens 512": lambda: sft_own(dtype, micro_tokens=512),
             "peft padded (default)": lambda: sft_padded(dtype), "peft sorted, rows of 4": lambda: sft_padded(dtype, 4, sort=True),
             "peft packed, labelled only": lambda: sft_packed(dtype),
             "peft packed, adapters in the base's type": lambda: sft_packed(dtype, False), "trl SFTTrainer": lambda: sft_trl(dtype)}[system]
    labelled = sum(label != -100 for document in documents() for label in document["labels"])
    return timed(build(), 2, useful, flops=4 * useful * LINEARS + 4 * labelled * HEAD)


# ---------------------------------------------------------------------------------------------------------------------
# sample, stream


class Lengths:
    """Imposes the answers' lengths on transformers' generate."""

    def __init__(self, start: int, wanted: list[int]):
        self.start, self.wanted = start, torch.tensor(wanted)

    def __call__(self, input_ids, scores, **more):
        return input_ids.shape[1] - self.start >= self.wanted


def sample_peer(dtype, sort: bool):
    model, (asked, wanted) = peer_model(dtype), prompts()
    order = sorted(range(len(asked)), key=lambda k: len(asked[k])) if sort else list(range(len(asked)))

    @torch.inference_mode()
    def work():
        for start in range(0, len(order), 32):
            part = order[start:start + 32]
            ids = padded([asked[k] for k in part], 0, left=True)
            mask = padded([[1] * len(asked[k]) for k in part], 0, left=True)
            model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=96, eos_token_id=None, pad_token_id=0,
                           stopping_criteria=[Lengths(ids.shape[1], [wanted[k] for k in part])])
    return work


def sample_batch(dtype):
    """generate_batch of transformers 5: continuous batching over a paged cache."""
    from transformers import GenerationConfig

    model, (asked, wanted) = peer_model(dtype), prompts()
    settings = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, max_new_tokens=96, eos_token_id=-1, pad_token_id=0)

    def work():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            manager = model.init_continuous_batching(generation_config=settings)
            manager.start()
            for ids, length in zip(asked, wanted):
                manager.add_request(ids, max_new_tokens=length)
            done = 0
            while done < len(asked):
                answer = manager.get_result(timeout=60)
                if answer is None:
                    raise RuntimeError("generate_batch gave no answer within a minute")
                done += answer.is_finished()
            manager.stop(block=True)
    return work


def sample_own(dtype, quantize: str = ""):
    from model import generate

    model, (asked, wanted) = own_model(dtype), prompts()
    return lambda: generate(model, asked, max_new_tokens=wanted, temperature=1.0, eos_ids=(), batch_size=32)


def sample(system, dtype):
    useful, (asked, wanted) = sum(prompts()[1]), prompts()
    if system == "llama.cpp":
        with llama_cpp(dtype, 32) as ask:
            return timed(lambda: ask(asked, wanted), 1, useful, warm=False, grow=0, peak=0)
    build = {"own": lambda: sample_own(dtype), "generate (default)": lambda: sample_peer(dtype, False), "generate, sorted": lambda: sample_peer(dtype, True),
             "generate_batch": lambda: sample_batch(dtype)}[system]
    return timed(build(), 1, useful, warm=False, flops=2 * (sum(map(len, asked)) + sum(wanted)) * LINEARS + 2 * sum(wanted) * HEAD)


def stream(system, dtype):
    asked, new = tokens(64, 1), 128
    if system.startswith("llama.cpp"):
        with llama_cpp("q8_0" if "q8_0" in system else dtype, 1, temperature=0) as ask:
            return timed(lambda: ask([asked], [new]), 2, new, grow=0, peak=0)
    if system.startswith("own"):
        from model import generate

        model = own_model(dtype)
        if "int8" in system:
            model = quantized(model)
        model.compiling = "compiled" in system
        return timed(lambda: generate(model, [asked], max_new_tokens=new, eos_ids=()), 3, new, bytes=weight_bytes(model))
    model = peer_model(dtype)
    how = {"generate (default)": {}, "generate, compiled": {"cache_implementation": "static"}}[system]
    if how:                                                 # compiled by hand: on a CPU generate does not do it by itself
        model.forward = torch.compile(model.forward, dynamic=False)
    ids = torch.tensor([asked])

    @torch.inference_mode()
    def work():
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0, **how)
    return timed(work, 3, new, bytes=weight_bytes(model))


def weight_bytes(model) -> int:
    """What every new token reads: all weights but the embedding."""
    return sum(w.numel() * w.element_size() for name, w in [*model.named_parameters(), *model.named_buffers()] if "embed_tokens" not in name)


def quantized(model):
    """The model with int8 linears, as load_model makes them."""
    from model import load_model, save_model

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        return load_model(folder, dtype=next(model.parameters()).dtype, quantize="int8").eval()


# ---------------------------------------------------------------------------------------------------------------------
# rank, judge


def rank_peer(dtype, labelled: bool):
    model, groups = peer_model(dtype, adapt=True), ranked()

    def loss():
        for group in groups:
            ids = torch.tensor([d["input_ids"] for d in group["documents"]])
            rows = slice(299, 339)
            logits = (model(input_ids=ids, use_cache=False, logits_to_keep=torch.arange(299, 339)) if labelled else model(input_ids=ids, use_cache=False)).logits
            logits = logits if labelled else logits[:, rows]
            logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 300:, None]).squeeze(-1)
            scores = logprobs.mean(1)
            (torch.relu(scores[1:] - scores[0]).sum() / 12 - logprobs[0].sum() / 160).backward()
    return stepped(model, loss)


def rank(system, dtype):
    groups = ranked()
    build = {"own": lambda: sft_own(dtype, "cat", groups), "peft, all logits (default)": lambda: rank_peer(dtype, False),
             "peft, answers' logits": lambda: rank_peer(dtype, True)}[system]
    return timed(build(), 2, len(groups), flops=len(groups) * (4 * (300 + 160) * LINEARS + 4 * 160 * HEAD))


def judge_peer(dtype, reuse: bool):
    import copy

    model, (header, items, words) = peer_model(dtype), judged()
    batch = 16 if reuse else 8
    order = sorted(range(len(items)), key=lambda k: len(items[k]))

    @torch.inference_mode()
    def work():
        past = model(input_ids=torch.tensor([header]), logits_to_keep=1, use_cache=True).past_key_values if reuse else None
        for start in range(0, len(order), batch):
            part = [items[k] for k in order[start:start + batch]]
            ends = torch.tensor([len(item) - 1 for item in part])
            if reuse:
                cache = copy.deepcopy(past)
                cache.batch_repeat_interleave(len(part))
                mask = torch.cat([torch.ones(len(part), len(header), dtype=torch.long), padded([[1] * len(i) for i in part], 0)], 1)
                hidden = model.model(input_ids=padded(part, 0), attention_mask=mask, past_key_values=cache).last_hidden_state
            else:
                whole = [header + item for item in part]
                hidden = model.model(input_ids=padded(whole, 0), attention_mask=padded([[1] * len(i) for i in whole], 0)).last_hidden_state
                ends = ends + len(header)
            model.lm_head(hidden[torch.arange(len(part)), ends]).float().log_softmax(-1)[:, words]
    return work


class Numbers:
    """A tokenizer whose text is the ids."""

    def encode_prompt(self, text):
        return [int(word) for word in text.split()]

    encode_continuation = encode_prompt


def judge_own(dtype):
    from eval import keyword_logprobs

    model, (header, items, words) = own_model(dtype), judged()
    prefix, suffixes = " ".join(map(str, header)), [" ".join(map(str, item)) for item in items]
    pairs = [tuple(f" {word}" for word in words)] * len(items)
    return lambda: keyword_logprobs(model, Numbers(), [prefix] * len(items), suffixes, pairs)


def judge(system, dtype):
    header, items, _ = judged()
    build = {"own": lambda: judge_own(dtype), "naive (default)": lambda: judge_peer(dtype, False), "cache reused by hand": lambda: judge_peer(dtype, True)}[system]
    return timed(build(), 2, len(items), flops=2 * (len(header) + sum(map(len, items))) * LINEARS)


# ---------------------------------------------------------------------------------------------------------------------
# llama.cpp

SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
params.n_parallel, params.n_ctx, params.warmup = int(sys.argv[3]), 1024 * int(sys.argv[3]), False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[4])
server = xllamacpp.Server(params)
time.sleep(3600)
"""


def gguf_file(path: Path, dtype) -> Path:
    """The random model as llama.cpp reads it; q and k are random, so their order does not matter to its speed."""
    import gguf

    model, writer = own_model(torch.float32), gguf.GGUFWriter(str(path), "llama")
    for name, value in (("context_length", 2048), ("embedding_length", 512), ("block_count", 8), ("feed_forward_length", 1376), ("head_count", 8), ("head_count_kv", 4),
                        ("layer_norm_rms_eps", 1e-5), ("rope_dimension_count", 64), ("vocab_size", 32000)):
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"t{k}".encode() for k in range(3, 32000))])
    writer.add_token_scores([0.0] * 32000)
    writer.add_token_types([2, 3, 3, *[1] * 31997])
    short = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    kind = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}[dtype]
    for name, weight in model.named_parameters():
        stem, weight = name.removesuffix(".weight"), weight.detach().numpy()
        block = stem.removeprefix("model.layers.").partition(".") if stem.startswith("model.layers.") else None
        full = f"blk.{block[0]}.{short[block[2]]}.weight" if block else f"{short[stem]}.weight"
        if weight.ndim == 1 or dtype == "float32":
            writer.add_tensor(full, weight)
        else:
            writer.add_tensor(full, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextlib.contextmanager
def llama_cpp(dtype, slots: int, temperature: float = 1.0):
    """Inside, a function (prompts, lengths) that has llama.cpp's server answer them, `slots` at a time."""
    import socket
    from concurrent.futures import ThreadPoolExecutor

    import requests

    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        file = gguf_file(Path(folder, "m.gguf"), str(dtype).removeprefix("torch."))
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [sys.executable, "-c", SERVER, str(file), str(port), str(slots), str(torch.get_num_threads())]
        process, session = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), requests.Session()
        session.trust_env = False
        try:
            for _ in range(300):
                with contextlib.suppress(requests.RequestException):
                    if session.get(f"http://127.0.0.1:{port}/health", timeout=1).status_code == 200:
                        break
                if process.poll() is not None:
                    raise RuntimeError("llama.cpp's server did not start")
                time.sleep(0.1)

            def one(job):
                body = {"prompt": job[0], "n_predict": job[1], "ignore_eos": True, "temperature": temperature, "cache_prompt": False, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
                reply = session.post(f"http://127.0.0.1:{port}/completion", json=body, timeout=600).json()
                assert reply["tokens_predicted"] == job[1], reply

            def ask(asked, wanted):
                with ThreadPoolExecutor(slots) as pool:
                    list(pool.map(one, zip(asked, wanted)))
            yield ask
        finally:
            process.kill()
            process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# The plan and the table

PLAN = {                                                    # workload: systems; the first is the peers' default
    "sft": ("peft padded (default)", "peft sorted, rows of 4", "peft packed, labelled only", "peft packed, adapters in the base's type", "trl SFTTrainer", "own", "own --micro-tokens 512"),
    "sample": ("generate (default)", "generate, sorted", "generate_batch", "llama.cpp", "own"),
    "stream": ("generate (default)", "generate, compiled", "llama.cpp", "llama.cpp q8_0", "own", "own, compiled", "own, int8"),
    "rank": ("peft, all logits (default)", "peft, answers' logits", "own"),
    "judge": ("naive (default)", "cache reused by hand", "own"),
}
UNITS = {"sft": "tok/s", "sample": "tok/s", "stream": "tok/s", "rank": "groups/s", "judge": "items/s"}


def machine(dtype) -> dict:
    """What plain operations reach here: GFLOP/s of the MLP's product at 512 rows; GB/s of reading and adding up all its weights.

    And GFLOP/s of 1, 32 and 512 rows through all its weights, as torch multiplies and as the project does while it samples.
    """
    from model import Linear, prepacked

    layers = torch.nn.ModuleList(Linear(512, 1376, bias=False) for _ in range(60)).to(dtype).requires_grad_(False)

    def rate(work, amount):
        work()
        best = 0.0
        for _ in range(5):
            began = time.perf_counter()
            work()
            best = max(best, amount / (time.perf_counter() - began))
        return best
    found = {"plain": [], "sampling": []}
    with torch.inference_mode():
        x, weight = torch.randn(512, 512).to(dtype), layers[0].weight
        gflops = rate(lambda: [torch.nn.functional.linear(x, weight) for _ in range(40)], 40 * 2 * 512 * 512 * 1376) / 1e9
        for rows in (1, 32, 512):
            found["plain"].append(rate(lambda: [torch.nn.functional.linear(x[:rows], layer.weight) for layer in layers], 60 * 2 * rows * 512 * 1376) / 1e9)
            with prepacked(layers, rows):
                found["sampling"].append(rate(lambda: [layer(x[:rows]) for layer in layers], 60 * 2 * rows * 512 * 1376) / 1e9)
        read = rate(lambda: [layer.weight.view(torch.float32).sum() for layer in layers], sum(layer.weight.nbytes for layer in layers)) / 1e9
    return {"gflops": gflops, "gbs": read, **found}


def measure(workload: str, system: str, dtype: str, threads: int) -> dict:
    """One measurement in a process of its own; {"error": why} where a peer is not there or fails."""
    before, began = busy(), time.perf_counter()
    command = [sys.executable, __file__, "--worker", workload, system, dtype, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    last = (done.stdout.strip().splitlines() or ["{}"])[-1]
    if done.returncode or not last.startswith("{"):
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}
    found = json.loads(last)
    elapsed = time.perf_counter() - began
    return {**found, "others": max(0.0, (busy() - before - found["cpu"]) / elapsed)}


def table(rows: list[dict], limits: dict) -> str:
    """Markdown; a row per system: median of the rounds, its ratios to the peers, the share of the limit."""
    lines = []
    for workload, dtype in dict.fromkeys((row["workload"], row["dtype"]) for row in rows):
        found = {}
        for row in rows:
            if (row["workload"], row["dtype"]) == (workload, dtype) and "rate" in row:
                found.setdefault(row["system"], []).append(row)
        rate = {system: statistics.median(row["rate"] for row in part) for system, part in found.items()}
        peers = [value for system, value in rate.items() if not system.startswith("own") and "q8_0" not in system]
        first = rate.get(PLAN[workload][0])
        lines += [f"\n**{workload}, {dtype}** ({UNITS[workload]})\n", "| system | rate | spread | x default | x best peer | of the limit | grow, MB |", "|---" * 7 + "|"]
        for system, part in found.items():
            row, limit = part[0], ""
            if "flops" in row:
                limit = f"{row['flops'] / statistics.median(r['seconds'] for r in part) / 1e7 / limits[dtype]['gflops']:.0f} %"
            elif "bytes" in row:
                limit = f"{row['bytes'] * rate[system] / 1e7 / limits[dtype]['gbs']:.0f} %"
            spread = 100 * (max(r["rate"] for r in part) - min(r["rate"] for r in part)) / rate[system]
            cells = [system, f"{rate[system]:.4g}", f"{spread:.0f} %", f"{rate[system] / first:.2f}" if first else "", f"{rate[system] / max(peers):.2f}" if peers and "8" not in system else "",       # eight bits are no peer of sixteen
                     limit, f"{statistics.median(r['grow'] for r in part):.0f}" if row["peak"] else ""]
            lines.append("| " + " | ".join(cells) + " |")
        missing = {row["system"]: row["error"] for row in rows if (row["workload"], row["dtype"]) == (workload, dtype) and "error" in row}
        lines += [f"\n{system}: {error}" for system, error in missing.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure in turn, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PLAN, default=list(PLAN))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--systems", nargs="+", help="only these, by a part of their names")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", default="", help="also append every measurement to this JSON Lines file")
    parser.add_argument("--profile", nargs=3, metavar=("WORK", "SYSTEM", "DTYPE"), help="profile one instead of measuring all")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.profile:
        globals()["timed"] = profiled
    if args.worker or args.profile:
        workload, system, dtype = args.worker or args.profile
        found = globals()[workload](system, getattr(torch, dtype) if hasattr(torch, dtype) else dtype)
        if args.worker:
            print(json.dumps({**found, "cpu": sum(os.times()[:4])}))
        return
    limits = {dtype: machine(getattr(torch, dtype)) for dtype in args.dtypes}
    print(f"{args.threads} threads; " + "; ".join(f"{dtype}: {limit['gflops']:.0f} GFLOP/s, {limit['gbs']:.1f} GB/s" for dtype, limit in limits.items()), flush=True)
    for dtype, limit in limits.items():
        print(f"{dtype}, GFLOP/s of 1, 32, 512 rows: " + "; ".join(f"{way} {', '.join(f'{value:.0f}' for value in limit[way])}" for way in ("plain", "sampling")), flush=True)
    rows, absent = [], {"llama.cpp": ("xllamacpp", "gguf"), "trl": ("trl", "datasets")}
    jobs = [(workload, dtype, system) for workload in args.only for dtype in args.dtypes for system in PLAN[workload]
            if not args.systems or any(part in system for part in args.systems)]
    for number in range(args.rounds):
        for workload, dtype, system in jobs:
            lacks = [name for key, names in absent.items() if system.startswith(key) for name in names if importlib.util.find_spec(name) is None]
            row = {"error": f"not installed: {', '.join(lacks)}"} if lacks else measure(workload, system, dtype, args.threads)
            rows.append({"workload": workload, "dtype": dtype, "system": system, "round": number, **row})
            said = f"{row['rate']:.4g} {UNITS[workload]}, others used {row['others']:.2f} cores" if "rate" in row else row["error"]
            print(f"round {number + 1} {workload} {dtype} {system}: {said}", flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows, limits))
    loud = sum(row.get("others", 0) > 0.25 for row in rows)
    if loud:
        print(f"\nDuring {loud} of {len(rows)} measurements other programs used more than a quarter of a core.")


if __name__ == "__main__":
    main()
