"""Records of runs on file, beside those of other commands: benchmarks/results/NAME.json."""

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def save(name: str, records: list[dict[str, Any]], load_average: float) -> None:
    """Adds records, each with its "command", and takes away what the same commands left before."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text())["records"] if path.exists() else []
    commands = {record["command"] for record in records}
    kept = [record for record in kept if record["command"] not in commands]
    records = [{"load_average": load_average, **record} for record in records]
    path.write_text(json.dumps({"cores": os.cpu_count(), "records": kept + records}, indent=1) + "\n")
