"""What came of every row so far: its length, or why it was skipped. Tokens of recent rows are kept, so most are made once."""

from collections import Counter, OrderedDict
from collections.abc import Callable

import numpy as np

from gemma4_jax.data.chat import BadRow, Encoded
from gemma4_jax.data.records import Rows
from gemma4_jax.data.source import Row
from gemma4_jax.errors import UserError
from gemma4_jax.media.batch import MediaShape

UNKNOWN = -1
BAD = 0  # a usable row has at least one target
ENOUGH = 1000  # rows, from which on a share of bad ones means something


class RowTable:
    """Lengths and tokens of rows by index, worked out on demand.

    A row's outcome depends on nothing but its bytes and the settings, so every process and every resumed run sees the same.
    Not for use by several threads at once.

    Args:
        source: rows by index.
        encode: makes tokens of a row or raises BadRow.
        raise_bad: raise the first BadRow instead of counting it.
        cache_bytes: how much of tokenised rows to keep; the last one is kept whatever its size.
        max_bad: share of the rows looked at above which a bad one ends it all, once ENOUGH have been looked at.
        on_bad: called with every bad row.
    """

    def __init__(
        self,
        source: Rows,
        encode: Callable[[Row], Encoded],
        *,
        raise_bad: bool,
        cache_bytes: int,
        max_bad: float = 1.0,
        on_bad: Callable[[BadRow], None] = lambda _: None,
    ) -> None:
        self._source = source
        self._encode = encode
        self._raise_bad = raise_bad
        self._cache_bytes = cache_bytes
        self._max_bad, self._on_bad = max_bad, on_bad
        self._looked_at = 0
        self._cached_bytes = 0
        self._cache: OrderedDict[int, Encoded] = OrderedDict()
        self._lengths = np.full(len(source), UNKNOWN, np.int64)
        self._trained = np.zeros(len(source), np.int64)
        self._media: dict[int, MediaShape] = {}  # of rows that have some
        self.skipped: Counter[str] = Counter()
        self.first_bad: dict[str, str] = {}  # reason -> the message of the first row that had it
        self.notes: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def known(self) -> bool:
        """Every row has been looked at."""
        return bool((self._lengths != UNKNOWN).all())

    def length(self, index: int) -> int:
        """Slots the row takes, 0 for a skipped one. Raises BadRow if the table was told to."""
        if self._lengths[index] == UNKNOWN:
            self._look_at(index)
        return int(self._lengths[index])

    def trained(self, index: int) -> int:
        """Trained targets of a row whose length has been asked for."""
        return int(self._trained[index])

    def media(self, index: int) -> MediaShape:
        """Pictures and sounds of a row whose length has been asked for."""
        return self._media.get(index, MediaShape())

    def tokens(self, index: int) -> Encoded:
        """The tokens of a usable row."""
        encoded = self._cache.get(index)
        if encoded is None:
            encoded = self._encode(self._source[index])
            self._keep(index, encoded)
        else:
            self._cache.move_to_end(index)
        return encoded

    def refuse_too_many_bad(self) -> None:
        """UserError if more than `max_bad` of the rows looked at so far are bad."""
        bad = self.skipped.total()
        if bad > self._max_bad * self._looked_at:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.most_common())
            raise UserError(
                f"{bad:,} of {self._looked_at:,} rows cannot be used ({reasons}), and data.max_bad={self._max_bad:g} is the share "
                f"allowed. The first: {next(iter(self.first_bad.values()))}"
            )

    def _look_at(self, index: int) -> None:
        self._looked_at += 1
        try:
            encoded = self.tokens(index)
        except BadRow as error:
            if self._raise_bad:
                raise
            self._lengths[index] = BAD
            self.skipped[error.reason] += 1
            self.first_bad.setdefault(error.reason, str(error))
            self._on_bad(error)
            if self._looked_at >= ENOUGH:
                self.refuse_too_many_bad()
            return
        self._lengths[index] = len(encoded)
        self._trained[index] = np.count_nonzero(encoded.trained)
        if encoded.media:
            self._media[index] = MediaShape.of(encoded.media)
        if encoded.note:
            self.notes[encoded.note] += 1

    def _keep(self, index: int, encoded: Encoded) -> None:
        self._cache[index] = encoded
        self._cached_bytes += encoded.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._cached_bytes -= old.nbytes
