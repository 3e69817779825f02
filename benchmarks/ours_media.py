"""Our side, `python -m benchmarks.ours_media CHECKPOINT`: every picture and sound once for every line of stdin."""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.worker import peak_gb
from gemma4_jax.checkpoint.hf import load_hf
from gemma4_jax.infer.weights import Towers, placed
from gemma4_jax.media.batch import MediaShape, batch_media
from gemma4_jax.media.images import image_piece
from gemma4_jax.media.pieces import SoundPiece
from gemma4_jax.media.sounds import sound_piece
from gemma4_jax.model.multimodal import Media, soft_frames


@jax.jit
def looked(towers: Towers, media: Media) -> jax.Array:
    """Soft tokens, padding included."""
    return towers.soft_tokens(media).values


def main(checkpoint: Path) -> None:
    """Pictures are padded to their budget and sounds to the longest, as in the engine and in training."""
    model = load_hf(checkpoint, dtype="float32")
    towers, vision = placed(Towers(model, "float32")), model.cfg.vision
    assert vision is not None
    given = np.load(checkpoint / "media.npz")
    pictures = [(given[f"picture{i}"], int(given[f"budget{i}"])) for i in range(sum("picture" in key for key in given))]
    sounds = [given[f"sound{i}"] for i in range(sum("sound" in key for key in given))]

    def see() -> tuple[float, float, list[np.ndarray]]:
        """Seconds, those of them until the towers start, soft tokens."""
        prepared, found, start = 0.0, [], time.perf_counter()
        for pixels, budget in pictures:
            begun = time.perf_counter()
            piece = image_piece(pixels, vision, budget)
            media = batch_media([[piece]], budget, vision, shape=MediaShape(((budget, 1),)))
            prepared += time.perf_counter() - begun
            assert media is not None
            found.append(np.asarray(looked(towers, media))[: piece.count])
        return time.perf_counter() - start, prepared, found

    def hear() -> tuple[float, float, list[np.ndarray]]:
        start = time.perf_counter()
        pieces: list[SoundPiece] = [sound_piece(samples) for samples in sounds]
        frames = max(len(piece.mel) for piece in pieces)
        longest = soft_frames(frames)
        shape = MediaShape((), len(pieces), frames)
        media = batch_media([[piece] for piece in pieces], longest, vision, shape=shape)
        prepared = time.perf_counter() - start
        assert media is not None
        values = np.asarray(looked(towers, media)).reshape(len(pieces), longest, -1)
        seconds = time.perf_counter() - start
        return seconds, prepared, [one[: piece.count] for one, piece in zip(values, pieces, strict=True)]

    for _ in sys.stdin:
        images_s, prepare_images_s, seen = see()
        audio_s, mel_s, heard = hear() if sounds else (0.0, 0.0, [])
        soft = {f"picture{i}": x for i, x in enumerate(seen)} | {f"sound{i}": x for i, x in enumerate(heard)}
        np.savez(checkpoint / "soft_gemma4_jax.npz", **soft)  # pyright: ignore[reportArgumentType]
        answer = {"version": f"jax {jax.__version__}", "images_s": images_s, "prepare_images_s": prepare_images_s}
        print(json.dumps({**answer, "audio_s": audio_s, "mel_s": mel_s, "peak_gb": peak_gb()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
