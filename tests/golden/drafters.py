"""Drafters of two tiny models, and what transformers drafts with them: a dense head and an ordered one.

The keys and values a drafter reads are those its target (a fixture of `structures.TINY`) leaves of a prompt, so only the prompt is
stored. The steps are those of `SinglePositionMultiTokenCandidateGenerator` right behind a prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from checkpoints import load_model, random_values, text_model
from structures import FIRST_SPECIAL_ID, TINY
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig

STEPS = 3
PROMPTS = (9, 41)  # within a window of 16, and beyond two
FURTHER = ("num_key_value_heads", "num_global_key_value_heads", "attention_k_eq_v", "head_dim", "global_head_dim")
LOGITS_MAX = 1e-3
"""As the models' own fixtures: float32 sums in another order through the target's layers come first."""


@dataclasses.dataclass(frozen=True)
class TinyDrafter:
    """One fixture: the target it drafts for, its own sizes, its seed."""

    target: str
    seed: int
    heads: int
    centroids: int = 0
    top: int = 0

    def config(self) -> Gemma4AssistantConfig:
        """Returns a new transformers configuration of the drafter."""
        target = TINY[self.target].text
        text = {
            key: target[key]
            for key in (*FURTHER, "vocab_size", "sliding_window", "max_position_embeddings")
            if key in target
        }
        text |= {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "num_attention_heads": self.heads,
            "num_kv_shared_layers": 4,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
        ordered = {"num_centroids": self.centroids, "centroid_intermediate_top_k": self.top} if self.centroids else {}
        return Gemma4AssistantConfig(
            text_config=Gemma4TextConfig(**text),
            backbone_hidden_size=target["hidden_size"],
            use_ordered_embeddings=bool(self.centroids),
            **ordered,
        )


DRAFTERS = {
    "drafter_31b": TinyDrafter("tiny_31b", 51, heads=8),
    "drafter_e2b": TinyDrafter("tiny_e2b", 52, heads=2, centroids=20, top=5),
}


@contextlib.contextmanager
def every_layer_may_share() -> Iterator[None]:
    """transformers 5.23.0 refuses to build its own drafters, and returns no keys and values of a target that shares none.

    `Gemma4TextConfig.kv_sharing_modes` wants a layer of each kind that owns keys and values, where a drafter has none; and marks
    no layer whose keys and values are handed out where no layer shares. What it says of every other model is unchanged.
    """

    def modes(config: Gemma4TextConfig) -> list[str | None]:
        kinds, owners = config.layer_types, config.num_hidden_layers - config.num_kv_shared_layers
        found: list[str | None] = ["reuse" if layer >= owners else None for layer in range(config.num_hidden_layers)]
        for kind in set(kinds[:owners]):
            found[max(layer for layer in range(owners) if kinds[layer] == kind)] = "store"
        return found

    with mock.patch.object(Gemma4TextConfig, "kv_sharing_modes", property(modes)):
        yield


@every_layer_may_share()
def write_drafter(drafter: TinyDrafter, directory: Path) -> None:
    """Writes config.json and bfloat16 safetensors; every value is random, the ordering a random permutation."""
    model = Gemma4AssistantForCausalLM(drafter.config()).to(torch.bfloat16)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("token_ordering"):
                order = np.random.default_rng(drafter.seed).permutation(tensor.shape[0])
                tensor.copy_(torch.from_numpy(order))
            elif name != "lm_head.weight":  # the same memory as embed_tokens
                tensor.copy_(random_values(name, tuple(tensor.shape), drafter.seed))
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)


@every_layer_may_share()
@torch.no_grad()
def compute_drafts(drafter: TinyDrafter, directory: Path, targets: Path) -> dict[str, np.ndarray]:
    """Returns of each prompt: `tokens` [T], and of each step `drafts` [STEPS], `logits` [STEPS, V], `hidden` [STEPS, D].

    `logits` are NaN where no cluster of the token was scored. The newest token is the last of `tokens`: the target has read those
    before it.
    """
    target = load_model(TINY[drafter.target], targets / drafter.target)
    model = Gemma4AssistantForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    text, arrays = text_model(target), {}
    rng = np.random.default_rng(drafter.seed)
    for number, length in enumerate(PROMPTS):
        tokens = torch.from_numpy(rng.integers(4, FIRST_SPECIAL_ID, (1, length)))
        out = text(input_ids=tokens[:, :-1], use_cache=False, return_shared_kv_states=True)
        stored: Any = {kind: out.shared_kv_states[kind] for kind in ("full_attention", "sliding_attention")}
        hidden, newest = out.last_hidden_state[:, -1:], tokens[:, -1:]
        found: dict[str, list[np.ndarray]] = {"drafts": [], "logits": [], "hidden": []}
        for _ in range(STEPS):
            step = model(
                inputs_embeds=torch.cat([text.embed_tokens(newest), hidden], dim=-1),
                attention_mask=torch.ones_like(tokens),
                position_ids=torch.tensor([[length - 1]]),
                shared_kv_states=stored,
            )
            newest, hidden = step.logits.argmax(dim=-1), step.last_hidden_state
            logits = step.logits[0, 0].numpy().copy()
            if drafter.centroids:
                logits[logits == logits.min()] = np.nan
            for key, value in (("drafts", newest[0, 0].numpy()), ("logits", logits), ("hidden", hidden[0, 0].numpy())):
                found[key].append(value)
        arrays[f"{number}/tokens"] = tokens[0].numpy().astype(np.int32)
        arrays |= {f"{number}/{key}": np.stack(values) for key, values in found.items()}
    return arrays
