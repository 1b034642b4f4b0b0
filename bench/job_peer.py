"""The work of job.py with transformers and peft, as a user writes it who knows both well.

Training reads rows without padding and has logits of labelled tokens only. Answers come from
`generate`, on prompts sorted by length. The judge's header is read once for all that stands behind
it. Adapters have peft's own type, float32, and are merged while the model answers and judges.
Shapes: B rows, T their length, M labelled tokens, n documents, V vocabulary.
"""

import copy

import torch
from peers import Lengths
from work import mask, padded

from data import IGNORE_INDEX, micro_batches

ROW = 512  # tokens of a row in training; longer ones are slower, as sdpa's mask is (T, T)
SAMPLED, EVALUATED = 32, 64  # prompts side by side
HEADERS = 16  # headers of the judge side by side


def run(folder: str, work: dict, clock) -> dict:
    """Do all phases; returns {loss: [that of the first step, that of the last]}."""
    with clock.phase("load"):
        model, tokenizer = open_peer(folder, work["settings"])
        tokenizer(work["texts"])
    losses = train(model, work, "SFT(IA)", clock)
    with clock.phase("sampling"):
        model.merge_adapter()
        answer(model, tokenizer, work["sampling"], SAMPLED, do_sample=True,
               temperature=work["settings"]["temperature"], top_k=0, top_p=1.0)
    with clock.phase("self-judging"):
        judge(model.get_base_model(), work["self-judging"], work["words"])
        model.unmerge_adapter()
    losses |= train(model, work, "CAT", clock)
    with clock.phase("evaluation"):
        model.merge_adapter()
        answer(model, tokenizer, work["evaluation"], EVALUATED, do_sample=False)
    return losses


def open_peer(folder: str, settings: dict):
    """The model in bfloat16 under LoRA, and its tokenizer."""
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None  # the lengths of answers are imposed
    torch.manual_seed(settings["seed"])
    lora = peft.LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"],
                           target_modules=settings["targets"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora), tokenizer


# ----- Training -----
def train(model, work: dict, phase: str, clock) -> dict:
    """The steps of SFT(IA) or CAT; returns the losses, see `run`."""
    with clock.phase(phase):
        stage, settings, log = work[phase], work["settings"], []
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), fused=True,
                                      weight_decay=settings["weight_decay"])
        model.train()
        for rate, indices in zip(stage["rates"], stage["steps"], strict=True):
            items = [stage["items"][index] for index in indices]
            log.append(backward(model, items, stage))
            torch.nn.utils.clip_grad_norm_(parameters, settings["clip"])
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.eval()
    terms = ("ce", "rank") if phase == "CAT" else ("ce",)
    return {f"{phase} {term}": [log[0][term], log[-1][term]] for term in terms}


def backward(model, items: list[dict], stage: dict) -> dict:
    """Gradients of a step, row by row, by CAT's loss; without pairs that is the cross-entropy.

    An item is never divided between rows.
    """
    pairs = sum(len(item["better"]) for item in items)
    targets = sum(map(count_targets, items))
    means = {"rank": 0.0, "ce": 0.0}
    for row in micro_batches(items, ROW):
        logprobs, owners, n = row_logprobs(model, row)  # (M,), (M,)
        sums = logprobs.new_zeros(n).index_add(0, owners, logprobs)  # (n,)
        scores = sums / torch.bincount(owners, minlength=n)
        better, worse, weights, start = [], [], [], 0
        for item in row:
            better += [start + index for index in item["better"]]
            worse += [start + index for index in item["worse"]]
            weights += item["weights"]
            start += len(item["documents"])
        hinge = torch.relu(stage["margin"] - scores[better] + scores[worse]).sum()
        ce = -(torch.tensor(weights) * sums).sum()
        terms = {"rank": hinge / max(1, pairs), "ce": stage["lam"] * ce / targets}
        sum(terms.values()).backward()
        for term, value in terms.items():
            means[term] += float(value.detach())
    return means


def count_targets(item: dict) -> float:
    """Labelled tokens, weighted as in the cross-entropy."""
    total = 0.0
    for document, weight in zip(item["documents"], item["weights"], strict=True):
        total += weight * sum(label != IGNORE_INDEX for label in document["labels"])
    return total


def row_logprobs(model, items: list[dict]):
    """Log-probabilities of the labelled tokens of a row, the document of each, and n."""
    ids, positions, labels, owners, n = [], [], [], [], 0
    for item in items:
        for document in item["documents"]:
            ids += document["input_ids"]
            positions += range(len(document["input_ids"]))
            labels += document["labels"]
            owners += [n] * len(document["input_ids"])
            n += 1
    labels = torch.tensor(labels)
    wanted = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # (M,)
    # With a cache, documents would attend to one another.
    logits = model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]),
                   logits_to_keep=wanted - 1, use_cache=False).logits[0]  # (M, V)
    ce = torch.nn.functional.cross_entropy(logits.float(), labels[wanted], reduction="none")
    return -ce, torch.tensor(owners)[wanted], n


# ----- Answering and judging -----
@torch.inference_mode()
def answer(model, tokenizer, asked: list[tuple], batch: int, **how) -> None:
    """`generate` on left-padded batches, each of which runs to its longest answer.

    asked: [(ids of a prompt, length of its answer), ...].
    """
    asked = sorted(asked, key=lambda row: len(row[0]))
    for start in range(0, len(asked), batch):
        prompts, lengths = zip(*asked[start:start + batch], strict=True)
        ids = padded(prompts, 0, left=True)  # (B, T)
        stop = Lengths(ids.shape[1], lengths)
        made = model.generate(input_ids=ids, attention_mask=mask(prompts, left=True),
                              max_new_tokens=max(lengths), pad_token_id=0,
                              stopping_criteria=[stop], **how)
        tokenizer.batch_decode(made[:, ids.shape[1]:], skip_special_tokens=True)


@torch.inference_mode()
def judge(llama, headers: list[dict], words: dict) -> list[tuple]:
    """Log-probabilities of words behind each header: [(kind, ids, place, those of the words), ...].

    headers: [{"header": ids, kind: [(ids, places), ...]}, ...] for two kinds of questions; a place
    is where words are predicted, counted from the end. words: {kind: their ids}.
    """
    found = []
    headers = sorted(headers, key=lambda row: len(row["header"]))
    for start in range(0, len(headers), HEADERS):
        part = headers[start:start + HEADERS]
        rows = [entry["header"] for entry in part]
        attended = mask(rows, left=True)  # (B, T)
        past = llama(input_ids=padded(rows, 0, left=True), attention_mask=attended,
                     position_ids=(attended.cumsum(1) - 1).clamp(min=0), logits_to_keep=1,
                     use_cache=True).past_key_values
        for kind, tokens in words.items():
            asked = [(k, *row) for k, entry in enumerate(part) for row in entry.get(kind, [])]
            if asked:
                logprobs = ask(llama, past, attended, asked)[:, tokens].tolist()
                places = [(ids, place) for _, ids, places in asked for place in places]
                found += [(kind, *where, x) for where, x in zip(places, logprobs, strict=True)]
    return found


def ask(llama, past, attended, asked: list[tuple]):
    """Log-probabilities (M, V) at the places of the rows behind the headers of a batch.

    past, attended (B, T): the headers' cache and mask. asked: [(number of the header, ids, places)]
    """
    owners, rows, places = zip(*asked, strict=True)
    owners = torch.tensor(owners)
    cache = copy.deepcopy(past)
    cache.batch_select_indices(owners)
    ids = padded(rows, 0)
    # Positions go on behind each header's last token, whatever its padding.
    positions = attended.sum(1)[owners, None] + torch.arange(ids.shape[1])
    hidden = llama.model(input_ids=ids, position_ids=positions, past_key_values=cache,
                         attention_mask=torch.cat([attended[owners], mask(rows)], 1),
                         ).last_hidden_state
    chosen, at = [], []
    for number, (row, wanted) in enumerate(zip(rows, places, strict=True)):
        chosen += [number] * len(wanted)
        at += [len(row) + place for place in wanted]
    return llama.lm_head(hidden[chosen, at]).float().log_softmax(-1)
