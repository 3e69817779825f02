"""Numbers a weight may be rounded to (`grids`), and which weights are (`policy`).

Nothing here knows the model: a policy finds the modules that have a `role` and a `grid`, and a module rounds its own weight.
"""
