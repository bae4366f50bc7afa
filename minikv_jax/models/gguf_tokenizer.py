"""A transformers tokenizer from the vocabulary inside a GGUF file: no torch, no network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from minikv_jax.models.gguf import GGUFFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Values of tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4

# Regular expressions that cut a text into words before byte-pair merging, as the models were trained.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {"llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}", "qwen2": rf"{_WORDS}|\p{{N}}|{_OTHERS}"}
_GPT2_SPLITS = ("gpt-2", "default", "smollm")
PRE_TOKENIZERS = (*_SPLITS, *_GPT2_SPLITS)


def tokenizer_from_gguf(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer and chat template of a GGUF file.

    Byte-level BPE ("gpt2": Llama 3, SmolLM2, Qwen) and SentencePiece BPE ("llama": Llama 2, Mistral) are supported.
    Raises ValueError naming the file for other kinds or a missing vocabulary.
    """
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    kind, pre = values.get("model"), values.get("pre", "default")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{file.path}: tokenizer.ggml.model={kind!r}: expected gpt2 or llama")
    if kind == "gpt2" and pre not in PRE_TOKENIZERS:
        raise ValueError(f"{file.path}: tokenizer.ggml.pre={pre!r}: expected one of {', '.join(PRE_TOKENIZERS)}")
    needed = ("tokens", "merges") if kind == "gpt2" else ("tokens", "scores")
    if missing := [f"tokenizer.ggml.{key}" for key in needed if key not in values]:
        raise ValueError(f"{file.path} lacks {', '.join(missing)}")
    tokens: list[str] = values["tokens"]
    backend = _byte_level(values, pre) if kind == "gpt2" else _sentence_piece(values)
    types = values.get("token_type", [])
    for added_type, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, token_type in zip(tokens, types, strict=False) if token_type == added_type]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    starts_with_bos = values.get("add_bos_token", kind == "llama" or pre == "llama-bpe")
    _add_template(backend, values, bos=starts_with_bos, eos=values.get("add_eos_token", False))
    named = {
        f"{name}_token": tokens[values[f"{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"{key}_token_id" in values
    }
    from transformers import PreTrainedTokenizerFast  # not at the top: it brings torch along, seconds of every start

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _byte_level(values: dict[str, Any], pre: str) -> Tokenizer:
    """GPT-2 style: bytes as printable characters, merged by rank inside words."""
    merges = [tuple(merge.split(" ", 1)) for merge in values["merges"]]
    # Llama 3's vocabulary has words that no chain of its merges reaches; such words are one token.
    model = BPE(vocab=_ids(values["tokens"]), merges=merges, ignore_merges=pre == "llama-bpe")
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


def _sentence_piece(values: dict[str, Any]) -> Tokenizer:
    """SentencePiece BPE: spaces as U+2581, unknown characters as bytes, pieces merged by score."""
    ids = _ids(values["tokens"])
    unknown = values["tokens"][values.get("unknown_token_id", 0)]
    merges = _merges_from_scores(ids, values["scores"])
    backend = Tokenizer(BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = values.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefixed else [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return backend


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _merges_from_scores(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece keeps no merge list: any two pieces that make a piece merge, the best-scored piece first."""
    merges = []
    for piece, index in ids.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = sorted((ids[a], ids[b], a, b) for a, b in pairs if a in ids and b in ids)
        merges += [(-scores[index], left, right) for _, _, left, right in pairs]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def _add_template(backend: Tokenizer, values: dict[str, Any], *, bos: bool, eos: bool) -> None:
    """Makes encoding add the first and last token that the model was trained with."""
    first = ["bos"] if bos and "bos_token_id" in values else []
    last = ["eos"] if eos and "eos_token_id" in values else []
    if not first + last:
        return
    named = {name: (values["tokens"][values[f"{name}_token_id"]], values[f"{name}_token_id"]) for name in first + last}
    single = [*(named[name][0] for name in first), "$A", *(named[name][0] for name in last)]
    pair = [*single, *(f"{part}:1".replace("$A", "$B") for part in single)]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(dict.fromkeys(named.values()))
    )
