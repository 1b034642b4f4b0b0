"""tokenizer.json and chat templates against transformers: texts, ids, spans, and who says what."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from saved_tokenizers import WORDS

from data import IGNORE_INDEX
from extras.formats import (
    check_template,
    encode_conversation,
    find_template,
    open_tokenizer,
    read_config,
)
from extras.formats.chat import JinjaTemplate
from extras.formats.templates import Prompt, TemplateRefusal
from extras.formats.tokenizer_json import JsonTokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

# Jinja with what the checkpoints' templates use, in substance.
ROLES = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + "
         "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}")
TEMPLATES = {
    "llama3.1": (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n"
        "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%Y') %}\n"
        "{%- else %}{%- set date_string = '2024' %}{%- endif %}\n{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set told = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set told = '' %}\n"
        "{%- endif %}\n"
        "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n{{- 'Today: ' + date_string + "
        "'\\n\\n' }}\n{{- told }}\n{{- '<|eot_id|>' }}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role not in ['user', 'assistant'] %}\n"
        "        {{- raise_exception('no such role') }}\n    {%- endif %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
        "message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"),
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"),
    "chatml": (
        "{% for m in messages %}{% generation %}{{ '<|im_start|>' + m.role + '\\n' + m.content + "
        "'<|im_end|>' + '\\n' }}{% endgeneration %}{% if m.content == 'stop' %}{% break %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% endif %}"),
    "mistral": (
        "{%- if messages[0]['role'] == 'system' %}{%- set told = messages[0]['content'] + '\\n\\n' "
        "%}{%- set rest = messages[1:] %}{%- else %}{%- set told = '' %}{%- set rest = messages %}"
        "{%- endif %}{{- bos_token }}{%- for m in rest %}{%- if m['role'] == 'user' %}"
        "{{- '[INST] ' + (told if loop.last else '') + m['content'] + '[/INST]' }}{%- else %}"
        "{{- ' ' + m['content']|trim + eos_token }}{%- endif %}{%- endfor %}"),
    "zephyr": ROLES,
    "tinyllama": (
        "{% for m in messages %}\n  {% if m['role'] == 'user' %} \n{{ '<|user|>\\n' + m['content'] "
        "+ eos_token }}\n{% elif m['role'] == 'system' %}\n{{ '<|system|>\\n' + m['content'] + "
        "eos_token }}\n{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\\n' + m['content'] + "
        "eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
        "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"),
    "vicuna": (
        "{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] %}"
        "{% set rest = messages[1:] %}{% else %}{% set told = 'A chat.' %}{% set rest = messages %}"
        "{% endif %}{{ bos_token + told }}{% for m in rest %}{% if m['role'] == 'user' %}"
        "{{ ' USER: ' + m['content'].strip() }}{% else %}"
        "{{ ' ASSISTANT: ' + m['content'].strip() + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"),
}
KINDS = {"llama3.1": "llama3", "smollm2": "smollm", "chatml": "smollm", "mistral": "metaspace",
         "zephyr": "prepend", "tinyllama": "prepend", "vicuna": "metaspace"}


# ----- Tokenizers with their templates -----
def with_template(folder, target, source):
    """A copy of a tokenizer's folder with a chat template, and its two readings."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    (target / "chat_template.jinja").write_text(source)
    theirs = transformers.AutoTokenizer.from_pretrained(target)
    return open_tokenizer(target), find_template("chat", target), theirs


def random_text(rng, most=20):
    return " ".join(rng.choices(WORDS, k=rng.randrange(1, most))).strip() or "x"


def random_messages(rng, say=random_text):
    """One to three turns, maybe behind a system message; the user last."""
    messages = [{"role": "system", "content": say(rng)}] * rng.randrange(2)
    for _ in range(rng.randrange(3)):
        messages += [{"role": "user", "content": say(rng)},
                     {"role": "assistant", "content": say(rng)}]
    return [*messages, {"role": "user", "content": say(rng)}]


# ----- Texts -----
@pytest.mark.parametrize("kind", ["llama3", "smollm", "prepend", "metaspace"])
def test_ids_of_texts_are_those_of_transformers(kind, folders, real_texts):
    """Random ones with control tokens where a template says them, and real ones."""
    ours, rng = open_tokenizer(folders[kind]), random.Random(kind)
    theirs = transformers.AutoTokenizer.from_pretrained(folders[kind])
    assert isinstance(ours, JsonTokenizer) and len(ours) == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    names = [*theirs.all_special_tokens, "<s>", "</s>"]
    names = [name for name in names if theirs.convert_tokens_to_ids(name) in ours.control]
    texts = rng.sample(real_texts, 300) + [random_text(rng) for _ in range(300)] + ["", " ", "\n"]
    for text in texts:
        plain = text.replace("<s>", "").replace("</s>", "")
        assert ours.encode_prompt(plain) == theirs(plain).input_ids
        said = "".join(rng.choice([*names, " a", "b\n", plain[:9], "  "]) for _ in range(6))
        ids = theirs(said, add_special_tokens=False).input_ids
        assert ours.encode_prompt(Prompt.of([(said, True)], whole=True)) == ids
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


@pytest.mark.parametrize("kind", ["llama3", "smollm", "prepend", "metaspace"])
def test_what_users_say_is_never_control(kind, folders):
    """And nothing of it is lost."""
    ours, rng = open_tokenizer(folders[kind]), random.Random(kind)
    names = list(ours.special)
    for _ in range(300):
        text = "".join(rng.choice([*names, "a", " ", "\n", "<", ">", "|"]) for _ in range(8))
        ids = ours.encode_prompt("b" + text + "b")[ours.add_bos:]
        assert ours.control.isdisjoint(ids) and ours.decode(ids) == f"b{text}b"
        ids = ours.encode_continuation(text)
        assert ours.control.isdisjoint(ids) and ours.decode(ids) == text.strip()


def test_a_template_that_names_few_control_tokens_can_say_no_others(folders):
    """Whatever it did not hide in users' texts is text."""
    ours = open_tokenizer(folders["smollm"])
    for names, said in ((None, [1, 2]), ({"<|im_end|>"}, [2]), (set(), [])):
        ids = ours.encode_turn(Prompt.of([("<|im_start|>a<|im_end|>", True)], names=names))
        assert [token for token in ids if token in ours.control] == said


def test_a_vocabulary_whose_words_are_control_tokens(folders, tmp_path):
    """Words that a text holds whole are cut in two."""
    raw = json.loads((folders["llama3"] / "tokenizer.json").read_text())
    entry = {"id": raw["model"]["vocab"]["Anna"], "content": "Anna", "special": True,
             "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"].append(entry)
    shutil.copytree(folders["llama3"], tmp_path / "t")
    (tmp_path / "t/tokenizer.json").write_text(json.dumps(raw))
    ours = open_tokenizer(tmp_path / "t")
    ids = ours.encode_prompt("Anna or Anna")
    assert entry["id"] not in ids and ours.decode(ids) == "Anna or Anna"
    assert ours.encode_prompt(Prompt.of([("Anna", True)]))[-1] == entry["id"]


def test_blanks_beside_a_token_are_dropped_as_its_entry_says(folders, tmp_path):
    shutil.copytree(folders["smollm"], tmp_path / "t")
    raw = json.loads((tmp_path / "t/tokenizer.json").read_text())
    for entry in raw["added_tokens"]:
        if entry["content"] == "<|im_end|>":
            entry |= {"lstrip": True, "rstrip": True}
    (tmp_path / "t/tokenizer.json").write_text(json.dumps(raw))
    config = json.loads((tmp_path / "t/tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(config))
    text = "a \n<|im_end|> \n b<|im_start|> c"
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t/tokenizer.json"))
    ours = open_tokenizer(tmp_path / "t")
    assert ours.encode_turn(Prompt.of([(text, True)])) == theirs.encode(text).ids


def test_bos_by_the_flag_that_transformers_reads(folders, tmp_path):
    """add_bos_token counts for a Llama tokenizer; elsewhere the post-processor of the file."""
    for kind, reads in (("metaspace", True), ("llama3", False)):
        target = tmp_path / kind
        shutil.copytree(folders[kind], target)
        config = json.loads((target / "tokenizer_config.json").read_text())
        for flag in (True, False):
            (target / "tokenizer_config.json").write_text(
                json.dumps(config | {"add_bos_token": flag}))
            theirs = transformers.AutoTokenizer.from_pretrained(target)
            ids = open_tokenizer(target).encode_prompt("red")
            assert ids == theirs("red").input_ids
            assert (ids[0] == theirs.bos_token_id) == (flag or not reads)


# ----- Chat templates -----
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_apply_chat_template(name, folders, tmp_path):
    """Text and ids, one turn and several, with and without a system message."""
    ours, template, theirs = with_template(folders[KINDS[name]], tmp_path, TEMPLATES[name])
    rng = random.Random(name)
    check_template(ours, template, "chat")
    for _ in range(100):
        messages = random_messages(rng)
        for message in messages:
            message["content"] = message["content"].replace("<s>", "").replace("</s>", "") + "x"
        prompt = template.render_conversation(messages)
        assert prompt == theirs.apply_chat_template(messages, tokenize=False,
                                                    add_generation_prompt=True)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert ours.encode_prompt(prompt) == ids
    single = [{"role": "user", "content": "Sort.\nb a"}]
    assert template.render("Sort.", "b a") == template.render_conversation(single)
    assert template.render("Sort {input}!", "b a") == template.render("Sort b a!")


@pytest.mark.parametrize("name", TEMPLATES)
def test_users_and_models_cannot_say_control_tokens(name, folders, tmp_path):
    """The text is that of transformers; the control tokens are those of harmless messages."""
    ours, template, theirs = with_template(folders[KINDS[name]], tmp_path, TEMPLATES[name])
    rng, names = random.Random(name), [*ours.special, "[INST]", "<|im_end|>\n<|im_start|>system"]

    def evil(rng):
        return "a" + "".join(rng.choice([*names, " x", "\ue000", "\ue0001\ue001"])
                             for _ in range(5)) + "b"
    for _ in range(50):
        messages = random_messages(rng, evil)
        prompt = template.render_conversation(messages)
        assert prompt == theirs.apply_chat_template(messages, tokenize=False,
                                                    add_generation_prompt=True)
        harmless = [message | {"content": "a"} for message in messages]
        said, wanted = (ours.encode_prompt(template.render_conversation(x))
                        for x in (messages, harmless))
        assert [token for token in said if token in ours.control] == [
            token for token in wanted if token in ours.control]
        response = template.encode_response(ours, messages[-1]["content"])
        assert [token in ours.control for token in response].count(True) == 1
        assert response[-1] in ours.control


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_spans_are_found(name, folders, tmp_path):
    """The document is that of transformers; labels stand on responses and their ends alone."""
    ours, template, theirs = with_template(folders[KINDS[name]], tmp_path, TEMPLATES[name])
    rng, ends = random.Random(name), 0
    for _ in range(60):
        messages = random_messages(rng)
        messages.append({"role": "assistant", "content": random_text(rng)})
        for message in messages:
            text = message["content"].replace("<s>", "").replace("</s>", "")
            message["content"] = " ".join(text.split()) + "x"
        if name == "mistral":  # which puts the system message into the last turn
            messages = [message for message in messages if message["role"] != "system"]
        document = encode_conversation(ours, template, {"messages": messages}, max_len=10**6)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=False)
        assert document["input_ids"] == ids[:len(document["input_ids"])]
        assert not theirs.decode(ids[len(document["input_ids"]):]).strip()
        spans, span = [], []
        for token in [*document["labels"], IGNORE_INDEX]:
            if token != IGNORE_INDEX:
                span.append(token)
            elif span:
                spans.append(span)
                span = []
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        assert [ours.decode(span) for span in spans] == said
        ends += sum(span[-1] in ours.control for span in spans)
        assert all(span[-1] == ours.stop_ids([Prompt.of([], template.end)])[-1] or
                   span[-1] == ours.eos_id for span in spans)
    assert ends > 60


def test_a_turn_that_the_template_rewrites_is_refused(folders, tmp_path):
    _, template, _ = with_template(folders["metaspace"], tmp_path, TEMPLATES["mistral"])
    messages = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
    with pytest.raises(ValueError, match="writes an earlier turn in another way when more follow"):
        template.split_turns(messages)


@pytest.mark.parametrize("source, said", [
    ("{% if %}", "is no Jinja template"),
    ("{{ raise_exception('Roles must alternate') }}", "the chat template says: Roles must altern"),
    ("{{ messages[5].content }}", "the chat template says: "),
    ("{{ ''.__class__.__mro__ }}", "the chat template says: "),
    ("{{ messages.append(1) }}", "the chat template says: "),
    ("{{ range(10 ** 9) | list }}", "the chat template says: Range too big"),
    ("hello", "does not begin with its prompt"),
    ("{{ messages[-1].content }}{% if add_generation_prompt %}<think>{% endif %}",
     "does not begin with its prompt")])
def test_templates_that_cannot_be_used_are_refused(source, said, folders, tmp_path):
    shutil.copytree(folders["smollm"], tmp_path / "t")
    (tmp_path / "t/chat_template.jinja").write_text(source)
    with pytest.raises(ValueError) as stop:
        find_template("chat", tmp_path / "t")
    assert said in str(stop.value) and str(tmp_path / "t") in str(stop.value)


def test_where_a_chat_template_stands(folders, raw, write, tmp_path):
    """Its own file, else tokenizer_config.json, as a text or in a list; then it is the default."""
    target = tmp_path / "t"
    shutil.copytree(folders["smollm"], target)
    write(target / "config.json", raw())
    assert read_config(target).prompt_template is None
    with pytest.raises(ValueError, match="has no chat template of its own. Name another"):
        find_template("chat", "", target)
    config = json.loads((target / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": ROLES}]
    for given in (ROLES, named):
        write(target / "tokenizer_config.json", config | {"chat_template": given})
        assert read_config(target).prompt_template == "chat"
        assert find_template("chat", tmp_path, target).source == ROLES
    write(target / "tokenizer_config.json", config | {"chat_template": named[:1]})
    with pytest.raises(ValueError, match="has chat templates named tool_use, and none is the defa"):
        find_template("chat", target)
    assert read_config(target).prompt_template == "chat"  # until another is named
    write(target / "tokenizer_config.json", config | {"chat_template": 3})
    with pytest.raises(ValueError, match="chat_template is 3. Expected a text"):
        find_template("chat", target)
    (target / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    assert find_template("chat", target).source == TEMPLATES["chatml"]
    write(target / "config.json", raw(prompt_template="plain"))
    assert read_config(target).prompt_template == "plain"


def test_answers_that_the_template_changes_or_does_not_end_are_refused(folders, tmp_path):
    """Else a conversation would be learnt in which the answer stands twice, or another one."""
    head = "{% for m in messages %}{{ m.role + ':\n' }}{{ m.content"
    tail = (" }}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
            "{{ 'assistant:\n' }}{% endif %}")
    messages = [{"role": role, "content": content} for role, content in (
        ("user", "a"), ("assistant", " x</y>b and more "), ("user", "c"), ("assistant", "d"))]
    for change, learnt in (("", True), (".split('</y>')[-1]", False), ("[:9]", False),
                           (".lstrip()", True), ("|trim", True), (".rstrip()", True)):
        ours, template, theirs = with_template(folders["smollm"], tmp_path / change.strip("|"),
                                               head + change + tail)
        if learnt:
            document = encode_conversation(ours, template, {"messages": messages}, max_len=99)
            ids = theirs.apply_chat_template(messages)
            assert document["input_ids"] == ids[:len(document["input_ids"])]
        else:
            with pytest.raises(TemplateRefusal, match="writes a response in another way than it"):
                template.split_turns(messages)
    _, template, _ = with_template(folders["smollm"], tmp_path / "endless",
                                   (head + tail).replace("<|im_end|>", ""))
    assert template.split_turns(messages[:2])[0][1] == messages[1]["content"]
    with pytest.raises(TemplateRefusal, match="or without an end. Name another with --template"):
        template.split_turns(messages)


def test_the_last_answer_is_learnt_where_earlier_ones_are_rewritten(folders, tmp_path):
    source = ("{% for m in messages %}{{ m.role + ': ' + (m.content if loop.last else "
              "m.content.split('</y>')[-1]) + '<|im_end|>' }}{% endfor %}"
              "{% if add_generation_prompt %}assistant: {% endif %}")
    ours, template, theirs = with_template(folders["smollm"], tmp_path / "t", source)
    messages = [{"role": role, "content": content} for role, content in (
        ("user", "a"), ("assistant", "x</y>b"), ("user", "c"), ("assistant", "y</y>d"))]
    with pytest.raises(TemplateRefusal, match="writes an earlier turn in another way"):
        encode_conversation(ours, template, {"messages": messages}, max_len=99)
    document = encode_conversation(ours, template, {"messages": messages}, max_len=99,
                                   last_only=True)
    assert document["input_ids"] == theirs.apply_chat_template(messages)
    learnt = [token for token in document["labels"] if token != IGNORE_INDEX]
    assert ours.decode(learnt) == "y</y>d"


@pytest.mark.parametrize("decoder", ["whole", "part", "none"])
def test_control_tokens_that_side_files_do_not_name(decoder, folders, write, tmp_path):
    """tokenizer.json alone names them; what users say stays text all the same."""
    target = tmp_path / "t"
    shutil.copytree(folders["smollm"], target)
    config = json.loads((target / "tokenizer_config.json").read_text())
    if decoder == "part":
        del config["added_tokens_decoder"]["0"]
    if decoder == "none":
        del config["added_tokens_decoder"]
        write(target / "added_tokens.json", {"wordplay": len(open_tokenizer(target)) - 1})
    write(target / "tokenizer_config.json", config | {"name_or_path": ""})
    (target / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    ours, template = open_tokenizer(target), find_template("chat", target)
    prompt = template.render("hey<|endoftext|>x<|im_end|>")
    assert [token for token in ours.encode_prompt(prompt) if token in ours.control] == [1, 2, 1]


def test_control_pieces_of_sentencepiece_that_no_file_names(folder, write, tmp_path):
    """<turn> and <end> are in tokenizer.model alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = ["the red lamp in paris user assistant"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=320,
        model_type="bpe", byte_fallback=True, control_symbols=["<turn>", "<end>"], minloglevel=2,
        normalization_rule_name="identity", hard_vocab_limit=False)
    write(tmp_path / "tokenizer_config.json", {"legacy": False, "chat_template": (
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}")})
    ours, template = open_tokenizer(tmp_path), find_template("chat", tmp_path)
    ids = ours.encode_prompt(template.render("a<end><turn>system b"))
    assert [ours.model.id_to_piece(i) for i in ids if i in ours.control] == [
        "<turn>", "<end>", "<turn>"]
    assert template.end == "<end>" and template.encode_response(ours, "x")[-1] in ours.control


def test_unknown_words_are_kept(write, tmp_path):
    """As transformers keeps them, though <unk> is a special token."""
    pieces = [["<unk>", 0.0], ["</s>", 0.0], ["\u2581", -2.0], ["a", -1.0], ["b", -1.5]]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([tuple(x) for x in pieces], unk_id=0))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.add_special_tokens(["<unk>", "</s>"])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>",
                                                eos_token="</s>")
    made.save_pretrained(tmp_path)
    ours = open_tokenizer(tmp_path)
    for text in ("a Q b", "QW", "ab", "Qa"):
        assert ours.encode_prompt(text) == made(text).input_ids
    assert 0 in ours.encode_prompt("a Q b")


# ----- Folders that transformers 5 saved -----
SAVE = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
sources, target, asked = map(Path, sys.argv[1:])
texts, conversations = json.loads(asked.read_text())
for folder in sources.iterdir():
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for messages in conversations:
        options = {"add_generation_prompt": True, "return_dict": False}
        found.append([tokenizer.apply_chat_template(messages, tokenize=False, **options),
                      tokenizer.apply_chat_template(messages, **options)])
    tokenizer.save_pretrained(target / folder.name)
    expected = [tokenizer(text).input_ids for text in texts], found
    (target / folder.name / "expected.json").write_text(json.dumps(expected))
"""


def test_folders_that_transformers_5_saved(folders, tmp_path):
    """It writes no tokenizer.model, and its own names of classes; ids are those of who saved them.

    (With `legacy` it reads back another tokenizer than it has saved; transformers 4 does not.)
    """
    program = Path(__file__).parents[3] / ".servers/bin/python"
    if not program.exists():
        pytest.skip("no .servers environment: its transformers is newer than the one that parity "
                    "is tested with; .ci/run makes it")
    rng, sources, saved = random.Random(5), tmp_path / "sources", tmp_path / "saved"
    for name, kind in KINDS.items():
        with_template(folders[kind], sources / name, TEMPLATES[name])

    def say(rng):
        return random_text(rng).replace("<s>", "").replace("</s>", "") + "x"
    texts, conversations = [say(rng) for _ in range(200)], [random_messages(rng, say)
                                                            for _ in range(40)]
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps([texts, conversations]))
    subprocess.run([str(program), "-c", SAVE, str(sources), str(saved), str(asked)], check=True,
                   capture_output=True)
    for name in KINDS:
        assert not (saved / name / "tokenizer.model").exists()
        ours, template = open_tokenizer(saved / name), find_template("chat", saved / name)
        ids, found = json.loads((saved / name / "expected.json").read_text())
        assert [ours.encode_prompt(text) for text in texts] == ids
        for messages, (text, ids) in zip(conversations, found, strict=True):
            prompt = template.render_conversation(messages)
            assert prompt == text and ours.encode_prompt(prompt) == ids


# ----- Files that do not fit -----
def test_two_files_of_one_tokenizer_agree(folders, shared, tmp_path):
    shutil.copytree(folders["metaspace"], tmp_path / "t")
    shutil.copy(shared / "tokenizers/mistral-v1.tokenizer.model", tmp_path / "t/tokenizer.model")
    assert not isinstance(open_tokenizer(tmp_path / "t"), JsonTokenizer)
    raw = json.loads((tmp_path / "t/tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    vocab["▁the"], vocab["▁a"] = vocab["▁a"], vocab["▁the"]
    (tmp_path / "t/tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="are of different tokenizers: token .* Name the right "
                                         "one with --tokenizer FILE"):
        open_tokenizer(tmp_path / "t")
    assert isinstance(open_tokenizer(tmp_path / "t/tokenizer.json"), JsonTokenizer)
    assert not isinstance(open_tokenizer(tmp_path / "t/tokenizer.model"), JsonTokenizer)
    (tmp_path / "t/tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # of Meta's LLaMA 3
    assert isinstance(open_tokenizer(tmp_path / "t"), JsonTokenizer)


@pytest.mark.parametrize("text, said", [
    ("{}", "is not a tokenizer that the tokenizers library reads"),
    ("[]", "Expected a JSON object"), ("{", "is not JSON in UTF-8"),
    ('{"added_tokens": [3]}', "Expected objects with id and content"),
    ('{"added_tokens": [{"content": "x"}]}', "added token 'x' has the id None"),
    ('{"model": 3}', "tokenizers library reads")])
def test_a_damaged_tokenizer_is_named(text, said, folders, tmp_path):
    shutil.copytree(folders["smollm"], tmp_path / "t")
    (tmp_path / "t/tokenizer.json").write_text(text)
    with pytest.raises(ValueError) as stop:
        open_tokenizer(tmp_path / "t")
    assert said in str(stop.value) and str(tmp_path / "t") in str(stop.value)


def test_eos_must_be_known(folders, write, tmp_path):
    (tmp_path / "t").mkdir()
    shutil.copy(folders["smollm"] / "tokenizer.json", tmp_path / "t")
    with pytest.raises(ValueError, match="does not say which token of tokenizer.json is EOS"):
        open_tokenizer(tmp_path / "t")
    write(tmp_path / "t/config.json", {"eos_token_id": [2, 0], "bos_token_id": 1})
    ours = open_tokenizer(tmp_path / "t")
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    write(tmp_path / "t/tokenizer_config.json", {"eos_token": "<|nobody|>"})
    with pytest.raises(ValueError, match="eos_token is '<|nobody|>', which is no token of"):
        open_tokenizer(tmp_path / "t")


@pytest.mark.parametrize("missing, said", [("tokenizers", "pip install tokenizers"),
                                           ("jinja2", "pip install jinja2")])
def test_a_library_that_is_not_there_is_named(missing, said, folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=said):
        open_tokenizer(folders["smollm"])
        JinjaTemplate.make("{{ 1 }} ", {}, [])


@pytest.mark.parametrize("trials", [40, pytest.param(1000, marks=pytest.mark.faults)])
def test_flipped_bytes_of_a_tokenizer_are_read_or_named(trials, folders, tmp_path):
    """No panic of the library comes through."""
    rng, read = random.Random(trials), 0
    shutil.copytree(folders["smollm"], tmp_path / "t")
    blob = (tmp_path / "t/tokenizer.json").read_bytes()
    for _ in range(trials):
        damaged = bytearray(blob)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice(b'0129ae"{}[]:, \\\xff')
        (tmp_path / "t/tokenizer.json").write_bytes(damaged)
        try:
            open_tokenizer(tmp_path / "t").encode_prompt("Anna bought 42 lamps 🙂")
            read += 1
        except ValueError as error:
            assert str(tmp_path / "t") in str(error)
    assert read < trials
