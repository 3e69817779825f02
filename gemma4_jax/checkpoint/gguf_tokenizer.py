"""A tokenizer as GGUF metadata, as llama.cpp's converter writes it: pieces, types, merges, special ids.

llama.cpp runs Gemma 4 as byte-pair merges over pieces with `▁` for a space. A tokenizer.json lists the merges; a SentencePiece
model implies them: every way to cut a piece into two pieces, in the order of the pieces' scores (Hugging Face's
`generate_merges`; 514,906 of them for the published model, as in published files).
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gemma4_jax.checkpoint.gguf_file import Metadata, Value, read_header
from gemma4_jax.errors import UserError
from gemma4_jax.tokenizer import SPECIAL_PIECES, Tokenizer, find_file

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
VISIBLE = (
    "channel_open",
    "channel_close",
    "tool_call_open",
    "tool_call_close",
    "tool_response_open",
    "tool_response_close",
    "quote",
)
"""Special pieces that llama.cpp must print, since its chat parser reads them."""
MASK = "<mask>"
SCORE = -1000.0
"""What the converter writes for every piece: merges decide, not scores."""


def metadata_of(path: Path, vocab_size: int) -> Metadata:
    """The `tokenizer.*` keys of the tokenizer at `path` (a file, or a directory with one), and its chat template.

    Raises:
      UserError: no readable tokenizer, or one with another number of pieces than the model's `vocab_size`.
    """
    file = find_file(path)
    tokenizer = Tokenizer.load(file)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{file} has {tokenizer.vocab_size} pieces and the model {vocab_size}; llama.cpp wants as many. Name the model's own "
            "tokenizer."
        )
    pieces, merges = _from_json(file) if file.suffix == ".json" else _from_sentencepiece(file)
    special = {
        index: name for name, index in vars(tokenizer.special).items() if index is not None and name != "newline"
    }
    ids = {piece: index for index, piece in enumerate(pieces)}
    control = {*special, *([ids[MASK]] if MASK in ids else [])}
    visible = {index for index, name in special.items() if name in VISIBLE}
    found: Metadata = {
        "tokenizer.ggml.model": Value("str", "gemma4"),
        "tokenizer.ggml.tokens": Value("[str]", pieces),
        "tokenizer.ggml.scores": Value("[f32]", [SCORE] * len(pieces)),
        "tokenizer.ggml.token_type": Value(
            "[i32]", [_type(i, piece, control, visible) for i, piece in enumerate(pieces)]
        ),
        "tokenizer.ggml.merges": Value("[str]", [f"{left} {right}" for left, right in merges]),
        "tokenizer.ggml.bos_token_id": Value("u32", tokenizer.special.bos),
        "tokenizer.ggml.eos_token_id": Value("u32", tokenizer.special.eos),
        "tokenizer.ggml.unknown_token_id": Value("u32", tokenizer.special.unk),
        "tokenizer.ggml.padding_token_id": Value("u32", tokenizer.special.pad),
    }
    if MASK in ids:
        found["tokenizer.ggml.mask_token_id"] = Value("u32", ids[MASK])
    template = file.parent / "chat_template.jinja"
    if template.is_file():
        found["tokenizer.chat_template"] = Value("str", template.read_text(encoding="utf-8"))
    found["tokenizer.ggml.add_space_prefix"] = Value("bool", False)
    found["tokenizer.ggml.add_bos_token"] = Value("bool", True)
    return found


def json_of(file: Path) -> bytes:
    """The tokenizer of a GGUF file as a tokenizer.json."""
    metadata, _ = read_header(file)
    return json.dumps(to_json(metadata, str(file)), ensure_ascii=False).encode()


def to_json(metadata: Metadata, where: str) -> dict[str, Any]:
    """A tokenizer.json with the pieces and merges of a GGUF file, for `Tokenizer`.

    Raises:
      UserError: the file has no Gemma 4 vocabulary.
    """
    kind = metadata.get("tokenizer.ggml.model", Value("str", None)).value
    if kind != "gemma4":
        raise UserError(
            f"{where} has the tokenizer {kind!r}; wanted 'gemma4'. Set config.tokenizer to the model's own file."
        )
    pieces: Sequence[str] = metadata["tokenizer.ggml.tokens"].value
    types: Sequence[int] = metadata["tokenizer.ggml.token_type"].value
    merges = [
        pair.split(" ", 1) if pair[0] != " " else pair.rsplit(" ", 1)
        for pair in metadata["tokenizer.ggml.merges"].value
    ]
    names = set(SPECIAL_PIECES.values()) - {SPECIAL_PIECES["newline"]} | {MASK}
    added = [
        {
            "id": index,
            "content": piece,
            "special": kind == CONTROL,
            "normalized": False,
            **dict.fromkeys(("single_word", "lstrip", "rstrip"), False),
        }
        for index, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if kind in (CONTROL, USER_DEFINED) or piece in names
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def merges_of(pieces: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of pieces whose concatenation is a piece; best score first, then longer parts first."""
    ids = {piece: index for index, piece in enumerate(pieces)}
    found: list[tuple[str, str, float]] = []
    for piece, score in zip(pieces, scores, strict=True):
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        pairs = [(left, right, score) for left, right in cuts if left in ids and right in ids]
        found += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    found.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
    return [(left, right) for left, right, _ in found]


def _from_sentencepiece(file: Path) -> tuple[list[str], list[tuple[str, str]]]:
    import sentencepiece

    model: Any = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    size = model.vocab_size()
    pieces: list[str] = [model.id_to_piece(index) for index in range(size)]
    return pieces, merges_of(pieces, [model.get_score(index) for index in range(size)])


def _from_json(file: Path) -> tuple[list[str], list[tuple[str, str]]]:
    parsed = json.loads(file.read_text(encoding="utf-8"))
    model = parsed["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{file} has a {model.get('type')} model; a Gemma tokenizer is BPE.")
    ids = dict(model["vocab"])
    ids |= {token["content"]: token["id"] for token in parsed.get("added_tokens", [])}
    pieces = [""] * len(ids)
    for piece, index in ids.items():
        pieces[index] = piece
    return pieces, list(_pairs(model["merges"]))


def _pairs(merges: Iterable[Any]) -> Iterable[tuple[str, str]]:
    """Old files write a merge as "a b", newer ones as ["a", "b"]; a space in a piece becomes U+0120, as in the converter."""
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left.replace(" ", "Ġ"), right.replace(" ", "Ġ")


def _type(index: int, piece: str, control: set[int], visible: set[int]) -> int:
    if index in visible:
        return USER_DEFINED
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return BYTE
    return CONTROL if index in control else NORMAL
