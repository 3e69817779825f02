"""What one output must look like: the form of its answer, whether it calls tools, how long it thinks."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from gemma4_jax.errors import UserError
from gemma4_jax.infer.constraint import AllOf, Answer, Constraint, ThoughtBudget
from gemma4_jax.infer.structured import Grammars
from gemma4_jax.infer.tool_choice import ToolChoice, tool_constraint
from gemma4_jax.infer.vocabulary import Vocabulary
from gemma4_jax.options import option
from gemma4_jax.tokenizer import Tokenizer


class FormOptions(TypedDict, total=False):
    """The fields of an OutputForm as keyword arguments."""

    schema: Mapping[str, Any] | bool | str | None
    regex: str | None
    grammar: str | None
    tool_choice: ToolChoice
    strict_tools: bool
    parallel_tool_calls: bool
    thinking_budget: int | None


@dataclass(frozen=True)
class OutputForm:
    """The form of an output; the defaults leave it free. At most one of schema, regex and grammar.

    Attributes:
        schema: a JSON schema, or its text, that the answer obeys.
        regex: what the whole answer matches, in Rust's syntax.
        grammar: what the answer derives from, in llguidance's lark notation.
        tool_choice: see `tool_choice.ToolChoice`.
        strict_tools: with tool choice auto too, hold the arguments of calls to the tools' schemas.
        parallel_tool_calls: whether one output may hold several calls that are constrained.
        thinking_budget: most tokens of thoughts; None: no limit.
    """

    schema: Mapping[str, Any] | bool | str | None = None
    regex: str | None = None
    grammar: str | None = None
    tool_choice: ToolChoice = "auto"
    strict_tools: bool = False
    parallel_tool_calls: bool = True
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(
                f"An answer has one form: give one of schema, regex and grammar, got {' and '.join(given)}."
            )
        budget = self.thinking_budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise UserError(f"thinking_budget is 0 (no thought) or a number of tokens, got {budget!r}.")

    def constraint(
        self,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
    ) -> Constraint | None:
        """A fresh constraint of one output; None where nothing is constrained.

        With tools and tool choice auto, an output is calls or an answer of this form; where the answer has one, calls are held
        to their schemas too.

        Args:
            tokenizer: the model's.
            stop_ids: what ends the output; None: the tokenizer's.
            tools: the tools of the prompt, None for one that is no conversation.
            thinking: the prompt asks for a thought.

        Raises:
            UserError: a form that cannot be compiled or satisfied, a tool choice that names no tool, a budget without thinking,
                or llguidance missing.
        """
        stops = tokenizer.stop_ids if stop_ids is None else tuple(stop_ids)
        if self.thinking_budget and not thinking:
            raise UserError("thinking_budget limits thoughts, but the prompt asks for none; set enable_thinking too.")
        thoughts = thinking and self.thinking_budget != 0
        parts: list[Constraint] = []
        inner = self._answer(tokenizer, stops)
        calls = tool_constraint(
            self.tool_choice,
            tools,
            tokenizer,
            stops,
            thoughts=thoughts,
            parallel=self.parallel_tool_calls,
            constrain_auto=self.strict_tools or inner is not None,
        )
        if calls is not None:
            parts.append(calls)
        if inner is not None:
            may_call = bool(tools) and self.tool_choice != "none"
            parts.append(Answer(inner, Vocabulary.of(tokenizer), stops, thoughts=thoughts, calls=may_call))
        if self.thinking_budget is not None:
            parts.append(ThoughtBudget(self.thinking_budget, Vocabulary.of(tokenizer)))
        if len(parts) < 2:
            return parts[0] if parts else None
        return AllOf(parts, Vocabulary.of(tokenizer), stops)

    def _answer(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> Constraint | None:
        # <|tool_response> ends calls; an answer ends with the others, if there are any.
        stop_ids = tuple(index for index in stop_ids if index != tokenizer.special.tool_response_open) or stop_ids
        if self.schema is not None:
            return Grammars.of(tokenizer).schema(self.schema).constraint(stop_ids)
        if self.regex is not None:
            return Grammars.of(tokenizer).regex(self.regex).constraint(stop_ids)
        if self.grammar is not None:
            return Grammars.of(tokenizer).lark(self.grammar).constraint(stop_ids)
        return None


@dataclass(frozen=True)
class FormConfig:
    """The form of answers, for a config."""

    schema: str | None = option(None, "a file with the JSON schema that answers obey")
    regex: str | None = option(None, "a regular expression that answers match as a whole")
    grammar: str | None = option(None, "a file with a grammar in lark notation that answers obey")
    tool_choice: str = option("auto", "auto, none, required, or the name of a tool")
    strict_tools: bool = option(False, "hold the arguments of calls to the tools' schemas")
    thinking_budget: int | None = option(None, "most tokens of a thought; none: no limit")

    def __post_init__(self) -> None:
        OutputForm(**self.options())

    def options(self) -> FormOptions:
        """The arguments of `Sampler.generate`. Raises UserError for a file that cannot be read."""
        return {
            "schema": None if self.schema is None else _json_schema(self.schema),
            "regex": self.regex,
            "grammar": None if self.grammar is None else _text(self.grammar),
            "tool_choice": self.tool_choice,
            "strict_tools": self.strict_tools,
            "thinking_budget": self.thinking_budget,
        }


def _json_schema(path: str) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"The JSON schema {path} is not JSON ({error}).") from None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The file {path} cannot be read ({error}).") from None
