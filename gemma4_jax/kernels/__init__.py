"""Fast array code, each piece with a slow and obvious twin in `reference.py`.

Nothing here knows a model's configuration or a file: arrays come in, arrays go out. What runs on a mesh is at the end.

    reference       the twins; they are the specification and the tests compare against them
    slices          blocks of bf16 arrays read and written in loops at the cost of the block
    blockwise       attention computed block by block, with its own backward pass; serves the next two
    banded          the blocks of sliding-window attention, O(T x window) memory and FLOPs
    chunked         causal attention over a whole sequence or a cache, never a [T, S] matrix
    splash          both kinds of attention on a TPU, with Pallas
    choice          which of them runs where
    sequence        attention of one sequence's tokens to its own keys by the kernel that was chosen
    grouped_matmul  rows sorted by expert times one matrix per expert; grouped_tpu and grouped_gpu have the accelerators'
    sum_rows        each token's rows, sorted by expert, back into one sum
    cross_entropy   soft-capped cross-entropy and distillation loss, never a [tokens, V] matrix

    context         keys and queries between devices that share out a sequence
    experts         the experts of one layer, and the ways to them (expert_routes)
    vocabulary      lookup, rounding and logits of a table whose rows are shared out
"""
