"""`python -m launch.data PATH ...`: what training would see of a file, before it is trained on.

Shows examples as they are rendered and tokenised, what is trained in colour (between ⟦ and ⟧ without colours), and the statistics
of all rows: tokens, how full the sequences are, how long rows are, and why rows cannot be used. PATH is what `config.data.paths`
may be. Exit code 0, or 1 with one sentence.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # reading files needs no accelerator, and should not take one

TRAINED, OTHER, END = ("\033[32;1m", "\033[32m"), ("\033[2m", "\033[0m"), "\033[0m"
"""Of a token and the next: two shades, so that one sees where tokens end."""
OPEN, CLOSE = "⟦", "⟧"
LONG_RUN = 4
"""Tokens of one kind in a row from which on they are counted instead of shown, as those of a picture."""
BAR = 40


def main(arguments: Sequence[str]) -> int:
    """Prints it all."""
    from gemma4_jax.errors import UserError

    options = _parser().parse_args(arguments)
    try:
        print(shown(options), flush=True)
    except UserError as error:
        print(f"data: {error}", file=sys.stderr)
        return 1
    return 0


def shown(options: argparse.Namespace) -> str:
    """Examples and statistics of the files."""
    from gemma4_jax import assets
    from gemma4_jax.data.pipeline import DataConfig, make_loader
    from gemma4_jax.processor import Processor

    fields: dict[str, Any] = {
        key: value for key, value in vars(options).items() if key in DataConfig.__dataclass_fields__
    }
    config = DataConfig(**fields, epochs=1, prefetch=0, max_bad=1.0)
    processor = Processor.load(options.tokenizer or assets.TOKENIZER)
    loader = make_loader(config, processor)
    try:
        usable = (index for index in range(options.first - 1, len(loader.rows)) if loader.rows.length(index))
        examples = [index for index, _ in zip(usable, range(options.examples), strict=False)]
        colour = options.colour == "always" or (
            options.colour == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        )
        parts = [example(loader.rows, index, processor, colour=colour, tokens=options.tokens) for index in examples]
        return "\n\n".join([*parts, f"{loader.summary.table()}\n{lengths(loader.rows, config.seq_len)}"])
    finally:
        loader.close()


def example(rows: Any, index: int, processor: Any, *, colour: bool, tokens: bool) -> str:
    """A row as it is trained on: its text with what is trained marked, or a line for each token."""
    encoded = rows.tokens(index)
    trained = np.concatenate([[False], encoded.trained])
    head = f"row {index + 1}: {len(encoded.tokens):,} tokens, {int(trained.sum()):,} trained"
    if tokens:
        lines = [
            f"{position:6}  {token:7}  {'trained' if is_trained else '       '}  {processor.decode([token])!r}"
            for position, (token, is_trained) in enumerate(zip(encoded.tokens.tolist(), trained.tolist(), strict=True))
        ]
        return "\n".join([head, *lines])
    text, last = [], False
    for number, (ids, is_trained) in enumerate(_pieces(encoded.tokens.tolist(), trained.tolist())):
        piece = (
            processor.decode(ids[:1]) + f"×{len(ids)}"
            if len(ids) > LONG_RUN and len(set(ids)) == 1
            else processor.decode(ids)
        )
        if colour:
            text.append(f"{(TRAINED if is_trained else OTHER)[number % 2]}{piece}{END}")
        else:
            text.append(f"{CLOSE if last and not is_trained else OPEN if is_trained and not last else ''}{piece}")
        last = is_trained
    return "\n".join([head, "".join(text) + (CLOSE if last and not colour else "")])


def lengths(rows: Any, seq_len: int) -> str:
    """How long the usable rows are, in slots: quantiles, and a bar for each power of two."""
    found = np.asarray([length for length in (rows.length(index) for index in range(len(rows))) if length])
    if not found.size:
        return ""
    quantiles = ", ".join(
        f"{name} {int(np.quantile(found, q)):,}" for name, q in (("median", 0.5), ("90 %", 0.9), ("99 %", 0.99))
    )
    lines = [f"  {'lengths':<10} {found.min():,} to {found.max():,}, {quantiles}; sequences have {seq_len:,}"]
    powers = np.ceil(np.log2(np.maximum(found, 1))).astype(int)
    counts = np.bincount(powers)
    for power in range(int(powers.min()), len(counts)):
        bar = "█" * int(np.ceil(BAR * counts[power] / counts.max()))
        lines.append(f"  {'':<10} {'≤ ' + format(2**power, ','):>9} {bar} {counts[power]:,}")
    return "\n".join(lines)


def _pieces(ids: Sequence[int], trained: Sequence[bool]) -> list[tuple[list[int], bool]]:
    """Tokens that are shown together: those that make a character only together, and long runs of one token."""
    pieces: list[tuple[list[int], bool]] = []
    for token, is_trained in zip(ids, trained, strict=True):
        if pieces and pieces[-1][1] == is_trained and pieces[-1][0][-1] == token:
            pieces[-1][0].append(token)
        else:
            pieces.append(([token], is_trained))
    return pieces


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.data", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="files, glob patterns, directories that datasets saved"
    )
    parser.add_argument("--kind", default="chat", help="chat, qa or text")
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens in a sequence")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--tokenizer", help="tokenizer file or directory; none: the embedded one")
    parser.add_argument("--weights", type=float, nargs="+", help="a mixture: one for each PATH")
    parser.add_argument("--train_on", default="assistant", help="assistant: every answer; last: those of the last turn")
    parser.add_argument("--enable_thinking", action="store_true", help="write the chats with thinking on")
    for field, default in (("prompt_field", "question"), ("response_field", "answer"), ("text_field", "text")):
        parser.add_argument(f"--{field}", default=default, help="key in the rows")
    parser.add_argument("--first", type=int, default=1, help="row to begin with")
    parser.add_argument("--examples", type=int, default=3, help="how many rows to show")
    parser.add_argument("--tokens", action="store_true", help="a line for each token, with its id")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
