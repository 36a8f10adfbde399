"""The quick way from text to tokens against `tokenizers`: the same tokens, whatever the text."""

import pickle
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from plait.train import piece_encoder
from plait.train.data import token_dtype
from plait.train.piece_encoder import PieceEncoder
from plait.train.tokenizer import END_OF_TEXT, train_tokenizer_on

TEXTS = [
    "def main(self):\n    return {'a': 12_345}  # \u00e9, \u03a9, \u00df\n\n",
    "  x = f(y)\r\n\tif z:\n",
] * 9
POOLS = [
    " \n\t\r\x0b\x0c\x85\xa0\x1c\x1f",
    "abzAZ_09",
    "().,:;|<>'\"",
    "   \n",
    "\u00b2\u00b3\u00bc\u00e9\u00df\u0414\u03c9\u03a9",
    "\u2014\u201c\u2026\u20ac\u2192",
]
OTHERS = [
    "\u65e5\u672c\u8a9e",
    "\u0301",
    "\U0001d518",
    "\u2167",
    "\u2003",
    "\u2028",
    "\U0001f642",
    "\0",
    "\ue0f0",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer_on(TEXTS, vocab_size=340)


def _expected(tokenizer, texts):
    alone = Tokenizer.from_str(tokenizer.to_str())
    alone.encode_special_tokens = True
    return [e.ids for e in alone.encode_batch_fast(texts, add_special_tokens=False)]


def _tokens(tokenizer, contents):
    dtype = token_dtype(tokenizer.get_vocab_size())
    return [np.frombuffer(content, dtype).tolist() for content in contents]


def _random_texts(count, pools, *, seed):
    generator = random.Random(seed)
    return [
        "".join(generator.choice(generator.choice(pools)) for _ in range(generator.randrange(40)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("others", [False, True], ids=["simple", "all scripts"])
def test_random_texts_have_the_tokens_of_the_tokenizer(tokenizer, others):
    texts = _random_texts(4000, [*POOLS, *([OTHERS] if others else [])], seed=int(others))
    encode = PieceEncoder(tokenizer)
    for start in range(0, len(texts), 500):
        part = texts[start : start + 500]
        assert _tokens(tokenizer, encode(part)) == _expected(tokenizer, part)


@pytest.mark.parametrize("context", ["{}", "a{}b", " {}1", "1{}2", "  {}\n x", "({}_"])
def test_every_character_that_is_cut_here_is_cut_as_there(tokenizer, context):
    is_simple, _ = piece_encoder._patterns()
    simple = [c for c in map(chr, range(0x20000)) if is_simple.fullmatch(c)]
    assert len(simple) > 3000
    texts = [context.format(character) for character in simple]
    assert _tokens(tokenizer, PieceEncoder(tokenizer)(texts)) == _expected(tokenizer, texts)


def test_a_text_that_spells_the_end_of_text_goes_on(tokenizer):
    text = f"a{END_OF_TEXT}b"
    again = pickle.loads(pickle.dumps(tokenizer))  # as it reaches a worker process
    (tokens,) = _tokens(tokenizer, PieceEncoder(again)([text]))
    assert tokenizer.token_to_id(END_OF_TEXT) not in tokens
    assert tokenizer.decode(tokens) == text


def test_other_tokenizers_do_the_work_themselves(tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    expected = _expected(other, TEXTS)
    assert expected != _expected(tokenizer, TEXTS)
    assert _tokens(other, PieceEncoder(other)(TEXTS)) == expected


def test_the_table_is_bounded_and_a_full_one_changes_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(piece_encoder, "_MOST_PIECES", 50)
    encode = PieceEncoder(tokenizer)
    texts = [*_random_texts(300, POOLS, seed=3), "x" * 5000]
    for _ in range(2):
        assert _tokens(tokenizer, encode(texts)) == _expected(tokenizer, texts)
        assert 0 < len(encode._known) <= 50
    assert max(map(len, encode._known)) <= 32


def test_long_runs_of_anything_take_no_longer_than_their_length():
    _, pieces_of = piece_encoder._patterns()
    for run in ("\n \n ", " ", ");\n  ", "a", " \t\t\n", "\u00e9\u00bc"):
        text = run * (400_000 // len(run))  # quadratic work would take minutes
        assert "".join(pieces_of.findall(text)) == text
