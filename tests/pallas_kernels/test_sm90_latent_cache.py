"""The Hopper kernels of the latent cache: interpreted, lowered for CUDA, and on a card."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_latent_cache
from pallas_kernels.latent_cache import (
    append_latents,
    dequantize_latent_cache,
    quantize_latent_cache,
    write_latents,
)
from tests.pallas_kernels.test_latent_cache import (
    BF16,
    EPS,
    GARBAGE,
    as_bytes,
    assert_same_bytes,
    case,
    draw,
    projected,
    with_corners,
)

NAN_SAFE = {"xla_cpu_experimental_ynn_fusion_type": ""}  # that library's maximum loses NaN
DTYPES = [np.uint8, BF16]


def interpreted(kernel, *operands, capsys, **options):
    """Fails on a race."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    kernel = functools.partial(kernel, interpret=interpret, **options)
    found = jax.jit(kernel, compiler_options=NAN_SAFE)(*operands)
    jax.block_until_ready(found)
    assert "RACE" not in "".join(capsys.readouterr())
    return found


def reference(function, *operands, **options):
    """On the CPU also where there is a card."""
    with jax.default_device(jax.devices("cpu")[0]):
        operands = [jnp.asarray(np.asarray(x)) for x in operands]
        return jax.jit(functools.partial(function, backend="reference", **options))(*operands)


def latents(tokens):
    """float32 [n, 576] of an FP8 cache's tokens [n, 656]."""
    pages = np.asarray(tokens).reshape(-1, 1, 656).repeat(64, 1)
    return np.asarray(dequantize_latent_cache(pages)[:, 0], np.float32)


def assert_near(found, expected):
    """Nearly all the same; a number is at most a unit in the last place or a step of e4m3 off."""
    assert found.dtype == expected.dtype
    assert np.mean(as_bytes(found) != as_bytes(expected)) < 1e-2
    if found.dtype != np.uint8:
        one, other = (np.asarray(x, np.float32) for x in (found, expected))
        np.testing.assert_allclose(one, other, rtol=2**-7, atol=1e-6)
        return
    one, other = map(latents, (found, expected))
    np.testing.assert_allclose(one[..., 512:], other[..., 512:], rtol=2**-7, atol=1e-6)
    np.testing.assert_allclose(one[..., :512], other[..., :512], rtol=0.126, atol=2.0**-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "together"), [(3, 1, 1), (2, 3, 4)])
def test_append(b, t, together, dtype, capsys):
    cache, table, positions = case(b, t, dtype)
    operands = cache, with_corners(draw(9))[: b * t].reshape(b, t, 576), table, positions
    found = interpreted(sm90_latent_cache.append, *operands, together=together, capsys=capsys)
    assert_same_bytes(found, reference(append_latents, *operands))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_has_no_place_is_dropped(dtype, capsys):
    cache, _, _ = case(2, 1, dtype, max_pages=2)
    table = np.array([[3, GARBAGE], [-1, cache.shape[0]]], np.int32)
    positions = [[-1, 128, 64, 2**31 - 1], [-(2**31), 0, 64, -64]]
    operands = cache, draw(2, 4), table, np.array(positions, np.int32)
    found = interpreted(sm90_latent_cache.append, *operands, capsys=capsys)
    assert_same_bytes(found, cache)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "t", "weight_dtype", "together"), [(3, 1, np.float32, 1), (1, 5, BF16, 4)]
)
def test_write(b, t, weight_dtype, together, dtype, capsys):
    cache, table, positions = case(b, t, dtype)
    operands = cache, *projected(b, t, weight_dtype), table, positions
    found = interpreted(
        sm90_latent_cache.write, *operands, eps=EPS, together=together, capsys=capsys
    )
    expected = reference(write_latents, *operands, eps=EPS)
    written = (as_bytes(expected) != as_bytes(cache)).any(-1)
    assert written.sum() == b * t - 1
    assert_same_bytes(np.asarray(found)[~written], cache[~written])
    assert_near(np.asarray(found)[written], np.asarray(expected)[written])


def test_quantize(capsys):
    cache = with_corners(draw(64))[None]
    found = interpreted(sm90_latent_cache.quantize, cache, capsys=capsys)
    assert_same_bytes(found, reference(quantize_latent_cache, cache))


def shaped(b, t, dtype):
    """Operands of the writes behind the cache, as (append's, write's); the cache; the positions."""
    of = jax.ShapeDtypeStruct
    cache = of((50, 64, 656 if dtype == np.uint8 else 576), dtype)
    rows, paging = of((b, t, 576), BF16), (of((b, 7), jnp.int32), of((b, t), jnp.int32))
    norm_and_rotation = of((512,), jnp.float32), of((b, t, 32, 2), jnp.float32)
    return (cache, rows, *paging), (cache, rows, *norm_and_rotation, *paging)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["append", "write"])
@pytest.mark.parametrize(("b", "t"), [(128, 1), (3, 999)])
def test_lowers_for_cuda_in_place(b, t, name, dtype):
    """One kernel, of which the donated cache is an operand and the aliased result."""
    append, write = shaped(b, t, dtype)
    kernel = functools.partial(sm90_latent_cache.write, eps=EPS)
    kernel, operands = dict(append=(sm90_latent_cache.append, append), write=(kernel, write))[name]
    step = jax.jit(kernel, donate_argnums=0)
    lowered = step.trace(*operands).lower(lowering_platforms=("cuda",))
    (main,) = lowered.compiler_ir("stablehlo").body.operations
    (block,) = main.regions[0].blocks
    assert "tf.aliasing_output = 0" in str(main.attributes["arg_attrs"][0])
    *others, before, call, after, end = block.operations
    barrier = "stablehlo.optimization_barrier"
    assert before.operation.name == after.operation.name == barrier
    assert {other.operation.name for other in others} <= {"stablehlo.reshape"}
    assert all(block.arguments[0] not in other.operands for other in others)
    aliases = str(call.attributes["output_operand_aliases"])
    assert call.attributes["call_target_name"].value == "mosaic_gpu_v2"
    assert "output_tuple_indices = [], operand_index = 0," in aliases
    assert list(before.operands) == [block.arguments[0]]
    assert call.operands[0] == before.results[0]
    assert list(after.operands) == list(call.results)
    assert list(end.operands) == list(after.results)


@pytest.mark.parametrize("pages", [1, 40])
def test_quantize_lowers_for_cuda(pages):
    cache = jax.ShapeDtypeStruct((pages, 64, 576), BF16)
    jax.jit(sm90_latent_cache.quantize).trace(cache).lower(lowering_platforms=("cuda",))


def on_card(function, cache, *operands, **options):
    """The kernel's result, in the cache's own memory, after it has given it twice."""
    run = functools.partial(function, backend="mosaic_gpu", **options)
    in_place = jax.jit(run, donate_argnums=0)
    again = jax.jit(run)(cache, *operands)
    donated = jnp.array(cache)
    text = in_place.lower(donated, *operands).compile().as_text()
    assert not re.search(rf"= \w+\[{','.join(map(str, cache.shape))}\]\S* copy", text)
    place = donated.unsafe_buffer_pointer()
    found = in_place(donated, *operands)
    assert found.unsafe_buffer_pointer() == place
    assert_same_bytes(again, found)
    return np.asarray(found)


CARD_SIZES = [(1, 1), (2, 1), (128, 1), (512, 1), (128, 2), (3, 300), (5, 7), (7, 521)]
on_sizes = pytest.mark.parametrize(("b", "t"), CARD_SIZES)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def fresh():
    return int(np.random.default_rng().integers(1 << 30))


@pytest.mark.gpu
@of_dtypes
def test_card_a_layer_of_several(dtype):
    """XLA must not make one of the kernel and the slice or the update of the layers around it."""
    cache, table, positions = case(3, 2, dtype, max_pages=9, seed=1)
    layers, new = jnp.stack([jnp.asarray(cache)] * 3), draw(3, 2, seed=1)

    @jax.jit
    def step(layers):
        layers = layers[::-1]
        layer = append_latents(layers[1], new, table, positions, backend="mosaic_gpu")
        return layers.at[1].set(layer)

    expected = reference(append_latents, cache, new, table, positions)
    for found, wanted in zip(step(layers), (cache, expected, cache), strict=True):
        assert_same_bytes(found, wanted)


@pytest.mark.gpu
@of_dtypes
@on_sizes
def test_card_append(b, t, dtype):
    seed = fresh()
    print(f"seed {seed}")
    cache, table, positions = case(b, t, dtype, max_pages=9, seed=seed)
    new = draw(b, t, seed=seed)
    new.reshape(-1, 576)[: min(b * t, 9)] = with_corners(draw(9, seed=seed))[: b * t]
    found = on_card(append_latents, cache, new, table, positions)
    assert_same_bytes(found, reference(append_latents, cache, new, table, positions))


@pytest.mark.gpu
@of_dtypes
@on_sizes
@pytest.mark.parametrize("weight_dtype", [np.float32, BF16])
def test_card_write(b, t, dtype, weight_dtype):
    seed = fresh()
    print(f"seed {seed}")
    cache, table, positions = case(b, t, dtype, max_pages=9, seed=seed)
    operands = *projected(b, t, weight_dtype, seed=seed), table, positions
    found = on_card(write_latents, cache, *operands, eps=EPS)
    expected = np.asarray(reference(write_latents, cache, *operands, eps=EPS))
    written = np.zeros(cache.shape[:2], bool)
    request, token = np.nonzero(positions >= 0)
    at = positions[request, token]
    written[table[request, at // 64], at % 64] = True
    assert_same_bytes(found[~written], cache[~written])
    assert_near(found[written], expected[written])


@pytest.mark.gpu
@of_dtypes
def test_card_drops_what_has_no_place(dtype):
    cache, _, _ = case(2, 1, dtype, max_pages=2)
    table = jnp.array([[3, GARBAGE], [-1, cache.shape[0]]], jnp.int32)
    positions = jnp.array([[-1, 128, 64, 2**31 - 1], [-(2**31), 0, 64, -64]], jnp.int32)
    run = jax.jit(functools.partial(append_latents, backend="mosaic_gpu"))
    assert_same_bytes(run(cache, draw(2, 4), table, positions), cache)


@pytest.mark.gpu
@pytest.mark.parametrize("pages", [1, 15, 17, 300])
def test_card_quantize(pages):
    cache = draw(pages, 64, seed=fresh())
    cache[pages // 2] = with_corners(cache[pages // 2])
    run = jax.jit(functools.partial(quantize_latent_cache, backend="mosaic_gpu"))
    found = run(cache)
    assert_same_bytes(run(cache), found)
    assert_same_bytes(found, reference(quantize_latent_cache, cache))


@pytest.mark.gpu
@of_dtypes
def test_card_cache_beyond_32_bits(dtype):
    """More elements than an int32 counts: the last page, the first, and no other."""
    pages, width = (52_000, 656) if dtype == np.uint8 else (60_000, 576)
    cache = jnp.zeros((pages, 64, width), dtype)
    table = jnp.array([[pages - 1], [0]], jnp.int32)
    positions = jnp.array([[63], [0]], jnp.int32)
    down, weight, turn = projected(2, 1)
    run = functools.partial(write_latents, eps=EPS, backend="mosaic_gpu")
    found = jax.jit(run, donate_argnums=0)(cache, down, weight, turn, table, positions)
    written = np.argwhere((found != 0).any(-1))
    np.testing.assert_array_equal(written, [[0, 0], [pages - 1, 63]])
    small = np.zeros((2, 64, width), dtype)
    operands = down, weight, turn, np.array([[1], [0]], np.int32), positions
    expected = np.asarray(reference(write_latents, small, *operands, eps=EPS))
    assert_near(np.asarray(found[pages - 1, 63]), expected[1, 63])
    assert_near(np.asarray(found[0, 0]), expected[0, 0])


@pytest.mark.gpu
@of_dtypes
def test_card_many_steps_in_a_loop(dtype):
    """Each token of a prompt alone, by a loop that carries the cache, or all at once."""
    cache, table, _ = case(4, 1, dtype, max_pages=4)
    table = jnp.asarray(np.random.default_rng(0).permutation(16).reshape(4, 4), jnp.int32)
    new = jnp.asarray(draw(4, 256))
    each = jnp.broadcast_to(jnp.arange(256, dtype=jnp.int32), (4, 256))
    append = functools.partial(append_latents, backend="mosaic_gpu")

    def one_by_one(cache):
        def step(i, cache):
            token = jax.lax.dynamic_slice_in_dim(new, i, 1, axis=1)
            return append(cache, token, table, jnp.full((4, 1), i, jnp.int32))

        return jax.lax.fori_loop(0, 256, step, cache)

    at_once = jax.jit(append)(cache, new, table, each)
    assert_same_bytes(jax.jit(one_by_one)(cache), at_once)
