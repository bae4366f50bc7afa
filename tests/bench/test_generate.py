"""Tests the memory limits of benchmark processes."""

import math

from minikv_jax.bench.generate import memory_fraction


def test_a_limit_is_not_exceeded_by_rounding():
    total, region = 150_109_945_856, 1 << 21  # an H200; its allocator takes whole regions
    for limit in (40_000_000_000, 80_000_000_000, 39_999_999_999, region):
        taken = math.ceil(float(f"{memory_fraction(limit, total):.6f}") * total / region) * region
        assert limit - 2 * region <= taken <= limit
