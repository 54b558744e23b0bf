"""CLIP's byte-level BPE tokenizer, in Stable Diffusion's own files.

`vocab.json` maps tokens to ids and `merges.txt` lists the merges in order of priority, both over
bytes spelt as printable characters, with `</w>` at the end of a word (Sennrich et al., 2016;
Radford et al., 2021). The merging itself is done by the `tokenizers` library; here it is configured
so that every id equals that of `transformers.CLIPTokenizer`.
"""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from segdiff_jax import files, stored
from segdiff_jax.errors import UserError

# The library's threads are not needed, and warn when a data worker is forked after their start.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
END_OF_WORD = "</w>"
# How CLIP cuts text into words: specials, English clitics, runs of letters, single digits, rest.
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_ROLES = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
_FLAGS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")


class Tokenizer:
    """Texts to token ids.

    Args:
      vocab: token -> id.
      merges: pairs of tokens, highest priority first.
      roles: which token plays `bos_token`, `eos_token`, `unk_token` and `pad_token`. Missing ones
        are CLIP's. SD1 pads with the end token, SD2 with "!" (id 0).
      added: tokens that are cut out of a text before anything else. Those of `roles` always are.
      model_max_length: length of every row of ids.

    Raises:
      UserError: the vocabulary and the merges do not fit each other, or lack a special token.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        roles: dict[str, str] | None = None,
        added: Iterable[AddedToken] = (),
        model_max_length: int = 77,
    ):
        if model_max_length < 3:
            raise UserError(
                f"tokenizer: model_max_length={model_max_length} leaves no room for text"
            )
        self.roles = _ROLES | (roles or {})
        self.model_max_length = model_max_length
        self._vocab, self._merges = dict(vocab), [tuple(merge) for merge in merges]
        self._backend = _backend(self._vocab, self._merges, self.roles["unk_token"])
        specials = [AddedToken(self.roles[role], special=True) for role in _ROLES]
        distinct = {token.content: token for token in [*specials, *added]}
        self._backend.add_tokens(list(distinct.values()))
        missing = [self.roles[role] for role in _ROLES if self.roles[role] not in vocab]
        if missing:
            raise UserError(
                f"tokenizer: {missing[0]!r} is not in the vocabulary: wrong vocab.json?"
            )
        self.bos_id, self.eos_id, self.pad_id = (
            vocab[self.roles[role]] for role in ("bos_token", "eos_token", "pad_token")
        )
        self._backend.post_processor = processors.RobertaProcessing(
            (self.roles["eos_token"], self.eos_id),
            (self.roles["bos_token"], self.bos_id),
            trim_offsets=False,
            add_prefix_space=False,
        )
        self._backend.enable_truncation(model_max_length)
        self._backend.enable_padding(
            length=model_max_length, pad_id=self.pad_id, pad_token=self.roles["pad_token"]
        )

    @property
    def vocab_size(self) -> int:
        """Number of rows the text encoder's embedding needs."""
        return self._backend.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return int32 ids [B, model_max_length]: start, text, end, padding.

        A text that is too long loses its tail; the end token stays.
        """
        ids = [found.ids for found in self._backend.encode_batch(list(texts))]
        return np.asarray(ids, np.int32).reshape(len(ids), self.model_max_length)

    def kept(self, text: str) -> int:
        """Count the characters of `text` that its ids stand for: not all if it is too long."""
        found = self._backend.encode(text)
        if not found.overflowing:
            return len(text)
        return max(end for _, end in found.offsets)

    @staticmethod
    def load(directory: os.PathLike[str] | str) -> "Tokenizer":
        """Read a `tokenizer/` folder, local or `gs://`.

        Needs `vocab.json` and `merges.txt`, or the `tokenizer.json` that transformers 5 writes
        instead. Special tokens come from `tokenizer_config.json` and `special_tokens_map.json`.
        Raises `UserError` naming the file that is missing or broken.
        """
        folder = epath.Path(directory)
        config = _read_optional(folder / "tokenizer_config.json")
        length = config.get("model_max_length", 77)
        if not isinstance(length, int | float):
            raise UserError(f"{folder}/tokenizer_config.json: model_max_length must be a number")
        length = int(length) if length < 1e6 else 77  # transformers writes 1e30 for "not known"
        try:
            roles, added = _special_tokens(folder, config)
            vocab, merges = _vocabulary(folder)
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise UserError(f"{folder}: damaged tokenizer files ({error}): fetch again") from error
        try:
            return Tokenizer(vocab, merges, roles, added, length)
        except (UserError, TypeError) as error:
            raise UserError(f"{folder}: {error}") from error

    def save(self, directory: os.PathLike[str] | str) -> None:
        """Write the four files that `load` and `transformers.CLIPTokenizer` read."""
        folder = epath.Path(directory)
        vocab = dict(sorted(self._vocab.items(), key=lambda item: item[1]))
        merges = "".join(f"{left} {right}\n" for left, right in self._merges)
        added = self._backend.get_added_tokens_decoder()  # id -> AddedToken
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.model_max_length,
            "do_lower_case": True,
            "added_tokens_decoder": {str(i): _to_json(added[i]) for i in sorted(added)},
            **self.roles,
        }
        files.write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
        files.write_text(folder / "merges.txt", "#version: 0.2\n" + merges)
        files.write_json(folder / "tokenizer_config.json", config)
        files.write_json(folder / "special_tokens_map.json", self.roles)


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int = 77) -> Tokenizer:
    """Train a tokenizer whose merges are learnt from `texts` (byte pairs, Sennrich et al., 2016).

    Deterministic. The vocabulary is laid out as CLIP's: 256 bytes, 256 bytes that end a word,
    merges, start, end. It has at most `vocab_size` tokens, and fewer once every word of `texts` is
    a single token.

    Raises `UserError` if `vocab_size` has no room for the bytes.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + END_OF_WORD for letter in letters]
    room = vocab_size - len(tokens) - 2
    if room < 0:
        raise UserError(f"tokenizer: vocab_size={vocab_size} is below {len(tokens) + 2}: raise it")
    backend = _backend({EOS: 0}, [], EOS)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=letters,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # Of its vocabulary only the merges: it has no room for the ends of words that `texts` lack.
    merges: list[tuple[str, str]] = []
    made: set[str] = set()
    for left, right in json.loads(backend.to_str())["model"]["merges"]:
        if len(made) < room:
            merges.append((left, right))
            made.add(left + right)
    tokens += [left + right for left, right in merges]
    tokens = list(dict.fromkeys(tokens)) + [BOS, EOS]
    vocab = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(vocab, merges, model_max_length=model_max_length)


def _backend(
    vocab: dict[str, int], merges: Sequence[Sequence[str]], unknown: str
) -> tokenizers.Tokenizer:
    try:
        model = BPE(
            vocab=vocab,
            merges=[(left, right) for left, right in merges],
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
            fuse_unk=False,
            unk_token=unknown,
        )
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())
        raise UserError(f"vocab.json and merges.txt do not fit each other ({reason})") from error
    backend = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    return backend


def _vocabulary(folder: epath.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    whole = folder / "tokenizer.json"
    if not (folder / "vocab.json").exists() and whole.exists():
        model = stored.read_object(whole).get("model", {})
        vocab, lines = model.get("vocab", {}), model.get("merges", [])
        pairs = [line.split(" ") if isinstance(line, str) else line for line in lines]
        source = whole
    else:
        vocab = stored.read_object(folder / "vocab.json")
        source = folder / "merges.txt"
        # Not splitlines(): merges contain characters that Unicode counts as line ends.
        lines = stored.read_text(source).replace("\r\n", "\n").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    broken = next((pair for pair in pairs if len(pair) != 2), None)
    if broken is not None:
        raise UserError(f"{source}: {' '.join(broken)!r} is not a merge of two: fetch it again")
    return vocab, [(left, right) for left, right in pairs]


def _read_optional(path: epath.Path) -> dict[str, Any]:
    with files.reading(path):
        return stored.read_object(path) if path.exists() else {}


def _special_tokens(
    folder: epath.Path, config: dict[str, Any]
) -> tuple[dict[str, str], list[AddedToken]]:
    """Return roles and added tokens, with the precedence of transformers 5.

    `special_tokens_map.json` beats `tokenizer_config.json`, unless the latter lists
    `added_tokens_decoder`, as transformers 4 wrote it. Version 5 keeps that in `tokenizer.json`.
    """
    values: dict[str, Any] = _ROLES | {r: config[r] for r in _ROLES if config.get(r)}
    listed = config.get("added_tokens_decoder")
    if listed is None:
        extra = _read_optional(folder / "special_tokens_map.json")
        values |= {role: extra[role] for role in _ROLES if extra.get(role)}
        whole = _read_optional(folder / "tokenizer.json")
        listed = {token["id"]: token for token in whole.get("added_tokens", [])}
    # A token can have several roles, with other flags in each: the last role decides. So SD1, which
    # pads with the end token, does not find "<|ENDOFTEXT|>" in a text, but SD2 does.
    added = [_from_json(values[role]) for role in _ROLES]
    added += [_from_json(listed[i]) for i in sorted(listed, key=int)]
    roles = {r: v["content"] if isinstance(v, dict) else v for r, v in values.items()}
    return roles, added


def _from_json(value: str | dict[str, Any]) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    return AddedToken(**({"special": True} | {f: value[f] for f in _FLAGS if f in value}))


def _to_json(token: AddedToken) -> dict[str, Any]:
    return {flag: getattr(token, flag) for flag in _FLAGS}
