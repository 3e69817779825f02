"""Train, quantise and sample Gemma 4 in JAX. The names here are the public ones; everything else may move.

Names load on first use, so that `import gemma4_jax` costs milliseconds and a tokenizer does not wait for Orbax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same table again, for editors and type checkers
    from gemma4_jax.checkpoint.drafter import load_drafter
    from gemma4_jax.checkpoint.exports import export
    from gemma4_jax.checkpoint.hf import save_hf
    from gemma4_jax.checkpoint.load import load
    from gemma4_jax.config import ModelConfig
    from gemma4_jax.errors import UserError
    from gemma4_jax.infer.agent import run_agent
    from gemma4_jax.infer.generate import Completion, Sampler
    from gemma4_jax.infer.tools import tool_of
    from gemma4_jax.media.boxes import draw_places, parse_places
    from gemma4_jax.media.frontend import MediaConfig
    from gemma4_jax.model.transformer import init
    from gemma4_jax.processor import Processor

_HOME = {
    "ModelConfig": "config",
    "init": "model.transformer",
    "load": "checkpoint.load",
    "load_drafter": "checkpoint.drafter",
    "save_hf": "checkpoint.hf",
    "export": "checkpoint.exports",
    "Processor": "processor",
    "Sampler": "infer.generate",
    "Completion": "infer.generate",
    "run_agent": "infer.agent",
    "tool_of": "infer.tools",
    "MediaConfig": "media.frontend",
    "parse_places": "media.boxes",
    "draw_places": "media.boxes",
    "UserError": "errors",
}
__all__ = [
    "Completion",
    "MediaConfig",
    "ModelConfig",
    "Processor",
    "Sampler",
    "UserError",
    "draw_places",
    "export",
    "init",
    "load",
    "load_drafter",
    "parse_places",
    "run_agent",
    "save_hf",
    "tool_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"gemma4_jax has no {name!r}; its names are {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"gemma4_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
