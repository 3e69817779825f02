"""The peer's side, in an environment with torch: `PYTHON -m benchmarks.peer_transformers CHECKPOINT`."""
# pyright: reportMissingImports=false

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.worker import serve


def main(checkpoint: Path) -> None:
    """Threads, attention and experts as torch and transformers choose them; a checkpoint loaded in part is an error."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, loading = load(checkpoint, dtype=torch.float32, output_loading_info=True)
    if any(loading.values()):
        sys.exit(f"transformers loads the checkpoint only in part: {loading}")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    tokens = torch.from_numpy(np.load(checkpoint / "tokens.npy")).long()

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    threads = f"{torch.get_num_threads()} threads"
    version = f"transformers {transformers.__version__}, torch {torch.__version__}, {threads}"
    serve({"version": version, "parameters": sum(parameter.numel() for parameter in model.parameters())}, step)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
