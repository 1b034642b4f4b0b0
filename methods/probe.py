"""What can be known of a run without a target: do answers agree, and have they collapsed?

agreement   CR (arXiv 2403.14221) of greedy answers to inputs that are never sampled for, under
            wordings that no stage learns from, if two are left. It needs no target. But a model
            that always says the same agrees with itself, so the commonest answers of each task are
            looked at, too.

Before the first step and after the last, --probe-inputs of each task are answered; probe.jsonl has
a record of each time. With --patience K they are answered at every line on the screen: training
ends when K times in a row brought no more agreement, and the best weights are kept.
"""

from dataclasses import replace

import data
import judge as judging
from eval import evaluate_responses
from methods import merged_copy
from methods.agreement import CROWDED, LEAST_QUESTIONS, commonest_answers
from methods.early import keep_weights, restore_weights
from methods.probe_questions import probe_questions

FILE = "probe.jsonl"


# ----- Measuring -----
def measure(run, step: int) -> float:
    """The agreement now; appends it, and the commonest answers, to probe.jsonl."""
    prefix = run.prefix() if step else ""  # what the model reacts to once it is trained
    answered = run.answers(merged_copy(run.model), run.memory["probe"], prefix)
    metrics, _ = evaluate_responses(answered, judging.RuleJudge(run.cfg.rouge_threshold))
    agreement = metrics["cr"]["mean"]
    record = {"step": step, "agreement": agreement, "commonest": commonest(answered)}
    run.guard.first(lambda: data.append_records(run.folder / FILE, [record]))
    return agreement


def commonest(answered: list[dict]) -> dict:
    """{task: [its commonest answer, the share of questions that have it, their number]}."""
    found, said = {}, [(question["task"], question["responses"]) for question in answered]
    for task, counts in commonest_answers(said).items():
        n = counts.total()
        (text, count), = counts.most_common(1)
        found[task] = [text, count / n, n]
    return found


# ----- In a run -----
def begin(run, sampled) -> None:
    """Measure before the first step; sampled(task, cfg): the wordings that a run samples under."""
    memory, stage = run.memory, run.cfg.stage
    memory["probe"] = probe_questions(run, sampled)
    if memory["probe"]:
        memory.update(best_agreement=measure(run, 0), best_step=0)
        keep_weights(run, 0)
        run.say(f"{stage}: before the first step, answers to {describe(run)} agree in "
                f"{100 * memory['best_agreement']:.1f} % of pairs.")


def describe(run) -> str:
    """What is asked, in words."""
    which = "that no stage sees"
    if not all(question["unseen"] for question in run.memory["probe"]):
        which = "that are sampled under"
    return f"{len(run.memory['probe'])} inputs that are not sampled for, under wordings {which},"


def measure_and_stop(run, step: int, told: bool) -> dict:
    """{"agreement": CR} where it is measured, else {}; may set the run's steps to end it here.

    told: whether this step has a line on the screen.
    """
    cfg, memory, done = run.cfg, run.memory, step + 1
    if not memory.get("probe") or not (done == cfg.steps or told and cfg.patience):
        return {}
    agreement = measure(run, done)
    run.model.train()
    if agreement > memory["best_agreement"]:  # of equal ones the earlier stays
        memory.update(best_agreement=agreement, best_step=done)
        keep_weights(run, done)
    waited = (done - memory["best_step"]) / max(1, cfg.steps // 10)
    if cfg.patience and done < cfg.steps and waited >= cfg.patience:
        run.say(f"{cfg.stage}: {cfg.patience} measurements in a row brought no more agreement.")
        run.cfg = replace(cfg, steps=done)
    return {"agreement": agreement}


def finish(run) -> None:
    """Go back to the best weights, and say what became of the answers."""
    cfg, memory, kept = run.cfg, run.memory, run.cfg.steps
    if not memory.get("probe"):
        return
    if cfg.patience:
        kept = memory["best_step"]
        restore_weights(run, kept)
    measured = {record["step"]: record for record in data.read_records(run.folder / FILE)}
    first, last = measured[0], measured[kept]
    run.say(f"{cfg.stage}: answers to {describe(run)} agree in "
            f"{100 * first['agreement']:.1f} % of pairs before, and in "
            f"{100 * last['agreement']:.1f} % with the weights of step {kept}.")
    for task, (text, share, n) in last["commonest"].items():
        _, before, _ = first["commonest"][task]
        if share >= CROWDED and n >= LEAST_QUESTIONS and share > before:
            run.say(f"warning: {100 * share:.0f} % of {n} questions of task {task} now get the "
                    f"answer {text!r}. Agreement also rises where a model always says the same: "
                    "look at these answers. Fewer steps or a higher --agreement-share may help.")
