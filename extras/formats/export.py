"""A trained model as a folder that other programs read: they must ask and stop as training did.

So config.json and generation_config.json name the token that ends a template's responses, and the
template travels along: as a chat template for others, and by name, or as a file, for this program.
"""

import json
import re
import shutil
from pathlib import Path

from data import as_list
from extras.formats.chat import JINJA_FILE, find_source
from extras.formats.checks import read_object
from extras.formats.templates import ChatTemplate, Prompt, find_file, find_template
from extras.formats.tokenizer import SIDE_FILES, HFTokenizer
from extras.formats.weights import save_model

GENERATION = "generation_config.json"


def export_model(model, tokenizer: HFTokenizer, name: str | None, source, target, *folders,
                 dtype=None) -> None:
    """Write a model, its tokenizer, and the template `name` that it was trained with, to `target`.

    source: the folder that the model was read from, or "". folders: where else a template may lie.
    """
    target, template, name = Path(target), None, name or model.config.prompt_template
    target.mkdir(parents=True, exist_ok=True)
    if name:
        places = [*folders, source, tokenizer.folder]
        template, file = find_template(name, *places), find_file(name, *places)
        if file:  # of the user's own
            shutil.copyfile(file, target / file.name)
        model.config.prompt_template = file.name if file else name
    write_tokenizer(tokenizer, template, target)
    write_stops(model, tokenizer, template, source, target)
    save_model(model, target, dtype=dtype)


def write_stops(model, tokenizer, template, source, target: Path) -> None:
    """Let the config and generation_config.json name all ids that end a response."""
    generation = read_object(Path(source, GENERATION)) if source else {}
    ends = [Prompt.of([], template.end)] if template else []
    ids = [*model.config.eos_ids, *as_list(generation.get("eos_token_id") or []),
           *tokenizer.stop_ids(ends)]
    model.config.eos_ids = list(dict.fromkeys(ids))
    eos = model.config.eos_ids if len(model.config.eos_ids) > 1 else model.config.eos_ids[0]
    generation |= {"bos_token_id": model.config.bos_id, "eos_token_id": eos}
    (target / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")


def write_tokenizer(tokenizer: HFTokenizer, template, target: Path) -> None:
    """Copy the tokenizer's files, with the template as their chat template.

    A tokenizer that stands alone gets a tokenizer_config.json, without which transformers would not
    know its kind.
    """
    target.mkdir(parents=True, exist_ok=True)
    own = tokenizer.path.name.endswith(".json")
    names = {"tokenizer.json" if own else "tokenizer.model": tokenizer.path}
    if not own:  # and its other form, which opening it has compared
        names["tokenizer.json"] = tokenizer.path.parent / "tokenizer.json"
    names |= {name: tokenizer.folder / name for name in (*SIDE_FILES, JINJA_FILE)}
    for name, file in names.items():
        if file.is_file() and file.resolve() != (target / name).resolve():
            shutil.copyfile(file, target / name)
    if not (target / SIDE_FILES[0]).is_file():
        write_object(target / SIDE_FILES[0], tokenizer.describe())
    chat = to_jinja(template, tokenizer) if isinstance(template, ChatTemplate) else None
    chat = chat or getattr(template, "source", None)
    if chat and find_source(target) != chat:
        (target / JINJA_FILE).unlink(missing_ok=True)  # which would go before the other
        config = read_object(target / SIDE_FILES[0])
        write_object(target / SIDE_FILES[0], config | {"chat_template": chat})


def write_object(file: Path, values: dict) -> None:
    """Write a JSON object as transformers does."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ----- Templates for other programs -----
def to_jinja(template: ChatTemplate, tokenizer: HFTokenizer) -> str:
    """What `template.render_conversation` does, as a chat template for other programs."""
    content = "message['content']" + " | trim" * template.strip
    pieces = {"{user}": f"{{{{- {content} -}}}}"}
    before, _, behind = template.opening.partition("{system}")
    pieces["{opening}"] = "".join([
        "{%- if ns.system and not ns.begun -%}", say(before, tokenizer), "{{- ns.system -}}",
        say(behind, tokenizer), "{%- endif -%}"])
    # Behind BOS, some tokenizers leave out the blank that they put before a text.
    begin = "{{- bos_token -}}" * tokenizer.add_bos
    if begin and tokenizer.encode_behind("a") != tokenizer.encode_first("a"):
        begin += "{{- ' ' -}}"
    turn = [pieces.get(piece) or say(piece, tokenizer)
            for piece in re.split(r"(\{user\}|\{opening\})", template.turn)]
    return "".join([
        begin,
        "{%- set ns = namespace(begun=false, system=", quote(template.system), ") -%}",
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'system' -%}{%- set ns.system = message['content'] -%}",
        "{%- elif message['role'] == 'user' -%}",
        "{%- if ns.begun -%}", say(template.between, tokenizer), "{%- endif -%}",
        *turn, "{%- set ns.begun = true -%}",
        "{%- else -%}", say(template.separator, tokenizer), pieces["{user}"],
        say(template.end, tokenizer), "{%- endif -%}{%- endfor -%}"])


def say(text: str, tokenizer: HFTokenizer) -> str:
    """Jinja that writes a text of a template, with <s> and </s> by the tokenizer's names."""
    names = {"<s>": "bos_token" if tokenizer.bos_id is not None else "''", "</s>": "eos_token"}
    parts = [names.get(part) or quote(part) for part in re.split("(</?s>)", text) if part]
    return f"{{{{- {' ~ '.join(parts)} -}}}}" if parts else ""


def quote(text: str) -> str:
    """A text as a literal of Jinja."""
    return "'" + text.encode("unicode_escape").decode().replace("'", "\\'") + "'"
