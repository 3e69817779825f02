"""Our models behind lm-evaluation-harness's interface; imports the harness, so only `launch.harness` imports this."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

from gemma4_jax.eval.likelihood import continuation_scores
from gemma4_jax.infer.generate import Sampler
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.processor import Processor

MOST_NEW_TOKENS = 256


class HarnessModel(LM):
    """Likelihoods and generated text of one model, on this process's devices.

    Text becomes tokens after one BOS, without which Gemma 4 loses several nats a token; the frame of chats in it is read as special
    tokens. A continuation is what the joined text has beyond the context's tokens.
    """

    def __init__(self, model: Transformer, processor: Processor, sampler: Sampler, batch_size: int = 8) -> None:
        super().__init__()
        self._model, self._processor, self._sampler, self._rows = model, processor, sampler, batch_size

    @property
    def tokenizer_name(self) -> str:
        """Names what chats were rendered by, in the harness's records."""
        return "gemma4_jax"

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the continuation's log-probability, and whether greedy decoding writes it."""
        return continuation_scores(self._model, [self._pair(*request.args) for request in requests], self._rows)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of whole texts, each token after all before it."""
        texts = [self._ids(request.args[0]) for request in requests]
        return [score for score, _ in continuation_scores(self._model, [(ids, 1) for ids in texts], self._rows)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy or sampled answers, each cut where one of its stop strings begins."""
        answers: list[str | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for members in groups.values():
            settings: dict[str, Any] = requests[members[0]].args[1]
            prompts = [self._ids(requests[index].args[0]) for index in members]
            samples = bool(settings.get("do_sample")) and float(settings.get("temperature", 1.0)) > 0
            found = self._sampler.generate(
                prompts,
                max_new_tokens=int(settings.get("max_gen_toks", MOST_NEW_TOKENS)),
                temperature=float(settings.get("temperature", 1.0)) if samples else 0.0,
            )
            for index, completion in zip(members, found, strict=True):
                answers[index] = _cut(completion.text, settings.get("until") or ())
        return [answer or "" for answer in answers]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat, without its BOS."""
        text = self._processor.render(chat_history, add_generation_prompt=add_generation_prompt)
        return text.removeprefix("<bos>")

    def _ids(self, text: str) -> list[int]:
        return [self._processor.tokenizer.special.bos, *self._processor.tokenizer.encode(text)]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Joined tokens, and where the continuation's begin. Blanks that end a context belong to the continuation."""
        bare = context.rstrip()
        whole, start = self._ids(context + continuation), len(self._ids(bare))
        return whole, min(start, len(whole) - 1)


def _cut(text: str, until: str | Sequence[str]) -> str:
    places = [text.find(stop) for stop in ([until] if isinstance(until, str) else until) if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]
