"""What a compiled program must not contain: large buffers found by shape, and tables that are gathered whole."""

import dataclasses
from collections.abc import Sequence

from gemma4_jax.plan.costs import COLLECTIVES
from gemma4_jax.plan.hlo import Computation, Instruction, Module, Shape
from gemma4_jax.plan.job import Job
from gemma4_jax.plan.traffic import FREE, result_shapes


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array that the program makes, or an argument; `count` instructions make one of this shape."""

    shape: Shape
    bytes: int
    name: str
    op_name: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.shape} ({self.op_name or self.name})"


def faults(module: Module, job: Job) -> dict[str, list[str]]:
    """What a sound program of `job` does not have: what was looked for -> each that was found, as a sentence."""
    found: dict[str, list[str]] = {}
    if job.program != "decode":
        queries = job.length // job.devices("context")
        pairs = [each for each in scores(module, queries, job.length) if not _is_activation(each.shape, job)]
        found["scores of all pairs"] = [str(each) for each in pairs]
    if job.trains:
        found["logits of all tokens"] = [str(each) for each in logits(module, job.tokens, job.cfg.vocab_size)]
    if job.devices() > 1:
        widths = [width for width in (job.cfg.hidden_size, job.per_layer_width) if width]
        found["a gathered table"] = [each.name for each in gathered(module, job.cfg.vocab_size, widths)]
    return found


def _is_activation(shape: Shape, job: Job) -> bool:
    """[rows of a device x] tokens x width, where a width looks like a number of queries."""
    dims = sorted(size for size in shape.dims if size > 1)
    rows = [job.local_rows] if job.local_rows > 1 else []
    return any(dims in (sorted((job.length, width)), sorted((*rows, job.length, width))) for width in job.widths)


def buffers(module: Module) -> list[Buffer]:
    """Arrays of the program, largest first, one for each shape. What only exists inside a fusion is no buffer."""
    found: dict[tuple[str, tuple[int, ...], int], Buffer] = {}
    for computation, made in module.executed():
        argument = made.opcode == "parameter" and computation.entry
        if (made.opcode in FREE and not argument) or made.opcode.endswith("-done"):
            continue
        for shape in result_shapes(computation, made):
            key = shape.dtype, tuple(sorted(shape.dims)), shape.space
            first = found.get(key)
            count = 1 if first is None else first.count + 1
            kept = Buffer(shape, shape.bytes, made.name, made.op_name) if first is None else first
            found[key] = dataclasses.replace(kept, count=count)
    return sorted(found.values(), key=lambda each: -each.bytes)


def scores(module: Module, queries: int, keys: int) -> list[Buffer]:
    """Buffers shaped like the scores of full attention: one dim `keys` long, another a multiple of `queries`.

    Lengths are those of one device. Integers and booleans count: a mask of that size is as bad.
    """

    def match(dims: tuple[int, ...]) -> bool:
        return any(
            size == keys and any(other % queries == 0 and other for j, other in enumerate(dims) if j != i)
            for i, size in enumerate(dims)
        )

    return [each for each in buffers(module) if match(each.shape.dims)]


def logits(module: Module, tokens: int, vocabulary: int) -> list[Buffer]:
    """float32 buffers that hold `tokens` x `vocabulary` numbers or more: the logits of all tokens of a device at once.

    A vocabulary that is cut over devices counts with the tokens that come together: [8 * tokens, vocabulary / 8].
    """

    def match(shape: Shape) -> bool:
        cut = any(size >= 1024 and vocabulary % size == 0 for size in shape.dims)
        return shape.dtype == "f32" and cut and shape.size >= tokens * vocabulary

    return [each for each in buffers(module) if match(each.shape)]


def gathered(module: Module, rows: int, widths: Sequence[int]) -> list[Instruction]:
    """All-gathers whose result has a dim of `rows`, and as many numbers in each as a table of one of `widths`, or a multiple.

    Keys of 262,144 tokens and the experts that 32,768 tokens choose have as many rows, but no such width.
    """

    def match(shape: Shape) -> bool:
        return rows in shape.dims and any(shape.size // rows % width == 0 for width in widths)

    return [
        made
        for _, made in collectives(module)
        if made.opcode.startswith("all-gather") and any(match(shape) for shape in made.leaves)
    ]


def collectives(module: Module) -> list[tuple[Computation, Instruction]]:
    """All collectives of the program, those inside fusions included."""
    return [
        (computation, made)
        for computation in module.computations.values()
        for made in computation.instructions
        if made.opcode.removesuffix("-start") in COLLECTIVES
    ]
