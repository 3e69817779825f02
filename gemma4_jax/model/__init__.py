"""The mathematics of Gemma 4: arrays in, arrays out; no files, meshes or flags.

One einsum alphabet throughout the package:
B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H head dim, D model, F ffw,
P per-layer-input dim, V vocabulary, E experts, L layers, C = 2 (gate and up side by side).
"""
