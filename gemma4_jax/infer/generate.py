"""The Sampler: prompts in, completions out, whatever their number and lengths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gemma4_jax import chat_parse
from gemma4_jax.errors import UserError
from gemma4_jax.infer.engine import Engine, Request, bucket
from gemma4_jax.infer.prompts import EncodedPrompt, Prompt, encode_prompt
from gemma4_jax.infer.sampler import Rule
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.options import option
from gemma4_jax.processor import Processor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SampleConfig:
    """How answers are drawn; the defaults are those the released models are published with."""

    max_new_tokens: int = option(256, "most tokens of an answer")
    temperature: float = option(1.0, "0 takes the most probable token; above 1 flattens, below 1 sharpens")
    top_k: int = option(64, "choose among so many most probable tokens; 0: all")
    top_p: float = option(0.95, "then among the most probable ones that hold this probability; 1: all")
    min_p: float = option(0.0, "then among those at least this times as probable as the first; 0: all")
    stop: tuple[str, ...] = option((), "texts that end an answer, besides the tokenizer's stop tokens; left out of it")
    enable_thinking: bool = option(False, "let the model think before it answers a conversation")
    batch_size: int = option(8, "prompts decoded together")
    max_length: int | None = option(None, "most tokens of a prompt and its answer; none: the model's context")

    def __post_init__(self) -> None:
        Rule(self.temperature, self.top_k, self.top_p, self.min_p)
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"sample.{name} is at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        text: what was written: of a conversation the answer without thought and calls; else everything, special tokens by
            their strings. Ends before the stop token or text. Empty without a processor.
        tokens: all ids, with the stop token if one ended it, up to the token that completed a stop text.
        logprobs: of each token, under the model itself: before temperature and the other rules.
        finish_reason: "stop", or "length" when max_new_tokens ended it.
        thought: of a conversation, the text of the thought channel.
        tool_calls: of a conversation, {"name", "arguments"} for each well-formed call.
        malformed: of a conversation, the text of calls that could not be read.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    thought: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stops:
    """What ends an answer."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass
class Draft:
    """An answer being written. `text` is what stands before a stop text, once one was found."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str | None = None


class Sampler:
    """Completes prompts with a model.

    Attributes:
        stop_ids: the ids that end an answer unless `stop` says otherwise; empty without a processor.
        max_length: most tokens of a prompt and its answer together.
    """

    def __init__(
        self,
        model: Transformer,
        processor: Processor | None = None,
        *,
        max_length: int | None = None,
        batch_size: int = 8,
    ):
        """`max_length=None` is the model's context; memory is taken for what a call needs, not for `max_length`.

        Raises:
            UserError: max_length beyond the context, batch_size below 1, or a tokenizer of another vocabulary.
        """
        cfg = model.cfg
        self.max_length = cfg.max_position_embeddings if max_length is None else max_length
        if not 2 <= self.max_length <= cfg.max_position_embeddings:
            raise UserError(
                f"max_length lies in 2 to the model's context, {cfg.max_position_embeddings}, got {max_length}."
            )
        if batch_size < 1:
            raise UserError(f"batch_size is at least 1, got {batch_size}.")
        if processor is not None and processor.vocab_size != cfg.vocab_size:
            raise UserError(
                f"The tokenizer has {processor.vocab_size} pieces and the model {cfg.vocab_size}; "
                "use the tokenizer the model was trained with."
            )
        self.processor = processor
        self.batch_size = batch_size
        self.stop_ids = () if processor is None else processor.stop_ids
        self._cfg = cfg
        self._engine = Engine(model)

    def update(self, model: Transformer) -> None:
        """Samples from `model` from now on: the same configuration, new weights, nothing compiled again."""
        if model.cfg != self._cfg:
            raise ValueError("Sampler.update wants a model of the configuration it was made with; make a new Sampler.")
        self._engine.update(model)

    def release(self) -> None:
        """Lets go of all weights until the next `update`: the unrolled copy would take memory that training needs."""
        self._engine.update(None)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 64,
        top_p: float = 0.95,
        min_p: float = 0.0,
        seed: int = 0,
        stop: Sequence[str | int] | None = None,
        enable_thinking: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in their order.

        The tokens of prompt i depend on the model, the prompt, the rule, the seed and i, not on the other prompts.

        Args:
            prompts: raw texts (BOS is added), conversations (lists of messages, or {"messages", "tools"}), or token ids.
            max_new_tokens: most tokens of a completion, its stop token included.
            temperature, top_k, top_p, min_p: the rule, see `sampler.Rule`; temperature 0 is greedy.
            seed: 0 to 2^32 - 1.
            stop: texts and token ids that end a completion; None: `stop_ids`; []: nothing does but max_new_tokens.
            enable_thinking: ask for a thought, in conversations.
            progress: called with the number of finished prompts and of all, after each batch.

        Raises:
            UserError: a value without meaning, or a prompt that is empty, too long, or cannot be encoded; says which.
        """
        rule = Rule(temperature, top_k, top_p, min_p)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is at least 1, got {max_new_tokens}.")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed lies in 0 to 2^32 - 1, got {seed}.")
        stops = self._stops(stop)
        encoded = self._encode(prompts, max_new_tokens, enable_thinking)
        if not encoded:
            return []
        longest = max(len(prompt.tokens) for prompt in encoded)
        cache_length = bucket(longest + max_new_tokens, self.max_length)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].tokens))  # like lengths together: less padding
        done: dict[int, Completion] = {}
        for start in range(0, len(order), self.batch_size):
            group = order[start : start + self.batch_size]
            requests = [Request(encoded[i].tokens, max_new_tokens, rule, seed, i, stops.ids) for i in group]
            drafts = self._run(requests, cache_length, stops)
            done |= {i: self._finish(draft, encoded[i].chat, stops) for i, draft in zip(group, drafts, strict=True)}
            if progress is not None:
                progress(len(done), len(encoded))
        return [done[i] for i in range(len(encoded))]

    def _stops(self, stop: Sequence[str | int] | None) -> Stops:
        if stop is None:
            return Stops(self.stop_ids, ())
        if isinstance(stop, str):
            raise UserError(f"stop is a list of texts and ids, got the text {stop!r}; put it in brackets.")
        texts = tuple(item for item in stop if isinstance(item, str))
        ids = tuple(int(item) for item in stop if not isinstance(item, str))
        if not all(texts):
            raise UserError("a stop text must not be empty.")
        if texts and self.processor is None:
            raise UserError(f"stop text {texts[0]!r} needs a processor, which this Sampler was made without; give ids.")
        wrong = [i for i in ids if not 0 <= i < self._cfg.vocab_size]
        if wrong:
            raise UserError(f"stop ids run from 0 to {self._cfg.vocab_size - 1}, got {wrong[0]}.")
        return Stops(ids, texts)

    def _encode(self, prompts: Sequence[Prompt], max_new_tokens: int, enable_thinking: bool) -> list[EncodedPrompt]:
        if isinstance(prompts, str):
            raise UserError("prompts is a list; put the one text in brackets.")
        encoded = []
        for index, prompt in enumerate(prompts):
            try:
                one = encode_prompt(prompt, self.processor, self._cfg.vocab_size, enable_thinking)
            except UserError as error:
                raise UserError(f"prompts[{index}]: {error}") from None
            if len(one.tokens) + max_new_tokens > self.max_length:
                raise UserError(
                    f"prompts[{index}] has {len(one.tokens)} tokens, and with max_new_tokens={max_new_tokens} would pass "
                    f"max_length={self.max_length}; shorten it, or ask for fewer new tokens."
                )
            encoded.append(one)
        return encoded

    def _run(self, requests: list[Request], cache_length: int, stops: Stops) -> list[Draft]:
        """The answers of one batch."""
        rows = min(1 << (len(requests) - 1).bit_length(), self.batch_size)
        drafts = [Draft() for _ in requests]
        ended = np.zeros(rows, bool)
        batch, tokens, logprobs = self._engine.prefill(requests, rows, cache_length)
        while True:
            for row, draft in enumerate(drafts):
                new = tokens[row] >= 0
                draft.tokens += tokens[row, new].tolist()
                draft.logprobs += logprobs[row, new].tolist()
                if stops.texts and not ended[row]:
                    ended[row] = self._cut_at_stop(draft, int(new.sum()), stops)
                whole = len(draft.tokens) >= requests[row].max_new_tokens or draft.tokens[-1] in stops.ids
                ended[row] |= whole
            if ended[: len(requests)].all():
                return drafts
            tokens, logprobs = self._engine.decode(batch, ended)

    def _cut_at_stop(self, draft: Draft, new: int, stops: Stops) -> bool:
        """Cuts a draft whose last `new` tokens completed a stop text; says whether they did."""
        assert self.processor is not None
        decode = self.processor.decode
        if all(text not in decode(draft.tokens) for text in stops.texts):
            return False
        for size in range(len(draft.tokens) - new + 1, len(draft.tokens) + 1):
            written = decode(draft.tokens[:size])
            places = [place for text in stops.texts if (place := written.find(text)) >= 0]
            if places:
                draft.text = written[: min(places)]
                del draft.tokens[size:], draft.logprobs[size:]
                return True
        return False

    def _finish(self, draft: Draft, chat: bool, stops: Stops) -> Completion:
        by_id = draft.text is None and draft.tokens[-1] in stops.ids
        reason: FinishReason = "length" if draft.text is None and not by_id else "stop"
        if self.processor is None:
            return Completion("", draft.tokens, draft.logprobs, reason)
        ids = draft.tokens[:-1] if by_id else draft.tokens
        if not chat:
            text = self.processor.decode(ids) if draft.text is None else draft.text
            return Completion(text, draft.tokens, draft.logprobs, reason)
        parsed = self.processor.parse(ids) if draft.text is None else chat_parse.parse(draft.text)
        return Completion(
            parsed.answer, draft.tokens, draft.logprobs, reason, parsed.thought, parsed.tool_calls, parsed.malformed
        )
