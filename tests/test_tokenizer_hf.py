"""The same ids as from transformers, which rebuilds the tokenizer that nomoe reads as it is."""

from __future__ import annotations

import json
import random
import shutil
import struct
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from nomoe import data
from nomoe.repository import TRAINED_PROMPTS
from nomoe.tokenizer import Tokenizer

VOCABULARY = 2048
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "<mask>", " <mask>", "<mask> ", "< s>", "<Mask>")
CLUSTERS = ("👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "e\u0301\u0323", "กำ็", "क्ष", "ﷺ", "각", "ﬁ", "①")
# what separates words: spaces of all kinds, nothing, control characters
BETWEEN = " | |  |\t|\n|\r\n|\x00|\x0b|\x85|\xa0|\u2003|\u2028|\u3000|\u200b|\ufeff||▁".split("|")
# scripts, symbols, private use, combining marks, controls, beyond the basic plane, non-characters
BLOCKS = (
    "20-7e a0-17f 300-36f 370-3ff 400-4ff 530-58f 590-5ff 600-6ff 900-97f 980-9ff e00-e7f "
    "10a0-10ff 1200-137f 1780-17ff 2000-206f 2190-21ff 2581-2581 3040-30ff 4e00-9fff ac00-d7a3 "
    "e000-e0ff fe00-fe0f ff00-ffef fff0-ffff 1f300-1faff 10000-10ffff 0-1f 80-9f"
)


def generate(count: int, seed: int) -> list[str]:
    """Mix words of twenty languages with whatever else people and programs put into a text."""
    draw = random.Random(seed)
    words = [word for group in data.sentences().values() for text in group for word in text.split()]
    blocks = [tuple(int(end, 16) for end in block.split("-")) for block in BLOCKS.split()]
    prompts = ["", *sorted(set(TRAINED_PROMPTS.values()))]

    def part() -> str:
        kind = draw.random()
        if kind < 0.5:
            return draw.choice(words)
        if kind < 0.8:
            low, high = draw.choice(blocks)
            return "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 8)))
        return draw.choice(SPECIAL if kind < 0.9 else CLUSTERS)

    return [
        draw.choice(prompts)
        + "".join(part() + draw.choice(BETWEEN) for _ in range(draw.randint(0, 20)))
        for _ in range(count)
    ]


LONG = ("", " ", "\n", "</s>", "<mask>", "\x00", "a" * 5000, "ab " * 1000, "语" * 2000, "潮 " * 600)
TEXTS = [*LONG, *generate(4000, seed=0)]


def charsmap(replacements: dict[str, str]) -> bytes:
    """A character map as SentencePiece stores it: a double-array trie of UTF-8, then what it finds.

    Every node has a block of 256 units of its own, which wastes space and spares a search.
    """
    found = b""
    # the root's unit stands alone in the first block
    units = [0] * 256

    def place(node: dict[Any, Any], position: int) -> None:
        block = len(units)
        units.extend([0] * 256)
        units[position] |= (position ^ block) << 10
        if None in node:
            units[position] |= 1 << 8
            units[block] = 1 << 31 | node[None]
        for byte, child in node.items():
            if byte is not None:
                units[block ^ byte] = byte
                place(child, block ^ byte)

    root: dict[Any, Any] = {}
    for text, replacement in replacements.items():
        node = root
        for byte in text.encode():
            node = node.setdefault(byte, {})
        node[None] = len(found)
        found += replacement.encode() + b"\0"
    place(root, 0)
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + found


def compatibility_characters() -> dict[str, str]:
    """Part of what XLM-R's own map does: wide forms, ligatures, circled digits, odd spaces."""
    codes = [*range(0xFF01, 0xFF5E), *range(0xFB00, 0xFB07), *range(0x2460, 0x2474), 0x3000, 0xA0]
    folded = {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in codes}
    return folded | {"\t": " ", "\n": " ", "\u200b": " ", "e\u0301": "é"}


def with_normalizer(folder: Path, normalizer: normalizers.Normalizer) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = normalizer
    backend.save(str(folder / "tokenizer.json"))


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "tiny"
    shutil.copytree(tiny_folder, copy)
    return copy


def assert_same(folder: Path, texts: list[str], max_length: int) -> None:
    ours = Tokenizer(folder / "tokenizer.json", VOCABULARY)(texts, max_length)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, truncation=True, max_length=max_length
    )["input_ids"]
    for text, expected, ids in zip(texts, theirs, ours.ids, strict=True):
        assert ids == expected, f"{text!r} differs"
    assert all(ids[0] == 0 and ids[-1] == 2 and len(ids) <= max_length for ids in ours.ids)


@pytest.mark.parametrize("max_length", [512, 64, 8, 3])
def test_ids_are_those_of_transformers(max_length: int, tiny_folder: Path) -> None:
    cut = Tokenizer(tiny_folder / "tokenizer.json", VOCABULARY)(TEXTS, max_length).cut
    assert len(cut) >= 3
    assert_same(tiny_folder, TEXTS, max_length)


def test_texts_reach_the_special_tokens(tiny_folder: Path) -> None:
    """Special tokens written in a text count as such, `<pad>` too: its row is no filling."""
    tokenizer = Tokenizer(tiny_folder / "tokenizer.json", VOCABULARY)
    ids = tokenizer(["a<pad>b</s> <mask>"], 512).ids[0]
    assert ids[-1] == 2
    assert {1, 2, tokenizer.backend.token_to_id("<mask>")} <= set(ids[1:-1])
    known = {one for row in tokenizer(TEXTS, 512).ids for one in row}
    assert len(known) > 0.5 * VOCABULARY


def test_stored_cuts_and_padding_are_overridden(folder: Path) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=40, pad_id=1, pad_token="<pad>")
    backend.save(str(folder / "tokenizer.json"))
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert stored["truncation"]
    assert stored["padding"]
    assert_same(folder, TEXTS[:200], 512)


def test_character_map(folder: Path) -> None:
    """The real tokenizer has one, and transformers carries it over into what it rebuilds."""
    normalizer = normalizers.Precompiled(charsmap(compatibility_characters()))
    assert normalizer.normalize_str("Ａ１\u3000ﬁ①\tb\u200be\u0301xé") == "A1 fi1 b éxé"
    with_normalizer(folder, normalizer)
    for max_length in (512, 8):
        assert_same(folder, TEXTS, max_length)
    tokenizer = Tokenizer(folder / "tokenizer.json", VOCABULARY)
    wide, plain = tokenizer(["ｔｈｅ\u3000ｔｉｄｅ", "the tide"], 512).ids
    assert wide == plain


def test_another_normalizer_is_kept_here_and_dropped_there(folder: Path) -> None:
    """Why the synthetic tokenizer has none."""
    with_normalizer(folder, normalizers.Lowercase())
    loud, quiet = Tokenizer(folder / "tokenizer.json", VOCABULARY)(["TIDE", "tide"], 512).ids
    assert loud == quiet
    with pytest.raises(AssertionError, match="'TIDE' differs"):
        assert_same(folder, ["tide", "TIDE"], 512)
