"""Trains the embedded tokenizer: SentencePiece BPE with byte fallback, 896 pieces, Gemma 4's special tokens.

Text becomes ids by Gemma 4's rules: no normalisation, no dummy prefix, no space lost, digits one by one, unknown
characters as bytes (only its pieces may span several words, ours not). Ids 0 to 110 are the same pieces as there (control
tokens, tool, channel and turn markers, newline runs), so code that knows an id by number works with both. The training
text is the embedded chat data and nothing else.

    python -m gemma4_jax.assets.make_tokenizer    # rewrites tokenizer.model, byte for byte with sentencepiece 0.2.3
"""

import io
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from gemma4_jax.assets import TOKENIZER, TRAIN
from gemma4_jax.assets.make_data import CITIES, KEYS, NAMES, SKIES, WORDS

VOCAB_SIZE = 896  # 118 special pieces, 256 bytes, 95 printable characters, the rest learnt
MADE_WITH = "0.2.3"  # the sentencepiece that wrote the committed file

# The words that the tasks copy. Each is one piece wherever it stands.
COPIED = (*NAMES, *CITIES, *WORDS, *SKIES, *KEYS)

NAMED = {
    4: "<mask>",
    5: "[multimodal]",
    46: "<|tool>",
    47: "<tool|>",
    48: "<|tool_call>",
    49: "<tool_call|>",
    50: "<|tool_response>",
    51: "<tool_response|>",
    52: '<|"|>',
    98: "<|think|>",
    100: "<|channel>",
    101: "<channel|>",
    105: "<|turn>",
    106: "<turn|>",
    107: "\n",
    108: "\n\n",
    109: "\n\n\n",
    110: "\n\n\n\n",
    # Gemma 4 keeps these at 255,999 and above, out of reach here; their names are the same.
    111: "<|image>",
    112: "<|image|>",
    113: "<image|>",
    114: "<|audio>",
    115: "<|audio|>",
    116: "<audio|>",
    117: "<|video|>",
}


def special_pieces() -> list[str]:
    """The pieces of ids 4, 5, ... in order: the named ones, and `<unused0>`, `<unused1>`, ... in the gaps."""
    pieces: list[str] = []
    unused = 0
    for index in range(4, max(NAMED) + 1):
        piece = NAMED.get(index)
        if piece is None:
            piece, unused = f"<unused{unused}>", unused + 1
        pieces.append(piece)
    return pieces


def declaration(tool: dict[str, Any]) -> str:
    """A tool as the chat format writes it, near enough to learn its pieces from."""
    function = tool["function"]
    types = function["parameters"]["properties"].items()
    properties = ",".join(f'{name}:{{type:<|"|>{kind["type"].upper()}<|"|>}}' for name, kind in types)
    required = ",".join(f'<|"|>{name}<|"|>' for name in function["parameters"]["required"])
    parameters = f'{{properties:{{{properties}}},required:[{required}],type:<|"|>OBJECT<|"|>}}'
    return f'declaration:{function["name"]}{{description:<|"|>{function["description"]}<|"|>,parameters:{parameters}}}'


def turns(row: dict[str, Any]) -> Iterator[str]:
    """The texts of one chat row."""
    for tool in row.get("tools", ()):
        yield declaration(tool)
    for message in row["messages"]:
        role = "model" if message["role"] == "assistant" else message["role"]
        yield f"{role}\n{message['content']}"
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = ",".join(
                f'{key}:<|"|>{value}<|"|>' if isinstance(value, str) else f"{key}:{value}"
                for key, value in sorted(function["arguments"].items())
            )
            yield f"call:{function['name']}{{{arguments}}}"
            yield f'response:{function["name"]}{{value:<|"|>'
    yield "system\n<|channel>thought\n<channel|>"


def corpus(path: Path = TRAIN) -> Iterator[str]:
    """The training text: turns, cut at the space before each word that the tasks copy.

    That space then never joins the word, so `Rome` is one id in running text, in a list and between quotes: what is
    copied is the same id on both sides.
    """
    boundary = re.compile(rf" (?=(?:{'|'.join(COPIED)})\b)")
    for line in path.read_text(encoding="utf-8").splitlines():
        for text in turns(json.loads(line)):
            yield from filter(None, boundary.split(text))


def build() -> bytes:
    """The serialised SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=special_pieces(),
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        byte_fallback=True,
        split_digits=True,
        split_by_unicode_script=True,
        split_by_number=True,
        split_by_whitespace=True,  # pieces of two words would hide the words that the tasks copy
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        shuffle_input_sentence=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main(path: Path = TOKENIZER) -> None:
    """Writes the model and says how large it is."""
    data = build()
    path.write_bytes(data)
    print(f"{path.name}: {VOCAB_SIZE} pieces, {len(data):,} bytes")


if __name__ == "__main__":
    main()
