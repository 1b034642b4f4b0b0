"""PPO's answers: sampled from the policy as it is, scored by a judge or a reward model.

Shapes: n answers, M tokens of all of them end to end.
"""

from contextlib import contextmanager
from dataclasses import replace

import data
from methods import (
    candidates,
    collate,
    label_hidden,
    label_logprobs,
    merged_copy,
    record_name,
    rewards,
    torch,
)
from methods.advantages import adapted_beta


def scored_answers(run):
    """Freshly sampled answers as items, their scores (n,), and the answer of each token (M,).

    An answer without a verdict is left out. Raises ValueError if no answer has one.
    """
    phase, judge = run.memory["phase"], run.memory["judge"]
    records, prompts, answers = sampled_answers(run)
    verdicts = judge.judge(rewards.with_labels(run, records))
    found, scores, lengths = [], [], []
    for record, prompt, answer, verdict in zip(records, prompts, answers, verdicts, strict=True):
        score = verdict.reward
        if not answer.finished:
            score = run.cfg.unfinished_reward
        if score is None:
            continue
        scores.append(float(score))
        lengths.append(len(answer.token_ids))
        found.append({
            "documents": [sampled_document(run, prompt, answer)],
            "name": record_name(record),
            "record": record,
            "finished": answer.finished,
        })
    unscored = len(records) - len(found)
    if not found:
        raise ValueError(f"ppo phase {phase}: the judge gave no verdict on any of {unscored} "
                         "answers. Give another --judge.")
    if unscored:
        run.say(f"ppo phase {phase}: {unscored} of {len(records)} answers got no verdict and are "
                "left out.")
    sequence_ids = torch.arange(len(found)).repeat_interleave(torch.tensor(lengths))  # (M,)
    return found, torch.tensor(scores), sequence_ids


def sampled_answers(run) -> tuple[list, list, list]:
    """This phase's records with their responses, the prompts, and the completions."""
    phase, records, prompts = run.memory["phase"], [], []
    for number, drawn in enumerate(drawn_records(run)):
        record = drawn | {"sample": f"{phase}/{number}"}
        prompts.append(run.template.render(record["wording"], record["input"]))
        records.append(record)
    # Sampled with the adapter merged: sooner, and the trained model stays as it is.
    sampler = replace(run, model=merged_copy(run.model))
    answers = candidates.sample_prompts(sampler, records, prompts)
    for record, answer in zip(records, answers, strict=True):
        record["response"] = answer.text
    return records, prompts, answers


def drawn_records(run) -> list[dict]:
    """What is answered in this phase; a judge of agreement needs all answers to a question."""
    cfg, groups = run.cfg, {}
    for number, record in enumerate(run.memory["todo"]):
        key = number
        if cfg.judge == "agreement":
            key = candidates.question_key(record)
        groups.setdefault(key, []).append(record)
    groups = list(groups.values())
    n = max(1, cfg.rollouts // max(map(len, groups)))
    indices = data.batch_indices(len(groups), n, run.memory["phase"], cfg.seed)
    return [record for index in indices for record in groups[index]]


def sampled_document(run, prompt: str, answer) -> dict:
    """A prompt and the very tokens that were sampled behind it."""
    room = run.cfg.max_len - run.cfg.max_new_tokens
    ids = data.truncate_left(run.tokenizer.encode_prompt(prompt), room)
    labels = [data.IGNORE_INDEX] * len(ids) + answer.token_ids
    return {"input_ids": ids + answer.token_ids, "labels": labels, "truncated": 0}


def policy_and_values(run, found: list[dict]):
    """log pi of the sampled tokens and V of the text before each, of all items: (M,), (M,)."""
    logprobs, values, device = [], [], next(run.model.parameters()).device
    for part in data.micro_batches(found, run.cfg.micro_tokens):
        batch = collate(part, run.model, device)
        figures = token_figures(run.model, batch, run.cfg)
        logprobs.append(figures[0].float().cpu())
        values.append(figures[1].float().cpu())
    return torch.cat(logprobs), torch.cat(values)


def token_figures(model, batch: dict, cfg):
    """log pi at the temperature the tokens were sampled at, and V: (M,), (M,)."""
    hidden = label_hidden(model, batch)  # (M, D)
    logprobs = label_logprobs(model, batch, hidden, temperature=cfg.temperature)
    return logprobs, model.value_head(hidden.float()).squeeze(-1)


def finish_phase(run, found: list[dict], scores, kls) -> None:
    """Write the phase's answers to rollouts.jsonl, and adapt the coefficient of the KL."""
    memory, rows = run.memory, []
    for item, score, kl in zip(found, scores.tolist(), kls.tolist(), strict=True):
        record = item.pop("record")
        response = record.pop("response")
        rows.append(record | {
            "phase": memory["phase"],
            "response": response,
            "finished": item.pop("finished"),
            "score": score,
            "kl": kl,
            "beta": memory["beta"],
        })
    run.guard.keep(run.folder / "rollouts.jsonl", rows)
    run.say(f"ppo phase {memory['phase']} | score {scores.mean():.3f} | KL {kls.mean():.3f} nats "
            f"per answer | beta {memory['beta']:.4f}")
    if run.cfg.kl_target:
        memory["beta"] = adapted_beta(memory["beta"], float(kls.mean()), run.cfg.kl_target)
    memory["phase"] += 1


@contextmanager
def swapped(weights: list[tuple]):
    """Parameters with other values, for one pass."""
    now = [parameter.detach().clone() for parameter, _ in weights]
    with torch.no_grad():
        for parameter, value in weights:
            parameter.copy_(value)
        try:
            yield
        finally:
            for (parameter, _), value in zip(weights, now, strict=True):
                parameter.copy_(value)
