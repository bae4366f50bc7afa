"""Tests the padding of prompts: buckets and `pad_prompts`."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minikv_jax.prompts import bucket_length, pad_prompts

cheap = settings(max_examples=50, deadline=None, derandomize=True)
LENGTHS = st.integers(1, 1 << 20)


@cheap
@given(tokens=LENGTHS)
def test_a_bucket_pads_by_a_quarter_at_most(tokens: int):
    """This holds beyond 64 tokens, and padding twice equals padding once."""
    bucket = bucket_length(tokens)
    assert tokens <= bucket <= max(64, 1.25 * tokens)
    assert bucket_length(bucket) == bucket


@cheap
@given(tokens=LENGTHS, more=LENGTHS)
def test_buckets_are_few_and_in_order(tokens: int, more: int):
    """There are at most eight per power of two, and a longer prompt never gets a shorter bucket."""
    bucket = bucket_length(tokens)
    assert bucket_length(tokens + more) >= bucket
    assert bucket % 64 == 0 or bucket % (1 << ((tokens - 1).bit_length() - 3)) == 0


@cheap
@given(tokens=LENGTHS, limit=LENGTHS)
def test_a_limit_caps_the_padding_but_never_the_prompt(tokens: int, limit: int):
    assert bucket_length(tokens, limit) == max(tokens, min(bucket_length(tokens), limit))


@cheap
@given(rows=st.lists(st.lists(st.integers(0, 95), min_size=1, max_size=90), min_size=1, max_size=4))
def test_rows_are_padded_on_the_right(rows: list[list[int]]):
    ids, lengths = pad_prompts(rows, 96, 512)
    assert ids.dtype == lengths.dtype == np.int32
    assert ids.shape == (len(rows), bucket_length(max(map(len, rows))))
    for padded, length, row in zip(ids, lengths, rows, strict=True):
        assert padded[:length].tolist() == row
        assert not padded[length:].any()
