"""The peer's side, in an environment with torch: `PYTHON -m benchmarks.peer_transformers_media CHECKPOINT`."""
# pyright: reportMissingImports=false

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from benchmarks.worker import peak_gb


def main(checkpoint: Path) -> None:
    """Threads and attention as torch and transformers choose them; pictures by the Pillow backend, one at a time."""
    load = transformers.Gemma4ForConditionalGeneration.from_pretrained
    model, loading = load(checkpoint, dtype=torch.float32, output_loading_info=True)
    if any(loading.values()):
        sys.exit(f"transformers loads the checkpoint only in part: {loading}")
    model.eval()
    given = np.load(checkpoint / "media.npz")
    pictures = [(given[f"picture{i}"], int(given[f"budget{i}"])) for i in range(sum("picture" in key for key in given))]
    sounds = [given[f"sound{i}"] for i in range(sum("sound" in key for key in given))]
    processors = {budget: Gemma4ImageProcessorPil(max_soft_tokens=budget) for _, budget in pictures}
    extractor = Gemma4AudioFeatureExtractor()

    def see() -> tuple[float, float, list[np.ndarray]]:
        """Seconds, those of them until the towers start, soft tokens."""
        prepared, found, start = 0.0, [], time.perf_counter()
        for pixels, budget in pictures:
            begun = time.perf_counter()
            inputs = processors[budget](images=[pixels], return_tensors="pt", input_data_format="channels_last")
            prepared += time.perf_counter() - begun
            features = model.model.get_image_features(inputs["pixel_values"].float(), inputs["image_position_ids"])
            found.append(features.pooler_output[0].numpy())
        return time.perf_counter() - start, prepared, found

    def hear() -> tuple[float, float, list[np.ndarray]]:
        start = time.perf_counter()
        inputs = extractor(sounds, sampling_rate=16_000, return_tensors="pt")
        prepared = time.perf_counter() - start
        out = model.model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
        seconds = time.perf_counter() - start
        return (
            seconds,
            prepared,
            [x[mask].numpy() for x, mask in zip(out.pooler_output, out.attention_mask, strict=True)],
        )

    threads = f"{torch.get_num_threads()} threads"
    version = f"transformers {transformers.__version__}, torch {torch.__version__}, {threads}"
    for _ in sys.stdin:
        with torch.no_grad():
            images_s, prepare_images_s, seen = see()
            audio_s, mel_s, heard = hear() if sounds else (0.0, 0.0, [])
        soft = {f"picture{i}": x for i, x in enumerate(seen)} | {f"sound{i}": x for i, x in enumerate(heard)}
        np.savez(checkpoint / "soft_transformers.npz", **soft)  # pyright: ignore[reportArgumentType]
        times = {"images_s": images_s, "prepare_images_s": prepare_images_s, "audio_s": audio_s, "mel_s": mel_s}
        print(json.dumps({"version": version, **times, "peak_gb": peak_gb()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
