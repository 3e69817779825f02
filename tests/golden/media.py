"""Computes what a correct multimodal implementation must reproduce: transformers in float32, PIL image backend, eager attention.

Array names and shapes are listed in README.md.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from checkpoints import load_model
from media_inputs import PROMPTS, RATE, RESIZED, SOUNDS, TOWER, USED, Film, Picture, Row, Sound, text_tokens
from structures import FIRST_SPECIAL_ID, SPECIAL_IDS, Tiny
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

NEW_TOKENS = 16
LOGIT_STRIDE = 3
KEPT_ROWS = 24
TOLERANCES = {
    "mel_max": [1e-4, "the same operations in the same dtypes; libraries of different builds may round sums otherwise"],
    "features_max": [1e-3, "soft tokens after the projection, of order 1; sums in another order through the tower"],
    "logits_max": [2e-3, "soft tokens carry the rounding of two towers into the text model"],
    "logits_mean": [1e-4, "rounding of float32 sums in another order; a wrong formula moves the mean by 1e-2 or more"],
    "loss_relative": [1e-5, "a mean over the trained positions averages the rounding of the logits"],
    "gradient_norm_relative": [1e-3, "backward sums in another order"],
    "gradient_relative": [1e-3, "error norm over gradient norm of one tensor"],
}  # fmt: skip
Arrays = dict[str, np.ndarray]


def image_inputs(pictures: list[Picture], patch_size: int) -> dict[str, Any]:
    """pixel_values, image_position_ids (padded to the largest budget) and counts, as the PIL backend gives them."""
    processed = []
    for picture in pictures:
        processor = Gemma4ImageProcessorPil(patch_size=patch_size, max_soft_tokens=picture.budget)
        # Of a picture one pixel high transformers would take the first axis for the colours.
        processed.append(processor(images=[picture.pixels()], return_tensors="pt", input_data_format="channels_last"))
    most = max(one["pixel_values"].shape[1] for one in processed)

    def padded(one: torch.Tensor, value: float) -> torch.Tensor:
        return torch.nn.functional.pad(one, (0, 0, 0, most - one.shape[1]), value=value)

    return {
        "pixel_values": torch.cat([padded(one["pixel_values"], 0) for one in processed]).float(),
        "image_position_ids": torch.cat([padded(one["image_position_ids"], -1) for one in processed]),
        "counts": [int(one["num_soft_tokens_per_image"][0]) for one in processed],
    }


def sound_inputs(sounds: list[Sound]) -> dict[str, torch.Tensor]:
    """input_features, input_features_mask of a padded batch."""
    extracted = Gemma4AudioFeatureExtractor()([s.waveform() for s in sounds], sampling_rate=RATE, return_tensors="pt")
    return {name: extracted[name] for name in ("input_features", "input_features_mask")}


def soft_count(mask: torch.Tensor) -> int:
    """Soft tokens of one clip."""
    return int(mask[::2][::2].sum())


def preprocessing() -> dict[str, Any]:
    """For each of RESIZED: soft tokens, grid of patches, and SHA-256 of the float32 pixels, row by row, without padding."""
    found = []
    for picture in RESIZED:
        inputs = image_inputs([picture], 16)
        real = (inputs["image_position_ids"][0] >= 0).all(-1)
        positions = inputs["image_position_ids"][0][real]
        pixels = np.ascontiguousarray(inputs["pixel_values"][0][real].numpy(), np.float32)
        grid = [int(positions[:, 1].max()) + 1, int(positions[:, 0].max()) + 1]
        found.append(
            {"soft_tokens": inputs["counts"][0], "grid": grid, "sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}
        )
    return {"versions": {"transformers": transformers.__version__}, "pictures": found}


def kept(values: torch.Tensor) -> np.ndarray:
    """About KEPT_ROWS rows, evenly."""
    return values.detach().numpy()[:: max(1, len(values) // KEPT_ROWS)].astype(np.float32)


@torch.no_grad()
def tower_arrays(model: torch.nn.Module) -> Arrays:
    """Soft tokens of TOWER and SOUNDS alone, and of three sounds as one padded batch; log-mel frames."""
    arrays: Arrays = {}
    for i, picture in enumerate(TOWER):
        inputs = image_inputs([picture], model.config.vision_config.patch_size)
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_position_ids"]).pooler_output[0]
        arrays |= {f"picture/{i}": kept(features), f"picture_count/{i}": np.asarray(len(features))}
    if model.model.audio_tower is None:
        return arrays
    for i, sound in enumerate(SOUNDS):
        inputs = sound_inputs([sound])
        mel, mask = inputs["input_features"][0], inputs["input_features_mask"][0]
        arrays |= {f"mel/{i}": kept(mel[mask]), f"mel_count/{i}": np.asarray(int(mask.sum()))}
        out = model.model.get_audio_features(**inputs)
        features = out.pooler_output[0][out.attention_mask[0]]
        arrays |= {f"sound/{i}": kept(features), f"sound_count/{i}": np.asarray(len(features))}
    out = model.model.get_audio_features(**sound_inputs(list(SOUNDS[:3])))
    for i in range(3):
        arrays[f"sound_batch/{i}"] = kept(out.pooler_output[i][out.attention_mask[i]])
    return arrays


def prompt_inputs(rows: list[Row], seed: int, patch_size: int) -> dict[str, Any]:
    """A right-padded batch as transformers takes it, and `labels`: some text tokens, never the first of a row."""
    ids = {name.replace("_token_id", "").replace("_token_index", ""): value for name, value in SPECIAL_IDS.items()}
    pictures, frames, sounds, tokens, kinds = [], [], [], [], []

    def add(values: list[int], kind: int) -> None:
        tokens[-1] += values
        kinds[-1] += [kind] * len(values)

    def add_seen(picture: Picture, placeholder: int, kind: int) -> None:
        add([ids["boi"]], 0)
        add([placeholder] * image_inputs([picture], patch_size)["counts"][0], kind)
        add([ids["eoi"]], 0)

    for r, row in enumerate(rows):
        tokens.append([])
        kinds.append([])
        for p, part in enumerate(row):
            if isinstance(part, int):
                add(text_tokens(part, [seed, r, p], FIRST_SPECIAL_ID).tolist(), 0)
            elif isinstance(part, Picture):
                pictures.append(part)
                add_seen(part, ids["image"], 1)
            elif isinstance(part, Film):
                frames += part.pictures()
                for f, picture in enumerate(part.pictures()):
                    add(text_tokens(2, [seed, r, p, f], FIRST_SPECIAL_ID).tolist(), 0)
                    add_seen(picture, ids["video"], 2)
            else:
                sounds.append(part)
                mask = sound_inputs([part])["input_features_mask"][0]
                add([ids["boa"], *[ids["audio"]] * soft_count(mask), ids["eoa"]], 0)
    length = max(map(len, tokens))
    batch = {
        "input_ids": np.array([row + [0] * (length - len(row)) for row in tokens]),
        "attention_mask": np.array([[1] * len(row) + [0] * (length - len(row)) for row in tokens]),
        "mm_token_type_ids": np.array([row + [0] * (length - len(row)) for row in kinds]),
    }
    text = (batch["attention_mask"] == 1) & (batch["input_ids"] < FIRST_SPECIAL_ID)
    text[:, 0] = False
    chosen = text & (np.random.default_rng([4, seed]).uniform(size=text.shape) < 0.8)
    batch["labels"] = np.where(chosen, batch["input_ids"], -100)
    out: dict[str, Any] = {name: torch.from_numpy(value) for name, value in batch.items()}
    if pictures:
        seen = image_inputs(pictures, patch_size)
        out |= {"pixel_values": seen["pixel_values"], "image_position_ids": seen["image_position_ids"]}
    if frames:
        seen = image_inputs(frames, patch_size)
        out |= {"pixel_values_videos": seen["pixel_values"], "video_position_ids": seen["image_position_ids"]}
        out["num_frames_per_video"] = torch.tensor(
            [part.frames for row in rows for part in row if isinstance(part, Film)]
        )
    if sounds:
        out |= sound_inputs(sounds)
    return out


def gradients(model: torch.nn.Module) -> tuple[Arrays, dict[str, float]]:
    """Whole gradients of some tower tensors; norms of all, row 0 of the lookup tables left out (see expected.py)."""
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None and n != "lm_head.weight"}
    wanted = [
        "vision_tower.patch_embedder.input_proj.weight",
        "vision_tower.encoder.layers.0.self_attn.q_norm.weight",
        "vision_tower.encoder.layers.1.mlp.down_proj.linear.weight",
        "embed_vision.embedding_projection.weight",
        "audio_tower.subsample_conv_projection.layer0.conv.weight",
        "audio_tower.layers.0.self_attn.per_dim_scale",
        "audio_tower.layers.0.self_attn.relative_k_proj.weight",
        "audio_tower.layers.1.lconv1d.depthwise_conv1d.weight",
        "audio_tower.output_proj.bias",
        "language_model.layers.0.self_attn.k_norm.weight",
    ]
    arrays = {f"model.{name}": grads[f"model.{name}"] for name in wanted if f"model.{name}" in grads}
    norms = {}
    for name, grad in grads.items():
        is_table = name.split(".")[-2] in ("embed_tokens", "embed_tokens_per_layer")
        norms[name] = float(np.linalg.norm(grad[1:] if is_table else grad))
    return arrays, norms


@torch.no_grad()
def greedy(model: torch.nn.Module, rows: list[Row], seed: int, patch_size: int) -> tuple[np.ndarray, float]:
    """Tokens through the cache, each row alone, and the smallest lead of a chosen token over the second best."""
    found, margin = [], float("inf")
    whole = prompt_inputs(rows, seed, patch_size)
    for r, row in enumerate(rows):
        one = prompt_inputs([row], seed, patch_size)
        length = int(whole["attention_mask"][r].sum())
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            one[name] = whole[name][r : r + 1, :length]
        del one["labels"]
        result = model.generate(
            **one,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        top = torch.stack(result.logits, dim=1).topk(2, dim=-1).values
        margin = min(margin, float((top[..., 0] - top[..., 1]).min()))
        found.append(result.sequences[0, -NEW_TOKENS:].numpy())
    return np.stack(found), margin


def compute_media(name: str, tiny: Tiny, directory: Path) -> tuple[Arrays, dict[str, Any]]:
    """Returns (arrays of expected.npz, contents of expected.json) for the checkpoint in `directory`."""
    model = load_model(tiny, directory)
    patch_size = model.config.vision_config.patch_size
    arrays, scalars = tower_arrays(model), {}
    for case in USED[name]:
        inputs = prompt_inputs(PROMPTS[case], tiny.token_seed, patch_size)
        model.zero_grad()
        outputs = model(**inputs, use_cache=False)
        outputs.loss.backward()
        grad_arrays, norms = gradients(model)
        real = inputs["attention_mask"].numpy()[..., None] == 1
        logits = outputs.logits.detach().numpy() * real
        tokens, margin = greedy(model, PROMPTS[case], tiny.token_seed, patch_size)
        arrays |= {f"{case}/{key}": inputs[key].numpy() for key in ("input_ids", "attention_mask", "labels")}
        arrays |= {f"{case}/mm_token_type_ids": inputs["mm_token_type_ids"].numpy()}
        arrays |= {f"{case}/logits": logits[:, ::LOGIT_STRIDE], f"{case}/greedy_tokens": tokens}
        arrays |= {f"{case}/gradient/{key}": value for key, value in grad_arrays.items()}
        scalars[case] = {
            "loss": outputs.loss.item(),
            "logits_std": float(logits[real[..., 0]].std()),
            "greedy_margin_min": margin,
            "gradient_norms": norms,
        }
    arrays = {key: value.astype(np.int32 if value.dtype.kind == "i" else np.float32) for key, value in arrays.items()}
    check_health(name, arrays, scalars)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    limits = {key: {"value": value, "reason": reason} for key, (value, reason) in TOLERANCES.items()}
    return arrays, {"versions": versions, "token_seed": tiny.token_seed, "tolerances": limits, "cases": scalars}


def check_health(name: str, arrays: Arrays, scalars: dict[str, Any]) -> None:
    """Raises ValueError when a seed gives numbers that cannot tell right from wrong, or only by luck."""
    problems = []
    for case, facts in scalars.items():
        if facts["greedy_margin_min"] <= 5e-3:
            problems.append(f"{case}: the greedy margin is {facts['greedy_margin_min']:.1e}, want > 5e-3")
        if not 2 < facts["logits_std"] < 6:
            problems.append(f"{case}: logits have standard deviation {facts['logits_std']:.2f}, want 2 to 6")
        if arrays[f"{case}/greedy_tokens"].max() >= FIRST_SPECIAL_ID:
            problems.append(f"{case}: greedy tokens contain a special id")
    if problems:
        raise ValueError(f"{name}: {'; '.join(problems)}. Choose other seeds in structures.MEDIA.")
