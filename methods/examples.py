"""Instruction examples, and how a model is taught and asked to judge.

Each training instance becomes a prompt and its reference output. A share of the examples
(--judge-share) teaches judging: answers to training inputs, right and wrong ones, with the verdicts
of exact rules, so that a small model can be its own judge later. The same format serves when the
model is asked, `ask_model`.
"""

import copy
import random

import data
from methods import collate, label_hidden, losses, record_name, torch
from methods.teaching import judge_document, judged_by_rule


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


# ----- Teaching the model to judge -----
def judging_documents(run, n: int) -> list[dict]:
    """n documents in the self-judge's format: four answers to one training input each."""
    cfg, documents, by_input = run.cfg, [], {}
    rng = random.Random(f"judge/{cfg.seed}")
    # Tasks share inputs; the output of one is a tempting wrong answer to another.
    for task in run.tasks:
        for instance in task.instances:
            by_input.setdefault(instance.input, []).append(instance.outputs[0])
    for _ in range(n):
        task = rng.choice(run.tasks)
        pool = data.split_instances(task, "train")[:cfg.per_task] or task.instances
        instance = rng.choice(pool)
        target = instance.outputs[0]
        # Four answers to it, right ones and wrong ones.
        others = [text for text in by_input[instance.input] if text != target]
        outputs = [other.outputs[0] for other in pool]
        answers = answers_to_judge(target, same_task=outputs, same_input=others, rng=rng, n=4)
        judged = judged_by_rule(run, task, instance, answers, rng)
        # A quarter of the documents hides the target, so that the judge can do without.
        shown = target
        if rng.random() >= 0.75:
            shown = None
        # The keywords that follow are what is learnt.
        segments = judge_document(task.definition, instance.input, shown, judged)
        documents.append(data.encode_document(run.tokenizer, segments, max_len=cfg.max_len))
    return documents


def answers_to_judge(target: str, *, same_task, same_input, rng, n: int) -> list[str]:
    """n answers: the target about half the time, else an error of the kinds that models make.

    same_input: outputs of other tasks for this input. same_task: outputs of this task for other
    inputs. An error is one of those, or the target with one word dropped or changed.
    """
    answers = []
    for _ in range(n):
        kind, words = rng.random(), target.split()
        if kind < 0.4:
            answer = target
        elif kind < 0.6 and same_input:  # right for another task
            answer = rng.choice(same_input)
        elif kind < 0.8 and len(words) > 1:  # one word changed, or dropped
            at = rng.randrange(len(words))
            other = rng.choice(rng.choice(same_task).split())
            words[at] = other if rng.random() < 0.7 else ""
            answer = " ".join(filter(None, words))
        else:  # right for another input
            answer = rng.choice(same_task)
        answers.append(answer)
    return answers


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
    sums, device, head = [], next(model.parameters()).device, float32_head(model)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(items), batch_size):
            batch = collate(items[start:start + batch_size], model, device)
            logits = head(losses.at_least_float32(label_hidden(model, batch)))  # (M, V)
            logprobs = losses.gathered_logprobs(logits, batch["targets"])  # (M,)
            ids, n = batch["sequence_ids"], batch["documents"]
            sums += losses.sequence_logprobs(logprobs, ids, n)[0].tolist()
    # two keywords of each prompt follow one another
    return list(zip(sums[::2], sums[1::2], strict=True))


def float32_head(model):
    """The model's head, or a float32 copy of a head in half precision.

    A bfloat16 has 8 significant bits, so logits from 16 to 32 are multiples of 1/8, and so is the
    difference of two keywords.
    """
    kinds = {part.dtype for part in [*model.lm_head.parameters(), *model.lm_head.buffers()]}
    if kinds.isdisjoint({torch.bfloat16, torch.float16}):
        return model.lm_head
    return copy.deepcopy(model.lm_head).float()
