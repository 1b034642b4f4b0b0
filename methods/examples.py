"""Instruction examples, and how a model is asked as a judge.

Each training instance becomes a prompt and its reference output. A share of the examples
(--judge-share) teaches judging (teaching.py), in the format in which `ask_model` asks.
"""

import data
from methods import collate, document_logprobs, record_name, torch
from methods.teaching import judging_documents


def instruction_items(run, *, wordings: int, augment: str) -> list[dict]:
    """Items of `data.instruction_examples`, and the share of them that teaches judging."""
    cfg = run.cfg
    examples = data.instruction_examples(run.tasks, wordings=wordings, augment=augment,
                                         per_task=cfg.per_task, seed=cfg.seed)
    found = []
    for x in examples:
        document = run.document(x["wording"], x["input"], x["output"])
        found.append({"documents": [document], "name": record_name(x)})
    # so many that they are --judge-share of all
    n = round(len(found) * cfg.judge_share / (1 - cfg.judge_share))
    for number, document in enumerate(judging_documents(run, n)):
        found.append({"documents": [document], "name": f"judging example {number}"})
    return found


# ----- Asking the model as a judge -----
def ask_model(run, prefixes: list[str], suffixes: list[str], keywords) -> list[tuple]:
    """log P(keyword | prefix + suffix) of both keywords of each prompt, over all their tokens."""
    def work(part):
        columns = [list(column) for column in zip(*part, strict=True)]
        return keyword_logprobs(run.model, run.tokenizer, *columns, batch_size=run.cfg.eval_batch,
                                max_len=run.cfg.max_len)
    prompts = list(zip(prefixes, suffixes, keywords, strict=True))
    return run.guard.share(prompts, work)


def keyword_logprobs(model, tokenizer, prefixes, suffixes, keywords, *, batch_size: int = 64,
                     max_len=None) -> list[tuple]:
    """For each (prefix, suffix, pair of keywords) the log P of both keywords, a pair of floats.

    Prefixes end in a line break and keywords begin with a space. Long prefixes are truncated from
    the left. extras/fast reads a prefix that items share only once.
    """
    if hasattr(model, "keyword_logprobs"):
        return model.keyword_logprobs(tokenizer, prefixes, suffixes, keywords,
                                      batch_size=batch_size, max_len=max_len)
    items, limit = [], min(max_len or model.config.context, model.config.context)
    for prefix, suffix, pair in zip(prefixes, suffixes, keywords, strict=True):
        stem = tokenizer.encode_continuation(suffix)
        # A document for each keyword, encoded with what stands before it.
        for keyword in pair:
            ids = tokenizer.encode_continuation(suffix + keyword)
            if limit - len(ids) < 2:
                raise ValueError(f"--max-len {limit} leaves no room for a judge's prompt before an "
                                 f"answer and its question, which take {len(ids)} tokens.")
            prompt = data.truncate_left(tokenizer.encode_prompt(prefix), limit - len(ids))
            hidden = len(prompt) + len(stem)  # the labels are the keyword alone
            labels = [data.IGNORE_INDEX] * hidden + ids[len(stem):]
            document = {"input_ids": prompt + ids, "labels": labels}
            items.append({"documents": [document]})
    sums, device = [], next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(items), batch_size):
            batch = collate(items[start:start + batch_size], model, device)
            sums += document_logprobs(model, batch)[0].tolist()
    # two keywords of each prompt follow one another
    return list(zip(sums[::2], sums[1::2], strict=True))
