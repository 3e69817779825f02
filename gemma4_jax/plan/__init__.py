"""What a step costs on chips that are not here: compiled programs read, rooflines, and estimates without a compiler."""
