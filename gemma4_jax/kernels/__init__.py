"""Fast array code, each piece with a slow and obvious twin in `reference.py`.

Nothing here knows a configuration, a mesh or a file: arrays come in, arrays go out.

    reference       the twins; they are the specification and the tests compare against them
    slices          blocks of bf16 arrays read and written in loops at the cost of the block
    blockwise       attention computed block by block, with its own backward pass; serves the next two
    banded          sliding-window attention, O(T x window) memory and FLOPs
    chunked         causal attention over a whole sequence or a cache, never a [T, S] matrix
    grouped_matmul  rows sorted by expert times one matrix per expert
    cross_entropy   soft-capped cross-entropy and distillation loss, never a [tokens, V] matrix
"""
