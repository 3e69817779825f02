"""The JSON schemas of tools become a lark grammar of calls in Gemma 4's own notation, for `structured.Grammars.lark`.

`call:NAME{key:value,key:value}` as `chat_syntax.call` writes it, which is what the model was trained on: keys unquoted and in
its order, strings between quote tokens, null as None, no white space. Optional properties may be left out; properties that
a schema does not name come only where it names none. Every derived call validates against its tool's schema; a keyword that
this could not be said of is refused. `format` says something about a string without restricting it, as in JSON Schema.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma4_jax.chat_syntax import by_key
from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.infer.schema_ends import require_ends
from gemma4_jax.tokenizer import Tokenizer

TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
NUMERIC = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
OF_TYPE = {  # keywords that give a schema without a type its type
    **dict.fromkeys(("properties", "required", "additionalProperties"), "object"),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems"), "array"),
    **dict.fromkeys(("minLength", "maxLength", "pattern"), "string"),
    **dict.fromkeys(NUMERIC, "number"),
}
# Keywords of JSON Schema that restrict values in ways no rule here expresses.
REFUSED = frozenset(
    "not if then else patternProperties propertyNames dependentRequired dependentSchemas dependencies uniqueItems contains "
    "minContains maxContains minProperties maxProperties unevaluatedItems unevaluatedProperties $dynamicRef".split()
)
PLAIN_KEY = re.compile(r'[^\s{}\[\]:,<>|"](?:[^{}\[\]:,<>|"\n]*[^\s{}\[\]:,<>|"])?')
TOOL_NAME = re.compile(r'[^\s{}<>|"]+')

START = """%llguidance {{}}
start: {calls} <[{close}]>
string: <[{quote}]> TEXT? <[{quote}]>
TEXT: /(.|\\n)+/
word: "true" | "false" | "None"
number: %json {{"type": "number"}}
any: string | word | number | any_list | any_object
any_list: "[" (any ("," any)*)? "]"
any_object: "{{" (any_pair ("," any_pair)*)? "}}"
any_pair: KEY ":" any
KEY: /[A-Za-z_][A-Za-z0-9_]{{0,63}}/
"""


def call_grammar(tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> str:
    """Lark text of one call of one of `tools`, from `call:` to `<tool_call|>`, which it includes.

    Raises:
        UserError: a schema that is malformed, cannot be satisfied, or uses a keyword of REFUSED; names the tool.
    """
    tokenizer.require(("tool_call_close", "quote"), "Constrained tool calls")
    special = tokenizer.special
    rules = _Rules(special.quote)
    calls = []
    for tool in tools:
        function = tool["function"]
        name, schema = function["name"], function.get("parameters") or {}
        if not TOOL_NAME.fullmatch(name):
            raise UserError(f"The tool {name!r} cannot be called: its name has a space, brace, quote or one of <>|.")
        require_ends(schema, f"The tool {name!r}")
        try:
            body = rules.object(schema if "type" in schema else {**schema, "type": "object"}, schema)
        except UserError as error:
            raise UserError(f"The parameters of the tool {name!r}: {error}") from None
        except RecursionError:
            raise UserError(f"The parameters of the tool {name!r} are nested too deeply.") from None
        calls.append(f"{_literal(f'call:{name}')} {body}")
    head = START.format(calls=f"({' | '.join(calls)})", close=special.tool_call_close, quote=special.quote)
    return head + "".join(f"{name}: {text}\n" for name, text in rules.made.items())


class _Rules:
    """The rules made so far, by name. Each method returns what stands for a schema in another rule."""

    def __init__(self, quote: int | None) -> None:
        self.made: dict[str, str] = {}
        self._quote = f"<[{quote}]>"
        self._of_pointer: dict[tuple[int, str], str] = {}

    def value(self, schema: Any, root: Mapping[str, Any]) -> str:
        """Any schema. `root` is where its references point into."""
        if schema is False:
            raise UserError("a schema is false, so nothing satisfies it.")
        if schema is True or schema == {}:
            return "any"
        if not isinstance(schema, Mapping):
            raise UserError(f"a schema is an object, got {type(schema).__name__}.")
        refused = sorted(key for key in schema if key in REFUSED and schema[key] not in (False, None))
        if refused:
            raise UserError(f"the keyword {refused[0]!r} cannot constrain a tool call; leave it out or describe it.")
        if "$ref" in schema:
            return self._reference(schema, root)
        for keyword in ("anyOf", "oneOf", "allOf"):
            if keyword in schema:
                return self._combined(keyword, schema, root)
        if "const" in schema or "enum" in schema:
            return self._one_of(schema)
        kinds = schema.get("type", next((OF_TYPE[key] for key in schema if key in OF_TYPE), None))
        if kinds is None:
            return "any"
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        if schema.get("nullable") and "null" not in kinds:
            kinds.append("null")  # OpenAPI's word, which the chat format declares
        return self._rule(_alternatives(self._typed(kind, schema, root) for kind in kinds))

    def object(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """A mapping with its braces; the whole of a tool's parameters must be one."""
        resolved = self.value(schema, root) if "$ref" in schema or "allOf" in schema else None
        if resolved is not None:
            return resolved
        if schema.get("type") != "object":
            raise UserError(f"they must be of type 'object', got {schema.get('type')!r}.")
        if not schema.get("properties") and not schema.get("required") and "additionalProperties" not in schema:
            return '"{}"'  # a function without parameters
        return self.value(schema, root)

    def _typed(self, kind: str, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        if kind == "object":
            return self._object(schema, root)
        if kind == "array":
            return self._array(schema, root)
        if kind == "string":
            return self._string(schema)
        if kind in ("integer", "number"):
            limits = {key: schema[key] for key in NUMERIC if key in schema}
            return (
                self._rule(f"%json {json.dumps({'type': kind, **limits})}") if limits or kind == "integer" else "number"
            )
        if kind in ("boolean", "null"):
            return '("true" | "false")' if kind == "boolean" else '"None"'
        raise UserError(f"unknown type {kind!r}; {did_you_mean(str(kind), TYPES)}.")

    def _object(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        properties = dict(schema.get("properties") or {})
        required = list(schema.get("required") or ())
        others = schema.get("additionalProperties", True)
        for name in required:
            if name not in properties and others is False:
                raise UserError(f"the required property {name!r} is not among the properties.")
            properties.setdefault(name, others)
        if not properties:
            if others is False:
                return '"{}"'
            pair = self._rule(f'KEY ":" {self.value(others, root)}')
            return f'"{{" ({pair} ("," {pair})*)? "}}"'
        # From the last property to the first: what may follow if nothing was written yet, and if something was.
        first = rest = '"}"'
        for name, inner in reversed(by_key(properties)):
            pair = self._rule(f'{self._key(name)} ":" {self.value(inner, root)}')
            if name in required:
                first, rest = self._rule(f"{pair} {rest}"), self._rule(f'"," {pair} {rest}')
            else:
                first, rest = (
                    self._rule(f"{pair} {rest} | {first}"),
                    self._rule(f'"," {pair} {rest} | {rest}'),
                )
        return f'"{{" {first}'

    def _array(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        given = [self.value(inner, root) for inner in schema.get("prefixItems") or ()]
        if most is not None and most < least:
            raise UserError(f"minItems ({least}) is greater than maxItems ({most}).")
        if most == 0:
            return '"[]"'
        if given:
            if not least <= len(given) <= (len(given) if most is None else most):
                raise UserError(f"an array of its {len(given)} prefixItems has not minItems to maxItems of them.")
            return '"[" ' + ' "," '.join(given) + ' "]"'
        item = self.value(schema.get("items", True), root)
        fewest, more = max(least - 1, 0), "" if most is None else most - 1
        filled = item if more == 0 else f'{item} ("," {item}){{{fewest},{more}}}'
        return f'"[" {filled} "]"' if least else f'"[" ({filled})? "]"'

    def _string(self, schema: Mapping[str, Any]) -> str:
        least, most, pattern = schema.get("minLength", 0), schema.get("maxLength"), schema.get("pattern")
        if most is not None and most < least:
            raise UserError(f"minLength ({least}) is greater than maxLength ({most}).")
        if most == 0 and pattern is None:
            return f"{self._quote} {self._quote}"
        if pattern is None and not least and most is None:
            return "string"
        regex = []
        if pattern is not None:
            regex.append(_whole(pattern))
        if least or most is not None:
            regex.append(f"/(.|\\n){{{least},{'' if most is None else most}}}/")
        text = self._rule(" & ".join(regex), terminal=True)
        # A lexeme is never empty, so the empty string is a case of its own.
        empty = f" | {self._quote} {self._quote}" if not least and (pattern is None or re.search(pattern, "")) else ""
        return f"({self._quote} {text} {self._quote}{empty})"

    def _one_of(self, schema: Mapping[str, Any]) -> str:
        """`enum` and `const`, as far as the schema's type accepts them."""
        values = [schema["const"]] if "const" in schema else list(schema["enum"])
        kinds = schema.get("type", TYPES)
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        kinds += ("null",) if schema.get("nullable") else ()
        values = [item for item in values if any(_is(item, kind) for kind in kinds)]
        if not values:
            raise UserError("no value of an enum is of the type its schema asks for.")
        return _alternatives(self._written(item) for item in values)

    def _combined(self, keyword: str, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """anyOf and allOf, and oneOf whose branches are of different types, with what stands beside them."""
        beside = {key: inner for key, inner in schema.items() if key != keyword}
        branches = [inner if isinstance(inner, Mapping) else {} for inner in schema[keyword]]
        if keyword == "allOf":
            merged = beside
            for inner in branches:
                merged = _merged(merged, self._target(inner, root), keyword)
            return self.value(merged, root)
        kinds = [self._target(inner, root).get("type") for inner in branches]
        if keyword == "oneOf" and (not all(isinstance(kind, str) for kind in kinds) or len(set(kinds)) < len(kinds)):
            raise UserError("oneOf cannot constrain a tool call unless its branches have different types; use anyOf.")
        if keyword == "oneOf" and {"integer", "number"} <= set(kinds):
            raise UserError("oneOf of an integer and a number accepts no integer; use anyOf.")
        return self._rule(_alternatives(self.value(_merged(beside, inner, keyword), root) for inner in branches))

    def _reference(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """A rule per pointer, named before it is made, so that schemas may contain themselves."""
        pointer = schema["$ref"]
        beside = _merged({key: inner for key, inner in schema.items() if key != "$ref"}, {}, "$ref")
        if beside:
            return self.value(_merged(beside, self._target(schema, root), "$ref"), root)
        key = (id(root), pointer)
        if key not in self._of_pointer:
            target = self._target(schema, root)
            name = self._of_pointer[key] = self._name()
            self.made[name] = self.value(target, root)
        return self._of_pointer[key]

    def _target(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a schema refers to; itself if it is no reference."""
        seen = []
        while "$ref" in schema:
            pointer = schema["$ref"]
            target: Any = root
            if pointer in seen or not isinstance(pointer, str) or not pointer.startswith("#"):
                raise UserError(f"the reference {pointer!r} leads nowhere in this schema.")
            seen.append(pointer)
            for part in pointer.removeprefix("#").split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                if not isinstance(target, Mapping) or part not in target:
                    raise UserError(f"the reference {pointer!r} leads nowhere in this schema.")
                target = target[part]
            if not isinstance(target, Mapping):
                raise UserError(f"the reference {pointer!r} leads to no schema.")
            schema = target
        return schema

    def _written(self, item: Any) -> str:
        """One value, as `chat_syntax.value` writes it."""
        if isinstance(item, str):
            return f"{self._quote} {_literal(item)} {self._quote}" if item else f"{self._quote} {self._quote}"
        if isinstance(item, Mapping):
            pairs = [f'{self._key(name)} ":" {self._written(inner)}' for name, inner in by_key(item)]
            return '"{" ' + ' "," '.join(pairs) + ' "}"'
        if isinstance(item, list | tuple):
            return '"[" ' + ' "," '.join(self._written(inner) for inner in item) + ' "]"'
        return _literal("true" if item is True else "false" if item is False else str(item))

    def _key(self, name: str) -> str:
        """A key: bare, or as a string where a bare one could not be read back."""
        return _literal(name) if PLAIN_KEY.fullmatch(name) else self._written(name)

    def _name(self, terminal: bool = False) -> str:
        name = f"{'T' if terminal else 'r'}{len(self.made)}"
        self.made[name] = ""  # takes the number
        return name

    def _rule(self, text: str, terminal: bool = False) -> str:
        """The name of a rule with this text; `text` itself where it is a name already."""
        if re.fullmatch(r"\w+", text):
            return text
        name = self._name(terminal)
        self.made[name] = text
        return name


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _alternatives(texts: Iterable[str]) -> str:
    texts = list(dict.fromkeys(texts))
    return texts[0] if len(texts) == 1 else f"({' | '.join(texts)})"


def _merged(one: Mapping[str, Any], other: Mapping[str, Any], keyword: str) -> dict[str, Any]:
    """Two schemas that both hold, where no keyword of theirs says different things."""
    notes = ("title", "description", "default", "examples", "$defs", "definitions")
    merged = {key: inner for key, inner in one.items() if key not in notes}
    for key, inner in other.items():
        if key in notes:
            continue
        if key == "properties" and isinstance(merged.get(key), Mapping):
            inner = _merged_properties(merged[key], inner)
        elif key == "required" and key in merged:
            inner = [*merged[key], *inner]
        elif merged.get(key, inner) != inner:
            raise UserError(f"{keyword}: its branches say different things about {key!r}, which cannot be combined.")
        merged[key] = inner
    return merged


def _merged_properties(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = sorted(name for name in one if name in other and one[name] != other[name])
    if both:
        raise UserError(f"two schemas that must both hold describe the property {both[0]!r}.")
    return {**one, **other}


def _is(item: Any, kind: str) -> bool:
    """Whether a JSON value is of a JSON type."""
    if isinstance(item, bool) or item is None:
        return kind == ("null" if item is None else "boolean")
    if isinstance(item, int | float):
        return kind == "number" or (kind == "integer" and item == int(item))
    return kind == {str: "string", dict: "object", list: "array", tuple: "array"}.get(type(item))


def _whole(pattern: str) -> str:
    """A schema's pattern, which matches anywhere in a string, as a lark terminal for the whole string."""
    body = pattern.removeprefix("^")
    ends = body.endswith("$") and not body.endswith("\\$")
    body = body[:-1] if ends else body
    if re.search(r"(?<!\\)[$]|(?<![\\\[])\^", body) or ("|" in body and (ends or body != pattern)):
        raise UserError(f"the pattern {pattern!r} has anchors inside, which cannot constrain a tool call.")
    before, after = "" if body != pattern and pattern.startswith("^") else "(.|\\n)*", "" if ends else "(.|\\n)*"
    return "/" + (before + f"({body})" + after).replace("\\/", "/").replace("/", "\\/") + "/"
