"""Text to ids and back, from both kinds of files, and every way a tokenizer file can be wrong."""

import io
import json
import pickle

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_jax import assets
from gemma4_jax.errors import UserError
from gemma4_jax.tokenizer import CHAT, SPECIAL_PIECES, Tokenizer


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return Tokenizer.load(assets.TOKENIZER)


@pytest.fixture(scope="module")
def published(shared_data) -> Tokenizer:
    return Tokenizer.load(shared_data / "tokenizer_gemma4.model")


@pytest.fixture(scope="module")
def as_json(tmp_path_factory) -> Tokenizer:
    """The embedded model as a tokenizer.json: BPE over the same pieces, merges in the order of their scores."""
    import tokenizers

    model = sentencepiece.SentencePieceProcessor(model_file=str(assets.TOKENIZER))
    pieces = [model.id_to_piece(index) for index in range(model.vocab_size())]
    ids = {piece: index for index, piece in enumerate(pieces)}
    markers = {piece for piece in SPECIAL_PIECES.values() if piece.strip()}
    named = [piece for piece in pieces if piece in markers or "unused" in piece]
    learnt = [piece for piece in pieces if piece not in named and not piece.startswith("<0x")]
    splits = ((piece[:cut], piece[cut:], piece) for piece in learnt for cut in range(1, len(piece)))
    merges = sorted(
        ((left, right) for left, right, _ in splits if left in ids and right in ids),
        key=lambda pair: (ids["".join(pair)], ids[pair[0]], ids[pair[1]]),
    )
    result = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    result.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    Sequence, Replace = tokenizers.decoders.Sequence, tokenizers.decoders.Replace
    result.decoder = Sequence([Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    result.add_special_tokens([tokenizers.AddedToken(piece, special=True, normalized=False) for piece in named])
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    result.save(str(path))
    return Tokenizer.load(path)


def train_tiny(path, **options):
    """A SentencePiece model without any chat pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g", "one two three"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=9,
        **{
            "pad_id": 0,
            "eos_id": 1,
            "bos_id": 2,
            "unk_id": 3,
            "pad_piece": "<pad>",
            "bos_piece": "<bos>",
            "eos_piece": "<eos>",
        }
        | options,
    )
    path.write_bytes(model.getvalue())
    return path


def test_published_ids(published, shared_data):
    rows = [json.loads(line) for line in (shared_data / "tokenizer_golden.jsonl").read_text().splitlines()]
    assert len(rows) == 46
    wrong = [row["text"] for row in rows if published.encode(row["text"]) != row["ids"]]
    assert not wrong
    assert all(published.decode(row["ids"]) == row["text"] for row in rows)


def test_published_special_ids(published):
    special = published.special
    assert published.stop_ids == (1, 106, 50)
    assert (special.pad, special.eos, special.bos, special.unk, special.newline) == (0, 1, 2, 3, 107)
    assert (special.turn_open, special.turn_close, special.think, special.quote) == (105, 106, 98, 52)
    assert (special.image, special.audio, special.video) == (258880, 258881, 258884)
    assert published.encode("<|video|>") == [258884]  # the model file knows it as <unused2968> only
    assert published.decode([258884]) == published.piece_of(258884) == "<|video|>"
    assert published.id_of("<|video|>") == 258884


def test_special_strings_become_their_ids(embedded):
    text = '<bos><|turn>user\nHi <|"|>x<|"|><turn|><eos>'
    ids = embedded.encode(text)
    special = embedded.special
    assert ids[:2] == [special.bos, special.turn_open]
    assert ids[-2:] == [special.turn_close, special.eos]
    assert ids.count(special.quote) == 2
    assert embedded.decode(ids) == text
    assert embedded.decode(ids, skip_special=True) == "user\nHi x"


def test_bos_and_eos_only_when_asked(embedded):
    plain = embedded.encode("a b")
    assert embedded.special.bos not in plain
    assert embedded.encode("a b", add_bos=True, add_eos=True) == [2, *plain, 1]
    assert embedded.encode("") == []


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40))
def test_text_survives(text):
    tokenizer = Tokenizer.load(assets.TOKENIZER)
    ids, offsets = tokenizer.encode_offsets(text)
    assert ids == tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    ends = [0, *(end for _, end in offsets)]
    assert [begin for begin, _ in offsets] == ends[:-1], "offsets tile the text"
    assert ends[-1] == len(text)


def test_json_and_model_agree(embedded, as_json):
    texts = [
        *assets.HELDOUT.read_text(encoding="utf-8").splitlines()[:100],
        "<bos><|turn>user\n \n\nÄ🙂 <turn|><eos>",
        "  x",
    ]
    for text in texts:
        assert as_json.encode(text) == embedded.encode(text)
        assert as_json.decode(as_json.encode(text)) == text
    assert as_json.special == embedded.special
    assert as_json.vocab_size == embedded.vocab_size


def test_json_offsets(as_json):
    text = "<bos>Hi 🙂<turn|>"
    ids, offsets = as_json.encode_offsets(text)
    assert ids == as_json.encode(text)
    assert offsets[0] == (0, 5)
    assert offsets[-1] == (9, 16)
    assert all(0 <= begin <= end <= len(text) for begin, end in offsets)


def test_pickle_and_save_keep_everything(embedded, as_json, tmp_path):
    for tokenizer, name in ((embedded, "tokenizer.model"), (as_json, "tokenizer.json")):
        assert pickle.loads(pickle.dumps(tokenizer)).encode("one <turn|>") == tokenizer.encode("one <turn|>")
        directory = tmp_path / name.replace(".", "_")
        assert tokenizer.save(directory) == directory / name
        assert Tokenizer.load(directory).encode("one <turn|>") == tokenizer.encode("one <turn|>")
    assert (tmp_path / "tokenizer_model" / "tokenizer.model").read_bytes() == assets.TOKENIZER.read_bytes()


def test_directory_prefers_the_model(as_json, embedded, tmp_path):
    as_json.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"garbled")
    with pytest.raises(UserError, match=r"tokenizer\.model is not a readable SentencePiece model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"", r"tokenizer\.model is empty"),
        ("tokenizer.model", b"not a model", r"not a readable SentencePiece model"),
        ("tokenizer.json", b"{", r"not a readable tokenizer\.json"),
        ("tokenizer.json", b"\xff\xfe", r"not a readable tokenizer\.json"),
        ("notes.txt", b"x", r"has neither tokenizer\.model nor tokenizer\.json"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="There is no tokenizer at"):
        Tokenizer.load(tmp_path / "absent.model")


def test_missing_pieces_are_named(tmp_path):
    tokenizer = Tokenizer.load(train_tiny(tmp_path / "tiny.model"))
    assert tokenizer.special.turn_open is None
    assert tokenizer.stop_ids == (1,)
    with pytest.raises(UserError, match=r"The chat format needs the special pieces .*'<\|turn>'.* lacks"):
        tokenizer.require(CHAT, "The chat format")
    with pytest.raises(UserError, match="lacks <bos>"):
        Tokenizer.load(train_tiny(tmp_path / "other.model", bos_piece="<s>"))


def test_wrong_ids_and_text_are_refused(embedded):
    with pytest.raises(UserError, match=f"Ids run from 0 to {embedded.vocab_size - 1}, got {embedded.vocab_size}"):
        embedded.decode([embedded.vocab_size])
    with pytest.raises(UserError, match="got -1"):
        embedded.piece_of(-1)
    with pytest.raises(UserError, match="no piece 'nothing like it'"):
        embedded.id_of("nothing like it")
    with pytest.raises(UserError, match="lone surrogate at character 1"):
        embedded.encode("a\ud800")
