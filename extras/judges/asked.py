"""Whom eval.py asks: local models, models behind a server, and answers that are already there."""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from eval import fail, find_template, local_answers, open_model, open_tokenizer, read_questions
from extras.formats.responses import read_files
from extras.judges.answers import ENDINGS
from extras.judges.client import check_flags, client_from_flags
from extras.judges.flags import read_extra
from extras.judges.judges import HttpJudge
from extras.judges.local import LocalChat
from extras.judges.progress import warn
from extras.judges.questions import JudgeStopped, Question, Reply
from extras.judges.similar import BY_ROUGE, make_similar
from judge import RuleJudge

# Wordings and inputs of a task. DEVIATION: arXiv 2403.14221 does not define its two test sets; this
# is the reading of articles about it.
TEST_SETS = {"I": (10, 10), "II": (0, 100)}
CUT = "cut at max_tokens"
ANSWERS = ("", CUT, "empty message")  # failures of a reply that is an answer nevertheless
THINKING = "cut while thinking"
# Failures that are on file, so that the same command does not ask again.
ON_FILE = {*ENDINGS.values(), THINKING, "prompt cut by the server"}
LOCAL = ("--model", "--template", "--tokenizer", "--quantize", "--device", "--dtype")
ANSWERING = ("--adapter", "--reference", "--batch-size", "--max-len")
ASKING = ("--tasks", "--paraphrases", "--split", "--wordings", "--per-task", "--test-set",
          "--samples", "--temperature", "--max-new-tokens", "--prefix", "--server",
          "--server-model", "--server-extra")


def add_flags(add: Callable) -> None:
    """The flags of eval.py about who is asked and how answers are compared."""
    add("--judge", choices=("rule", "http", "self"), default="rule", help="who compares responses")
    add("--symmetrize", choices=("and", "or", "first"), default="and", help="orders of a pair")
    add("--similar", default="",
        help="rule, exact, rouge, or a function of yours (module:function), in place of --judge")
    add("--server", default="", help="address of a server whose models are asked (.../v1)")
    add("--server-model", default="", help="their names there, with commas between")
    add("--server-key-env", default="SERVER_API_KEY", help="environment variable with its key")
    add("--server-extra", default="", help="JSON object of further fields of each request")
    add("--responses", nargs="+", default=[], help="files of answers: measure these, ask nobody")
    add("--test-set", choices=("", *TEST_SETS), default="",
        help="of the paper: I, 10 wordings x 10 inputs a task; II, the instruction x 100 inputs")
    add("--samples", type=int, default=1, help="answers to each wording")
    add("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy")
    add("--seed", type=int, default=0, help="seeds sampled answers")


def settle_flags(cfg, argv: list[str]) -> None:
    """What the flags together mean; a flag that would go unread is refused (exit status 2)."""
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}

    def refuse(names, why: str) -> None:
        for name in sorted(given & set(names)):
            fail(f"{name} {why}. Leave it out.")
    for name, least in (("samples", 1), ("temperature", 0)):
        if not least <= getattr(cfg, name) < float("inf"):
            fail(f"--{name} is {getattr(cfg, name)}. Expected {least} or more.")
    if cfg.test_set:
        refuse(("--wordings", "--per-task"), "is set by --test-set")
        cfg.wordings, cfg.per_task = TEST_SETS[cfg.test_set]
    names = [*model_names(cfg.server_model), *dict.fromkeys(cfg.adapter)]
    if cfg.responses:
        check_out(cfg)
        unread = {*ASKING, *ANSWERING}
        if cfg.judge != "self":  # which opens the model
            unread |= set(LOCAL)
        refuse(unread, "is for asking a model, and --responses brings the answers")
    if not cfg.server:
        refuse(("--server-model", "--server-key-env", "--server-extra"), "needs --server")
    elif not cfg.server_model.strip(" ,"):
        fail("--server has no model. Name those to be asked with --server-model.")
    elif cfg.judge != "http":
        refuse(("--judge-url", "--judge-model", "--judge-key-env", "--judge-extra",
                "--judge-max-tokens", "--judge-cache", "--judge-fold-system",
                "--judge-temperature", "--verdict"),
               "needs --judge http")
    if cfg.similar:
        refuse(("--judge",), "and --similar both say how answers are compared")
    if cfg.judge != "rule" or cfg.similar not in BY_ROUGE:
        refuse(("--rouge-threshold",), "is for rules, and others compare the answers")
    if (cfg.server or cfg.responses) and "--model" not in given:
        if cfg.server:
            refuse(LOCAL + ANSWERING,
                   "is for a local model. Name it with --model, or ask the server alone")
        if cfg.judge == "self":
            fail("--judge self needs the model that is to judge. Name it with --model.")
        cfg.model = ""
    elif not cfg.responses:
        names.append(Path(cfg.model).name)
    for name, times in Counter(names).items():
        if times > 1:  # the second would take the place of the first
            fail(f"{times} of the models are called {name}, and each needs a name of its own. "
                 "Leave one out, or give its folder another name.")
    if cfg.samples > 1 and not cfg.temperature and cfg.model and not cfg.responses:
        fail(f"--samples {cfg.samples} at --temperature 0 would be the same answer each time. "
             "Give a --temperature above 0.")


def model_names(text: str) -> list[str]:
    """The names in --server-model."""
    return [name.strip() for name in text.split(",") if name.strip()]


def check_out(cfg) -> None:
    """Refuse a file of answers that the results would be written over."""
    written = Path(cfg.out, "questions.jsonl")
    for file in cfg.responses:
        if Path(file).resolve() == written.resolve():
            fail(f"the results would be written over {file}, which --responses reads. Give "
                 "another --out.")


# ----- Who says whether two answers agree -----
def make_judge(cfg):
    """The judge of pairs that --judge or --similar names."""
    if not cfg.server:
        check_flags(cfg, asked=cfg.judge == "http")
    if cfg.judge == "http":
        ask = client_from_flags(cfg, cfg.out).ask
        return HttpJudge(ask, max_unparsed=cfg.max_unparsed, name=f"http {cfg.judge_model}")
    if cfg.judge == "self":
        model = open_model(cfg)
        chat = LocalChat(model, open_tokenizer(cfg), find_template(cfg, model))
        return HttpJudge(chat.ask, max_unparsed=cfg.max_unparsed, name=f"self {cfg.model}")
    if cfg.similar:
        return make_similar(cfg.similar, cfg.rouge_threshold)
    return RuleJudge(cfg.rouge_threshold)


# ----- Answers -----
def all_answers(cfg) -> Iterator[tuple]:
    """(name, answered questions, further metrics) of files, of servers, of local models."""
    if cfg.responses:
        for name, questions in read_files(cfg.responses).items():
            yield name, questions, {}
        return
    for name in read_extra(cfg.server_extra, role="server"):
        if name in ("temperature", "seed"):  # with one seed, all samples would be the same
            raise ValueError(f"--server-extra sets {name}. Use --{name}.")
    questions = read_questions(cfg)
    if cfg.test_set:
        warn_of_less(cfg.test_set, questions)
    for question in questions:
        # Duplicate wordings are dropped; each of the others is asked `samples` times.
        styles = {}
        for wording, style in zip(question["wordings"], question["styles"], strict=True):
            styles.setdefault(wording, style)
        for name, values in (("wordings", list(styles)), ("styles", styles.values())):
            question[name] = [x for x in values for _ in range(cfg.samples)]
    for name in model_names(cfg.server_model):
        yield name, *server_answers(cfg, name, questions)
    if cfg.model:
        asked = sum(len(question["wordings"]) for question in questions)
        seeds = [f"{cfg.seed},{k}" for k in range(asked)]
        yield from local_answers(cfg, questions, cfg.temperature, seeds)


def warn_of_less(name: str, questions: list[dict]) -> None:
    """Say if the tasks have less than the test set of that name has in the paper."""
    wordings, inputs = TEST_SETS[name]
    tasks = Counter(question["task"] for question in questions)
    few = sum(number < inputs for number in tasks.values())
    short = sum(len(question["wordings"]) < wordings for question in questions)
    parts = []
    if few:
        parts.append(f"{few} of {len(tasks)} tasks have fewer than {inputs} inputs")
    if short:
        parts.append(f"{short} of {len(questions)} questions have fewer than {wordings} wordings")
    if parts:
        warn(f"warning: this is less than the paper's test set {name}: {', '.join(parts)}.")


def server_answers(cfg, name: str, questions: list[dict]) -> tuple[list[dict], dict]:
    """(answered questions, counts) of a model behind --server; answers.jsonl in --out keeps all.

    An answer that reached --max-new-tokens counts, unless the model was still thinking; so does an
    empty one. Wordings without an answer are left out of their question. Raises JudgeStopped if
    more than the share --max-unparsed have none.
    """
    role = {"role": "server", "judge_url": cfg.server, "judge_model": name,
            "judge_key_env": cfg.server_key_env, "judge_extra": cfg.server_extra,
            "judge_max_tokens": 0, "judge_temperature": "", "judge_fold_system": False,
            "verdict": "line", "judge_cache": str(Path(cfg.out, "answers.jsonl"))}
    client, replies = client_from_flags(Namespace(**vars(cfg) | role), cfg.out), {}
    for sample in range(cfg.samples):
        places = [(k, i) for k, question in enumerate(questions)
                  for i in range(sample, len(question["wordings"]), cfg.samples)]
        asked = [plain_question(cfg, questions[k], questions[k]["wordings"][i]) for k, i in places]
        made = client.ask(asked, temperature=cfg.temperature, sample=1000 * cfg.seed + sample)
        replies |= dict(zip(places, map(drop_thoughts, made), strict=True))
    failed = Counter(reply.failure for reply in replies.values() if reply.failure not in ANSWERS)
    if failed.total() > cfg.max_unparsed * len(replies):
        causes = ", ".join(f"{n} {cause}" for cause, n in failed.most_common())
        advice = "Run the same command again to ask these anew"
        if ON_FILE.issuperset(failed):
            advice = "These are not asked again"
            if THINKING in failed:
                advice = "Raise --max-new-tokens, or turn thinking off with --server-extra"
        raise JudgeStopped(f"{name} left {failed.total()} of {len(replies)} questions without an "
                           f"answer ({causes}). {advice}; --max-unparsed allows more.")
    answered = []
    for k, question in enumerate(questions):
        kept = [i for i in range(len(question["wordings"])) if replies[k, i].failure in ANSWERS]
        own = question | {"responses": [replies[k, i].text.strip() for i in kept]}
        own |= {part: [question[part][i] for i in kept] for part in ("wordings", "styles")}
        own["unfinished"] = sum(replies[k, i].failure == CUT for i in kept)
        if kept:
            answered.append(own)
    return answered, {"unanswered": failed.total(), "usage": client.usage()}


def drop_thoughts(reply: Reply) -> Reply:
    """A reply that was cut, without what the model thought; no answer if it only thought."""
    if reply.failure != CUT:
        return reply
    text = reply.text.rpartition("</think>")[2].strip()
    if not text or text.startswith("<think>"):
        return replace(reply, failure=THINKING)
    return replace(reply, text=text)


def plain_question(cfg, question: dict, wording: str) -> Question:
    """A wording with its input as a user's message, and no words of ours."""
    instruction, input = cfg.prefix + wording, question["input"]
    if "{input}" in instruction:
        instruction, input = instruction.replace("{input}", input), ""
    text = f"{instruction}\n{input}" if input else instruction
    return Question([{"role": "user", "content": text}], cfg.max_new_tokens)
