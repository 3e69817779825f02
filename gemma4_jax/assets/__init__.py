"""The embedded default: a small tokenizer and a small chat data set, so that the demo needs no download.

`TOKENIZER` is a SentencePiece model that keeps Gemma 4's special tokens under their real ids. `TRAIN` and `HELDOUT` are
JSONL files of chat rows `{"task": ..., "messages": [...], "tools": [...]}` (`tools` only where the row has some); no
prompt of one file occurs in the other. The text is the project's own: `make_data` writes the rows, `make_tokenizer`
trains on the training rows, and both write the same bytes every time.
"""

from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent
TOKENIZER = DIRECTORY / "tokenizer.model"
TRAIN = DIRECTORY / "chat_train.jsonl"
HELDOUT = DIRECTORY / "chat_heldout.jsonl"
