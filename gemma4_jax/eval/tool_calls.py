"""Tool calls compared as syntax trees: the right function, with arguments of the right types and accepted values.

The rules are those of the Berkeley Function Calling Leaderboard's AST checks (gorilla, `bfcl_eval`): of each argument a list of
values is accepted, "" among them means that it may be left out; strings are compared without case, blanks and punctuation; an
integer is a float where one is wanted, and nothing else is converted; several calls match in any order.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Call = Mapping[str, Any]
"""{"name": str, "arguments": dict}."""

IGNORED = re.compile(r"[ ,./\-_*^]")
OMITTED = ""
TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "float": (float, int),
    "number": (float, int),
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "object": dict,
}
"""Names of types in schemas, JSON's and BFCL's; one that is not here is not checked."""


@dataclass(frozen=True)
class Expected:
    """One wanted call: its function's schema of arguments, and for each argument the values that count as right."""

    name: str
    accepted: Mapping[str, Sequence[Any]]
    schema: Mapping[str, Any]

    def __str__(self) -> str:
        values = ", ".join(
            f"{name}={values[0]!r}" for name, values in self.accepted.items() if values and values[0] != ""
        )
        return f"{self.name}({values})"


def complaint(calls: Sequence[Call], wanted: Sequence[Expected]) -> str:
    """What is wrong with an answer's calls, the first thing that is; "" if nothing is."""
    if len(calls) != len(wanted):
        return f"wanted {len(wanted)} calls, got {len(calls)}"
    if len(wanted) == 1:
        return call_complaint(calls[0], wanted[0])
    fits = [[not call_complaint(call, one) for call in calls] for one in wanted]
    free = _unmatched(fits)
    if free is None:
        return ""
    reasons = [call_complaint(call, wanted[free]) for call in calls]
    return f"no call for {wanted[free]}: {'; '.join(dict.fromkeys(filter(None, reasons)))}"


def call_complaint(call: Call, wanted: Expected) -> str:
    """What is wrong with one call; "" if nothing is."""
    if call["name"] != wanted.name:
        return f"wanted {wanted.name}, got {call['name']}"
    arguments, properties = call.get("arguments") or {}, wanted.schema.get("properties") or {}
    for name in wanted.schema.get("required") or ():
        if name not in arguments:
            return f"{name} is missing"
    for name, value in arguments.items():
        if name not in wanted.accepted or name not in properties:
            return f"{name} was not asked for"
        if reason := _value_complaint(name, value, wanted.accepted[name], properties[name]):
            return reason
    for name, values in wanted.accepted.items():
        if name not in arguments and OMITTED not in values:
            return f"{name} is missing"
    return ""


def _value_complaint(name: str, value: Any, accepted: Sequence[Any], schema: Mapping[str, Any]) -> str:
    if not _is_of(value, schema) and not any(type(value) is type(one) for one in accepted if one != OMITTED):
        return f"{name} is {value!r}, wanted {schema.get('type')}"
    if not any(_same(value, one) for one in accepted):
        return f"{name} is {value!r}, wanted {' or '.join(repr(one) for one in accepted if one != OMITTED)}"
    return ""


def _is_of(value: Any, schema: Mapping[str, Any]) -> bool:
    kind = TYPES.get(str(schema.get("type")))
    if kind is None:
        return True
    if isinstance(value, bool) is not (kind is bool):
        return False
    if not isinstance(value, kind):
        return False
    items = schema.get("items")
    return not isinstance(value, list) or not isinstance(items, Mapping) or all(_is_of(item, items) for item in value)


def _same(value: Any, one: Any) -> bool:
    """Whether a value is an accepted one. Of a dict each key has its own accepted values."""
    if isinstance(value, dict) and isinstance(one, Mapping):
        known = all(
            key in one and any(_same(inner, choice) for choice in _choices(one[key])) for key, inner in value.items()
        )
        return known and all(key in value or OMITTED in _choices(values) for key, values in one.items())
    if isinstance(value, list | tuple) and isinstance(one, list | tuple):
        return len(value) == len(one) and all(_same(a, b) for a, b in zip(value, one, strict=True))
    if isinstance(value, str) and isinstance(one, str):
        return _plain(value) == _plain(one)
    return isinstance(value, bool) is isinstance(one, bool) and value == one


def _choices(values: Any) -> Sequence[Any]:
    return values if isinstance(values, list) else [values]


def _plain(text: str) -> str:
    return IGNORED.sub("", text).lower().replace("'", '"')


def _unmatched(fits: Sequence[Sequence[bool]]) -> int | None:
    """A wanted call that finds no call of its own however they are dealt out; None if all do (augmenting paths)."""
    owner: dict[int, int] = {}

    def place(one: int, tried: set[int]) -> bool:
        for call, fit in enumerate(fits[one]):
            if fit and call not in tried:
                tried.add(call)
                if call not in owner or place(owner[call], tried):
                    owner[call] = one
                    return True
        return False

    return next((one for one in range(len(fits)) if not place(one, set())), None)
