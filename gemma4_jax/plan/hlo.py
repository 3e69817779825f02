"""The text of a compiled XLA program as a small tree: module, computations, instructions, shapes.

Reads `compiled.as_text()` of TPU, GPU and CPU programs (jax 0.10.2). Only what costs are read from is understood: shapes
with layouts, operands, attributes, constants that are one integer, and the three spellings of device groups.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

HBM, VMEM, HOST = 0, 1, 5
"""Memory spaces of a TPU layout, S(n). Spaces 2 and up other than 5 hold scalars and semaphores."""

BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: dtype, dims, and from its layout the order of dims, the tiles that pad it and the memory it lies in."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()  # minor to major
    tiles: tuple[tuple[int, ...], ...] = ()
    space: int = HBM

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Bits of one element."""
        if self.dtype in BITS:
            return BITS[self.dtype]
        return int(re.sub(r"\D*(\d+).*", r"\1", self.dtype))  # bf16, s4, f8e4m3fn

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes in memory, padding of the tiles included."""
        if not self.tiles:
            return -(-self.size * self.bits // 8)
        tile = self.tiles[0]
        order = self.order or tuple(reversed(range(len(self.dims))))
        major_to_minor = [self.dims[i] for i in reversed(order)]
        padded = [1] * max(0, len(tile) - len(major_to_minor)) + major_to_minor
        for i, size in enumerate(reversed(tile), start=1):
            padded[-i] = -(-padded[-i] // size) * size
        return math.prod(padded) * self.bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass
class Instruction:
    """One line: name = shape opcode(operands), attributes."""

    name: str
    shape: "Shape | tuple"  # nested tuples of Shape
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    attributes: str  # what follows them
    root: bool = False

    @property
    def leaves(self) -> list[Shape]:
        """The arrays of the result, tuples flattened."""
        return list(leaves(self.shape))

    @functools.cached_property
    def op_name(self) -> str:
        """The path of named scopes and transformations that JAX wrote, or nothing."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, key: str) -> str:
        """The text of an attribute up to the comma or bracket that ends it; nothing when it is absent."""
        found = re.search(rf"(?:^|[\s,]){key}=", self.attributes)
        return "" if found is None else _value(self.attributes, found.end())

    def computations(self, key: str) -> list[str]:
        """Names of computations that an attribute lists, one or several in braces."""
        return [name.strip().lstrip("%") for name in self.attribute(key).strip("{}").split(",") if name.strip()]

    def integers(self, key: str) -> list[int]:
        """An attribute like dimensions={0,2}."""
        return [int(number) for number in re.findall(r"\d+", self.attribute(key))]


@dataclasses.dataclass
class Computation:
    """Instructions in order, the last of them or the one marked ROOT being the result."""

    name: str
    entry: bool
    instructions: list[Instruction]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Name -> instruction."""
        return {each.name: each for each in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        """The result."""
        return next((each for each in self.instructions if each.root), self.instructions[-1])

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> instructions that read it."""
        found: dict[str, list[Instruction]] = {each.name: [] for each in self.instructions}
        for each in self.instructions:
            for operand in dict.fromkeys(each.operands):
                found.setdefault(operand, []).append(each)
        return found

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """Parameters by number."""
        found = [each for each in self.instructions if each.opcode == "parameter"]
        return sorted(found, key=lambda each: int(each.literal))

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """The arrays an instruction reads, tuples flattened."""
        return [shape for name in instruction.operands for shape in self.by_name[name].leaves]


@dataclasses.dataclass
class Module:
    """A program: its computations by name, and whether memory spaces are a TPU's."""

    computations: dict[str, Computation]
    tpu: bool

    @functools.cached_property
    def entry(self) -> Computation:
        """Where it starts."""
        return next(each for each in self.computations.values() if each.entry)

    def executed(self) -> Iterator[tuple[Computation, Instruction]]:
        """Every instruction that runs by itself: those of fusions and of reducers are left out."""
        waiting, seen = [self.entry.name], set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            computation = self.computations[name]
            for each in computation.instructions:
                yield computation, each
                waiting += called(each)


def called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs instruction by instruction: loop bodies, branches, calls."""
    if instruction.opcode == "while":
        return instruction.computations("condition") + instruction.computations("body")
    if instruction.opcode == "conditional":
        keys = ("branch_computations", "true_computation", "false_computation")
        return [name for key in keys for name in instruction.computations(key)]
    if instruction.opcode in ("call", "call-start", "async-start"):
        return instruction.computations("to_apply") or instruction.computations("calls")
    return []


def leaves(shape: "Shape | tuple") -> Iterator[Shape]:
    """The arrays of a shape, tuples flattened."""
    if isinstance(shape, Shape):
        yield shape
    else:
        for each in shape:
            yield from leaves(each)


_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"^\s+(ROOT )?%?(\S+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")


def parse(text: str | None) -> Module:
    """The program in `compiled.as_text()`. A line that fits no rule continues the one above: kernel metadata has breaks."""
    text = text or ""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    pending = ""

    def flush() -> None:
        nonlocal pending
        if pending and current is not None:
            current.instructions.append(_instruction(pending))
        pending = ""

    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = Computation(header[2], bool(header[1]), [])
                computations[current.name] = current
        elif line == "}" or line.startswith("}, execution_thread"):
            flush()
            current = None
        elif _LINE.match(line):
            flush()
            pending = line
        else:
            pending += "\n" + line
    if not any(each.entry for each in computations.values()):
        raise ValueError("This is not the text of a compiled program: it has no ENTRY computation.")
    return Module(computations, ":T(" in text)


def parse_shape(text: str, start: int = 0) -> tuple["Shape | tuple", int]:
    """The shape that begins at `start`, and where it ends."""
    if text[start] != "(":
        found = _ARRAY.match(text, start)
        if found is None:
            raise ValueError(f"No shape in HLO text at {text[start : start + 60]!r}.")
        return _array(found[1], found[2], found[3] or ""), found.end()
    parts, at = [], start + 1
    while text[at] != ")":
        comment = re.compile(r"(?:/\*.*?\*/|[\s,])+").match(text, at)
        if comment:
            at = comment.end()
            continue
        part, at = parse_shape(text, at)
        parts.append(part)
    return tuple(parts), at + 1


@functools.cache
def _array(dtype: str, dims: str, layout: str) -> Shape:
    sizes = tuple(int(size.strip().lstrip("<=")) for size in dims.split(",") if size.strip())  # <= marks a bound
    order, _, rest = layout.partition(":")
    tiles = re.match(r"T((?:\([\d,*]+\))+)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Shape(
        dtype,
        sizes,
        tuple(int(number) for number in order.split(",") if number),
        tuple(
            tuple(int(size) for size in tile.split(","))
            for tile in re.findall(r"\(([\d,]+)\)", tiles[1] if tiles else "")
        ),
        int(space[1]) if space else HBM,
    )


def _instruction(text: str) -> Instruction:
    head = _LINE.match(text)
    assert head is not None
    shape, at = parse_shape(text, head.end())
    opened = text.index("(", at)
    closed = _closing(text, opened)
    literal = text[opened + 1 : closed]
    opcode = text[at:opened].strip()
    names = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([^\s,)]+)", literal))
    return Instruction(head[2], shape, opcode, names, literal, text[closed + 1 :], bool(head[1]))


def _closing(text: str, opened: int) -> int:
    """Where the bracket at `opened` closes."""
    depth = 0
    for found in re.compile(r"[(){}\[\]]|\"(?:[^\"\\]|\\.)*\"").finditer(text, opened):
        mark = found[0]
        depth += (mark in "([{") - (mark in ")]}")
        if depth == 0:
            return found.start()
    raise ValueError(f"Unclosed bracket in HLO text at {text[opened : opened + 60]!r}.")


def _value(text: str, at: int) -> str:
    if text[at] == "{":
        return text[at : _closing(text, at) + 1]
    if text[at] == '"':
        found = re.compile(r'"((?:[^"\\]|\\.)*)"').match(text, at)
        return found[1] if found else ""
    found = re.compile(r"[^,\s]*").match(text, at)
    return found[0] if found else ""


def groups(instruction: Instruction, devices: int) -> np.ndarray:
    """Device numbers [groups, members] that exchange data, from source_target_pairs or any spelling of replica_groups.

    `{{0,1},{2,3}}`; `[2,4]<=[4,2]T(1,0)`, an iota reshaped and transposed; and `mesh['a'=4,'b'=2] {'a'}`, the axes of a
    mesh over `device_ids`. Pairs come as groups of two. Empty means all devices.
    """
    pairs = instruction.attribute("source_target_pairs")
    if pairs:
        return np.array(re.findall(r"\d+", pairs), dtype=int).reshape(-1, 2)
    found = re.search(r"replica_groups=", instruction.attributes)
    text = instruction.attributes[found.end() :] if found else ""
    if text.startswith("{"):
        inner = re.findall(r"\{([\d,\s]*)\}", text[1 : _closing(text, 0)])
        members = [[int(number) for number in group.split(",")] for group in inner if group.strip()]
        return np.array(members or [list(range(devices))])
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    mesh = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}", text)
    if mesh:
        return _mesh_groups(mesh[1], mesh[2], mesh[3], mesh[4])
    if not text:
        return np.arange(devices)[None]
    raise ValueError(f"Unknown spelling of replica_groups in HLO text: {text[:80]!r}.")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    shape = _numbers(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(permutation)) if permutation else ids


def _mesh_groups(sizes: str, dims: str | None, permutation: str | None, axes: str) -> np.ndarray:
    names = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    count = math.prod(names.values())
    ids = (_iota(dims, permutation) if dims else np.arange(count)).reshape(tuple(names.values()))
    # 'a':(2)4 takes of axis a the part of size 4 that follows a part of size 2; split such axes first.
    parts: list[int] = []
    chosen: list[int] = []
    picked = {
        name: (int(pre or 1), int(size or 0)) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, size in names.items():
        before, width = picked.get(name, (1, 1))
        width = width or size
        if name in picked:
            chosen.append(len(parts) + 1)
        parts += [before, width, size // before // width]
    ids = ids.reshape(parts)
    others = [index for index in range(len(parts)) if index not in chosen]
    return ids.transpose(others + chosen).reshape(-1, math.prod(parts[index] for index in chosen))


def axes_of(groups: np.ndarray, sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ; `sizes` in mesh order. Device numbers count through the mesh.

    jax.jit numbers devices by their place in `mesh.devices.flat`, whatever their hardware ids are.
    """
    coordinates = np.unravel_index(groups, tuple(sizes.values()))
    return tuple(name for name, at in zip(sizes, coordinates, strict=True) if (at != at[:, :1]).any())
