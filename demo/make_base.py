"""Make the demo's base checkpoint again: corpus, tokenizer, pre-training. Under an hour on two CPU cores.

    python demo/make_base.py                                # writes demo/base

The corpus is text about the demo's world (demo/world.py), never about the inputs of its task files: what phrases mean
("the hue : red"), requests and what answers them, facts ("lyon is in france"), which phrases mean the same, judged
answers in the format in which the self-judge is asked, and a few instructions in the prompt template. Its instructions are frames (demo/frames.json) around noun phrases
(demo/phrases.json); none is a dev or test wording of demo/paraphrases.json.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import world                                                # noqa: E402
from data import TEMPLATES, answer_candidates, load_tasks   # noqa: E402
from judge import RuleJudge, judge_document                 # noqa: E402

PHASES = [                                                  # shares of the documents, and how they are trained on
    ({"fields": 0.22, "requests": 0.26, "judged": 0.30, "compared": 0.11, "instruction": 0.01, "same": 0.05, "facts": 0.05}, 3000, 2.5e-3),
    ({"fields": 0.16, "requests": 0.25, "lists": 0.10, "judged": 0.34, "compared": 0.10, "same": 0.02,
      "facts": 0.03}, 2600, 2e-3),
]
VOCAB_SIZE = 1500
LISTED = (world.NAMES, world.COLOURS, world.KIND_OF, world.COUNTRY_OF, world.DAYS, world.ANIMALS, world.FRUITS, world.OTHERS,
          world.NUMBERS, world.ASPECTS, world.VENUES, world.GOOD, world.BAD, world.ACTIVITIES, world.PLACES)


def held_out_wordings():
    """{task: the texts of its dev and test wordings}, which the corpus never uses."""
    found = json.loads((HERE / "paraphrases.json").read_text())
    return {task: {w["text"].removeprefix("{input} . ") for split in ("dev", "test") for w in splits[split]}
            for task, splits in found.items()}


def misspell(text, rng):
    """The text with a slip of the pen in one or two of its longer words: letters swapped, doubled or lost."""
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) > 3]
    for i in rng.sample(long, min(len(long), rng.choice((1, 2)))):
        word, k = words[i], rng.randrange(1, len(words[i]) - 1)
        words[i] = rng.choice((word[:k] + word[k + 1] + word[k] + word[k + 2:], word[:k] + word[k] + word[k:], word[:k] + word[k + 1:]))
    return " ".join(words)


class Corpus:
    """Draws documents: lists of (text, is_label) segments; the loss reads the labelled ones."""

    def __init__(self, seed, shares):
        self.rng, self.shares = random.Random(seed), shares
        self.frames = json.loads((HERE / "frames.json").read_text())
        self.wordings = held_out_wordings()
        self.terms = {task: [term for term in texts["terms"] if term not in self.wordings[task]]
                      for task, texts in world.load_phrases().items()}
        self.definitions = {task: texts["definition"] for task, texts in world.load_phrases().items()}
        self.held_out = {family: {text for text, _ in world.demo_inputs(family)} for family in world.FAMILIES}
        self.labels = {task.name: task.labels for task in load_tasks(HERE / "tasks")}
        self.judge = RuleJudge(rouge_threshold=0.95)

    def draw(self):
        """One document of a random kind."""
        kind = self.rng.choices(list(self.shares), list(self.shares.values()))[0]
        return getattr(self, kind)()

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

    def request(self, family, task, styles=("plain", "terse", "polite", "wordy", "distractor")):
        """An instruction for a task: one of the corpus's own frames around a noun phrase, now and then with a slip."""
        others = self.rng.sample([name for name in self.terms if name != task and name.split("_")[0] == family], 2)
        while True:
            text = self.rng.choice(self.frames[self.rng.choice(styles)]).format(
                term=self.term(task), other=self.term(others[0]), third=self.term(others[1]))
            if self.rng.random() < 0.15:
                text = misspell(text, self.rng)
            if text not in self.wordings[task]:
                return text

    def fields(self):
        """An input and what several noun phrases mean in it."""
        family, text, answers = self.sample()
        segments = [(f"{text} .", False)]
        for task in self.rng.sample(list(answers), min(len(answers), 7)):
            asked = f"{self.term(task)} :" if self.rng.random() < 0.6 else self.request(family, task, ("plain", "polite", "distractor", "after"))
            segments += [(f" {asked}", False), (f" {answers[task]} ;", True)]
        return segments

    def requests(self):
        """Instructions, each before an input of its own: what is wanted has to be kept in mind while the input is read."""
        segments = []
        for _ in range(4):
            family, text, answers = self.sample()
            task = self.rng.choice(list(answers))
            segments += [(f" {self.request(family, task)} - {text} :" if segments else f"{self.request(family, task)} - {text} :", False),
                         (f" {answers[task]} ;", True)]
        return segments

    def lists(self):
        """Lists of any words of the world, said again and taken apart: copying, and places in a list."""
        segments, every = [], sorted({word for words in LISTED for word in words})
        for _ in range(3):
            row = self.rng.sample(every, self.rng.randrange(3, 7))
            while " ".join(row) in self.held_out["words"]:
                row = self.rng.sample(every, self.rng.randrange(3, 7))
            answers = {"words_first": row[0], "words_last": row[-1], "words_ends": f"{row[0]} and {row[-1]}",
                       "words_rest": " ".join(row[1:]), "words_joined": " and ".join(row)}
            segments += [(f" {' '.join(row)} ." if segments else f"{' '.join(row)} .", False), (" again :", False), (f" {' '.join(row)} ;", True)]
            for task in self.rng.sample(list(answers), 3):
                segments += [(f" {self.term(task)} :", False), (f" {answers[task]} ;", True)]
        return segments

    def instruction(self):
        """An instruction in the prompt template, sometimes after the input: rare, so that following is left to learn."""
        family, text, answers = self.sample()
        task = self.rng.choice(list(answers))
        request = self.request(family, task)
        if self.rng.random() < 0.2:
            request = "{input} . " + self.request(family, task, ("plain", "after"))
        return [(TEMPLATES["plain"].render(request, text), False), (f" {answers[task]}", True), ("</s>", True)]

    def judged(self):
        """Several answers to one instruction, judged by rule, in the self-judge's own format."""
        family, text, answers = self.sample()
        task = self.rng.choice(list(answers))
        instruction = self.definitions[task]
        if self.rng.random() < 0.35:
            instruction = self.request(family, task)
        same_task = [world.FAMILIES[family](self.rng)[1][task] for _ in range(4)]
        same_input = [answer for name, answer in answers.items() if name != task]
        candidates = answer_candidates(answers[task], same_task=same_task, same_input=same_input, rng=self.rng, n=12)
        items = [{"instruction": instruction, "input": text, "target": answers[task], "response": response,
                  "labels": self.labels[task]} for response in candidates]
        judged = []
        for response, verdict in zip(candidates, self.judge.judge(items)):
            asked = self.rng.random()
            judged.append((response, verdict.type if asked < 0.45 else None, verdict.correct if asked >= 0.45 else None))
        target = answers[task] if self.rng.random() < 0.75 else None
        return judge_document(instruction, text, target, judged)

    def compared(self):
        """Pairs of answers that are equal, or differ in a word: what a judge with a reference has to see."""
        family, text, answers = self.sample()
        segments = [("compare :", False)]
        for _ in range(12):
            task = self.rng.choice(list(answers))
            target, others = answers[task], [world.FAMILIES[family](self.rng)[1][task] for _ in range(2)]
            (answer,) = answer_candidates(target, same_task=others, same_input=list(answers.values()), rng=self.rng, n=1)
            segments += [(f" {target} / {answer} :", False), (" correct" if answer == target else " incorrect", True), (" ;", False)]
        return segments

    def same(self):
        """Two noun phrases that mean the same, or do not."""
        family = self.rng.choice(list(world.FAMILIES))
        task, other = self.rng.sample([name for name in self.terms if name.split("_")[0] == family], 2)
        first, second = self.rng.sample(self.terms[task], 2)
        return [(f"{first} : the same as {second} ; not {self.term(other)} .", True)]

    def facts(self):
        """A few facts of the world."""
        pairs = [(f"{city} is in {country}", 1) for city, country in world.COUNTRY_OF.items()]
        pairs += [(f"a {thing} is a kind of {kind}", 1) for thing, kind in world.KIND_OF.items()]
        pairs += [(f"{word} is good , positive , yes", 1) for word in world.GOOD]
        pairs += [(f"{word} is bad , negative , no", 1) for word in world.BAD]
        pairs += [(f"{word} is an animal", 1) for word in world.ANIMALS] + [(f"{word} is a fruit", 1) for word in world.FRUITS]
        return [(" ; ".join(text for text, _ in self.rng.sample(pairs, 6)) + " .", True)]


def train_tokenizer(corpus, path):
    """A byte-fallback BPE with LLaMA's settings over a sample of the corpus."""
    texts = ["".join(text for text, _ in corpus.draw() if text != "</s>").replace("\n", " ") for _ in range(12000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path / "tokenizer"), vocab_size=VOCAB_SIZE, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2)
    (path / "tokenizer.vocab").unlink()


def main(argv=None):
    """Write the corpus and the tokenizer, then run the `pretrain` stage on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(HERE / "base"))
    parser.add_argument("--work", default="runs/base", help="where the corpus and the training runs go")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    import train
    world.write_tasks()
    work, model = Path(args.work), []
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer.model").exists():
        train_tokenizer(Corpus(args.seed + 1, PHASES[0][0]), work)
    for number, (shares, steps, lr) in enumerate(PHASES):
        last = number == len(PHASES) - 1
        export = args.out if last else str(work / f"model{number}")
        if not last and Path(export, "config.json").exists():
            print(f"phase {number + 1}: found in {export}.")
            model = ["--model", export]
            continue
        corpus, path = Corpus(1000 * number + args.seed, shares), work / f"corpus{number}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for _ in range(42 * steps):                     # 40 documents a step: none is seen twice
                file.write(json.dumps(corpus.draw()) + "\n")
        code = train.main(["--stage", "pretrain", "--dtype", "bfloat16", "--corpus", str(path), "--tokenizer", str(work / "tokenizer.model"),
                           "--steps", str(steps), "--lr", str(lr), "--out", str(work / f"phase{number}"), "--export", export,
                           "--seed", str(args.seed), *model])
        if code:
            return code
        model = ["--model", export]
    return 0


if __name__ == "__main__":
    sys.exit(main())
