"""Log-probabilities of two keywords behind a prompt, which the self-judge asks for.

Behind a prefix lie branches: a suffix and all but the last token of a keyword, which is predicted
and never read. Keywords that differ in their last token only have one branch.
"""

import sys

import torch

from data import truncate_left
from extras.fast.attention import Branched, put
from losses import at_least_float32, gathered_logprobs
from methods.examples import float32_head


def keyword_logprobs(model, tokenizer, prefixes: list[str], suffixes: list[str],
                     keywords: list[tuple[str, str]], *, batch_size: int = 64,
                     max_len: int | None = None) -> list[tuple[float, float]]:
    """log P(keyword | prefix + suffix), over all its tokens, for both keywords of every item.

    A prefix that several items share is read once for each `batch_size` of them. Raises ValueError
    for a keyword that does not continue its suffix, and for a suffix without room for a prefix.
    """
    forks, longest = [], {}  # longest: the most tokens behind each prefix
    for item, (prefix, suffix, pair) in enumerate(zip(prefixes, suffixes, keywords, strict=True)):
        for ids, targets in make_branches(tokenizer, suffix, pair).items():
            forks.append((prefix, ids, item, targets))
            longest[prefix] = max(longest.get(prefix, 0), len(ids))
    most = min(max_len or sys.maxsize, model.config.context)
    needed = max(longest.values(), default=0)
    if most - needed < 2:
        raise ValueError(f"a response to judge has about {needed} tokens and leaves no room for "
                         f"its question within {most}. Lower --max-new-tokens, or raise --max-len.")
    heads = {prefix: truncate_left(tokenizer.encode_prompt(prefix), most - longest[prefix])
             for prefix in longest}
    # similar lengths are attended to together
    order = {prefix: (len(prefix), number) for number, prefix in enumerate(longest)}
    forks.sort(key=lambda fork: (order[fork[0]], len(fork[1])))
    results = torch.zeros(len(prefixes), 2, device=model.model.embed_tokens.weight.device)
    was_training, lm_head = model.training, float32_head(model)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(forks), batch_size):
            add_logprobs(model, lm_head, heads, forks[start:start + batch_size], results)
    model.train(was_training)
    return [tuple(pair) for pair in results.tolist()]


def make_branches(tokenizer, suffix: str, keywords: tuple[str, str]) -> dict[tuple, list]:
    """{token ids: [(keyword 0 or 1, place of an id from the end, what follows it)]} of an item."""
    stem, branches = tokenizer.encode_continuation(suffix), {}
    if not stem:
        raise ValueError("a suffix has no tokens, but the keywords are read behind it. Give it "
                         "some text.")
    for which, keyword in enumerate(keywords):
        ids = tokenizer.encode_continuation(suffix + keyword)
        if ids[:len(stem)] != stem or len(ids) == len(stem):
            raise ValueError(f"keyword {keyword!r} fuses with the text before it, "
                             f"{suffix[-20:]!r}. Begin the keyword with a space.")
        targets = branches.setdefault(tuple(ids[:-1]), [])
        targets += [(which, i - len(ids), ids[i]) for i in range(len(stem), len(ids))]
    return branches


def add_logprobs(model, lm_head, heads: dict, forks: list[tuple], results: torch.Tensor) -> None:
    """Read each prefix once and its branches behind it; add what is predicted to results (n, 2)."""
    documents, asked, device = {}, [], results.device
    for prefix, ids, _, _ in forks:
        documents.setdefault(prefix, []).append([*heads[prefix], *ids])
    attend = Branched([(len(heads[prefix]), rows) for prefix, rows in documents.items()], device)
    for (_, _, item, targets), row in zip(forks, attend.tokens, strict=True):
        asked += [(item, which, row[place], token) for which, place, token in targets]
    items, which, rows, tokens = put(torch.tensor(asked), device).unbind(1)  # (M,) each
    hidden = model.hidden(put(torch.tensor(attend.input_ids), device), attend, rows)  # (M, D)
    logprobs = gathered_logprobs(lm_head(at_least_float32(hidden)), tokens)  # (M,)
    results.index_put_((items, which), logprobs, accumulate=True)
