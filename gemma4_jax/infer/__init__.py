"""Answers from a model.

`sampler` chooses tokens from logits, `engine` runs prefill and decode for one batch, `prompts` turns what a user gives into ids,
`generate` puts batches together and answers apart, `program` is the task `sample`.
"""
