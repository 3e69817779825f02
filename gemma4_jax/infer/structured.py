"""Structured output: a JSON schema, a regular expression or a lark grammar says which tokens may come next.

The masks are llguidance's (optional: `pip install gemma4_jax[structured]`), over the bytes of each token; special tokens write
no text, so none comes unless a lark grammar names its id, `<[52]>`. A stop id is allowed exactly where the output may end.

    grammars = Grammars.of(processor.tokenizer)
    grammars.schema({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}).constraint()
"""

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gemma4_jax.errors import UserError
from gemma4_jax.infer.schema_ends import require_ends
from gemma4_jax.infer.vocabulary import Vocabulary
from gemma4_jax.tokenizer import Tokenizer

# Between the parts of JSON: nothing, a space, or a new line with its indentation. Unbounded space is where weak models get
# stuck: every token of it is legal and none leads on.
WHITESPACE = r"(\n {0,32}| )?"
KEPT = 256  # compiled grammars


class Grammars:
    """Compiles grammars for one tokenizer, and keeps them. Make it with `Grammars.of`, which keeps it too."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocabulary = Vocabulary.of(tokenizer)
        self._llguidance = _library()
        wrapper = self._llguidance.TokenizerWrapper(_ForLibrary(self.vocabulary))
        stops = list(self.vocabulary.stop_ids)
        self._tokens = self._llguidance.LLTokenizer(wrapper, n_vocab=self.vocabulary.size, eos_token=stops)
        self._compiled = functools.lru_cache(maxsize=KEPT)(self._compile)

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def of(tokenizer: Tokenizer) -> "Grammars":
        """Those of a tokenizer; 3 s for 262,144 pieces, the first time. Raises UserError without llguidance."""
        return Grammars(tokenizer)

    def schema(self, schema: Mapping[str, Any] | bool | str) -> "Grammar":
        """JSON that a schema, or the text of one, accepts. Raises UserError if it cannot be compiled or satisfied."""
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise UserError(f"The JSON schema is not JSON ({error}).") from None
        if not isinstance(schema, Mapping | bool):
            raise UserError(f"A JSON schema is an object, got {type(schema).__name__}.")
        if schema is False:
            raise UserError("The JSON schema cannot be satisfied: it is false.")
        try:
            text = json.dumps({} if schema is True else schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"The JSON schema holds something that is not JSON ({error}).") from None
        require_ends(schema, "The JSON schema")
        options = {"whitespace_pattern": WHITESPACE}
        return self._compiled(
            self._llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options), "The JSON schema"
        )

    def regex(self, pattern: str) -> "Grammar":
        """Text that `pattern` (Rust syntax, no look-around) matches from its start to its end. Raises UserError."""
        anchored = pattern.removeprefix("^")
        ends = anchored.endswith("$") and not anchored.endswith("\\$")
        text = self._llguidance.LLMatcher.grammar_from_regex(anchored[:-1] if ends else anchored)
        return self._compiled(text, f"The regular expression {pattern!r}")

    def lark(self, grammar: str, what: str = "The grammar") -> "Grammar":
        """Text that a grammar in llguidance's lark notation derives from `start`. Raises UserError, which begins with `what`."""
        return self._compiled(self._llguidance.LLMatcher.grammar_from_lark(grammar), what)

    def _compile(self, grammar: str, what: str) -> "Grammar":
        matcher_class = self._llguidance.LLMatcher
        wrong, messages = matcher_class.validate_grammar_with_warnings(grammar, self._tokens)
        if wrong:
            raise UserError(_sentence(what, messages[0]))
        matcher = matcher_class(self._tokens, grammar, log_level=0)
        found = Grammar(matcher, self.vocabulary, what)
        start = found.constraint()
        allowed = start.mask() & ~self.vocabulary.mask(self.vocabulary.stop_ids)
        if start.failed or not allowed.any():
            raise UserError(f"{what} cannot be satisfied: no text, or only the empty one, obeys it.")
        return found


class Grammar:
    """A compiled grammar; `constraint` starts it afresh."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary, what: str) -> None:
        self.vocabulary = vocabulary
        self.what = what
        self._matcher = matcher

    def constraint(self, stop_ids: Iterable[int] | None = None) -> "GrammarConstraint":
        """A new constraint of one output, which ends with one of `stop_ids` (None: the tokenizer's)."""
        stops = self.vocabulary.stop_ids if stop_ids is None else tuple(stop_ids)
        return GrammarConstraint(self._matcher.deep_copy(), self.vocabulary, stops, self.what)


class GrammarConstraint:
    """One output under a grammar. See `constraint.Constraint`."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary, stop_ids: tuple[int, ...], what: str) -> None:
        self._matcher = matcher
        self._stop_ids = frozenset(stop_ids)
        self._what = what
        self._stops = vocabulary.stops(stop_ids)
        self._no_stops = vocabulary.everything & ~vocabulary.mask(vocabulary.stop_ids)
        self._stopped = False
        self.failed = ""

    @property
    def finished(self) -> bool:
        return self._stopped or bool(self.failed) or self._matcher.is_stopped()

    def mask(self) -> np.ndarray:
        if self.finished:
            return self._stops
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error():
            self._fail()
            return self._stops
        # llguidance allows all of the tokenizer's stop ids where the output may end; this request may have others.
        mask = words[: len(self._no_stops)] & self._no_stops
        if self._matcher.is_accepting():
            mask |= self._stops
        elif not mask.any():
            self.failed = f"{self._what} has no token to go on with."
            return self._stops
        return mask

    def advance(self, token: int) -> None:
        if self.finished:
            return
        if token in self._stop_ids:
            self._stopped = True
            if not self._matcher.is_accepting():
                self.failed = f"{self._what} was broken off by the stop token {token}."
        elif not self._matcher.consume_token(token):
            self._fail()

    def _fail(self) -> None:
        self.failed = _sentence(self._what, self._matcher.get_error(), "could not be kept up")


class _ForLibrary:
    """The vocabulary as llguidance asks for it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.tokenizer.special.eos
        self.bos_token_id = vocabulary.tokenizer.special.bos
        self.tokens = vocabulary.texts
        self.special_token_ids = vocabulary.special
        self._encode = vocabulary.tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode())


def _library() -> Any:
    try:
        import llguidance  # optional, and no other part of the project needs it
    except ImportError:
        message = "Structured output needs the package llguidance; pip install 'gemma4_jax[structured]'."
        raise UserError(message) from None
    return llguidance


def _sentence(what: str, message: str, verb: str = "") -> str:
    """llguidance's message, several lines of it at times, as one sentence."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("error:")), lines[0] if lines else "no reason given")
    reason, unsatisfiable, why = reason.partition("Unsatisfiable schema:")
    reason = (why if unsatisfiable else reason).removeprefix("error:").strip()
    verb = verb or ("cannot be satisfied" if unsatisfiable else "cannot be compiled")
    return f"{what} {verb}: {reason[:200].rstrip('.')}."
