"""One file per experiment; the docstring says what it does, where its numbers come from, and the exact command."""
