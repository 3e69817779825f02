"""The blocks of sliding-window attention whose memory and FLOPs grow with T x window, not with T x T.

A block of C queries that starts in slot s can only see the slots [s - (window - 1), s + C): one slice of the keys.
Blocks far from the start all have slices of one length and run as one loop; those before them look at keys from slot 0.
Where queries see up to `ahead` slots after their own (the rest of their image), slices are so much longer, and the last
blocks look at one slice that ends with the keys.
"""

from gemma4_jax.kernels.blockwise import Span, causal_spans


def block_rows(window: int) -> int:
    """Queries per block: a quarter of the window, so that a slice holds 1.25 windows, within 64 to 256.

    Below 64 rows the matrix products are too small to be fast; above 256 the scores of a block outgrow the caches.
    """
    return min(256, max(64, window // 4))


def banded_spans(length: int, window: int, rows: int, ahead: int = 0) -> tuple[Span, ...]:
    """The blocks whose slice would begin before slot 0, whole ones, those whose slice would pass the last key, the rest."""
    whole, rest = divmod(length, rows)
    back = window - 1
    ramp = min(whole, -(-back // rows))
    spans = [span._replace(k_len=min(length, span.k_len + ahead)) for span in causal_spans(ramp * rows, rows)]
    inside = min(whole, max(ramp, (length - ahead) // rows))
    if inside > ramp:
        spans.append(Span(ramp * rows, rows, inside - ramp, ramp * rows - back, rows, back + rows + ahead))
    if whole > inside:
        first_key = inside * rows - back
        spans.append(Span(inside * rows, rows, whole - inside, first_key, 0, length - first_key))
    if rest:
        first_key = max(0, whole * rows - back)
        spans.append(Span(whole * rows, rest, 1, first_key, 0, length - first_key))
    return tuple(spans)
