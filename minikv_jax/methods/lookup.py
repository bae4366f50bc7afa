"""Named methods: each a frozen `CacheConfig` with its paper's defaults. `dataclasses.replace` changes any field.

All of them choose tokens once, at prefill, and keep every generated token, as MiniKV does; H2O, TOVA and StreamingLLM
evict during generation too, which is `evict_every=1` here.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping

from minikv_jax.methods import calibrated as calibration
from minikv_jax.methods import quantizers, scorers  # noqa: F401  (they register the schemes named here)
from minikv_jax.methods.base import METHODS, register_method, seal
from minikv_jax.methods.config import CacheConfig
from minikv_jax.ops import select  # noqa: F401

_MINIKV = CacheConfig(
    name="minikv",
    citation="MiniKV, arXiv 2411.18077: 25 % heavy hitters + 25 % recent window, 2 bits in groups of 16",
    scorer="cumulative",
    heavy=0.25,
    recent=0.25,
    k_bits=2,
    v_bits=2,
)
_KIVI = CacheConfig(
    name="kivi-2",
    citation="KIVI, arXiv 2402.02750: every token, 2 bits in groups of 32, the last 128 in full precision",
    k_bits=2,
    v_bits=2,
    group_size=32,
    residual="kivi",
)
_H2O = CacheConfig(
    name="h2o",
    citation="H2O, arXiv 2306.14048: 10 % heavy hitters + 10 % recent window",
    scorer="cumulative",
    heavy=0.1,
    recent=0.1,
)
_SNAPKV = CacheConfig(
    name="snapkv",
    citation="SnapKV, arXiv 2404.14469: 1024 tokens by the votes of the last 32 queries, max-pooled over 7",
    scorer="window",
    heavy=992,
    recent=32,
)
# Eviction to half costs little, two bits cost much, 8-bit metadata and a short tail free bytes: docs/results.md.
_TWIN = CacheConfig(
    name="twin-4bit",
    citation="minikv_jax: 44 % by the votes of a short and a long window + the newest 256, 4 bits, 8-bit metadata; "
    "no more bytes than minikv",
    scorer="twin-window",
    heavy=0.44,
    recent=256,
    sinks=4,
    observation_window=16,
    pooling_kernel=31,
    k_bits=4,
    v_bits=4,
    group_size=32,
    metadata_dtype="float8_e4m3fn",
    residual_length=32,
)

_PRESETS = (
    CacheConfig(name="full", citation="every token, in the model's dtype"),
    _KIVI,
    dataclasses.replace(_KIVI, name="kivi-4", k_bits=4, v_bits=4, citation=_KIVI.citation.replace("2 bits", "4 bits")),
    _H2O,
    _SNAPKV,
    dataclasses.replace(
        _SNAPKV,
        name="pyramidkv",
        citation="PyramidKV, arXiv 2406.02069: the votes of the last 8 queries, budgets falling linearly, beta 20",
        budget="pyramid",
        pyramid_beta=20.0,
        heavy=1016,
        recent=8,
        observation_window=8,
    ),
    CacheConfig(
        name="streaming-llm",
        citation="StreamingLLM, arXiv 2309.17453: 4 sink tokens + the newest 1020",
        sinks=4,
        recent=1020,
    ),
    CacheConfig(
        name="q-hitter",
        citation="Q-Hitter, MLSys 2024: heavy hitters + recent window (59 % as in MiniKV's table 1), 4 bits",
        scorer="cumulative",
        heavy=0.295,
        recent=0.295,
        k_bits=4,
        v_bits=4,
        group_size=32,
    ),
    CacheConfig(
        name="tova",
        citation="TOVA, arXiv 2401.06104: 20 % by the last query's weights, the same tokens for every head",
        scorer="tova",
        heavy=0.2,
        recent=0.0,
    ),
    CacheConfig(
        name="knorm",
        citation="Devoto et al., arXiv 2406.11430: the 50 % of keys with the smallest norm",
        scorer="knorm",
        heavy=0.5,
        recent=0.0,
    ),
    CacheConfig(
        name="keydiff",
        citation="KeyDiff, arXiv 2504.15364: the 20 % of keys least like their mean",
        scorer="keydiff",
        heavy=0.2,
        recent=0.0,
    ),
    CacheConfig(
        name="lagkv",
        citation="LagKV, arXiv 2504.04704: 25 % by spread against the next 128 tokens, 16 sinks",
        scorer="lagkv",
        heavy=0.25,
        recent=0.0,
        sinks=16,
    ),
    CacheConfig(
        name="expected-attention",
        citation="Expected Attention, arXiv 2510.00636: 50 % by what the next 512 queries are expected to pay, 4 sinks",
        scorer="expected-attention",
        heavy=0.5,
        recent=0.0,
        sinks=4,
    ),
    dataclasses.replace(
        _KIVI,
        name="kivi-2-hadamard",
        quantizer="hadamard",
        citation=_KIVI.citation + ", turned by a Hadamard matrix (QuaRot, arXiv 2404.00456)",
    ),
    CacheConfig(
        name="turboquant-4",
        citation="TurboQuant-MSE, arXiv 2504.19874: every token, 4 bits and a norm",
        quantizer="turboquant",
        k_bits=4,
        v_bits=4,
    ),
    CacheConfig(
        name="nvfp4",
        citation="NVFP4 (NVIDIA, 2025): every token, 4-bit floats, an 8-bit scale per 16 channels",
        quantizer="nvfp4",
        k_bits=4,
        v_bits=4,
    ),
    CacheConfig(
        name="fp8",
        citation="FP8, arXiv 2209.05433: every token, 8-bit floats (e4m3)",
        quantizer="fp8",
        k_bits=8,
        v_bits=8,
    ),
    _MINIKV,
    dataclasses.replace(
        _MINIKV,
        name="minikv-pyramid",
        budget="pyramid",
        citation=_MINIKV.citation + ", heavy budget falling linearly over layers",
    ),
    dataclasses.replace(
        _MINIKV,
        name="minikv-variance",
        budget="variance",
        citation=_MINIKV.citation + ", heavy budget by how spread out each layer's scores are",
    ),
    dataclasses.replace(
        _MINIKV,
        name="minikv-snap",
        scorer="window",
        citation=_MINIKV.citation + ", heavy hitters by SnapKV's observation window",
    ),
    _TWIN,
    dataclasses.replace(
        _TWIN,
        name="twin-4bit-half",
        citation="minikv_jax: as twin-4bit, 21 % + the newest 32; half of minikv's bytes",
        heavy=0.21,
        recent=32,
    ),
)
for _preset in _PRESETS:
    register_method(_preset)
seal()


def names() -> tuple[str, ...]:
    """The names that `get` accepts: the library's methods and those registered since."""
    return tuple(METHODS)


def get(name: str) -> CacheConfig:
    """The method called `name`, or that a directory is which `minikv calibrate` wrote; ValueError lists the names."""
    if not isinstance(name, str):
        raise ValueError(f"method {name!r}: expected a name")
    if name in METHODS:
        return METHODS[name]
    if calibration.is_calibration(name):
        return calibration.method(name)
    raise ValueError(f"method {name!r}: expected one of {', '.join(METHODS)}; or a calibration's directory")


def parse(text: str, settings: Iterable[tuple[str, str]] = ()) -> CacheConfig:
    """A method and changes to it, as command lines take them: `h2o`, or `h2o:heavy=0.25,recent=0.25`.

    `settings` are changes too (`override`); the text's own win over them.

    Raises:
      ValueError: an unknown method, field or value.
    """
    name, _, own = text.partition(":")
    changes = dict(settings)
    for setting in filter(None, own.split(",")):
        key, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"method {text!r}: expected NAME or NAME:KEY=VALUE,KEY=VALUE, got {setting!r}")
        changes[key] = value
    return override(get(name), changes)


def override(config: CacheConfig, settings: Mapping[str, str]) -> CacheConfig:
    """`config` with fields set from text, as in `--set heavy=0.5`: `0.5` is a share, `512` a count, `none` is None.

    A key may also be an option of the scorer, budget rule or quantiser that the method then has. Options of schemes
    that it no longer has are dropped.

    Raises:
      ValueError: an unknown field or a value of the wrong type or out of range, naming both.
    """
    for key, text in settings.items():
        if not isinstance(text, str):
            raise ValueError(f"{key}={text!r}: expected text, as on the command line; values go to dataclasses.replace")
    kinds = {key: kind for key, kind in typing.get_type_hints(CacheConfig).items() if key != "options"}
    fields = {key: _parse(key, text, kinds[key]) for key, text in settings.items() if key in kinds}
    plain = dataclasses.replace(config, **fields, options=())
    known = plain.option_defaults
    for key in settings:
        if key not in kinds and key not in known:
            raise ValueError(f"unknown setting {key!r}: expected one of {', '.join([*kinds, *known])}")
    options = {key: value for key, value in config.options if key in known}
    options |= {key: _parse(key, text, type(known[key])) for key, text in settings.items() if key not in kinds}
    return dataclasses.replace(plain, options=options)


def _parse(key: str, text: str, kind: object) -> object:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and text.lower() == "none":
        return None
    for option in (int, float, str):  # "512" is a count, "0.5" a share: the narrowest type that parses
        if option in options:
            try:
                return option(text)
            except ValueError:
                continue
    raise ValueError(
        f"{key}={text!r}: expected {' or '.join(getattr(option, '__name__', str(option)) for option in options)}"
    )
