"""Write the tasks for a real model to demo/real/tasks, one file each.

    python demo/real/make_tasks.py

The words are in words.py, numbers and sentences are drawn from a seed. The files have the schema of
Super-NaturalInstructions. Every task has one right answer for each input.
"""

import json
import random
from pathlib import Path

import words

HERE = Path(__file__).parent
DEFINITIONS = {
    "antonym": "Give the opposite of the word. Answer with one word in lower case.",
    "comparative": "Write the comparative form of the adjective, without the word 'than'.",
    "continent": "On which continent is the country? Answer with Africa, Asia, Europe, "
                 "North America, South America or Oceania.",
    "digits": "Write the number in digits. Use no commas.",
    "kind": "Say what kind of thing the word names. Answer with one of these words: animal, plant, "
            "food, tool, clothing, vehicle.",
    "largest": "Which of the three numbers is the largest? Answer with the number only.",
    "past": "Write the simple past tense of the verb. Answer with one word.",
    "plural": "Write the plural of the noun. Answer with one word.",
    "sentiment": "Does the writer like it? Answer with positive or negative.",
    "sum": "Add the two numbers. Answer with the number only.",
    "word_class": "Is the word a noun, a verb or an adjective? Answer with one of these three "
                  "words.",
}


def split_list(text, separator=","):
    """The entries of a list in words.py, without blanks and line breaks around or inside them."""
    return [" ".join(entry.split()) for entry in text.split(separator)]


def pairs(text):
    """(input, answer) of every entry."""
    return [tuple(entry.split()) for entry in split_list(text)]


def labelled(groups):
    """(input, label) of every entry of {label: list}."""
    return [(entry, label) for label, text in groups.items() for entry in split_list(text)]


# ----- Spelling -----
def ends_in_consonant_y(word):
    """Whether a final y becomes i before an ending: city, but not boy."""
    return word.endswith("y") and word[-2] not in "aeiou"


def add_s(noun):
    """The plural of a noun that follows the rules."""
    if ends_in_consonant_y(noun):
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun + "s"


def add_ending(word, ending):
    """The word with -ed or -er: baked, cried, walked."""
    if word.endswith("e"):
        return word + ending[1:]
    if ends_in_consonant_y(word):
        return word[:-1] + "i" + ending
    return word + ending


def double_last(word, ending):
    """The word with -ed or -er and its last letter twice: stopped, bigger."""
    return word + word[-1] + ending


def plurals():
    """(noun, plural)."""
    return pairs(words.PLURAL) + [(noun, add_s(noun)) for noun in split_list(words.NOUNS)]


def past_tenses():
    """(verb, simple past)."""
    found = pairs(words.PAST)
    found += [(verb, double_last(verb, "ed")) for verb in split_list(words.DOUBLED_VERBS)]
    return found + [(verb, add_ending(verb, "ed")) for verb in split_list(words.VERBS)]


def comparatives():
    """(adjective, comparative)."""
    found = pairs(words.COMPARATIVE)
    found += [(word, double_last(word, "er")) for word in split_list(words.DOUBLED_ADJECTIVES)]
    found += [(word, add_ending(word, "er")) for word in split_list(words.ADJECTIVES)]
    return found + [(word, "more " + word) for word in split_list(words.LONG_ADJECTIVES)]


# ----- Numbers and reviews -----
def sums(count=170):
    """("a, b", their sum) of numbers from 3 to 60."""
    rng, found = random.Random("sum"), {}
    while len(found) < count:
        a, b = rng.randint(3, 60), rng.randint(3, 60)
        found[f"{a}, {b}"] = str(a + b)
    return list(found.items())


def largest_numbers(count=170):
    """(three numbers of two to four digits, the largest)."""
    rng, found = random.Random("largest"), {}
    while len(found) < count:
        base = rng.choice([40, 400, 4000])
        numbers = rng.sample(range(base // 2, 2 * base), 3)
        found[", ".join(map(str, numbers))] = str(max(numbers))
    return list(found.items())


ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def spell(number):
    """A number below a million in English words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        rest = "-" + ONES[number % 10] if number % 10 else ""
        return TENS[number // 10 - 2] + rest
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    text = f"{spell(number // size)} {name}"
    rest = number % size
    if not rest:
        return text
    return text + (" and " if rest < 100 else " ") + spell(rest)


def numbers_in_words(count=170):
    """(a number in words, in digits) of two to five digits."""
    rng, found = random.Random("digits"), {}
    while len(found) < count:
        size = rng.choice([100, 1000, 10_000, 100_000])
        number = rng.randint(size // 10, size - 1)
        found[spell(number)] = str(number)
    return list(found.items())


def reviews(count=85):
    """(a review of one sentence, positive or negative), `count` of each."""
    rng, found = random.Random("sentiment"), {}
    things = split_list(words.THINGS, ";")
    verdicts = {
        "positive": (split_list(words.POSITIVE, ";"), "Everyone had warned me, but"),
        "negative": (split_list(words.NEGATIVE, ";"), "Everyone had praised it, but")}
    for label, (phrases, opening) in verdicts.items():
        texts = {}
        while len(texts) < count:
            thing = rng.choice(things)
            # In turn, so that every verdict is used as often as the others.
            phrase = phrases[len(texts) % len(phrases)]
            sentence = f"{thing} {phrase}."
            if rng.random() < 0.25:
                sentence = f"{opening} {thing[0].lower()}{thing[1:]} {phrase}."
            texts[sentence] = label
        found |= texts
    return list(found.items())


INSTANCES = {
    "antonym": pairs(words.ANTONYM),
    "comparative": comparatives(),
    "continent": labelled(words.COUNTRIES),
    "digits": numbers_in_words(),
    "kind": labelled(words.KINDS),
    "largest": largest_numbers(),
    "past": past_tenses(),
    "plural": plurals(),
    "sentiment": reviews(),
    "sum": sums(),
    "word_class": labelled(words.WORD_CLASSES)}


def write_tasks(out=HERE):
    """Write OUT/tasks/*.json."""
    (out / "tasks").mkdir(parents=True, exist_ok=True)
    for name, rows in INSTANCES.items():
        record = {"Contributors": ["the authors of this repository"],
                  "Source": ["demo/real/make_tasks.py"], "Categories": [name],
                  "Definition": [DEFINITIONS[name]], "Input_language": ["English"],
                  "Output_language": ["English"], "Instruction_language": ["English"],
                  "Positive Examples": [], "Negative Examples": []}
        lines = []
        for number, (text, answer) in enumerate(rows):
            instance = {"id": f"{name}-{number}", "input": text, "output": [answer]}
            lines.append("  " + json.dumps(instance))
        head, body = json.dumps(record, indent=1)[:-2], ",\n".join(lines)
        path = out / "tasks" / f"{name}.json"
        path.write_text(f'{head},\n "Instances": [\n{body}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    write_tasks()
    print(f"{len(INSTANCES)} tasks written to {HERE / 'tasks'}")
