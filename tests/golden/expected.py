"""Computes the numbers a correct implementation must reproduce: transformers in float32 with eager attention.

Array names, shapes and units are listed in README.md. Positions that are padding hold 0 in `logits`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from checkpoints import load_model, text_model
from structures import FIRST_SPECIAL_ID, Tiny
from transformers.models.gemma4 import modeling_gemma4

LENGTH = 60  # more than three windows of 16
LEFT_PADS, RIGHT_PADS = 13, 9
PACKED_LENGTHS = (25, 35)
PROMPT_LENGTHS = (21, 34)
NEW_TOKENS = 40
HIDDEN_POSITIONS = np.arange(3, LENGTH, 8)
PLE_POSITIONS = np.array([0, 17, 59])
MOE_LAYER = 6
GRADIENT_ROWS = 4
TOLERANCES = {
    "logits_max": [1e-3, "the reference's own eager and sdpa attention differ by up to 4e-4 on such random networks"],
    "logits_mean": [5e-5, "rounding of float32 sums in another order; a wrong formula moves the mean by 1e-2 or more"],
    "loss_relative": [1e-5, "a mean over some 130 positions averages the rounding of the logits"],
    "gradient_norm_relative": [1e-3, "backward sums in another order through 12 to 18 layers; see noise_floor"],
    "gradient_relative": [1e-3, "error norm over gradient norm of one tensor, same reason"],
    "hidden_max": [1e-3, "running the reference's attention in float64 moves them by at most 1.2e-4"],
    "intermediate_max": [1e-4, "PLE inputs, keys, values, router and expert values: running the reference's attention "
                               "in float64 moves them by at most 2e-5"],
}  # fmt: skip
Arrays = dict[str, np.ndarray]


def inputs(seed: int) -> Arrays:
    """Returns 3 rows of tokens (full, left-padded, right-padded), labels, one packed row and 2 left-padded prompts.

    Id 0 appears only as padding, special ids never. `labels` is -100 at padding, at the first real token of every row
    (its logits would come from a padded slot) and at every fifth slot or so, at random.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, FIRST_SPECIAL_ID, (3, LENGTH))
    mask = np.ones((3, LENGTH), np.int64)
    mask[1, :LEFT_PADS] = 0
    mask[2, LENGTH - RIGHT_PADS :] = 0
    first_real = np.arange(LENGTH) == np.array([0, LEFT_PADS, 0])[:, None]
    untrained = (mask == 0) | first_real | (rng.uniform(size=mask.shape) < 0.2)
    prompts = rng.integers(4, FIRST_SPECIAL_ID, (2, max(PROMPT_LENGTHS)))
    pads = max(PROMPT_LENGTHS) - np.array(PROMPT_LENGTHS)[:, None]
    prompt_mask = (np.arange(max(PROMPT_LENGTHS)) >= pads).astype(np.int64)
    return {
        "tokens": tokens * mask,
        "attention_mask": mask,
        "position_ids": np.where(mask == 1, mask.cumsum(-1) - 1, 0),
        "labels": np.where(untrained, -100, tokens),
        "packed_tokens": rng.integers(4, FIRST_SPECIAL_ID, (1, sum(PACKED_LENGTHS))),
        "packed_position_ids": np.concatenate([np.arange(n) for n in PACKED_LENGTHS])[None],
        "prompt_tokens": prompts * prompt_mask,
        "prompt_attention_mask": prompt_mask,
    }


@contextlib.contextmanager
def recorded_intermediates(model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Yields a dict that one forward pass fills: layer outputs, final norm, keys, values, PLE input, one MoE layer."""
    text, seen = text_model(model), {}
    plain_attention, plain_ple = modeling_gemma4.eager_attention_forward, text.project_per_layer_inputs

    def attention(module, query, key, value, *args, **kwargs):
        if isinstance(module, modeling_gemma4.Gemma4TextAttention) and not module.is_kv_shared_layer:
            seen[f"kv_{module.layer_type.split('_')[0]}"] = (module.layer_idx, key, value)  # the last one stays
        return plain_attention(module, query, key, value, *args, **kwargs)

    def ple(*args):
        seen["ple"] = plain_ple(*args)
        return seen["ple"]

    def keep(name):
        return lambda module, args, output: seen.__setitem__(name, (args, output))

    hooks = [layer.register_forward_hook(keep(("layer", i))) for i, layer in enumerate(text.layers)]
    hooks.append(text.norm.register_forward_hook(keep("norm")))
    if text.config.enable_moe_block:
        hooks.append(text.layers[MOE_LAYER].router.register_forward_hook(keep("router")))
        hooks.append(text.layers[MOE_LAYER].experts.register_forward_hook(keep("experts")))
        for i, layer in enumerate(text.layers):
            hooks.append(layer.router.register_forward_hook(keep(("router", i))))
    with (
        mock.patch.object(modeling_gemma4, "eager_attention_forward", attention),
        mock.patch.object(text, "project_per_layer_inputs", ple),
    ):
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


def intermediate_arrays(seen: dict[str, Any], num_layers: int) -> Arrays:
    """Returns what was recorded as arrays: row 0 only, few positions, [S, K, H] keys and values."""
    layers = torch.stack([seen["layer", i][1][0, HIDDEN_POSITIONS] for i in range(num_layers)])
    arrays = {
        "hidden_positions": HIDDEN_POSITIONS,
        "embeddings": seen["layer", 0][0][0][0, HIDDEN_POSITIONS],
        "hidden_states": layers,
        "final_norm": seen["norm"][1][0, HIDDEN_POSITIONS],
    }
    for kind in ("sliding", "full"):
        layer, key, value = seen[f"kv_{kind}"]
        arrays[f"kv_{kind}_layer"] = np.asarray(layer)
        arrays[f"kv_{kind}_k"] = key[0].transpose(0, 1)
        arrays[f"kv_{kind}_v"] = value[0].transpose(0, 1)
    if "ple" in seen:
        arrays["ple_positions"] = PLE_POSITIONS
        arrays["ple_inputs"] = seen["ple"][0, PLE_POSITIONS]
    if "router" in seen:  # these modules see [B*T, D]; row 0 is the first T
        (router_input, *_), (probabilities, weights, index) = seen["router"]
        (experts_input, *_), experts_output = seen["experts"]
        arrays |= {
            "moe_layer": np.asarray(MOE_LAYER),
            "moe_router_input": router_input[HIDDEN_POSITIONS],
            "moe_probabilities": probabilities[:LENGTH],
            "moe_weights": weights[:LENGTH],
            "moe_index": index[:LENGTH],
            "moe_experts_input": experts_input[HIDDEN_POSITIONS],
            "moe_experts_output": experts_output[HIDDEN_POSITIONS],
        }
    return {name: np.asarray(value.detach() if torch.is_tensor(value) else value) for name, value in arrays.items()}


def router_margin(seen: dict[str, Any], mask: np.ndarray) -> float:
    """Returns the smallest gap between the last chosen and the first refused expert's probability, all layers."""
    gaps = []
    for name, record in seen.items():
        if isinstance(name, tuple) and name[0] == "router":
            probabilities, weights, _ = record[1]
            ranked = probabilities.sort(dim=-1, descending=True).values
            chosen = weights.shape[-1]
            gaps.append((ranked[:, chosen - 1] - ranked[:, chosen])[torch.from_numpy(mask.reshape(-1)) == 1].min())
    return min(gaps).item()


def gradients(model: torch.nn.Module) -> tuple[Arrays, dict[str, float], dict[str, float]]:
    """Returns (full gradients of a few tensors, norms per parameter, the same norms with row 0 of the tables).

    torch gives the pad row of a lookup table no gradient through lookups, so row 0 is left out of the compared norms
    of the two tables. Tower parameters take no part in text and are absent.
    """
    config = text_model(model).config
    prefix = "model.language_model." if hasattr(model.model, "language_model") else "model."
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None and n != "lm_head.weight"}
    norms, with_row_0 = {}, {}
    for name, grad in grads.items():
        is_table = name.split(".")[-2] in ("embed_tokens", "embed_tokens_per_layer")
        norms[name] = float(np.linalg.norm(grad[1:] if is_table else grad))
        if is_table:
            with_row_0[name] = float(np.linalg.norm(grad))
    owners = config.num_hidden_layers - config.num_kv_shared_layers
    kinds = config.layer_types[:owners]
    last = {kind: owners - 1 - kinds[::-1].index(kind) for kind in set(kinds)}  # the producers, where K/V is shared
    wanted = [f"layers.{i}.self_attn.{leaf}.weight" for i in sorted(last.values()) for leaf in ("k_proj", "k_norm")]
    wanted += ["layers.0.self_attn.q_norm.weight", "layers.0.input_layernorm.weight", "norm.weight"]
    wanted += [f"layers.{config.num_hidden_layers - 1}.self_attn.q_norm.weight"]
    if config.enable_moe_block:
        wanted += [f"layers.{i}.router.{leaf}" for i in (0, MOE_LAYER) for leaf in ("scale", "per_expert_scale")]
    if config.hidden_size_per_layer_input:
        wanted += ["per_layer_projection_norm.weight"]
    arrays = {f"gradient/{prefix}{name}": grads[prefix + name] for name in wanted}
    return arrays, norms, with_row_0


def table_gradient_rows(model: torch.nn.Module, tokens: np.ndarray) -> Arrays:
    """Returns gradient rows of the lookup tables for a few ids that occur in `tokens`, the ids as `gradient_rows`."""
    text, ids = text_model(model), np.unique(tokens[tokens > 0])[:: max(1, len(np.unique(tokens)) // GRADIENT_ROWS)]
    arrays = {"gradient_rows": ids, "gradient_rows/embed_tokens": text.embed_tokens.weight.grad.numpy()[ids]}
    if text.config.hidden_size_per_layer_input:
        arrays["gradient_rows/embed_tokens_per_layer"] = text.embed_tokens_per_layer.weight.grad.numpy()[ids]
    return arrays


def forward_with_loss(model: torch.nn.Module, data: Arrays) -> Any:
    """Returns the outputs (logits, loss) of the padded batch without a cache, gradients enabled."""
    names = {"tokens": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids"}
    batch = {hf: torch.from_numpy(data[ours]) for ours, hf in names.items()}
    return model(**batch, labels=torch.from_numpy(data["labels"]), use_cache=False)


@torch.no_grad()
def packed_logits(model: torch.nn.Module, data: Arrays) -> np.ndarray:
    """Returns logits of two packed sequences: with no mask and no cache, restarted positions mean that."""
    tokens, positions = (torch.from_numpy(data[name]) for name in ("packed_tokens", "packed_position_ids"))
    return model(input_ids=tokens, position_ids=positions, use_cache=False).logits.numpy()


@torch.no_grad()
def greedy(model: torch.nn.Module, data: Arrays) -> Arrays:
    """Returns 40 greedy tokens per prompt through the cache, their logits and their lead over the second best."""
    result = model.generate(
        input_ids=torch.from_numpy(data["prompt_tokens"]),
        attention_mask=torch.from_numpy(data["prompt_attention_mask"]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.stack(result.logits, dim=1).topk(2, dim=-1).values.numpy()
    return {
        "greedy_tokens": result.sequences[:, -NEW_TOKENS:].numpy(),
        "greedy_logits": top[..., 0],
        "greedy_margins": top[..., 0] - top[..., 1],
    }


def noise_floor(model: torch.nn.Module, tiny: Tiny, directory: Path, data: Arrays, real: np.ndarray) -> dict[str, Any]:
    """Returns how far transformers is from itself (eager against sdpa) on logits, loss and gradient norms."""
    other = load_model(tiny, directory, attention="sdpa")
    outputs = [forward_with_loss(m, data) for m in (model, other)]
    outputs[1].loss.backward()
    difference = np.abs(outputs[0].logits.detach().numpy() - outputs[1].logits.detach().numpy())[real]
    norms = [gradients(m)[1] for m in (model, other)]
    return {
        "logits_max": float(difference.max()),
        "logits_mean": float(difference.mean()),
        "loss_relative": abs(outputs[0].loss.item() / outputs[1].loss.item() - 1.0),
        "gradient_norm_relative_max": max(abs(norms[1][n] / norms[0][n] - 1.0) for n in norms[0]),
    }


def check_health(name: str, arrays: Arrays, scalars: dict[str, Any]) -> None:
    """Raises ValueError when a seed gives a fixture that cannot tell right from wrong, or only by luck."""
    distinct = [len(set(row)) for row in arrays["greedy_tokens"].tolist()]
    problems = {
        f"logits have standard deviation {scalars['logits_std']:.2f}, want 3 to 5": not 3 < scalars["logits_std"] < 5,
        f"the greedy margin is {scalars['greedy_margin_min']:.1e}, want > 5e-3": scalars["greedy_margin_min"] <= 5e-3,
        f"greedy rows have {distinct} distinct tokens, want >= 16": min(distinct) < 16,
        "greedy tokens contain a special id": arrays["greedy_tokens"].max() >= FIRST_SPECIAL_ID,
        "greedy tokens contain the pad id": arrays["greedy_tokens"].min() == 0,
        f"noise floor {scalars['noise_floor']['logits_max']:.1e}, want <= 4e-4": (
            scalars["noise_floor"]["logits_max"] > 4e-4
        ),
        "a router decision is a near tie": scalars.get("router_margin_min", 1.0) <= 1e-5,
    }
    if found := [text for text, is_bad in problems.items() if is_bad]:
        raise ValueError(f"{name}: {'; '.join(found)}. Choose other seeds in structures.TINY.")


def compute(name: str, tiny: Tiny, directory: Path) -> tuple[Arrays, dict[str, Any]]:
    """Returns (arrays of expected.npz, contents of expected.json) for the checkpoint in `directory`."""
    data = inputs(tiny.token_seed)
    model = load_model(tiny, directory)
    config = text_model(model).config
    real = data["attention_mask"] == 1
    with recorded_intermediates(model) as seen:
        outputs = forward_with_loss(model, data)
    outputs.loss.backward()
    grad_arrays, norms, with_row_0 = gradients(model)
    logits = outputs.logits.detach().numpy()
    arrays = {
        **data,
        "logits": logits * real[..., None],
        **intermediate_arrays(seen, config.num_hidden_layers),
        **grad_arrays,
        **table_gradient_rows(model, data["tokens"]),
        "packed_logits": packed_logits(model, data),
        **greedy(model, data),
    }
    arrays = {key: value.astype(np.int32 if value.dtype.kind == "i" else np.float32) for key, value in arrays.items()}
    scalars: dict[str, Any] = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]},
        "weight_seed": tiny.weight_seed,
        "token_seed": tiny.token_seed,
        "tolerances": {key: {"value": value, "reason": reason} for key, (value, reason) in TOLERANCES.items()},
        "noise_floor": noise_floor(model, tiny, directory, data, real),
        "logits_std": float(logits[real].std()),
        "loss": outputs.loss.item(),
        "trained_positions": int((data["labels"][:, 1:] != -100).sum()),
        "greedy_margin_min": float(arrays["greedy_margins"].min()),
        "gradient_norms": norms,
        "gradient_norms_with_row_0": with_row_0,
    }
    if config.enable_moe_block:
        scalars["router_margin_min"] = router_margin(seen, data["attention_mask"])
    check_health(name, arrays, scalars)
    return arrays, scalars
