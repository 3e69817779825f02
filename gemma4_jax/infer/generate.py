"""The Sampler: prompts in, completions out, whatever their number and lengths."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

from gemma4_jax import chat_parse
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.infer.cache import CacheConfig
from gemma4_jax.infer.constraint import Constraint
from gemma4_jax.infer.drafting import check_tokens
from gemma4_jax.infer.engine import Engine
from gemma4_jax.infer.output_form import FormConfig, FormOptions, OutputForm
from gemma4_jax.infer.prompts import EncodedPrompt, Prompt, encode_prompt
from gemma4_jax.infer.request import Reason, Request, Running
from gemma4_jax.infer.sampler import Rule
from gemma4_jax.media.frontend import FrontEnd
from gemma4_jax.model.drafter import Drafter
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.options import option
from gemma4_jax.processor import Processor


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
    batch_size: int = option(8, "prompts answered side by side")
    max_length: int | None = option(None, "most tokens of a prompt and its answer; none: the model's context")
    packed: bool = option(
        False, "keep the codes of a quantised checkpoint as codes, decoded as they are used: little memory, slow on CPU"
    )
    drafter: str | None = option(
        None, "Hugging Face directory of the model's drafter, which guesses tokens ahead: the same answers, sooner"
    )
    draft_tokens: int = option(4, "most tokens the drafter guesses at a time; fewer where its guesses do not hold")
    cache: CacheConfig = option(factory=CacheConfig, help="how keys and values are kept")
    form: FormConfig = option(factory=FormConfig, help="what answers look like")

    def __post_init__(self) -> None:
        Rule(self.temperature, self.top_k, self.top_p, self.min_p)
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"sample.{name} is at least 1, got {getattr(self, name)}.")
        check_tokens(self.draft_tokens, "sample.draft_tokens")


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        text: what was written: of a conversation the answer without thought and calls; else everything, special tokens by
            their strings. Ends before the stop token or text. Empty without a processor.
        tokens: all ids, with the stop token if one ended it, up to the token that completed a stop text.
        logprobs: of each token, under the model itself: before temperature and the other rules.
        finish_reason: "stop"; "length" when max_new_tokens ended it; "cancelled"; "error", and `error` says which.
        thought: of a conversation, the text of the thought channel.
        tool_calls: of a conversation, {"name", "arguments"} for each well-formed call.
        malformed: of a conversation, the text of calls that could not be read.
        error: why there is no (whole) answer.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: Reason
    thought: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Stops:
    """What ends an answer."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


class Stream:
    """An answer while it is written: iterate over it for the text, piece by piece, in whole characters.

    Iterating makes the engine work, for all requests that are in it. Ended by `cancel`, or when nobody iterates any more:
    `with sampler.stream(...) as pieces`.
    """

    def __init__(self, sampler: "Sampler", running: Running, chat: bool):
        self.running = running
        self._sampler, self._chat = sampler, chat

    def __iter__(self) -> Iterator[str]:
        while True:
            while self.running.pieces:
                yield self.running.pieces.pop(0)
            if self.running.done:
                return
            self._sampler.engine.step(soon=True)

    def tokens(self) -> Iterator[int]:
        """The ids as they come, instead of the text."""
        given = 0
        while True:
            while given < len(self.running.tokens):
                given += 1
                yield self.running.tokens[given - 1]
            if self.running.done:
                return
            self._sampler.engine.step(soon=True)

    def events(self) -> Iterator[chat_parse.Event]:
        """Pieces of the thought and the answer, and whole tool calls, as they come. A stop text is not left out."""
        if self._sampler.processor is None:
            raise UserError("events need a processor, which this Sampler was made without; take tokens().")
        parser = self._sampler.processor.stream_parser()
        for token in self.tokens():
            yield from parser.feed([token])
        yield from parser.finish()

    def cancel(self) -> None:
        """Writes no more; the slot is free for another request."""
        self._sampler.engine.cancel(self.running)

    def completion(self) -> Completion:
        """The whole answer; waits for its end."""
        while not self.running.done:
            self._sampler.engine.step()
        return self._sampler.completed(self.running, self._chat)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class Sampler:
    """Completes prompts with a model.

    Attributes:
        stop_ids: the ids that end an answer unless `stop` says otherwise; empty without a processor.
        max_length: most tokens of a prompt and its answer together.
        engine: where the requests run.
    """

    def __init__(
        self,
        model: Transformer,
        processor: Processor | None = None,
        *,
        max_length: int | None = None,
        batch_size: int = 8,
        cache: CacheConfig = CacheConfig(),  # noqa: B008
        consume: bool = False,
        packed: bool = False,
        drafter: Drafter | None = None,
        draft_tokens: int = 4,
    ):
        """`max_length=None` is the model's context; memory is taken for what calls need, unless `warm_up` takes all of it.

        `consume`: the weights are needed for nothing else, so that they need not be held twice; `model` cannot be used after.
        `packed`: weights with a grid stay codes in memory, a few bits each, and are decoded as they are multiplied.
        `drafter`: guesses up to `draft_tokens` tokens ahead, which one pass of the model judges: the same answers, sooner
        (`load_drafter`). How its guesses fare stands in `engine.drafting`.

        Raises:
            UserError: max_length beyond the context, batch_size below 1, a tokenizer of another vocabulary, a cache layout that
                the model cannot have, a drafter of another model.
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
        self.processor = processor if processor is None else _seeing(processor, cfg)
        self.batch_size = batch_size
        self.stop_ids = () if processor is None else processor.stop_ids
        self._cfg = cfg
        self.engine = Engine(
            model,
            slots=batch_size,
            max_length=self.max_length,
            cache=cache,
            consume=consume,
            packed=packed,
            drafter=drafter,
            draft_tokens=draft_tokens,
        )

    def update(self, model: Transformer) -> None:
        """Samples from `model` from now on: the same configuration, new weights, nothing compiled again."""
        if model.cfg != self._cfg:
            raise ValueError("Sampler.update wants a model of the configuration it was made with; make a new Sampler.")
        self.engine.update(model)

    def release(self) -> None:
        """Lets go of all weights and caches until the next `update`: they would take memory that training needs."""
        self.engine.update(None)

    def warm_up(self) -> None:
        """Takes the memory for `max_length` and compiles every program: after it nothing compiles again, whatever is asked."""
        self.engine.warm_up()

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
        constraints: Sequence[Constraint | None] | None = None,
        on_error: Literal["raise", "keep"] = "raise",
        progress: Callable[[int, int], None] | None = None,
        **form: Unpack[FormOptions],
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
            constraints: one a prompt: what may be written; None: what `form` says.
            on_error: what a prompt does that is empty, too long, or cannot be encoded: raise before anything is read, or become
                a completion with finish_reason "error" while the others are answered.
            progress: called with the number of finished prompts and of all, whenever some are finished.
            form: of all answers: schema, regex or grammar, tool_choice, strict_tools, parallel_tool_calls, thinking_budget; see
                `output_form.OutputForm`.

        Raises:
            UserError: a value without meaning, or (unless `on_error` keeps it) a prompt that cannot be answered; says which.
        """
        rule, stops = Rule(temperature, top_k, top_p, min_p), self._stops(stop)
        if isinstance(prompts, str):
            raise UserError("prompts is a list; put the one text in brackets.")
        if constraints is not None and len(constraints) != len(prompts):
            raise UserError(f"constraints has one for each of the {len(prompts)} prompts, got {len(constraints)}.")
        _check(max_new_tokens, seed)
        look = OutputForm(**form)
        done: dict[int, Completion] = {}
        asked: dict[int, tuple[Request, bool]] = {}
        for index, prompt in enumerate(prompts):
            constraint = None if constraints is None else constraints[index]
            try:
                one = encode_prompt(prompt, self.processor, self._cfg.vocab_size, enable_thinking)
                constraint = constraint or self._constraint(look, prompt, one.chat and enable_thinking, stops)
                request = self._request(one, max_new_tokens, rule, seed, index, stops, constraint, streamed=False)
            except UserError as error:
                if on_error == "raise":
                    raise UserError(f"prompts[{index}]: {error}") from None
                done[index] = Completion("", [], [], "error", error=str(error))
                continue
            asked[index] = request, one.chat
        if asked:
            self.engine.reserve(max(len(request.tokens) for request, _ in asked.values()) + max_new_tokens)
        order = sorted(asked, key=lambda i: len(asked[i][0].tokens))  # like lengths are read together: less padding
        waiting = {i: self.engine.submit(asked[i][0]) for i in order}
        try:
            while waiting:
                self.engine.step()
                ended = [i for i, running in waiting.items() if running.done]
                done |= {i: self.completed(waiting.pop(i), asked[i][1]) for i in ended}
                if ended and progress is not None:
                    progress(len(done), len(prompts))
        finally:
            for running in waiting.values():
                self.engine.cancel(running)
        return [done[i] for i in range(len(prompts))]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 64,
        top_p: float = 0.95,
        min_p: float = 0.0,
        seed: int = 0,
        stream: int = 0,
        stop: Sequence[str | int] | None = None,
        enable_thinking: bool = False,
        constraint: Constraint | None = None,
        **form: Unpack[FormOptions],
    ) -> Stream:
        """One answer as it is written; several streams share the slots. Arguments as those of `generate`.

        `stream` stands for the prompt's place in `generate`: the same seed and place draw the same tokens. Raises UserError.
        """
        rule, stops = Rule(temperature, top_k, top_p, min_p), self._stops(stop)
        _check(max_new_tokens, seed)
        one = encode_prompt(prompt, self.processor, self._cfg.vocab_size, enable_thinking)
        constraint = constraint or self._constraint(OutputForm(**form), prompt, one.chat and enable_thinking, stops)
        streamed = self.processor is not None
        request = self._request(one, max_new_tokens, rule, seed, stream, stops, constraint, streamed=streamed)
        return Stream(self, self.engine.submit(request), one.chat)

    def _request(
        self,
        prompt: EncodedPrompt,
        max_new_tokens: int,
        rule: Rule,
        seed: int,
        stream: int,
        stops: Stops,
        constraint: Constraint | None,
        *,
        streamed: bool,
    ) -> Request:
        decode = self.processor.decode if self.processor is not None and (streamed or stops.texts) else None
        request = Request(
            prompt.tokens, max_new_tokens, rule, seed, stream, stops.ids, stops.texts, decode, constraint, prompt.media
        )
        self.engine.check(request)
        return request

    def _constraint(self, form: OutputForm, prompt: Prompt, thinking: bool, stops: Stops) -> Constraint | None:
        """What holds an answer to `prompt` to a form; None for a free one."""
        if form == OutputForm():
            return None
        if self.processor is None:
            raise UserError("the form of an answer needs a processor, which this Sampler was made without.")
        tools = prompt.get("tools") if isinstance(prompt, Mapping) else None
        return form.constraint(self.processor.tokenizer, stops.ids, tools=tools, thinking=thinking)

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

    def completed(self, running: Running, chat: bool) -> Completion:
        """What became of a request; of a chat the answer is parsed."""
        tokens, logprobs, reason = list(running.tokens), list(running.logprobs), running.reason
        assert reason is not None
        if self.processor is None:
            return Completion("", tokens, logprobs, reason, error=running.error)
        by_text = running.text is not None and running.text.stopped
        ids = tokens[:-1] if tokens and not by_text and tokens[-1] in running.request.stop_ids else tokens
        if not chat:
            text = running.text.text if by_text and running.text is not None else self.processor.decode(ids)
            return Completion(text, tokens, logprobs, reason, error=running.error)
        by_text_only = running.text.text if by_text and running.text is not None else None
        parsed = self.processor.parse(ids) if by_text_only is None else chat_parse.parse(by_text_only)
        return Completion(
            parsed.answer,
            tokens,
            logprobs,
            reason,
            parsed.thought,
            parsed.tool_calls,
            parsed.malformed,
            running.error,
        )


def _seeing(processor: Processor, cfg: ModelConfig) -> Processor:
    """A processor that knows no towers gets the model's."""
    front_end = processor.front_end
    if front_end.vision is not None or front_end.audio is not None or not cfg.is_multimodal:
        return processor
    return processor.with_front_end(FrontEnd(cfg.vision, cfg.audio, front_end.config))


def _check(max_new_tokens: int, seed: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is at least 1, got {max_new_tokens}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed lies in 0 to 2^32 - 1, got {seed}.")
