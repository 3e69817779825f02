"""Tunix's side: `PYTHON -m benchmarks.peer_tunix_inference CHECKPOINT` in an environment with google-tunix."""
# pyright: reportMissingImports=false

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tunix.generate import sampler as tunix_sampler

from benchmarks.jax_peer import Asked, answer
from benchmarks.peer_tunix import load, version


class _Tokenizer:
    """Numbers for words: its sampler wants one, and the prompts are token ids already. No row ends early."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return -2


def main(checkpoint: Path) -> None:
    """The programs of its Sampler, greedy, in the order in which its `__call__` runs them; a cache just long enough."""
    model = load(checkpoint)
    samplers: dict[int, tunix_sampler.Sampler] = {}

    def ask(tokens: np.ndarray, new: int) -> Asked:
        """The prefill ends with the first token; the loop takes a step for which there is no room any more."""
        length = tokens.shape[1] + new
        if length not in samplers:
            sizes = dict.fromkeys(
                ("num_layers", "num_kv_heads", "head_dim"), 1
            )  # unread: the model's init_cache has them
            samplers[length] = tunix_sampler.Sampler(model, _Tokenizer(), tunix_sampler.CacheConfig(length, **sizes))
            samplers[length].eos_ids = jnp.array([-1])
        sampler = samplers[length]
        state = sampler.init_sample_state(
            jnp.asarray(tokens, jnp.int32),
            total_sampling_steps=length,
            include_logits=False,
            forbidden_token_ids=None,
            temperature=0.0,
            top_p=None,
            top_k=None,
            seed=jax.random.PRNGKey(0),
            beam_size=None,
        )
        jax.block_until_ready(state)
        cache = sum(x.nbytes for x in jax.tree.leaves(state.cache))
        start = time.perf_counter()
        weights = sampler._flattened_transformer_state
        state = jax.block_until_ready(sampler._compiled_prefill_fn(weights, state, None, echo=False))
        read = time.perf_counter()
        state = jax.block_until_ready(sampler._compiled_decode_fn(weights, state))
        step = (time.perf_counter() - read) / new
        written = np.asarray(state.token_buffer)[:, tokens.shape[1] :].tolist()
        return Asked(read - start, read - start, step, written, cache)

    answer(checkpoint, ask, version())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
