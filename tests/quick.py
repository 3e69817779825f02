"""Compiling without LLVM's optimisations, for tests that are nearly all compilation: 7 s in place of 17 s for a model's gradient.

Not for tests of bits: the code rounds differently. A plain `jax.jit` is for those.
"""

import functools

import jax

OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)
