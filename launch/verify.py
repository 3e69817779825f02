"""`python -m launch.verify PATH ...`: compares checkpoints with the digests taken when they were written.

PATH is a model directory, a step, or a training run, of which every committed step is read. Exit code 0 if all is as it was
written, 1 if something is damaged or there is nothing to compare, 2 for a path that is no checkpoint.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # reading files needs no accelerator, and should not take one


def main(arguments: Sequence[str]) -> int:
    """One line for each step; the damage, if any, on stderr."""
    from gemma4_jax.checkpoint.digest import FILES, step_bytes
    from gemma4_jax.checkpoint.steps import step_directories
    from gemma4_jax.checkpoint.verified import array_digests, damage
    from gemma4_jax.errors import UserError
    from gemma4_jax.tables import table

    parser = argparse.ArgumentParser(prog="python -m launch.verify", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a model directory, a step, or a training run")
    rows, worst = [], 0
    for path in parser.parse_args(arguments).paths:
        try:
            steps = step_directories(path)
        except UserError as error:
            print(f"verify: {error}", file=sys.stderr)
            worst = 2
            continue
        for step in steps:
            began = time.perf_counter()
            found = damage(step)
            seconds, size = time.perf_counter() - began, step_bytes(step) / 1e9
            try:
                count = len(array_digests(step))
            except UserError:
                count = 0
            sealed = count and (step / FILES).exists()
            result = "DAMAGED" if found else "as written" if sealed else "nothing to compare with"
            rows.append((str(step), count, f"{size:.3f}", f"{seconds:.1f}", f"{size / seconds:.2f}", result))
            if found:
                print(f"verify: {found}", file=sys.stderr)
            worst = max(worst, 0 if sealed and not found else 1)
    if rows:
        print(table(("step", "arrays", "GB", "seconds", "GB/s", "result"), rows))
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
