"""Talk to a model at the terminal.

    python -m tools.chat --model DIR --adapter runs/x

The adapter stays apart from the model, so that it can be switched off.
"""

import sys
from argparse import Namespace
from contextlib import nullcontext

from data import truncate_left
from eval import find_template, open_model, open_tokenizer
from extras.reports.plots import printable
from tools import make_main

HELP = """/reset            begin a new conversation
/system TEXT      begin a new one under this system message
/adapter on|off   with the adapter, or the base model alone
/quit             leave, as the end of the input does"""


def chat(cfg) -> None:
    """Read lines, print answers as they come, until /quit or the end of the input."""
    from extras.fast import prepacked
    from lora import disabled

    adapter = cfg.adapter[0] if cfg.adapter else ""
    model, tokenizer = open_model(cfg, adapter).eval(), open_tokenizer(cfg)
    chat_templates = Namespace(**vars(cfg) | {"plain": False})  # the course has no others
    template, messages, adapted = find_template(chat_templates, model, adapter), [], True
    print(f"{cfg.model}{adapter and f' with {adapter}'}: /help lists the commands.")
    with prepacked(model, 1):  # which would be done for each answer anew
        for line in iter(read_line, None):
            command, _, rest = line.strip().partition(" ")
            if command == "/quit":
                break
            elif command in ("/reset", "/system"):
                messages = [{"role": "system", "content": rest}] if rest else []
            elif command == "/adapter" and rest in ("on", "off"):
                adapted = rest == "on"
            elif command.startswith("/"):
                print(HELP)
            elif line.strip():
                messages.append({"role": "user", "content": line})
                try:
                    with nullcontext() if adapted else disabled(model):
                        text = say_answer(cfg, model, tokenizer, template, messages)
                    messages.append({"role": "assistant", "content": text})
                except (KeyboardInterrupt, ValueError) as error:
                    print(f"\n({str(error) or 'stopped'})")
                    messages.pop()  # the line is forgotten, the conversation goes on


def read_line() -> str | None:
    """A line from the terminal; None at its end."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        return print()


def say_answer(cfg, model, tokenizer, template, messages: list[dict]) -> str:
    """Print the answer while it is made. The oldest turns are forgotten if they do not fit."""
    from model import Sampling, generate

    room = min(cfg.max_len or model.config.context, model.config.context) - cfg.max_new_tokens
    if room < 2:
        raise ValueError(f"--max-new-tokens {cfg.max_new_tokens} leaves no room for a prompt.")
    first = int(messages[0]["role"] == "system")
    prompt = template.render_conversation(messages)
    while len(tokenizer.encode_prompt(prompt)) > room and len(messages) > first + 2:
        del messages[first:first + 2]
        prompt = template.render_conversation(messages)
        print("(the oldest turn is forgotten: the conversation is longer than the model takes)")
    shown = [""]

    def watch(answer):
        text = "\n".join(map(printable, tokenizer.decode(answer.tokens).split("\n")))
        if text.startswith(shown[0]) and not text.endswith("\ufffd"):  # half of a character
            print(text[len(shown[0]):], end="", flush=True)
            shown[0] = text
    ids = generate(model, [truncate_left(tokenizer.encode_prompt(prompt), room)],
                   Sampling(cfg.max_new_tokens, cfg.temperature), watch=watch,
                   seeds=[f"{cfg.seed + len(messages)},0"],
                   eos_ids=[*tokenizer.stop_ids([prompt]), *model.config.eos_ids])[0]
    print(f"\n({len(ids)} tokens)")
    return tokenizer.decode(ids)


main = make_main(chat, __doc__, temperature=(0.7, "0 takes the most probable token"),
                 seed=(0, "seeds the sampling"))

if __name__ == "__main__":
    sys.exit(main())
