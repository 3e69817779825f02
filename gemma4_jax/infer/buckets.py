"""Few lengths instead of all: what is padded to them compiles once for each."""

SMALLEST = 16


def bucket(length: int, most: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ... that holds `length`, at most `most`."""
    size = SMALLEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, most)


def chunk_sizes(chunk: int) -> list[int]:
    """The lengths chunks are padded to: powers of two from 16 up to `chunk`."""
    sizes = [SMALLEST]
    while sizes[-1] < chunk:
        sizes.append(2 * sizes[-1])
    return sizes
