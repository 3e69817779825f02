"""Weights and training states on disk: Hugging Face safetensors, Orbax, and the table of names between them.

`load` reads either kind of directory; `hf` and `store` write one each. Nothing here imports orbax until it is needed.
"""
