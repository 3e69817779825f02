"""Tool choice as a constraint: auto, none, required, or one tool by its name; arguments held to the tools' schemas.

With auto nothing is constrained before a call begins; inside a call the schema decides. With required and a name the output
is calls and nothing else, after a thought where there may be one, and ends with `<|tool_response>` as the chat format has it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma4_jax.chat_check import check_tools
from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.infer.call_grammar import call_grammar
from gemma4_jax.infer.constraint import Constraint, Forbid, after_calls
from gemma4_jax.infer.structured import Grammar, Grammars
from gemma4_jax.infer.vocabulary import Vocabulary
from gemma4_jax.tokenizer import Tokenizer

CHOICES = ("auto", "none", "required")
ToolChoice = str | Mapping[str, Any]
"""One of CHOICES, the name of a tool, or OpenAI's {"type": "function", "function": {"name": ...}}."""


def tool_constraint(
    choice: ToolChoice,
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: Tokenizer,
    stop_ids: Iterable[int] | None = None,
    *,
    thoughts: bool = False,
    parallel: bool = True,
    constrain_auto: bool = False,
) -> Constraint | None:
    """A fresh constraint; None where there is nothing to constrain (auto).

    Args:
        choice: a ToolChoice.
        tools: the function tools of the prompt.
        stop_ids: what ends the output; None: the tokenizer's.
        thoughts: whether a thought may come before calls that are required.
        parallel: whether more than one call may come.
        constrain_auto: hold arguments to the schemas with auto as well.

    Raises:
        UserError: a choice that names no tool, calls required without tools, or a schema that cannot be compiled.
    """
    check_tools(tools)
    stops = tokenizer.stop_ids if stop_ids is None else tuple(stop_ids)
    name = _name(choice)
    if name not in CHOICES:
        known = [tool["function"]["name"] for tool in tools or ()]
        if name not in known:
            raise UserError(
                f"tool_choice {name!r} is no tool of this prompt; {did_you_mean(name, [*CHOICES, *known])}."
            )
        tools = [tool for tool in tools or () if tool["function"]["name"] == name]
    if name == "none":
        tokenizer.require(("tool_call_open",), "tool_choice 'none'")
        vocabulary = Vocabulary.of(tokenizer)
        return Forbid([tokenizer.special.tool_call_open], vocabulary)
    if not tools and name != "auto":
        raise UserError(f"tool_choice {name!r} needs tools, and this prompt has none.")
    if name == "auto" and not (tools and constrain_auto):
        return None
    tokenizer.require(("tool_call_open", "tool_call_close", "quote"), f"tool_choice {name!r}")
    grammar = Grammars.of(tokenizer).lark(call_grammar(tools or (), tokenizer), "The grammar of the tools")
    return Calls(grammar, stops, required=name != "auto", thoughts=thoughts, parallel=parallel)


def _name(choice: ToolChoice) -> str:
    """A choice as one word."""
    function = choice.get("function") if isinstance(choice, Mapping) else {"name": choice}
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise UserError(f"tool_choice is one of {', '.join(CHOICES)} or the name of a tool, got {choice!r}.")
    return name


class Calls:
    """Calls obey `grammar`, which derives one call without its opening token. See `constraint.Constraint`."""

    def __init__(
        self, grammar: Grammar, stop_ids: Iterable[int], *, required: bool, thoughts: bool, parallel: bool
    ) -> None:
        vocabulary = grammar.vocabulary
        special = vocabulary.tokenizer.special
        self._grammar, self._call = grammar, grammar.constraint()
        self._special, self._stop_ids = special, frozenset(stop_ids)
        self._required, self._parallel = required, parallel
        self._state = "start"  # start, thought, free (the answer, with auto), call, after (a call), stopped
        self._called = False
        self._opening = opening = vocabulary.mask([special.tool_call_open])
        end = after_calls(vocabulary, self._stop_ids)
        self._masks = {
            "start": opening | vocabulary.mask([special.channel_open] if thoughts else []),
            "thought": vocabulary.text | vocabulary.mask([special.channel_close]),
            "after": opening | end if parallel else end,
            "stopped": end,
        }
        if not required:
            free = vocabulary.everything
            self._masks |= {"start": free, "free": free, "after": free if parallel else free & ~opening}
            self._masks["thought"] = free & ~opening

    @property
    def finished(self) -> bool:
        return self._state == "stopped" or bool(self.failed) or (self._only_one and self._state == "after")

    @property
    def failed(self) -> str:
        return self._call.failed

    @property
    def _only_one(self) -> bool:
        return self._required and not self._parallel

    def mask(self) -> np.ndarray:
        return self._call.mask() if self._state == "call" else self._masks[self._state]

    def advance(self, token: int) -> None:
        special = self._special
        if self._state == "call":
            self._call.advance(token)
            self._state = "after" if token == special.tool_call_close else "call"
        elif token in self._stop_ids:
            self._state = "stopped"
        elif self._state == "thought":
            if token == special.channel_close:
                self._state = "after" if self._called else "start"
                if self._required:  # one thought
                    self._masks["start"] = self._opening
        elif token == special.channel_open:
            self._state = "thought"
        elif token == special.tool_call_open:
            self._state, self._called, self._call = "call", True, self._grammar.constraint()
        elif not self._required:
            self._state = "free" if self._state == "start" else self._state
