"""Which tokens CUT would unlearn, and whether they are the wrong ones   (arXiv 2312.14591, Eq. 5).

A mask holds "texts", what each token adds to the text (bytes); "judged" and "plain", its
log-probability with and without the judgment; "flagged" {lambda: [bool]}; and "wrong", [bool, or
None for EOS and blanks], or None where there is no target.
"""

from data import IGNORE_INDEX
from extras.reports.metrics import response_logprobs
from methods import losses
from methods.critics import wrong_words
from methods.judged import judged_document

LAMS = (1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)


def find_masks(run, records: list[dict], lams, *, floor: float = 0.0,
               satisfied: str | None = None) -> list[dict]:
    """A mask per judged response. satisfied: the judgment of the satisfied condition, if any."""
    scored, masks = [], []
    for judgments in ([record["judgment"] for record in records], [satisfied] * len(records)):
        documents = [judged_document(run, *pair) for pair in zip(records, judgments, strict=True)]
        scored.append(response_logprobs(run.model, documents))
    for record, document, judged, plain in zip(records, documents, *scored, strict=True):
        ids = [token for token in document["labels"] if token != IGNORE_INDEX]
        mask = {"texts": [token_text(run.tokenizer, token) for token in ids],
                "judged": judged, "plain": plain, "flagged": {}, "wrong": None}
        for lam in lams:
            flagged = losses.inappropriate_tokens(judged, plain, detect_lam=lam, floor=floor)
            mask["flagged"][lam] = flagged.tolist()
        if record.get("target") is not None:
            words = wrong_words(record["response"], record["target"])
            mask["wrong"] = wrong_tokens(mask["texts"], words)
        masks.append(mask)
    return masks


def token_text(tokenizer, token: int) -> bytes:
    """What a token adds to the text; nothing for control tokens such as EOS."""
    if token in tokenizer.control:
        return b""
    if token in getattr(tokenizer, "text_of", {}):  # a token that was added to the model
        return tokenizer.text_of[token].encode()
    piece = tokenizer.model.id_to_piece(token)
    if tokenizer.model.is_byte(token):  # "<0x0A>"
        return bytes([int(piece[3:-1], 16)])
    return piece.replace("\u2581", " ").encode()


def wrong_tokens(texts: list[bytes], words: list[bool]) -> list[bool | None]:
    """For each token whether the word in which it ends is wrong."""
    so_far, wrong = b"", []
    for text in texts:
        so_far += text
        word = len(so_far.split()) - 1
        wrong.append(words[word] if text.strip() and word < len(words) else None)
    return wrong


def score_masks(masks: list[dict]) -> list[dict]:
    """Precision and recall of the flagged tokens against the wrong ones, for each lambda."""
    scores = []
    for lam in masks[0]["flagged"] if masks else ():
        pairs = []  # (flagged, wrong)
        for mask in masks:
            pairs += zip(mask["flagged"][lam], mask["wrong"] or (), strict=False)
        pairs = [(flagged, wrong) for flagged, wrong in pairs if wrong is not None]
        flags, wrongs = sum(flag for flag, _ in pairs), sum(wrong for _, wrong in pairs)
        hits = sum(flag and wrong for flag, wrong in pairs)
        scores.append({"lam": lam, "precision": hits / flags if flags else None,
                       "recall": hits / wrongs if wrongs else None, "n": len(pairs)})
    return scores


