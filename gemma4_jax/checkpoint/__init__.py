"""Weights and training states on disk: Hugging Face safetensors, Orbax, and the table of names between them.

`load` reads either kind of directory; `hf` and `store` write a model, `store` also keeps the steps of a run. Orbax is
imported by `store` and `steps` only.
"""
