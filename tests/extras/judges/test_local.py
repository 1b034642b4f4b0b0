"""The local model as a backend."""

from types import SimpleNamespace

import pytest
import sentencepiece
import torch

from data import Tokenizer, find_template
from extras.judges.local import LocalChat
from extras.judges.pairs import STRATEGIES, Evaluator
from extras.judges.questions import make_question
from extras.judges.run import make_backend
from methods.examples import keyword_logprobs
from model import Llama, ModelConfig


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(model, tokenizer, template)."""
    folder = tmp_path_factory.mktemp("model")
    words = "judge verdict answer with one line alone in place of the texts a b red blue"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 20), model_prefix=str(folder / "tokenizer"),
        vocab_size=300, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        minloglevel=2)
    tokenizer = Tokenizer(folder)
    config = ModelConfig(vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=4, n_kv_heads=2,
                         head_dim=8, hidden_dim=64, norm_eps=1e-5, context=2048)
    model, generator = Llama(config), torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.fill_(1.0)
        else:
            weight.data.normal_(0, 0.2, generator=generator)
    return model, tokenizer, find_template("plain")


def pick(text):
    return make_question("pick", {"x": text}, choices=("a", "b"), system="{nonce}")


def test_the_more_probable_choice_is_the_verdict(parts):
    model, tokenizer, template = parts
    question = pick("red")
    reply, = LocalChat(*parts).ask([question])
    system, user = (message["content"] for message in question.messages)
    prompt = template.render(system, user).rstrip("\n") + "\n"
    (a, b), = keyword_logprobs(model, tokenizer, [prompt], [f"VERDICT {question.nonce}:"],
                               [(" a", " b")])
    assert reply.text == f"VERDICT {question.nonce}: {'ab'[b > a]}" and not reply.failure
    assert reply.odds == pytest.approx(a - b)


def test_order_free_text_and_prompts_that_do_not_fit(parts):
    free = make_question("say", {"x": "red"}, system="{nonce}", max_tokens=5)
    chat = LocalChat(*parts)
    long, written, picked = chat.ask([pick("red " * 9000), free, pick("red")])
    assert long.failure == "prompt longer than the model takes" and not long.text
    assert written.failure in ("", "cut at max_tokens", "empty message")
    assert picked == chat.ask([pick("red")])[0]
    assert chat.ask([]) == []
    pair = {"input": "red " * 9000, "output_1": "x", "output_2": "y"}
    row, = Evaluator(chat.ask, STRATEGIES["rules"]).evaluate([pair])
    assert row["winners"] == [None, None]
    assert row["failures"] == ["prompt longer than the model takes"] * 2


def test_an_answer_has_half_of_the_context_at_most(parts, monkeypatch):
    monkeypatch.setattr(parts[0].config, "context", 256)
    texts = ["red", "red " * 200]
    questions = [make_question("say", {"x": text}, system="", max_tokens=1024) for text in texts]
    short, long = LocalChat(*parts).ask(questions)
    assert short.failure in ("", "cut at max_tokens")
    assert long.failure == "prompt longer than the model takes"


def test_a_text_under_judgment_stays_as_it_is(parts):
    model, tokenizer, template = parts
    asked = []

    def render(*texts):
        asked.append(template.render(*texts))
        return asked[-1]
    LocalChat(model, tokenizer, SimpleNamespace(render=render)).ask([pick("{input} {instruction}")])
    assert "\n{input} {instruction}\n" in asked[0]


def test_numbers_that_are_none_are_no_verdict(parts):
    model, tokenizer, template = parts
    broken = Llama(model.config)
    for weight in broken.parameters():
        weight.data.fill_(float("nan"))
    reply, = LocalChat(broken, tokenizer, template).ask([pick("red")])
    assert (reply.text, reply.failure) == ("", "no number")


def test_the_model_of_a_run_is_a_backend_of_which_each_process_asks_a_share(parts):
    model, tokenizer, template = parts
    shares = []

    def share(items, work):
        shares.append(len(items))
        return work(items[:1]) + work(items[1:])
    run = SimpleNamespace(model=model, tokenizer=tokenizer, template=template,
                          cfg=SimpleNamespace(judge="self", eval_batch=4), memory={},
                          guard=SimpleNamespace(share=share))
    ask, questions = make_backend(run), [pick("red"), pick("blue"), pick("a")]
    found = [reply.text for reply in ask(questions, sample=1)]
    assert found == [reply.text for reply in LocalChat(*parts).ask(questions)] and shares == [3]
