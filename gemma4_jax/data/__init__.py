"""Files become batches.

`source` finds the rows of files, `chat` turns a row into tokens, `rows` remembers what came of each, `pack` fits them into
sequences, `batches` is the checkpointable iterator over them, `pipeline` has the settings and puts it all together.
"""
