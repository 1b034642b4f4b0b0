"""Small tokenizers of the kinds that checkpoints have, saved by transformers."""

import json
import random

import pytest

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
WORDS = ("the lamp is red . Anna bought 42 blue chairs in Paris on Monday , and 7 tables ; who "
         "paid ? naïve café über straße 我们 在 巴黎 。 привет мир 🙂 👍🏽 x=1 \t\n  \n\n fn(a,b) "
         "<b> [1] {y} | 's don't I'll <s> </s>").split(" ")


def train_bpe(texts, special, **options):
    """A byte-level BPE of the library."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    pre, regex = tokenizers.pre_tokenizers, tokenizers.Regex(LLAMA3)
    made.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(False)])
    if options:
        made.pre_tokenizer = pre.Sequence([pre.Split(regex, "isolated"),
                                           pre.ByteLevel(False, use_regex=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, special_tokens=special,
                                             initial_alphabet=pre.ByteLevel.alphabet())
    made.train_from_iterator(texts, trainer)
    return made


def save_tokenizers(file, make_folder):
    """{kind: a folder as transformers saves it}: two byte-level ones, two of a tokenizer.model."""
    rng, found = random.Random(1), {}
    texts = [" ".join(rng.choices(WORDS, k=30)) for _ in range(300)]
    made = train_bpe(texts, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                             "<|end_header_id|>", "<|eot_id|>"], ignore_merges=True)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="$A $B",
        special_tokens=[("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    found["llama3"] = made
    made = train_bpe(texts, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens(["wordplay"])
    found["smollm"] = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|im_start|>", eos_token="<|im_end|>")
    found["prepend"] = transformers.LlamaTokenizerFast(vocab_file=str(file), legacy=True,
                                                       add_prefix_space=True)
    found["metaspace"] = transformers.LlamaTokenizerFast(vocab_file=str(file), legacy=False,
                                                         add_prefix_space=True)
    for kind, made in found.items():
        folder = make_folder(kind)
        made.save_pretrained(folder)
        (folder / "tokenizer.model").unlink(missing_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("add_prefix_space", None)  # else transformers looks for the file again
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        found[kind] = folder
    return found
