"""`import gemma4_jax` is quick, and brings in nothing a user of one part does not need."""

import subprocess
import sys
import time

from conftest import PROJECT

HEAVY = ("torch", "transformers", "tensorflow", "orbax", "grain", "sentencepiece", "tokenizers", "ml_collections")


def test_import_is_fast_and_light():
    """Under 3 s of the process's own CPU time (a busy machine does not fail it), and none of the heavy libraries."""
    code = (
        "import sys, time, gemma4_jax; cpu = time.process_time();"
        f"print(cpu, *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    cpu, *heavy = result.stdout.split()
    assert not heavy, f"import gemma4_jax imports {', '.join(heavy)}; import them where they are used"
    assert float(cpu) < 3.0, f"{float(cpu):.1f} s of CPU, {time.monotonic() - start:.1f} s on the clock"
