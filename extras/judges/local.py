"""The local model as a backend, in place of a server."""

from extras.judges.questions import Question, Reply, pick_choice


class LocalChat:
    """Answers questions with a model, its tokenizer and a prompt template (data.Template).

    Where a question wants one of its choices and nothing else, the more probable one is the
    verdict; otherwise the model writes, half of its context at most. A prompt that does not fit
    fails and is never truncated.
    """

    def __init__(self, model, tokenizer, template, *, batch_size: int = 16):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.batch_size = batch_size

    def ask(self, questions: list[Question], *, temperature: float = 0.0,
            sample: int = 0) -> list[Reply]:
        """One reply per question, in order; those without a choice share one length limit."""
        from eval import complete
        from methods.examples import keyword_logprobs
        from model import Sampling

        replies, prompts, longest, picked, written = [], [], [], [], []
        for i, question in enumerate(questions):
            # All but the system prompt goes where no {input} is looked for: texts stay as they are.
            system, *turns = (message["content"] for message in question.messages)
            prompts.append(self.template.render(system, "\n\n".join(turns)))
            longest.append(min(question.max_tokens, self.model.config.context // 2))
            length = len(self.tokenizer.encode_prompt(prompts[i])) + longest[i]
            replies.append(Reply("", "prompt longer than the model takes"))
            if length <= self.model.config.context:
                group = picked if question.pick else written
                group.append(i)
        if picked:
            heads = [f"VERDICT {questions[i].nonce}:" for i in picked]
            words = [tuple(f" {word}" for word in questions[i].choices) for i in picked]
            prefixes = [prompts[i].rstrip("\n") + "\n" for i in picked]
            logprobs = keyword_logprobs(self.model, self.tokenizer, prefixes, heads, words,
                                        batch_size=self.batch_size)
            for i, pair in zip(picked, logprobs, strict=True):
                replies[i] = pick_choice(questions[i], *pair)
        if written:
            sampling = Sampling(max(longest[i] for i in written), temperature)
            made = complete(self.model, self.tokenizer, [prompts[i] for i in written], sampling,
                            seeds=[1000 * sample + i for i in written], batch_size=self.batch_size)
            for i, answer in zip(written, made, strict=True):
                failure = "" if answer.text else "empty message"
                replies[i] = Reply(answer.text,
                                   failure if answer.finished else "cut at max_tokens")
        return replies
