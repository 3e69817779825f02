"""What a model is worth: `perplexity` of held-out batches, `exact_match` of answers, `report` for tables of both."""
