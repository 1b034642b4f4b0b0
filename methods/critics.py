"""Who judges an answer in words, as CUT needs it: a model, or rules that know the target.

A critic has `critique(items) -> [judgment, ...]`: what is wrong, in words; None if the response
satisfies; FAILED if no judgment came. `make_critic` of methods/judged.py picks one.
"""

from judge import flatten, fold, normalize

PERFECT = "perfect ."
FAILED = "$ERROR$"  # the CUT authors' files have the same mark


def critic_prompt(instruction: str, input: str, response: str) -> tuple[str, str]:
    """What a critic is asked, as instruction and input   CUT, Figure 9."""
    asked = f"{flatten(instruction)} {flatten(input)}".strip()
    return (f'say what is wrong in the response , or "{PERFECT}" if nothing is .',
            f"{asked} ### Answer: {flatten(response)}")


class LocalCritic:
    """A model that writes judgments: write([(instruction, input)]) -> [(text, it ended)]."""

    name = "self"

    def __init__(self, write):
        self.write = write

    def critique(self, items: list[dict]) -> list[str | None]:
        """One judgment per item: None for satisfaction, FAILED for an empty or unfinished one."""
        prompts, judgments = [], []
        for x in items:
            prompts.append(critic_prompt(x["instruction"], x["input"], x["response"]))
        asked = list(dict.fromkeys(prompts))  # equal ones once
        written = dict(zip(asked, self.write(asked), strict=True))
        for prompt in prompts:
            text, ended = written[prompt]
            if not ended or not text.strip():
                judgments.append(FAILED)
            elif text.strip().lower().startswith("perfect"):  # CUT, appendix A.2
                judgments.append(None)
            else:
                judgments.append(text.strip())
        return judgments


class RuleCritic:
    """Judgments by rule from the target: the fields, or the words, that are wrong or missing.

    Records, "name : value ; name : value", are compared field by field, other texts word by word.
    """

    name = "rule"

    def critique(self, items: list[dict]) -> list[str | None]:
        """One judgment per item; None for a response that equals a target."""
        found = []
        for item in items:
            targets = item.get("targets") or [item["target"]]
            found.append(self.judgment(item["response"], targets))
        return found

    def judgment(self, response: str, targets: list[str]) -> str | None:
        """What is wrong in a response, against the nearest of its targets."""
        if normalize(response) in map(normalize, targets):
            return None  # it satisfies
        # The nearest target is the one that needs the fewest words taken out.
        target = min(targets, key=lambda text: sum(wrong_words(response, text)))
        wanted, given = named_fields(target), named_fields(response)
        if wanted and given:
            return f"wrong : {' , '.join(wrong_fields(given, wanted)) or 'the order'} ."
        bad = marked_words(response, target)
        if bad:
            return f"wrong : {' '.join(bad)} ."
        missing = marked_words(target, response)
        return f"missing : {' '.join(missing)} ."


def named_fields(text: str) -> dict:
    """{name: value} of "name : value ; name : value"; {} for text of another form."""
    fields, parts = {}, normalize(text).split(";")
    for part in parts:
        name, colon, value = part.partition(":")
        if colon and name.strip():
            fields[name.strip()] = value.strip()
    if len(parts) < 2 or len(fields) < len(parts):
        return {}
    return fields


def wrong_fields(given: dict, wanted: dict) -> list:
    """The names of fields with another value, or else of those that are not wanted.

    Both are in the order of the texts.
    """
    bad = [name for name in wanted if given.get(name) != wanted[name]]
    return bad or [name for name in given if name not in wanted]


def marked_words(response: str, target: str) -> list[str]:
    """The words of the response that `wrong_words` marks."""
    words, marks = response.split(), wrong_words(response, target)
    return [word for word, wrong in zip(words, marks, strict=True) if wrong]


def wrong_words(response: str, target: str) -> list[bool]:
    """For each word of the response whether it is outside a longest common subsequence.

    That is the least number of words to take out so that the rest stands in the target, in order.
    """
    words, wanted = ([fold(word) for word in text.split()] for text in (response, target))
    # common[i][j]: the length of that subsequence for the words from i and the target from j
    common = [[0] * (len(wanted) + 1) for _ in range(len(words) + 1)]
    for i in reversed(range(len(words))):
        for j in reversed(range(len(wanted))):
            if words[i] == wanted[j]:
                common[i][j] = common[i + 1][j + 1] + 1
            else:
                common[i][j] = max(common[i + 1][j], common[i][j + 1])
    # Walk along one such subsequence: a word that is on it is right, and the others are wrong.
    # Where the two texts differ, step over the word whose loss keeps the subsequence longer.
    wrong, i, j = [True] * len(words), 0, 0
    while i < len(words) and j < len(wanted):
        if words[i] == wanted[j]:
            wrong[i] = False
            i, j = i + 1, j + 1
        elif common[i + 1][j] >= common[i][j + 1]:
            i += 1
        else:
            j += 1
    return wrong
