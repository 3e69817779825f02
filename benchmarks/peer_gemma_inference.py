"""google-deepmind/gemma's side: `PYTHON -m benchmarks.peer_gemma_inference CHECKPOINT` in an environment with gemma."""
# pyright: reportMissingImports=false

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gemma.gm.text import _prefill, _sampler_loop, _sampling, _tokenizer
from gemma.gm.utils import _types

from benchmarks.jax_peer import Asked, answer
from benchmarks.peer_gemma import load


def main(checkpoint: Path) -> None:
    """Its own prefill and sampling loop, greedy, with a cache just long enough for what is asked."""
    model, params, version = load(checkpoint)
    end = model.config.num_embed + 1  # no token, so that no row ends early

    def ask(tokens: np.ndarray, new: int) -> Asked:
        """Its loop begins with the prompt's last token once more: the first token comes with the first step."""
        length = tokens.shape[1] + new
        loop = _sampler_loop.SamplerLoop(
            model=model,
            end_tokens=(end,),
            forbidden_tokens=None,
            sampling=_sampling.Greedy(),
            cache_length=length,
            special_tokens=_tokenizer.Gemma3Tokenizer.special_tokens,
        )
        given = _types.Input(text=jnp.asarray(tokens, jnp.int32), images=None, config=model.config.input_config)
        start = time.perf_counter()
        state = _prefill.prefill(
            model=model,
            params=params,
            input=given,
            last_state=None,
            cache_length=length,
            max_out_length=new,
            pad_length=(tokens.shape[1],),
            rng=jax.random.key(0),
            sharding=None,
        )
        jax.block_until_ready(state)
        read = time.perf_counter()
        state = loop.sample(params=params, init_state=state, max_new_tokens=jnp.asarray(new))
        jax.block_until_ready(state)
        prefill, step = read - start, (time.perf_counter() - read) / new
        cache = sum(x.nbytes for x in jax.tree.leaves(state.cache))
        return Asked(prefill, prefill + step, step, np.asarray(state.predicted_tokens).tolist(), cache)

    answer(checkpoint, ask, version)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
