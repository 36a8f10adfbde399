"""Encode text piece by piece: each distinct piece of text goes through the tokenizer once.

Most of the time of `tokenizers` goes into cutting a text into the pieces of its pattern and into
noting where each came from. Here Python's `re` cuts, and a table knows the tokens of the pieces
that were met before: the same tokens in less time. Texts with characters of
other scripts than those of `_SIMPLE`, on which the two might differ, go to `tokenizers` whole.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer

from plait.train.data import token_dtype
from plait.train.tokenizer import PIECES

_SIMPLE = (
    "\\0-\u024f\u0386-\u04ff\u2010-\u2027\u2030-\u205e\u20a0-\u20bf\u2190-\u23ff\u2500-\u2767"
    "\U0001f300-\U0001f64f"
)
"""Latin, Greek, Cyrillic, punctuation, signs: blocks whose letters and numbers no version of
Unicode has changed since 7.0, so that `re` and the tokenizer's engine agree on them."""
_MOST_PIECES = 1 << 17
_LONGEST_PIECE = 32
"""Longer pieces hardly ever come again; leaving them out bounds the table."""


class PieceEncoder:
    """Encodes texts to tokens as they lie on disk, as the tokenizer alone would.

    The tokenizer is set to read special tokens in a text as plain text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer; one with other pieces than ours does all the work itself."""
        tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> goes on
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.get_vocab_size())
        self._known: dict[str, bytes] = {}
        self._is_simple, self._pieces_of = _patterns()
        if not _cuts_our_pieces(tokenizer):
            self._is_simple = re.compile(r"(?!)")

    def __call__(self, texts: Sequence[str]) -> list[bytes]:
        """Encode each text; little-endian numbers of `token_dtype`."""
        cut = [self._pieces_of.findall(t) if self._is_simple.fullmatch(t) else None for t in texts]
        others = [text for text, pieces in zip(texts, cut, strict=True) if pieces is None]
        whole = iter(self._encode(others))
        new = list({piece for pieces in cut if pieces for piece in pieces} - self._known.keys())
        self._known |= zip(new, self._encode(new), strict=True)
        found = [
            next(whole) if pieces is None else b"".join(map(self._known.__getitem__, pieces))
            for pieces in cut
        ]
        for piece in new:
            if len(piece) > _LONGEST_PIECE or len(self._known) > _MOST_PIECES:
                del self._known[piece]
        return found

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype).tobytes() for encoding in encodings]


def _cuts_our_pieces(tokenizer: Tokenizer) -> bool:
    settings = json.loads(tokenizer.to_str())
    parts = (settings.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    others = [token for token in settings["added_tokens"] if not token["special"]]
    is_plain = settings.get("normalizer") is None and len(parts) == 2 and not others
    return is_plain and parts[0].get("pattern") == {"Regex": PIECES}


@lru_cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Whether a text is simple, and the pattern of the tokenizer with its classes spelt out."""
    is_simple = re.compile(f"[{_SIMPLE}]*")
    simple = [c for c in map(chr, range(0x20000)) if is_simple.fullmatch(c)]
    kinds = {c: unicodedata.category(c)[0] for c in simple}
    classes = {
        r"\p{L}": _class_of([c for c in simple if kinds[c] == "L"]),
        r"\p{N}": _class_of([c for c in simple if kinds[c] == "N"]),
        r"\s": "\\t-\\r \\x85\\xa0",
        r"\S": "^\\t-\\r \\x85\\xa0",
    }
    return is_simple, re.compile(_spelt_out(PIECES, classes))


def _spelt_out(pattern: str, classes: dict[str, str]) -> str:
    """Put classes in the place of their names, in brackets where there are none yet."""
    parts: list[str] = []
    is_inside = False
    for part in re.findall(r"\\p\{\w\}|\\.|.", pattern):
        if part in classes:
            parts.append(classes[part] if is_inside else f"[{classes[part]}]")
        else:
            is_inside = part == "[" or (is_inside and part != "]")
            parts.append(part)
    return "".join(parts)


def _class_of(characters: list[str]) -> str:
    """Ranges of a character class; letters and numbers need no escape."""
    ranges: list[list[str]] = []
    for character in characters:
        if ranges and ord(ranges[-1][1]) + 1 == ord(character):
            ranges[-1][1] = character
        else:
            ranges.append([character, character])
    return "".join(f"{first}-{last}" for first, last in ranges)
