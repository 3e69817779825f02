"""`python -m benchmarks`: the comparison of benchmarks/train.py from the command line."""

import argparse
import sys
from pathlib import Path

from benchmarks.train import MODELS, compare
from gemma4_jax.errors import UserError


def main() -> None:
    """Exits with 1 and the reason on stderr if the comparison is not valid."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="SFT steps beside transformers on torch.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, not how fast")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--steps", type=int, choices=range(1, 100), metavar="N", default=5, help="timed, by each side")
    parser.add_argument("--peer-python", type=Path, metavar="PATH", help="of an environment with transformers")
    parser.add_argument("--save", action="store_true", help="write a JSON file into benchmarks/results")
    options = parser.parse_args()
    parity = sorted(Path(__file__).parents[1].glob(".venv-parity-*/bin/python"))
    peer: Path | None = options.peer_python or (parity[-1] if parity else None)
    if peer is None:
        print("Without transformers: there is no .venv-parity-*. `make parity` makes it; --peer-python names another.")
    elif not peer.is_file():
        parser.error(f"--peer-python {peer} does not exist; name the bin/python of an environment with transformers")
    try:
        compare(options.models, quick=options.quick, steps=options.steps, peer=peer, save=options.save)
    except UserError as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main()
