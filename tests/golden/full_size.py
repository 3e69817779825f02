"""Describes the four real variants without their weights: text tensor names and shapes, both config spellings.

Built on torch's meta device, so nothing of the 4.6 to 30.7 billion parameters is allocated.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from structures import FULL, full_config, to_old_spelling
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def shapes(name: str) -> dict[str, Any]:
    """Returns {"text_parameters": count, "tensors": [...]} of a real variant, equal layers folded into one entry.

    An entry is {"name", "shape", "buffer"} plus "layers", the list of indices that replace "*" in the name.
    Names are those of `Gemma4ForConditionalGeneration`; the tied `lm_head.weight` and the towers are left out.
    """
    config = full_config(name)
    config.vision_config = config.audio_config = None
    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(config)
    model.tie_weights()
    parameters = dict(model.named_parameters())  # a tied tensor appears once
    folded: dict[tuple[str, tuple[int, ...], bool], list[int]] = {}
    for full_name, tensor in model.state_dict().items():
        if full_name != "lm_head.weight":
            match = _LAYER.search(full_name)
            key = (_LAYER.sub(".layers.*.", full_name), tuple(tensor.shape), full_name not in parameters)
            folded.setdefault(key, []).extend([int(match[1])] if match else [])
    tensors = [
        {"name": key[0], "shape": list(key[1]), "buffer": key[2], **({"layers": layers} if layers else {})}
        for key, layers in folded.items()
    ]
    return {"text_parameters": sum(p.numel() for p in parameters.values()), "tensors": tensors}


def shapes_json() -> str:
    """Returns the text of full_size_shapes.json: one tensor entry per line."""
    blocks = []
    for name in FULL:
        described = shapes(name)
        lines = ",\n".join("      " + json.dumps(entry) for entry in described["tensors"])
        count = described["text_parameters"]
        blocks.append(f'  "{name}": {{\n    "text_parameters": {count},\n    "tensors": [\n{lines}\n    ]\n  }}')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def config_files() -> dict[str, str]:
    """Returns {file name: text} of both spellings of every real config.json; both load to the same configuration."""
    files = {}
    for name in FULL:
        new = json.loads(full_config(name).to_json_string())
        old = to_old_spelling(new)
        if json.loads(Gemma4Config.from_dict(old).to_json_string()) != new:
            raise ValueError(f"{name}: transformers reads the old spelling of the configuration differently.")
        files[f"{name}.new.json"] = json.dumps(new, indent=2) + "\n"
        files[f"{name}.old.json"] = json.dumps(old, indent=2) + "\n"
    return files
