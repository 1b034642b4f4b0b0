"""Make the demo's base checkpoint again: corpus, tokenizer, pre-training. Under an hour on two CPU cores.

    python demo/make_base.py                                # writes demo/base

The corpus is text about the demo's world (demo/world.py), never about the inputs of its task files: what phrases mean
("the hue : red"), facts ("lyon is in france"), which phrases mean the same, a few plain instructions, and judged
answers in the format in which the self-judge is asked. Its phrases are those of demo/phrases.json; it holds none of the
wordings in demo/paraphrases.json.
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

FRAMES = ["what is {term} ?", "{term} ?", "{term} :", "give {term} .", "find {term} .", "write {term} .", "tell me {term} .",
          "look at the text and give {term} .", "i want {term} , please .", "could you say {term} ?",
          "the answer should be {term} .", "answer with {term} and with nothing else .", "{term} , not {other} .",
          "do not give {other} , give {term} .", "forget {other} . we need {term} ."]
PHASES = [                                                  # shares of the documents, and how they are trained on
    ({"fields": 0.28, "judged": 0.42, "compared": 0.14, "instruction": 0.05, "same": 0.06, "facts": 0.05}, 3000, 2.5e-3),
    ({"fields": 0.12, "judged": 0.62, "compared": 0.18, "instruction": 0.03, "same": 0.03, "facts": 0.02}, 2400, 1.5e-3),
]
VOCAB_SIZE = 1500


class Corpus:
    """Draws documents: lists of (text, is_label) segments; the loss reads the labelled ones."""

    def __init__(self, seed, shares):
        self.rng, self.shares = random.Random(seed), shares
        self.phrases = world.load_phrases()
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
        return self.rng.choice(self.phrases[task]["terms"])

    def request(self, family, task):
        """A plain instruction for a task, in one of the corpus's own frames."""
        other = self.rng.choice([name for name in self.phrases if name != task and name.split("_")[0] == family])
        return self.rng.choice(FRAMES).format(term=self.term(task), other=self.term(other))

    def fields(self):
        """An input and what several noun phrases mean in it."""
        family, text, answers = self.sample()
        segments = [(f"{text} .", False)]
        for task in self.rng.sample(list(answers), min(len(answers), 7)):
            segments += [(f" {self.term(task)} :", False), (f" {answers[task]} ;", True)]
        return segments

    def instruction(self):
        """A plain instruction in the prompt template, sometimes after the input."""
        family, text, answers = self.sample()
        task = self.rng.choice(list(answers))
        request = self.request(family, task)
        if self.rng.random() < 0.2:
            request = "{input} . " + request
        return [(TEMPLATES["plain"].render(request, text), False), (f" {answers[task]}", True), ("</s>", True)]

    def judged(self):
        """Several answers to one instruction, judged by rule, in the self-judge's own format."""
        family, text, answers = self.sample()
        task = self.rng.choice(list(answers))
        instruction = self.phrases[task]["definition"]
        if self.rng.random() < 0.5:
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
        task, other = self.rng.sample([name for name in self.phrases if name.split("_")[0] == family], 2)
        first, second = self.rng.sample(self.phrases[task]["terms"], 2)
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
    train_tokenizer(Corpus(args.seed + 1, PHASES[0][0]), work)
    for number, (shares, steps, lr) in enumerate(PHASES):
        corpus, path = Corpus(1000 * number + args.seed, shares), work / f"corpus{number}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for _ in range(42 * steps):                     # 40 documents a step: none is seen twice
                file.write(json.dumps(corpus.draw()) + "\n")
        last = number == len(PHASES) - 1
        export = args.out if last else str(work / f"model{number}")
        code = train.main(["--stage", "pretrain", "--corpus", str(path), "--tokenizer", str(work / "tokenizer.model"),
                           "--steps", str(steps), "--lr", str(lr), "--out", str(work / f"phase{number}"), "--export", export,
                           "--seed", str(args.seed), *model])
        if code:
            return code
        model = ["--model", export]
    return 0


if __name__ == "__main__":
    sys.exit(main())
