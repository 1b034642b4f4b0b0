"""The demo's small world: inputs that many tasks share, so only the instruction tells them apart.

Four families (purchases, word lists, reviews, meetings), 34 tasks. Every task of a family answers
another question about the same input; 13 of them want several words. `python demo/world.py` writes
the task files (in the schema of Super-NaturalInstructions) to demo/tasks. Instructions and their
wordings were written by hand (demo/phrases.json, demo/paraphrases.json). Inputs and answers are
computed here, so every reference is right.
"""

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from data import Instance, Task, split_instances  # noqa: E402

N_INPUTS = 120  # inputs per family; data.py splits them by a hash of the text

NAMES = ("anna tom mary peter lucy john emma paul sarah david clara mark julia simon laura henry "
         "nina oscar alice frank rosa martin helen victor").split()
VERBS = "bought sold found lost".split()
COLOURS = "red blue green yellow black white brown pink grey purple".split()
KINDS = {
    "furniture": "lamp chair table desk shelf".split(),
    "clothing": "shirt coat hat scarf dress".split(),
    "tool": "hammer saw drill spade brush".split(),
    "toy": "doll kite ball puzzle robot".split(),
    "vehicle": "bike car van boat truck".split(),
    "kitchenware": "cup plate bowl kettle pan".split(),
}
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}
COUNTRY_OF = {
    "paris": "france", "lyon": "france", "rome": "italy", "milan": "italy", "madrid": "spain",
    "seville": "spain", "berlin": "germany", "munich": "germany", "london": "england",
    "leeds": "england", "oslo": "norway", "bergen": "norway", "tokyo": "japan", "kyoto": "japan",
    "cairo": "egypt", "luxor": "egypt",
}
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
ANIMALS = "dog cat horse cow sheep lion tiger bear rabbit duck goat wolf".split()
FRUITS = "pear apple plum lemon grape peach cherry mango banana melon fig lime".split()
OTHERS = ("rain snow wind stone river chair table bread milk book paper glass iron gold door "
          "window road bridge shoe ring").split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
ASPECTS = "food staff music price room view service coffee light garden bed menu".split()
VENUES = "hotel bar museum cafe cinema theatre shop market gym school zoo club".split()
GOOD = ("great lovely perfect pleasant wonderful excellent charming superb fine "
        "delightful").split()
BAD = "awful cold rude terrible horrible poor dirty nasty dreadful boring".split()
ACTIVITIES = ("lunch coffee chess tennis dinner tea golf yoga breakfast cards swimming "
              "dancing").split()
PLACES = ("station park library harbour church square garden office airport museum beach "
          "tower").split()


# ----- The four families: each returns an input, and the answer of every task of the family -----
def purchase(rng):
    """One purchase."""
    who, verb, colour = rng.choice(NAMES), rng.choice(VERBS), rng.choice(COLOURS)
    thing, city, day = rng.choice(list(KIND_OF)), rng.choice(list(COUNTRY_OF)), rng.choice(DAYS)
    order = rng.choice(("{deed} in {city} on {day}", "on {day} {deed} in {city}",
                        "in {city} , {deed} on {day}"))

    def sentence(thing):
        return order.format(deed=f"{who} {verb} a {thing}", city=city, day=day)
    return sentence(f"{colour} {thing}"), {
        "purchase_person": who, "purchase_colour": colour, "purchase_object": thing,
        "purchase_city": city, "purchase_day": day, "purchase_country": COUNTRY_OF[city],
        "purchase_kind": KIND_OF[thing], "purchase_no_colour": sentence(thing),
        "purchase_short": f"{who} {verb} a {thing}", "purchase_where_when": f"{city} on {day}",
        "purchase_who_what": f"{who} : {colour} {thing}",
    }


def words(rng):
    """One list of three to five words with exactly one animal and one fruit."""
    animal, fruit = rng.choice(ANIMALS), rng.choice(FRUITS)
    row = [animal, fruit] + rng.sample(OTHERS, rng.randrange(1, 4))
    rng.shuffle(row)
    return " ".join(row), {
        "words_first": row[0], "words_last": row[-1], "words_count": NUMBERS[len(row) - 1],
        "words_animal": animal, "words_fruit": fruit, "words_ends": f"{row[0]} and {row[-1]}",
        "words_rest": " ".join(row[1:]), "words_joined": " and ".join(row),
    }


def review(rng):
    """One review of one aspect of one venue."""
    aspect, venue, good = rng.choice(ASPECTS), rng.choice(VENUES), rng.random() < 0.5
    word, verdict = rng.choice(GOOD if good else BAD), "good" if good else "bad"
    text = rng.choice((f"the {aspect} at the {venue} was {word}",
                       f"we found the {aspect} in the {venue} {word}",
                       f"at this {venue} the {aspect} is {word}"))
    return text, {
        "review_sentiment": "positive" if good else "negative", "review_venue": venue,
        "review_aspect": aspect, "review_word": word, "review_recommend": "yes" if good else "no",
        "review_verdict": f"{verdict} {aspect}",
        "review_summary": f"{verdict} {aspect} at the {venue}",
    }


def meeting(rng):
    """One appointment."""
    who, what = rng.choice(NAMES), rng.choice(ACTIVITIES)
    where, hour = rng.choice(PLACES), rng.choice(NUMBERS)
    text = rng.choice((f"meet {who} for {what} at the {where} at {hour}",
                       f"at {hour} , {what} with {who} at the {where}",
                       f"come to the {where} at {hour} for {what} with {who}"))
    return text, {
        "meeting_person": who, "meeting_place": where, "meeting_hour": hour,
        "meeting_activity": what, "meeting_who_when": f"{who} at {hour}",
        "meeting_where_when": f"{where} at {hour}", "meeting_accept": f"yes , see you at {hour}",
        "meeting_decline": f"sorry , no {what}",
    }


FAMILIES = {"purchase": purchase, "words": words, "review": review, "meeting": meeting}


def demo_inputs(family):
    """The N_INPUTS (input, answers) of a family that the task files hold.

    The base model never sees these inputs.
    """
    rng, rows = random.Random(f"tasks/{family}"), {}
    while len(rows) < N_INPUTS:
        text, answers = FAMILIES[family](rng)
        rows.setdefault(text, answers)
    return list(rows.items())


def fresh_inputs(task, n=70):
    """n inputs of a task's family that are in none of its splits, for methods without targets."""
    family = task.split("_")[0]
    known = {text for text, _ in demo_inputs(family)}
    rng, found = random.Random(f"unlabelled/{family}"), {}
    while len(found) < n:
        text, _ = FAMILIES[family](rng)
        if text not in known:
            found[text] = None
    return list(found)


# ----- The task of the methods on judged responses -----
N_RECORDS = 1200
ERROR_RATE = 0.4  # of each of the three fields; beyond it CUT's ratio has no room
TONE = dict.fromkeys(COLOURS, "dark") | dict.fromkeys(["yellow", "white", "pink", "grey"], "light")


def record_instances():
    """(input, output) of the record task. Train outputs are flawed: what CUT has to unlearn.

    A train instance says too general a thing in each of three fields with probability ERROR_RATE:
    the tone for the colour, the kind for the object, the country for the place. Pool, dev and test
    instances are right.
    """
    rng, rows = random.Random("records"), {}
    while len(rows) < N_RECORDS:
        text, answers = purchase(rng)
        fields = {"name": "person", "colour": "colour", "object": "object", "place": "city",
                  "day": "day"}
        right = {name: answers[f"purchase_{task}"] for name, task in fields.items()}
        flawed = dict(right)
        for name, general in (("colour", TONE[right["colour"]]),
                              ("object", KIND_OF[right["object"]]),
                              ("place", COUNTRY_OF[right["place"]])):
            if rng.random() < ERROR_RATE:
                flawed[name] = general
        rows.setdefault(text, (right, flawed))
    task = Task("purchase_record", "", [Instance(text, text, ("",)) for text in rows])
    train = {instance.input for instance in split_instances(task, "train")}
    found = []
    for text, (right, flawed) in rows.items():
        record = flawed if text in train else right
        found.append((text, " ; ".join(f"{name} : {value}" for name, value in record.items())))
    return found


# ----- Files -----
def load_phrases():
    """{task: {"definition": its instruction, "terms": noun phrases for the answer}}, by hand."""
    return json.loads((HERE / "phrases.json").read_text())


def write_tasks(out=HERE):
    """Write OUT/tasks/*.json; returns the number of tasks."""
    (out / "tasks").mkdir(parents=True, exist_ok=True)
    inputs, phrases = {family: demo_inputs(family) for family in FAMILIES}, load_phrases()
    for task, text in phrases.items():
        family = task.split("_")[0]
        rows = [(row, answers[task]) for row, answers in inputs[family]]
        write_task(out / "tasks" / f"{task}.json", family, text["definition"], rows)
    return len(phrases)


def write_records(out=HERE):
    """Write OUT/records/purchase_record.json, the task of the experiments with judgments."""
    (out / "records").mkdir(parents=True, exist_ok=True)
    definition = "write the record of the purchase : name , colour , object , place and day ."
    write_task(out / "records" / "purchase_record.json", "purchase", definition,
               record_instances())


def write_task(path, category, definition, rows):
    """A task file in the schema of Super-NaturalInstructions; rows are (input, output)."""
    record = {"Contributors": ["the authors of this repository"], "Source": ["demo/world.py"],
              "Categories": [category], "Definition": [definition],
              "Input_language": ["English"], "Output_language": ["English"],
              "Instruction_language": ["English"], "Positive Examples": [],
              "Negative Examples": []}
    lines = []
    for number, (text, answer) in enumerate(rows):
        instance = {"id": f"{path.stem}-{number}", "input": text, "output": [answer]}
        lines.append("  " + json.dumps(instance))
    head, body = json.dumps(record, indent=1)[:-2], ",\n".join(lines)
    path.write_text(f'{head},\n "Instances": [\n{body}\n ]\n}}\n')


if __name__ == "__main__":
    write_records()
    print(f"{write_tasks()} tasks written to {HERE}/tasks, one to {HERE}/records")
