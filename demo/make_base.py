"""Make the demo's base checkpoint again: corpus, tokenizer, pre-training. About an hour, two cores.

    python demo/make_base.py                                # writes demo/base

The corpus is text about the demo's world (demo/world.py), never about the inputs of its task files:
what phrases mean ("the hue : red"), requests and what answers them, facts ("lyon is in france"),
which phrases mean the same, judged answers in the format in which the self-judge is asked, and a
few instructions in the prompt template. Its instructions are frames (demo/frames.json) around noun
phrases (demo/phrases.json); none is a dev or test wording of demo/paraphrases.json.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import world  # noqa: E402

import train  # noqa: E402
from data import TEMPLATES, read_json, read_tasks  # noqa: E402
from judge import RuleJudge  # noqa: E402
from methods.examples import answers_to_judge  # noqa: E402
from methods.teaching import judge_document  # noqa: E402

PHASES = [  # shares of the kinds of documents, steps, learning rate
    ({"fields": 0.22, "requests": 0.26, "judged": 0.30, "compared": 0.11, "instruction": 0.01,
      "same": 0.05, "facts": 0.05}, 3000, 2.5e-3),
    ({"fields": 0.16, "requests": 0.25, "lists": 0.10, "judged": 0.34, "compared": 0.10,
      "same": 0.02, "facts": 0.03}, 2600, 2e-3),
]
VOCAB_SIZE = 1500
LISTED = sorted({*world.NAMES, *world.COLOURS, *world.KIND_OF, *world.COUNTRY_OF, *world.DAYS,
                 *world.ANIMALS, *world.FRUITS, *world.OTHERS, *world.NUMBERS, *world.ASPECTS,
                 *world.VENUES, *world.GOOD, *world.BAD, *world.ACTIVITIES, *world.PLACES})


def held_out_wordings():
    """{task: the texts of its dev and test wordings}, which the corpus never uses."""
    found = {}
    for task, splits in read_json(HERE / "paraphrases.json").items():
        texts = [wording["text"] for wording in splits["dev"] + splits["test"]]
        found[task] = {text.removeprefix("{input} . ") for text in texts}
    return found


def misspell(text, rng):
    """The text with a slip in one or two of its longer words: letters swapped, doubled or lost."""
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) > 3]
    for i in rng.sample(long, min(len(long), rng.choice((1, 2)))):
        word, k = words[i], rng.randrange(1, len(words[i]) - 1)
        words[i] = rng.choice((word[:k] + word[k + 1] + word[k] + word[k + 2:],
                               word[:k] + word[k] + word[k:], word[:k] + word[k + 1:]))
    return " ".join(words)


class Corpus:
    """Draws documents: lists of (text, is_label) segments; the loss reads the labelled ones."""

    def __init__(self, seed, shares):
        self.rng, self.shares, phrases = random.Random(seed), shares, world.load_phrases()
        self.frames = read_json(HERE / "frames.json")
        self.wordings, self.terms = held_out_wordings(), {}
        for task, texts in phrases.items():
            self.terms[task] = [x for x in texts["terms"] if x not in self.wordings[task]]
        self.definitions = {task: texts["definition"] for task, texts in phrases.items()}
        self.held_out = {family: {text for text, _ in world.demo_inputs(family)}
                         for family in world.FAMILIES}
        self.labels = {task.name: task.labels for task in read_tasks(HERE / "tasks")}
        self.judge = RuleJudge(rouge_threshold=0.95)

    def draw(self):
        """One document of a random kind."""
        kind = self.rng.choices(list(self.shares), list(self.shares.values()))[0]
        return getattr(self, kind)()

    # ----- Parts of documents -----
    def sample(self):
        """A family and a fresh input with all its answers, never one of the task files."""
        family = self.rng.choice(list(world.FAMILIES))
        while True:
            text, answers = world.FAMILIES[family](self.rng)
            if text not in self.held_out[family]:
                return family, text, answers

    def term(self, task):
        """A noun phrase that names a task's answer."""
        return self.rng.choice(self.terms[task])

    def request(self, task, styles=("plain", "terse", "polite", "wordy", "distractor")):
        """An instruction for a task: a frame of the corpus's own around a noun phrase.

        Now and then with a slip.
        """
        others = [name for name in self.tasks_of(task.split("_")[0]) if name != task]
        others = self.rng.sample(others, 2)
        while True:
            frame = self.rng.choice(self.frames[self.rng.choice(styles)])
            text = frame.format(term=self.term(task), other=self.term(others[0]),
                                third=self.term(others[1]))
            if self.rng.random() < 0.15:
                text = misspell(text, self.rng)
            if text not in self.wordings[task]:
                return text

    def tasks_of(self, family):
        """The names of a family's tasks."""
        return [name for name in self.terms if name.split("_")[0] == family]

    # ----- Kinds of documents -----
    def fields(self):
        """An input and what several noun phrases mean in it."""
        _, text, answers = self.sample()
        segments = [(f"{text} .", False)]
        for task in self.rng.sample(list(answers), min(len(answers), 7)):
            if self.rng.random() < 0.6:
                asked = f"{self.term(task)} :"
            else:
                asked = self.request(task, ("plain", "polite", "distractor", "after"))
            segments += [(f" {asked}", False), (f" {answers[task]} ;", True)]
        return segments

    def requests(self):
        """Instructions, each before an input of its own.

        What is wanted has to be kept in mind while the input is read.
        """
        segments = []
        for _ in range(4):
            _, text, answers = self.sample()
            task = self.rng.choice(list(answers))
            space = " " if segments else ""
            segments += [(f"{space}{self.request(task)} - {text} :", False),
                         (f" {answers[task]} ;", True)]
        return segments

    def lists(self):
        """Lists of any words, repeated and taken apart: copying, and places in a list."""
        segments = []
        for _ in range(3):
            row = self.rng.sample(LISTED, self.rng.randrange(3, 7))
            while " ".join(row) in self.held_out["words"]:
                row = self.rng.sample(LISTED, self.rng.randrange(3, 7))
            text, space = " ".join(row), " " if segments else ""
            answers = {"words_first": row[0], "words_last": row[-1],
                       "words_ends": f"{row[0]} and {row[-1]}", "words_rest": " ".join(row[1:]),
                       "words_joined": " and ".join(row)}
            segments += [(f"{space}{text} .", False), (" again :", False), (f" {text} ;", True)]
            for task in self.rng.sample(list(answers), 3):
                segments += [(f" {self.term(task)} :", False), (f" {answers[task]} ;", True)]
        return segments

    def instruction(self):
        """An instruction in the prompt template, sometimes after the input.

        These are rare, so that following instructions is left to learn.
        """
        _, text, answers = self.sample()
        task = self.rng.choice(list(answers))
        request = self.request(task)
        if self.rng.random() < 0.2:
            request = "{input} . " + self.request(task, ("plain", "after"))
        return [(TEMPLATES["plain"].render(request, text), False), (f" {answers[task]}", True),
                ("</s>", True)]

    def judged(self):
        """Several answers to one instruction, judged by rule, in the self-judge's own format."""
        family, text, answers = self.sample()
        task = self.rng.choice(list(answers))
        instruction, target, judged = self.definitions[task], answers[task], []
        if self.rng.random() < 0.35:
            instruction = self.request(task)
        responses = answers_to_judge(
            target, same_task=self.other_answers(family, task, 4), rng=self.rng, n=12,
            same_input=[answer for name, answer in answers.items() if name != task])
        for response in responses:
            verdict = self.judge.verdict({
                "instruction": instruction, "input": text, "target": target,
                "response": response, "labels": self.labels[task]})
            if self.rng.random() < 0.45:
                judged.append((response, verdict.type, None))
            else:
                judged.append((response, None, verdict.correct))
        shown = target if self.rng.random() < 0.75 else None
        return judge_document(instruction, text, shown, judged)

    def other_answers(self, family, task, n):
        """A task's answers to n inputs."""
        return [world.FAMILIES[family](self.rng)[1][task] for _ in range(n)]

    def compared(self):
        """Pairs of answers, equal or a word apart: what a judge with a reference has to see."""
        family, _, answers = self.sample()
        segments = [("compare :", False)]
        for _ in range(12):
            task = self.rng.choice(list(answers))
            (answer,) = answers_to_judge(
                answers[task], same_task=self.other_answers(family, task, 2), rng=self.rng, n=1,
                same_input=list(answers.values()))
            word = " correct" if answer == answers[task] else " incorrect"
            segments += [(f" {answers[task]} / {answer} :", False), (word, True), (" ;", False)]
        return segments

    def same(self):
        """Two noun phrases that mean the same, and one that does not."""
        family = self.rng.choice(list(world.FAMILIES))
        task, other = self.rng.sample(self.tasks_of(family), 2)
        first, second = self.rng.sample(self.terms[task], 2)
        return [(f"{first} : the same as {second} ; not {self.term(other)} .", True)]

    def facts(self):
        """A few facts of the world."""
        facts = [f"{city} is in {country}" for city, country in world.COUNTRY_OF.items()]
        facts += [f"a {thing} is a kind of {kind}" for thing, kind in world.KIND_OF.items()]
        facts += [f"{word} is good , positive , yes" for word in world.GOOD]
        facts += [f"{word} is bad , negative , no" for word in world.BAD]
        facts += [f"{word} is an animal" for word in world.ANIMALS]
        facts += [f"{word} is a fruit" for word in world.FRUITS]
        return [(" ; ".join(self.rng.sample(facts, 6)) + " .", True)]


def train_tokenizer(corpus, path):
    """A byte-fallback BPE with LLaMA's settings over a sample of the corpus."""
    texts = []
    for _ in range(12000):
        text = "".join(text for text, _ in corpus.draw() if text != "</s>")
        texts.append(text.replace("\n", " "))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path / "tokenizer"), model_type="bpe",
        vocab_size=VOCAB_SIZE, byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=True, remove_extra_whitespaces=False, hard_vocab_limit=False,
        minloglevel=2)
    (path / "tokenizer.vocab").unlink()


def main(argv=None):
    """Write the corpus and the tokenizer, then run the `pretrain` stage on them."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(HERE / "base"))
    parser.add_argument("--work", default="runs/base", help="folder of the corpus and the runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    world.write_tasks()
    work, model = Path(args.work), []
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = work / "tokenizer.model"
    if not tokenizer.exists():
        train_tokenizer(Corpus(args.seed + 1, PHASES[0][0]), work)
    for number, (shares, steps, lr) in enumerate(PHASES):
        export, path = work / f"model{number}", work / f"corpus{number}.jsonl"
        if number == len(PHASES) - 1:
            export = Path(args.out)
        elif (export / "config.json").exists():
            print(f"phase {number + 1}: found in {export}.")
            model = ["--model", str(export)]
            continue
        corpus = Corpus(1000 * number + args.seed, shares)
        with open(path, "w", encoding="utf-8") as file:
            for _ in range(42 * steps):  # 40 documents a step: none is seen twice
                file.write(json.dumps(corpus.draw()) + "\n")
        code = train.main([
            "--stage", "pretrain", "--dtype", "bfloat16", "--corpus", str(path), "--tokenizer",
            str(tokenizer), "--steps", str(steps), "--lr", str(lr), "--seed", str(args.seed),
            "--out", str(work / f"phase{number}"), "--export", str(export), *model])
        if code:
            return code
        model = ["--model", str(export)]
    return 0


if __name__ == "__main__":
    sys.exit(main())
