"""Whether a JSON schema has finite values at all: one that requires itself has none, and a writer under it would never end."""

from collections.abc import Mapping
from typing import Any

from gemma4_jax.errors import UserError


def require_ends(schema: Any, what: str) -> None:
    """Raises UserError, beginning with `what`, for a schema that requires itself without end."""
    if not _ends(schema, schema, ()):
        raise UserError(f"{what} cannot be satisfied: it requires itself, so its values would never end.")


def _ends(schema: Any, root: Any, inside: tuple[str, ...]) -> bool:
    """Whether some value ends; `inside` are the references being followed. What is malformed is for the compiler to find."""
    if not isinstance(schema, Mapping):
        return True
    pointer = schema.get("$ref")
    if isinstance(pointer, str):
        return pointer not in inside and _ends(_target(pointer, root), root, (*inside, pointer))
    for keyword in ("anyOf", "oneOf"):
        branches = schema.get(keyword)
        if isinstance(branches, list) and branches and not any(_ends(one, root, inside) for one in branches):
            return False
    every = schema.get("allOf")
    if isinstance(every, list) and not all(_ends(one, root, inside) for one in every):
        return False
    kind = schema.get("type", "object" if "required" in schema else None)
    if kind == "object":
        properties, required = schema.get("properties"), schema.get("required")
        given = properties if isinstance(properties, Mapping) else {}
        names = required if isinstance(required, list) else []
        others = schema.get("additionalProperties", True)
        return all(_ends(given.get(name, others), root, inside) for name in names if isinstance(name, str))
    if kind == "array":
        first = schema.get("prefixItems")
        parts = [*(first if isinstance(first, list) else []), *([schema.get("items")] if "items" in schema else [])]
        least = schema.get("minItems", 0)
        return all(_ends(one, root, inside) for one in (parts if isinstance(least, int) and least > 0 else []))
    return True


def _target(pointer: str, root: Any) -> Any:
    """What a local pointer points at; True, which ends, where it points at nothing."""
    target = root
    for part in pointer.removeprefix("#").split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(target, Mapping) or part not in target:
            return True
        target = target[part]
    return target
