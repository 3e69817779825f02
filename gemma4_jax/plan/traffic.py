"""Bytes that one instruction moves to and from HBM: what it reads and writes, slices by their own size.

Operands and results that lie in VMEM cost nothing; a copy between the two costs one read or one write. A fusion that
takes a slice of an operand reads the slice, and one that updates a slice in place writes the slice.
"""

from gemma4_jax.plan.hlo import HBM, HOST, Computation, Instruction, Module, Shape

FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "add-dependency",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "call-start",
    "async-start",
}
"""Plumbing, and control flow whose cost is that of the computations it runs."""

SLICES = ("dynamic-slice", "slice", "gather")


def traffic(module: Module, computation: Computation, instruction: Instruction) -> tuple[float, float]:
    """(HBM bytes, bytes to or from the host's memory) of one execution."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return 0.0, 0.0
    if opcode == "fusion":
        moved = _fusion(module, computation, instruction)
    else:
        moved = _plain(computation, instruction)
    return (
        float(sum(size for size, space in moved if _in_hbm(module, space))),
        float(sum(size for size, space in moved if module.tpu and space == HOST)),
    )


def _in_hbm(module: Module, space: int) -> bool:
    return space == HBM or not module.tpu  # elsewhere S(1) is a kind of device memory too


def result_shapes(computation: Computation, instruction: Instruction) -> list[Shape]:
    """Arrays that an instruction makes; of the start of an asynchronous one, those that its end hands on."""
    if instruction.opcode.endswith("-start"):
        done = [each for each in computation.users[instruction.name] if each.opcode.endswith("-done")]
        if done:
            return done[0].leaves
    return instruction.leaves


def _plain(computation: Computation, instruction: Instruction) -> list[tuple[float, int]]:
    opcode = instruction.opcode.removesuffix("-start")
    reads = computation.operand_shapes(instruction)
    writes = result_shapes(computation, instruction)
    if opcode in SLICES:
        return [(writes[0].bytes, reads[0].space), *_sizes(reads[1:]), *_sizes(writes)]
    if opcode == "dynamic-update-slice":
        return [(reads[1].bytes, reads[1].space), (reads[1].bytes, writes[0].space)]
    if opcode == "scatter":
        updates = reads[-1]
        return [*_sizes(reads[len(writes) :]), (2.0 * updates.bytes, writes[0].space)]
    if opcode in ("broadcast", "iota"):
        return _sizes(writes)
    return [*_sizes(reads), *_sizes(writes)]


def _sizes(shapes: list[Shape]) -> list[tuple[float, int]]:
    return [(float(each.bytes), each.space) for each in shapes]


def _fusion(module: Module, computation: Computation, fusion: Instruction) -> list[tuple[float, int]]:
    inner = module.computations[fusion.computations("calls")[0]]
    moved = []
    for operand, parameter in zip(fusion.operands, inner.parameters, strict=True):
        for shape in computation.by_name[operand].leaves:
            moved.append((_read(module, inner, parameter.name), shape.space))
    written = _written(module, inner, inner.root)
    for size, shape in zip(written, fusion.leaves, strict=True):
        moved.append((size, shape.space))
    return moved


def _read(module: Module, computation: Computation, name: str) -> float:
    """Bytes of one value that its users in a fused computation read."""
    whole = float(sum(each.bytes for each in computation.by_name[name].leaves))
    total = 0.0
    for user in computation.users[name]:
        if user.opcode in ("bitcast", "reshape"):
            total += _read(module, computation, user.name)
        elif user.opcode in SLICES and user.operands[0] == name:
            total += user.leaves[0].bytes
        elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
            total += 0.0 if user.opcode == "dynamic-update-slice" else _updates(computation, user)
        elif user.opcode == "fusion":
            inner = module.computations[user.computations("calls")[0]]
            places = [i for i, operand in enumerate(user.operands) if operand == name]
            total += sum(_read(module, inner, inner.parameters[place].name) for place in places)
        elif user.opcode == "tuple" or _chained(user):
            continue
        else:
            return whole
    return min(whole, total)


def _written(module: Module, computation: Computation, made: Instruction) -> list[float]:
    """Bytes of each array of a fused computation's result."""
    if made.opcode == "tuple":
        return [size for name in made.operands for size in _written(module, computation, computation.by_name[name])]
    if made.opcode == "bitcast":
        return _written(module, computation, computation.by_name[made.operands[0]])
    if made.opcode == "parameter" or _chained(made):
        return [0.0] * len(made.leaves)
    if made.opcode == "fusion":
        inner = module.computations[made.computations("calls")[0]]
        return _written(module, inner, inner.root)
    if made.opcode == "dynamic-update-slice" and _from_parameter(computation, made.operands[0]):
        return [float(computation.by_name[made.operands[1]].leaves[0].bytes)]
    if made.opcode == "scatter" and len(made.leaves) == 1 and _from_parameter(computation, made.operands[0]):
        return [_updates(computation, made)]
    return [float(each.bytes) for each in made.leaves]


def _updates(computation: Computation, scatter: Instruction) -> float:
    return float(computation.by_name[scatter.operands[-1]].leaves[0].bytes)


def _from_parameter(computation: Computation, name: str) -> bool:
    made = computation.by_name[name]
    while made.opcode == "bitcast":
        made = computation.by_name[made.operands[0]]
    return made.opcode == "parameter"


def _chained(instruction: Instruction) -> bool:
    """A collective that the TPU runs alongside the matmuls of several fusions; see `costs.Reader`."""
    return "chain_id=" in instruction.attribute("frontend_attributes")
