"""How often the loops of a compiled program run: from the compiler's note, else from condition, body and first value."""

import dataclasses
import re

from gemma4_jax.plan.hlo import Computation, Instruction, Module


@dataclasses.dataclass(frozen=True)
class Linear:
    """An integer: `offset`, plus element `argument` of the computation's parameter unless that is None."""

    argument: int | None
    offset: int


Known = dict[int, int]
"""Elements of a computation's parameter tuple whose value is known and stays."""


def trip_count(module: Module, computation: Computation, loop: Instruction, known: Known) -> int | None:
    """Times that the body of a `while` runs; None when that depends on data."""
    noted = re.search(r'"known_trip_count":\{"n":"?(\d+)"?\}', loop.attributes)
    if noted:
        return int(noted[1])
    compare = _comparison(module, module.computations[loop.computations("condition")[0]])
    if compare is None:
        return None
    left, right, direction = compare
    if left.argument is None:
        left, right, direction = right, left, direction.translate(str.maketrans("LG", "GL"))
    body = module.computations[loop.computations("body")[0]]
    if left.argument is None:
        return None
    start = _first(module, computation, loop, left.argument, known)
    step = _step(module, body, left.argument)
    limit = right.offset
    if right.argument is not None:
        first = _first(module, computation, loop, right.argument, known)
        if first is None or _step(module, body, right.argument) != 0:
            return None
        limit += first
    if start is None or not step:
        return None
    distance = limit - start - left.offset
    if direction in ("LE", "GE"):
        distance += 1 if direction == "LE" else -1
    if (direction in ("LT", "LE") and step < 0) or (direction in ("GT", "GE") and step > 0):
        return None
    return max(0, -(-distance // step)) if direction != "EQ" else None


def body_arguments(module: Module, computation: Computation, loop: Instruction, known: Known) -> Known:
    """Elements of a loop's state that are known and that its body hands on unchanged, for the loops inside it."""
    body = module.computations[loop.computations("body")[0]]
    found = {}
    for index in range(len(body.root.operands) if body.root.opcode == "tuple" else 0):
        first = _first(module, computation, loop, index, known)
        if first is not None and _step(module, body, index) == 0:
            found[index] = first
    return found


def _comparison(module: Module, condition: Computation) -> tuple[Linear, Linear, str] | None:
    inputs: dict[str, Linear | None] = {}
    computation, made = condition, condition.root
    while made.opcode in ("fusion", "call", "bitcast", "copy"):
        if made.opcode in ("bitcast", "copy"):
            made = computation.by_name[made.operands[0]]
            continue
        inner = module.computations[(made.computations("calls") or made.computations("to_apply"))[0]]
        values = [integer(module, computation, name, inputs) for name in made.operands]
        inputs = {each.name: value for each, value in zip(inner.parameters, values, strict=True)}
        computation, made = inner, inner.root
    if made.opcode != "compare":
        return None
    left, right = (integer(module, computation, name, inputs) for name in made.operands)
    return None if left is None or right is None else (left, right, made.attribute("direction"))


def _first(module: Module, computation: Computation, loop: Instruction, index: int, known: Known) -> int | None:
    made = computation.by_name[loop.operands[0]]
    while made.opcode in ("copy", "bitcast", "opt-barrier"):
        made = computation.by_name[made.operands[0]]
    if made.opcode != "tuple":
        return None
    value = integer(module, computation, made.operands[index])
    if value is None or value.argument is None:
        return None if value is None else value.offset
    return known[value.argument] + value.offset if value.argument in known else None


def _step(module: Module, body: Computation, index: int) -> int | None:
    if body.root.opcode != "tuple":
        return None
    value = integer(module, body, body.root.operands[index])
    return value.offset if value is not None and value.argument == index else None


_SAME = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "broadcast", "opt-barrier")


def integer(module: Module, computation: Computation, name: str, inputs: dict | None = None) -> Linear | None:
    """The value of a scalar as far as constants and the computation's parameter tuple determine it.

    `inputs` are the values of a fused computation's parameters.
    """
    made = computation.by_name[name]
    opcode = made.opcode
    if opcode == "parameter":
        return (inputs or {}).get(name)
    if opcode == "constant":
        return Linear(None, int(made.literal)) if re.fullmatch(r"-?\d+", made.literal) else None
    if opcode in _SAME:
        return integer(module, computation, made.operands[0], inputs)
    if opcode == "get-tuple-element":
        index = int(made.attribute("index"))
        source = computation.by_name[made.operands[0]]
        if source.opcode == "parameter" and not inputs:
            return Linear(index, 0)
        if source.opcode == "tuple":
            return integer(module, computation, source.operands[index], inputs)
        return _fused(module, computation, source, index, inputs) if source.opcode == "fusion" else None
    if opcode in ("add", "subtract"):
        left, right = (integer(module, computation, each, inputs) for each in made.operands)
        if left is None or right is None or (right.argument is not None and opcode == "subtract"):
            return None
        if left.argument is not None and right.argument is not None:
            return None
        sign = 1 if opcode == "add" else -1
        return Linear(left.argument if left.argument is not None else right.argument, left.offset + sign * right.offset)
    return _fused(module, computation, made, None, inputs) if opcode == "fusion" else None


def _fused(module: Module, computation: Computation, fusion: Instruction, index: int | None, inputs) -> Linear | None:
    inner = module.computations[fusion.computations("calls")[0]]
    values = {
        each.name: integer(module, computation, name, inputs)
        for each, name in zip(inner.parameters, fusion.operands, strict=True)
        if not computation.by_name[name].leaves[0].dims
    }
    made = inner.root
    if index is not None:
        if made.opcode != "tuple":
            return None
        made = inner.by_name[made.operands[index]]
    return integer(module, inner, made.name, values or {"": None})
