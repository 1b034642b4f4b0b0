"""The work of speed.py with transformers, peft and trl: their usual ways and their fastest.

Each function but the first returns what is timed. Shapes: B rows, T their length.
"""

import contextlib
import copy
import io
import tempfile

import torch
from work import (
    RANK,
    SIZES,
    count_labels,
    documents,
    judge_work,
    mask,
    new_weights,
    padded,
    rank_work,
    sample_work,
    shape,
    tokens,
    training_step,
)


def peer_model(config, dtype, *, device="cpu", adapt: bool = False, float32_adapters=True,
               attn_implementation: str = "sdpa"):
    """A random LLaMA of transformers in the shape of our config, with `adapt` under peft's LoRA."""
    import peft
    import transformers

    from model import HF_KEYS

    transformers.logging.set_verbosity_error()
    keys = {theirs: getattr(config, ours) for ours, theirs in HF_KEYS.items()}
    del keys["prompt_template"]
    with new_weights(device, dtype):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            **keys, pad_token_id=0, attn_implementation=attn_implementation))
    if not adapt:
        return model.eval()
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=float32_adapters).train()


# ----- sft -----
def sft_padded(dtype, rows: int = 16, sort: bool = False):
    """Padded batches of so many examples."""
    model, made = peer_model(shape(), dtype, adapt=True), documents()
    total = torch.tensor(count_labels(made))
    if sort:
        made.sort(key=lambda row: len(row["input_ids"]))

    def loss():
        for start in range(0, len(made), rows):
            part = made[start:start + rows]
            ids = [row["input_ids"] for row in part]
            labels = padded([row["labels"] for row in part], -100)
            model(input_ids=padded(ids, 0), attention_mask=mask(ids), labels=labels,
                  use_cache=False, num_items_in_batch=total).loss.backward()
    return training_step(model, loss)


def packed_rows(made: list[dict], most: int) -> list[list[dict]]:
    """Documents in rows of at most so many tokens."""
    rows, size = [[]], 0
    for document in made:
        if rows[-1] and size + len(document["input_ids"]) > most:
            rows.append([])
            size = 0
        rows[-1].append(document)
        size += len(document["input_ids"])
    return rows


def sft_packed(dtype, float32_adapters: bool = True, most: int = 512):
    """The best setting that was found: rows without padding, logits of labelled tokens only."""
    model = peer_model(shape(), dtype, adapt=True, float32_adapters=float32_adapters)
    rows, total = packed_rows(documents(), most), count_labels(documents())

    def loss():
        for row in rows:
            ids, positions, labels = [], [], []
            for document in row:
                ids += document["input_ids"]
                positions += range(len(document["input_ids"]))
                labels += document["labels"]
            labels = torch.tensor(labels)
            wanted = (labels != -100).nonzero().squeeze(1)
            # with a cache, documents would attend to one another
            logits = model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]),
                           logits_to_keep=wanted - 1, use_cache=False).logits[0]
            ce = torch.nn.functional.cross_entropy(logits.float(), labels[wanted], reduction="sum")
            (ce / total).backward()
    return training_step(model, loss)


def sft_trl(dtype):
    """trl's SFTTrainer as it computes its loss, on the padded batch."""
    import datasets
    import tokenizers
    import transformers
    import trl

    model, made = peer_model(shape(), dtype, adapt=True), documents()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), **names)
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in made]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = trl.SFTConfig(output_dir=folder, report_to=[], use_cpu=True, bf16=False,
                                 max_length=None)
        trainer = trl.SFTTrainer(model, args=settings, processing_class=tokenizer,
                                 train_dataset=datasets.Dataset.from_list(rows))
    ids, total = [row["input_ids"] for row in made], torch.tensor(count_labels(made))
    batch = {"input_ids": padded(ids, 0), "attention_mask": mask(ids),
             "labels": padded([row["labels"] for row in made], -100)}

    def loss():
        trainer.compute_loss(model, dict(batch), num_items_in_batch=total).backward()
    return training_step(model, loss)


# ----- sample, stream -----
class Lengths:
    """Imposes the lengths of the responses on `generate`."""

    def __init__(self, start: int, wanted: list[int]):
        self.start, self.wanted = start, torch.tensor(wanted)

    def __call__(self, input_ids, scores, **more):
        return input_ids.shape[1] - self.start >= self.wanted


def sample(dtype, sort: bool):
    """`generate` on left-padded batches of 32 prompts, each of which runs to its longest."""
    model, (prompts, wanted) = peer_model(shape(), dtype), sample_work()
    order = list(range(len(prompts)))
    if sort:
        order.sort(key=lambda k: len(prompts[k]))

    @torch.inference_mode()
    def work():
        for start in range(0, len(order), 32):
            part = order[start:start + 32]
            rows = [prompts[k] for k in part]
            ids = padded(rows, 0, left=True)
            stop = Lengths(ids.shape[1], [wanted[k] for k in part])
            model.generate(ids, attention_mask=mask(rows, left=True), do_sample=True,
                           temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=96,
                           eos_token_id=None, pad_token_id=0, stopping_criteria=[stop])
    return work


def sample_batch(dtype):
    """generate_batch of transformers 5: continuous batching over a paged cache."""
    from transformers import GenerationConfig, __version__

    if int(__version__.partition(".")[0]) < 5:
        raise RuntimeError(f"needs transformers 5, found {__version__}")
    model, (prompts, wanted) = peer_model(shape(), dtype), sample_work()
    settings = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, max_new_tokens=96,
                                eos_token_id=-1, pad_token_id=0)

    def work():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            manager = model.init_continuous_batching(generation_config=settings)
            manager.start()
            for ids, length in zip(prompts, wanted, strict=True):
                manager.add_request(ids, max_new_tokens=length)
            done = 0
            while done < len(prompts):
                result = manager.get_result(timeout=60)
                if result is None:
                    raise RuntimeError("generate_batch gave no answer within a minute")
                done += result.is_finished()
            manager.stop(block=True)
    return work


def stream(dtype, **how):
    """`generate` on one prompt, greedy."""
    model = peer_model(shape(), dtype)
    if how:  # compiled by hand: on a CPU `generate` does not do it itself
        model.forward = torch.compile(model.forward, dynamic=False)
    ids = torch.tensor([tokens(64, 1)])

    @torch.inference_mode()
    def work():
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                       max_new_tokens=SIZES["stream"], eos_token_id=None, pad_token_id=0, **how)
    return work


# ----- rank, judge -----
def rank(dtype, all_logits: bool):
    """CAT's loss of one group after the other, as rows of one length."""
    model, items = peer_model(shape(), dtype, adapt=True), rank_work()
    wanted = 0 if all_logits else torch.arange(299, 339)

    def loss():
        for item in items:
            ids = torch.tensor([row["input_ids"] for row in item["documents"]])  # (4, 340)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=wanted).logits
            if all_logits:
                logits = logits[:, 299:339]
            logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 300:, None]).squeeze(-1)
            scores = logprobs.mean(1)  # (4,)
            hinge = torch.relu(scores[1:] - scores[0]).sum() / (3 * len(items))
            (hinge - logprobs[0].sum() / (40 * len(items))).backward()
    return training_step(model, loss)


def judge(dtype, reuse: bool):
    """Both words of every item, with the header's cache copied by hand or with all read anew."""
    model, (header, items, words) = peer_model(shape(), dtype), judge_work()
    batch, order = 16 if reuse else 8, sorted(items, key=len)

    @torch.inference_mode()
    def work():
        if reuse:
            past = model(input_ids=torch.tensor([header]), logits_to_keep=1,
                         use_cache=True).past_key_values
        for start in range(0, len(order), batch):
            part = order[start:start + batch]
            whole = [header + item for item in part]
            if reuse:
                cache = copy.deepcopy(past)
                cache.batch_repeat_interleave(len(part))
                hidden = model.model(input_ids=padded(part, 0), attention_mask=mask(whole),
                                     past_key_values=cache).last_hidden_state
                ends = torch.tensor([len(item) - 1 for item in part])
            else:
                hidden = model.model(input_ids=padded(whole, 0),
                                     attention_mask=mask(whole)).last_hidden_state
                ends = torch.tensor([len(row) - 1 for row in whole])
            logits = model.lm_head(hidden[torch.arange(len(part)), ends])  # (B, V)
            logits.float().log_softmax(-1)[:, words]
    return work
