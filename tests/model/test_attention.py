"""The contiguous cache as pages, plans, and the attention of caches that no kernel takes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model.attention import attend_to_rows, lies_in_pages, pages_of, plan_decode
from pallas_kernels import mla_decode, plan_mla_decode
from tests.tiny import CONFIG

PUBLISHED = replace(CONFIG, kv_lora_rank=512, qk_rope_dim=64, heads=3)
SCALE = 0.07


@pytest.mark.parametrize(
    ("changes", "room", "dtype", "expected"),
    [({}, 128, jnp.bfloat16, True), ({}, 0, jnp.bfloat16, True), ({}, 100, jnp.bfloat16, False),
     ({}, 128, jnp.float32, False), ({"kv_lora_rank": 256}, 128, jnp.bfloat16, False),
     ({"qk_rope_dim": 32}, 128, jnp.bfloat16, False)],
)  # fmt: skip
def test_what_lies_in_pages_has_a_plan(changes, room, dtype, expected):
    config = replace(PUBLISHED, **changes)
    latents, lengths = jnp.zeros((3, 2, room, config.latent_dim), dtype), jnp.array([3, room])
    assert lies_in_pages(config, latents) is expected
    plan = plan_decode(config, latents, lengths, 2)
    assert (plan is not None) is expected
    if plan is not None:
        wanted = plan_mla_decode(jnp.array([3, room], jnp.int32), queries=2, heads=3)
        jax.tree.map(np.testing.assert_array_equal, plan, wanted)


@pytest.mark.parametrize("layer", [0, 2])
def test_pages_are_found_where_they_lie(layer):
    latents = jax.random.normal(jax.random.key(0), (3, 2, 192, 576), jnp.bfloat16)
    pages, table = jax.jit(pages_of)(latents, jnp.int32(layer))
    assert table.shape == (2, 3)
    assert table.dtype == jnp.int32
    np.testing.assert_array_equal(pages[table].reshape(2, 192, 576), latents[layer])


@pytest.mark.parametrize("t", [1, 3])
def test_rows_are_attended_to_as_pages(t):
    keys = jax.random.split(jax.random.key(t), 2)
    q = jax.random.normal(keys[0], (2, t, 3, 576), jnp.bfloat16)
    latents = jax.random.normal(keys[1], (2, 2, 128, 576), jnp.bfloat16)
    lengths = jnp.array([t, 100], jnp.int32)
    free = jnp.arange(128) >= lengths[:, None]
    latents = jnp.where(free[..., None], jnp.nan, latents)
    pages, table = pages_of(latents, 1)
    expected = mla_decode(q, pages, table, lengths, scale=SCALE, backend="reference")[0]
    wide = q.astype(jnp.float32), latents[1].astype(jnp.float32)
    found = attend_to_rows(*wide, lengths, rank=512, scale=SCALE)
    np.testing.assert_allclose(found, expected.astype(jnp.float32), rtol=2**-8, atol=1e-5)
    short = attend_to_rows(q, latents[1], lengths, rank=512, scale=SCALE)
    assert short.dtype == jnp.bfloat16
    np.testing.assert_allclose(short.astype(jnp.float32), found, rtol=0, atol=0.05)
