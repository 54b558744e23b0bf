"""The tokenizer against transformers.CLIPTokenizer, with CLIP's real vocabulary."""

import gzip
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from segdiff_jax.errors import UserError
from segdiff_jax.text.tokenizer import Tokenizer, train_tokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def _write_clip_vocabulary(folder: Path) -> None:
    """`vocab.json` and `merges.txt` out of OpenAI's list of merges, which `openai-clip` ships."""
    package = importlib.metadata.distribution("openai-clip")
    packed = Path(str(package.locate_file("clip/bpe_simple_vocab_16e6.txt.gz")))
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += ["".join(line.split()) for line in lines] + [BOS, EOS]
    vocab = {token: i for i, token in enumerate(tokens)}
    assert len(vocab) == 49408
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "#version: 0.2\n" + "\n".join(lines) + "\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")


def _write_stable_diffusion(folder: Path, pad: str) -> Path:
    """A tokenizer folder with the special-token files of SD1 (`pad` = end) or SD2 (`pad` = "!")."""
    _write_clip_vocabulary(folder)
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    roles = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
    special = {role: {"content": token} | flags for role, token in roles.items()}
    config = {role: {"__type": "AddedToken"} | value for role, value in special.items()}
    config |= {"pad_token": EOS, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": pad}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def folder(request, tmp_path_factory) -> Path:
    pad = {"sd1": EOS, "sd2": "!"}[request.param]
    return _write_stable_diffusion(tmp_path_factory.mktemp(request.param), pad)


def _expected(tokenizer: CLIPTokenizer, texts: list[str]) -> np.ndarray:
    length = tokenizer.model_max_length
    return np.array(
        tokenizer(texts, padding="max_length", truncation=True, max_length=length)["input_ids"]
    )


# Words, contractions, numbers and white space; spellings of the special tokens; scripts, emoji.
PIECES = "a photo of the Building, edifice grandstand don't we'll IT'S 3rd 1024 café naïve"
PIECES += " <|endoftext|> <|StartOfText|> ! !!! … ﬁ İ ß 👩‍👩‍👧‍👦"
PIECES += " 建物 고양이 кошка γάτα חתול आसमान ｆｕｌｌ"
PIECES = [*PIECES.split(" "), "e\u0301", "\u3000", "\x07", "\t\n"]
PIECE = st.sampled_from(PIECES) | st.text(max_size=8)
TEXT = st.tuples(st.sampled_from(["", " "]), st.lists(PIECE, max_size=90))
TEXTS = st.lists(TEXT.map(lambda parts: parts[0].join(parts[1])), min_size=1, max_size=4)
FIXED = ["", " ", "\n", *PIECES, " ".join(PIECES), "".join(PIECES), "cat " * 200]


@pytest.fixture(scope="module")
def clip_pair(folder):
    return Tokenizer.load(folder), CLIPTokenizer.from_pretrained(folder)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_ids_equal_transformers_on_any_text(clip_pair, texts):
    ours, theirs = clip_pair
    ids = ours(texts)
    assert ids.dtype == np.int32 and ids.shape == (len(texts), 77)
    np.testing.assert_array_equal(ids, _expected(theirs, texts))


def test_layout_of_a_row(clip_pair):
    tokenizer, _ = clip_pair
    (row,) = tokenizer(["a photo of a cat"])
    # Golden: these ids are the same in every release of CLIP's vocabulary.
    assert row[:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (row[7:] == tokenizer.pad_id).all()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (49406, 49407, 49408)
    (row,) = tokenizer(["cat " * 200])
    assert row[0] == tokenizer.bos_id and row[-1] == tokenizer.eos_id and (row[1:-1] == 2368).all()
    assert tokenizer([]).shape == (0, 77)


def test_padding_of_the_two_releases(clip_pair):
    tokenizer, _ = clip_pair
    two = tokenizer.roles["pad_token"] == "!"
    assert tokenizer.pad_id == (0 if two else 49407)
    # "!" is SD2's padding token, and is also read as such within a text.
    assert tokenizer(["hi!"])[0, 2] == (0 if two else 256)


def test_save_round_trip(clip_pair, tmp_path):
    ours, theirs = clip_pair
    expected = ours(FIXED)
    ours.save(tmp_path / "ours")
    np.testing.assert_array_equal(Tokenizer.load(tmp_path / "ours")(FIXED), expected)
    again = CLIPTokenizer.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(_expected(again, FIXED), expected)
    # transformers 5 writes one tokenizer.json instead of vocab.json and merges.txt
    theirs.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "vocab.json").exists()
    np.testing.assert_array_equal(Tokenizer.load(tmp_path / "theirs")(FIXED), expected)


PROMPTS = [
    f"a photo of a {texture} {color} {shape}"
    for texture in ("striped", "dotted", "plain")
    for color in ("blue", "red", "green", "yellow")
    for shape in ("triangle", "circle", "square", "star")
]


def test_trained_words_become_single_tokens():
    tokenizer = train_tokenizer(PROMPTS, vocab_size=1000, model_max_length=16)
    ids = tokenizer(PROMPTS)
    assert ids.shape == (48, 16) and tokenizer.vocab_size <= 1000
    assert (ids[:, 8] == tokenizer.eos_id).all()  # start, seven words, end
    assert len({tuple(row) for row in ids}) == 48
    assert tokenizer.eos_id == tokenizer.vocab_size - 1 == ids.max()


def test_trained_saves_for_transformers(tmp_path):
    tokenizer = train_tokenizer(PROMPTS, vocab_size=560, model_max_length=40)
    assert tokenizer.vocab_size == 560
    tokenizer.save(tmp_path)
    texts = [*PROMPTS, *FIXED]
    np.testing.assert_array_equal(Tokenizer.load(tmp_path)(texts), tokenizer(texts))
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 40
    np.testing.assert_array_equal(_expected(theirs, texts), tokenizer(texts))


def test_frequent_words_come_first():
    texts = ["sky"] * 50 + ["road"] * 10 + ["zyx"]
    tokenizer = train_tokenizer(texts, vocab_size=514 + 5, model_max_length=8)
    words = tokenizer(["sky", "road", "zyx"])
    assert (words == tokenizer.eos_id).argmax(axis=1).tolist() == [2, 2, 4]


def test_training_is_the_same_in_every_process(tmp_path):
    texts = ["abc bcd cde dea eab", "xyz yzx zxy"]
    train_tokenizer(texts, 530).save(tmp_path / "here")
    code = "import sys; from segdiff_jax.text.tokenizer import train_tokenizer\n"
    code += f"train_tokenizer({texts}, 530).save(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def _break(name, content):
    def apply(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break("vocab.json", None), "vocab.json: no such file"),
        (_break("merges.txt", None), "merges.txt: no such file"),
        (_break("vocab.json", '{"a": 1'), "vocab.json: not valid JSON"),
        (_break("vocab.json", "[]"), "vocab.json: holds no JSON object"),
        (_break("vocab.json", '{"a": 0}'), "do not fit"),
        (_break("merges.txt", "#version: 0.2\na b c\n"), "'a b c' is not a merge"),
        (_break("merges.txt", "#version: 0.2\nqqq zzz\n"), "do not fit"),
        (_break("tokenizer_config.json", '{"model_max_length": 2}'), "leaves no room"),
        (_break("tokenizer_config.json", '{"model_max_length": "x"}'), "tokenizer_config.json"),
        (_break("tokenizer_config.json", '{"pad_token": "<pad>"}'), "'<pad>' is not in"),
    ],
)
def test_broken_folder(tmp_path, damage, message):
    train_tokenizer(PROMPTS, vocab_size=600).save(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        Tokenizer.load(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_vocabulary_without_room():
    with pytest.raises(UserError, match="vocab_size=100"):
        train_tokenizer(PROMPTS, vocab_size=100)
