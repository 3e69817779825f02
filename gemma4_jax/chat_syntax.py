"""Tools and their arguments in Gemma 4's own notation: unquoted keys, strings between `<|"|>`, types in capitals.

Every rule here is the published chat template's, oddities included, because the model was trained on its output: keys are
sorted without regard to case, a JSON null is written `None`, and a property whose name is also a schema key (`type`,
`description`, ...) is left out of the declaration.
"""

from collections.abc import Iterable, Mapping
from typing import Any

QUOTE = '<|"|>'

# Keys of a schema that say something about it. They are never taken for names of properties, so that an object without
# `properties` can list its properties directly.
SCHEMA_KEYS = frozenset(("description", "type", "properties", "required", "nullable"))


def quoted(text: object) -> str:
    """`text` as a string literal."""
    return f"{QUOTE}{text}{QUOTE}"


def by_key(mapping: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """The items sorted by key without regard to case, as jinja's `dictsort` does."""
    return sorted(mapping.items(), key=lambda item: item[0].lower() if isinstance(item[0], str) else item[0])


def value(item: Any, quote_keys: bool = False) -> str:
    """A JSON value: `<|"|>text<|"|>`, 1.5, true, None, [..], {key:..}; keys quoted only inside tool schemas."""
    if isinstance(item, str):
        return quoted(item)
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, Mapping):
        pairs = (f"{quoted(key) if quote_keys else key}:{value(inner, quote_keys)}" for key, inner in by_key(item))
        return "{" + ",".join(pairs) + "}"
    if isinstance(item, list | tuple):
        return "[" + ",".join(value(inner, quote_keys) for inner in item) + "]"
    return str(item)


def arguments(pairs: Mapping[str, Any]) -> str:
    """What stands between the braces of a tool call or a tool response: `key:value,key:value`."""
    return ",".join(f"{key}:{value(inner)}" for key, inner in by_key(pairs))


def call(name: str, pairs: Mapping[str, Any]) -> str:
    """A whole tool call with its markers."""
    return f"<|tool_call>call:{name}{{{arguments(pairs)}}}<tool_call|>"


def response(name: str, result: Any) -> str:
    """A whole tool response without its opening marker; anything but a mapping goes under the key `value`."""
    pairs = result if isinstance(result, Mapping) else {"value": result}
    return f"response:{name}{{{arguments(pairs)}}}<tool_response|>"


def declaration(tool: Mapping[str, Any]) -> str:
    """`<|tool>declaration:NAME{description:..,parameters:{..}}<tool|>` of an OpenAI-style function tool."""
    function = tool["function"]
    text = f"declaration:{function['name']}{{description:{quoted(function.get('description', ''))}"
    parameters = function.get("parameters")
    if parameters:
        text += f",parameters:{{{_parameters(parameters)}"
    if "response" in function:
        text += f",response:{{{_response_schema(function['response'])}"
    return f"<|tool>{text}}}<tool|>"


def _parameters(schema: Mapping[str, Any]) -> str:
    """The inside of `parameters:{..}`. The closing brace belongs to the type: a schema without one stays open."""
    text = ""
    if schema.get("properties"):
        text += f"properties:{{{_properties(schema['properties'])}}},"
    if schema.get("required"):
        text += f"{_required(schema['required'])},"
    if schema.get("type"):
        text += f"type:{quoted(_upper(schema['type']))}}}"
    return text


def _response_schema(schema: Any) -> str:
    """The inside of `response:{..}`, only its description and the type OBJECT; its brace closes with the type."""
    text = ""
    if _field(schema, "description"):
        text += f"description:{quoted(schema['description'])},"
    if _upper(_field(schema, "type", "")) == "OBJECT":
        text += f"type:{quoted('OBJECT')}}}"
    return text


def _properties(properties: Mapping[str, Any]) -> str:
    """`name:{..},name:{..}` of the properties whose names are not schema keys."""
    return ",".join(f"{name}:{_property(schema)}" for name, schema in by_key(properties) if name not in SCHEMA_KEYS)


def _property(schema: Any) -> str:
    """One property: description, then what its type adds, then the type."""
    kind = _upper(_field(schema, "type", ""))
    parts = []
    if _field(schema, "description"):
        parts.append(f"description:{quoted(schema['description'])}")
    if kind == "STRING" and _field(schema, "enum"):
        parts.append(f"enum:{value(schema['enum'], quote_keys=True)}")
    items = _field(schema, "items")
    if kind == "ARRAY" and isinstance(items, Mapping) and items:
        parts.append(f"items:{{{_items(items)}}}")
    if _field(schema, "nullable"):
        parts.append("nullable:true")
    if kind == "OBJECT":
        inner = _field(schema, "properties")
        parts.append(f"properties:{{{_properties(inner if isinstance(inner, Mapping) else schema)}}}")
        if _field(schema, "required"):
            parts.append(_required(schema["required"]))
    parts.append(f"type:{quoted(kind)}")
    return "{" + ",".join(parts) + "}"


def _items(items: Mapping[str, Any]) -> str:
    """The schema of an array's items: every key it has, those without a value left out."""
    parts = []
    for key, inner in by_key(items):
        if inner is None:
            continue
        if key == "properties":
            parts.append(f"properties:{{{_properties(inner) if isinstance(inner, Mapping) else ''}}}")
        elif key == "required":
            parts.append(_required(inner))
        elif key == "type":
            parts.append(f"type:{value(_upper(inner) if isinstance(inner, str) else [_upper(one) for one in inner])}")
        else:
            parts.append(f"{key}:{value(inner, quote_keys=True)}")
    return ",".join(parts)


def _required(names: Iterable[object]) -> str:
    return "required:[" + ",".join(quoted(name) for name in names) + "]"


def _upper(kind: object) -> str:
    return str(kind).upper()


def _field(schema: Any, key: str, default: Any = None) -> Any:
    """`schema[key]`, or `default` where the schema is no mapping: malformed schemas render as the template renders them."""
    return schema.get(key, default) if isinstance(schema, Mapping) else default
