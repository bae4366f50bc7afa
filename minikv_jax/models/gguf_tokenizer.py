"""Builds a transformers tokenizer from the vocabulary in a GGUF file, without torch or network."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from minikv_jax import checks, schemas
from minikv_jax.models import bounds
from minikv_jax.models.gguf_file import GGUFFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Values of `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4

# Regular expressions that split a text into words before byte-pair merging, as in the models' training.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {"llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}", "qwen2": rf"{_WORDS}|\p{{N}}|{_OTHERS}"}
_GPT2_SPLITS = ("gpt-2", "default", "smollm")
PRE_TOKENIZERS = (*_SPLITS, *_GPT2_SPLITS)


class _Tokenizer(schemas.Schema, extra="ignore"):
    """Metadata keys under `tokenizer.ggml`."""

    model: Literal["gpt2", "llama"]
    pre: str = "default"
    tokens: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(min_length=1)]
    merges: list[str] | None = None
    scores: list[float] | None = None
    token_type: list[int] | None = None
    bos_token_id: bounds.Token | None = None
    eos_token_id: bounds.Token | None = None
    unknown_token_id: bounds.Token | None = None
    padding_token_id: bounds.Token | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool = False
    add_space_prefix: bool = True

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Checks that the lists and ids match the tokens."""
        needed = "merges" if self.model == "gpt2" else "scores"
        if getattr(self, needed) is None:
            raise ValueError(f"{needed} is missing, which model {self.model!r} needs")
        if self.model == "gpt2" and self.pre not in PRE_TOKENIZERS:
            raise ValueError(f"pre is {checks.shown(self.pre)}; accepted: {', '.join(PRE_TOKENIZERS)}")
        size = len(self.tokens)
        for name, values in (("scores", self.scores), ("token_type", self.token_type)):
            if values is not None and len(values) != size:
                raise ValueError(f"{name} has {len(values)} entries; accepted: {size}, one for each token")
        for name in ("bos", "eos", "unknown", "padding"):
            if (token := getattr(self, f"{name}_token_id")) is not None and token >= size:
                raise ValueError(f"{name}_token_id is {token}; accepted: 0 to {size - 1}, the tokens")
        if len(set(self.tokens)) < size:
            twice = next(token for token, count in collections.Counter(self.tokens).items() if count > 1)
            raise ValueError(f"token {checks.shown(twice)} appears twice")
        return self


class _Template(schemas.Schema, extra="ignore"):
    """Metadata key under `tokenizer` with the chat template."""

    chat_template: str | None = None


def tokenizer_from_gguf(file: GGUFFile) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of a GGUF file, with its chat template.

    Supports byte-level BPE ("gpt2": Llama 3, SmolLM2, Qwen) and SentencePiece BPE ("llama": Llama 2, Mistral).

    Raises:
      ValueError: another kind of tokenizer, or a vocabulary that is missing or inconsistent. The message names the
        file.
    """
    values = file.section(_Tokenizer, "tokenizer.ggml")
    template = file.section(_Template, "tokenizer").chat_template
    try:
        backend = _backend(values)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{file.path}: no tokenizer can be made of its vocabulary: {checks.reason(error)}") from error
    named = {
        f"{name}_token": values.tokens[token]
        for name, token in (
            ("bos", values.bos_token_id),
            ("eos", values.eos_token_id),
            ("unk", values.unknown_token_id),
            ("pad", values.padding_token_id),
        )
        if token is not None
    }
    from transformers import PreTrainedTokenizerFast  # imported here, because it imports torch, which takes seconds

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=str(file.path),
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **named,
    )


def _backend(values: _Tokenizer) -> Tokenizer:
    """Builds the tokenizer with its added tokens, and the first and last token of every text."""
    backend = _byte_level(values) if values.model == "gpt2" else _sentence_piece(values)
    types = values.token_type or []
    for added_type, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, token_type in zip(values.tokens, types, strict=False) if token_type == added_type]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    starts_with_bos = values.add_bos_token
    if starts_with_bos is None:
        starts_with_bos = values.model == "llama" or values.pre == "llama-bpe"
    first = [values.bos_token_id] if starts_with_bos else []
    last = [values.eos_token_id] if values.add_eos_token else []
    _add_ends(backend, values.tokens, *([token for token in end if token is not None] for end in (first, last)))
    return backend


def _byte_level(values: _Tokenizer) -> Tokenizer:
    """Builds a byte-level BPE as GPT-2's: bytes as printable characters, merged by rank within words."""
    pre, merges = values.pre, [_pair(merge) for merge in values.merges or []]
    # No chain of merges reaches some words of Llama 3's vocabulary; such words are one token.
    model = BPE(vocab=_ids(values.tokens), merges=merges, ignore_merges=pre == "llama-bpe")
    backend = Tokenizer(model)
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        words: list[pre_tokenizers.PreTokenizer] = [
            split,
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        words = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if pre == "smollm":
        words.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise ValueError(f"merge {checks.shown(merge)}: expected two pieces with a space between")
    return left, right


def _sentence_piece(values: _Tokenizer) -> Tokenizer:
    """Builds a SentencePiece BPE: spaces as U+2581, unknown characters as bytes, pieces merged by score."""
    ids = _ids(values.tokens)
    unknown = values.tokens[values.unknown_token_id or 0]
    merges = _merges_from_scores(ids, values.scores or [])
    backend = Tokenizer(BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = values.add_space_prefix
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefixed else [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return backend


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _merges_from_scores(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Lists the merges that SentencePiece implies: any two pieces that form a piece, best-scored piece first."""
    merges = []
    for piece, index in ids.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = sorted((ids[a], ids[b], a, b) for a, b in pairs if a in ids and b in ids)
        merges += [(-scores[index], left, right) for _, _, left, right in pairs]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def _add_ends(backend: Tokenizer, tokens: list[str], first: list[int], last: list[int]) -> None:
    """Makes the tokenizer add the first and last token that the model was trained with."""
    if not first + last:
        return
    single = [*(tokens[token] for token in first), "$A", *(tokens[token] for token in last)]
    pair = [*single, *(f"{part}:1".replace("$A", "$B") for part in single)]
    special = [(tokens[token], token) for token in dict.fromkeys(first + last)]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
