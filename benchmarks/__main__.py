"""`python -m benchmarks`: the comparison of benchmarks/train.py from the command line."""

import argparse
import sys

from benchmarks.train import MODELS, PEERS, ROWS, compare
from benchmarks.worker import add_peers, given_peers
from gemma4_jax.errors import UserError


def main() -> None:
    """Exits with 1 and the reason on stderr if the comparison is not valid."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="SFT steps beside those of peers.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, not how fast")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--steps", type=int, choices=range(1, 100), metavar="N", default=5, help="timed, by each side")
    parser.add_argument("--rows", type=int, choices=range(1, 100), metavar="N", default=ROWS, help="of the batch")
    add_peers(parser, PEERS)
    parser.add_argument("--save", action="store_true", help="keep the records in benchmarks/results")
    options = parser.parse_args()
    peers = given_peers(parser, options.peer, PEERS)
    try:
        size = {"quick": options.quick, "steps": options.steps, "rows": options.rows}
        compare(options.models, **size, peers=peers, save=options.save)
    except UserError as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main()
