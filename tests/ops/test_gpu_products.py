"""The Pallas products: interpreted on the CPU against float64, and lowered for CUDA and TPU without either.

That they are the right program is shown here; that a GPU's compiler takes it, and how fast it is, is not.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from jax import export
from support import relative_l2
from support_blocks import QTYPES, by_gguf_py, random_blocks, with_scale

from scarlet_jax import configs, forward, gguf
from scarlet_jax.load import weights as load_weights
from scarlet_jax.model import Model
from scarlet_jax.ops import gpu, implementations
from scarlet_jax.ops.gpu import planes, products
from scarlet_jax.ops.matmul import embed
from scarlet_jax.ops.qtensor import QTensor, block_size
from scarlet_jax.sampling import Sampling
from scarlet_jax.span import Span

PACKED = [q for q in QTYPES if q not in ("F32", "F16", "BF16")]

# As in test_matmul: the same numbers on both sides, f32 products and f32 sums.
TOLERANCE = 2e-6

# What is interpreted is not worth optimising: compiling is all of its time.
QUICKLY = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
run = jax.jit(lambda x, w: gpu.qmatmul(x, w), compiler_options=QUICKLY)

every_type = pytest.mark.parametrize("qtype", PACKED)


def weight(qtype: str, out: int, blocks: int) -> tuple[QTensor, np.ndarray]:
    """Random blocks of unit scale, and their values f32 (out, in)."""
    rows = with_scale(qtype, random_blocks(qtype, out * blocks)).reshape(out, -1)
    values = by_gguf_py(qtype, rows.reshape(-1, block_size(qtype)[1])).reshape(out, -1)
    return QTensor(rows, qtype), values


def hollow(w: QTensor) -> planes.Planes:
    """The shapes of its planes: all that lowering asks for."""
    return jax.eval_shape(planes.pack, w)


def activations(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


@every_type
def test_planes_hold_the_very_values(qtype):
    out, blocks = 5, 11
    rows = random_blocks(qtype, out * blocks, seed=blocks).reshape(out, -1)
    if qtype == "MXFP4":  # a step below 2^-126 may be flushed: left out
        rows.reshape(out, blocks, -1)[..., 0] |= 0x80
    expected = by_gguf_py(qtype, rows.reshape(-1, block_size(qtype)[1])).reshape(out, -1)
    got = np.asarray(
        jax.jit(lambda w: planes.values(planes.pack(w)), compiler_options=QUICKLY)(QTensor(rows, qtype))
    )
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[finite], expected[finite])
    assert not np.isfinite(got[~finite]).any()


@every_type
def test_planes_are_hardly_larger_than_the_blocks(qtype):
    """One shape that every format fills. Codebooks are stored looked up, and grow; nothing else does by much."""
    elements, size = block_size(qtype)
    w = QTensor(np.zeros((3, 1024 // elements * size), np.uint8), qtype)
    packed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(hollow(w)))
    # By the layouts: 3 bits and a byte of scale per 16 or 32 for the grids, where the file has 1.6 to 3.4 bits;
    # f16 scales twice or four times as often for the formats of 64 and 128; 2 bits for 1.7 of TQ1_0.
    limit = {"IQ1_S": 2.12, "IQ1_M": 2.04, "IQ2_XXS": 1.61, "IQ2_XS": 1.55, "IQ2_S": 1.4, "IQ3_XXS": 1.41}
    limit |= {"IQ3_S": 1.26, "Q1_0": 1.34, "Q2_0": 1.12, "TQ1_0": 1.23, "Q2_K": 1.2, "MXFP4": 1.06}
    limit |= {"NVFP4": 1.12}
    assert packed <= limit.get(qtype, 1.04) * np.asarray(w.blocks).nbytes


# Rows of activations on both sides of the two kernels, and of a tile; weights of odd sizes, and large enough
# for several programs with an overlap.
@pytest.mark.parametrize(
    ("qtype", "batch", "out", "blocks"),
    [("Q4_K", 1, 1, 3), ("Q6_K", 3, 37, 8), ("Q4_K", 8, 6, 5), ("Q8_0", 9, 13, 1), ("Q5_K", 33, 70, 2)],
)
def test_product_of_any_size(qtype, batch, out, blocks):
    w, values = weight(qtype, out, blocks * 256 // block_size(qtype)[0])
    x = activations(batch, values.shape[1])
    with gpu.mode("interpreted"):
        got = run(x, w)
    assert got.dtype == jnp.float32
    assert relative_l2(got, x.astype(float) @ values.T.astype(float)) <= TOLERANCE


@every_type
def test_product_of_any_type(qtype):
    w, values = weight(qtype, out=7, blocks=3)
    x = activations(1, values.shape[1])
    with gpu.mode("interpreted"):
        got = run(x, w)
    assert relative_l2(got, x.astype(float) @ values.T.astype(float)) <= TOLERANCE


many = jax.jit(lambda x, ws: gpu.qmatmul_many(x, ws), compiler_options=QUICKLY)


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_products_of_one_input(batch):
    """Weights of several types and sizes, one that is no multiple of a program's rows, and one that is not packed."""
    sizes = {"Q4_K": 13, "Q6_K": 3, "Q8_0": 1, "IQ4_XS": 8}
    ws, values = zip(*(weight(q, out, 768 // block_size(q)[0]) for q, out in sizes.items()), strict=True)
    plain = activations(5, 768)
    x = activations(batch, 768)
    with gpu.mode("interpreted"):
        got = many(x, [*ws[:2], plain, *ws[2:]])
    for y, w in zip(got, [*values[:2], plain, *values[2:]], strict=True):
        assert relative_l2(y, x.astype(float) @ w.T.astype(float)) <= TOLERANCE


def test_bf16_activations():
    w, values = weight("Q4_K", out=70, blocks=3)
    x = activations(19, values.shape[1])
    with gpu.mode("interpreted"):
        got = products.qmatmul(jnp.asarray(x), planes.pack(w), activations=jnp.bfloat16)
    # Both sides are rounded to 8 bits, 2^-9 / sqrt(3) = 1.1e-3 each on average, and random errors add in squares.
    assert 5e-4 < relative_l2(got, x.astype(float) @ values.T.astype(float)) < 3e-3


def lowered(function, platform: str, *arguments) -> str:
    """The program for a platform that is not here."""
    allowed = [export.DisabledSafetyCheck.custom_call(gpu.CUSTOM_CALL)]
    with gpu.mode("elsewhere"):
        export_for = export.export(jax.jit(function), platforms=[platform], disabled_checks=allowed)
        return export_for(*arguments).mlir_module()


@pytest.mark.parametrize(
    ("qtype", "batch"), [*((q, 1) for q in PACKED), ("Q4_K", 8), ("Q4_K", 40), ("IQ3_S", 40), ("Q6_K", 40)]
)
def test_lowers_for_cuda_as_one_kernel(qtype, batch):
    w = hollow(weight(qtype, out=37, blocks=3)[0])
    text = lowered(products.qmatmul, "cuda", activations(batch, w.shape[1]), w)
    assert text.count(gpu.CUSTOM_CALL) == 1
    assert "stablehlo.dot_general" not in text  # nothing is left to XLA


def test_products_of_one_input_lower_for_cuda_as_one_kernel():
    ws = [hollow(weight(q, out, blocks=3)[0]) for q, out in (("Q4_K", 37), ("Q6_K", 5), ("Q5_K", 1))]
    x = activations(1, ws[0].shape[1])
    text = lowered(products.qmatmul_many, "cuda", x, ws)
    assert text.count(gpu.CUSTOM_CALL) == 1
    assert "stablehlo.dot_general" not in text
    assert lowered(products.qmatmul_many, "cuda", np.tile(x, (9, 1)), ws).count(gpu.CUSTOM_CALL) == 3
    assert gpu.CUSTOM_CALL not in lowered(products.qmatmul_many, "tpu", x, ws)


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_lowers_elsewhere_without_a_kernel(platform):
    w = hollow(weight("Q5_K", out=37, blocks=3)[0])
    text = lowered(products.qmatmul, platform, activations(5, w.shape[1]), w)
    assert "dot_general" in text
    assert gpu.CUSTOM_CALL not in text


def test_without_a_gpu_it_says_so():
    assert gpu.unavailable() == f"the default device is a {jax.default_backend()}"
    with gpu.mode("interpreted"):
        assert gpu.unavailable() is None


def test_rows_of_an_embedding_come_from_planes():
    w, values = weight("Q6_K", out=11, blocks=2)
    ids = jnp.array([[10, 0, 3], [3, 7, 1]])
    np.testing.assert_array_equal(jax.jit(embed)(gpu.prepare(w), ids), values[np.asarray(ids)])


@pytest.fixture(scope="module")
def on_a_gpu():
    """A model, and the shapes of its weights as they are held on a GPU."""
    model = models.model(models.PACKABLE, "Q4_K_M")
    with gpu.mode("elsewhere"):
        return model, jax.eval_shape(lambda w: implementations.prepared(w, "gpu"), model.weights)


@pytest.mark.parametrize("mapped", [True, False], ids=["from the host", "from the device"])
def test_what_is_on_the_device_while_a_model_is_packed(mapped, monkeypatch):
    """Its planes and one matrix of the file, where weights come from the host, as `load` has it on a GPU."""
    shape = dataclasses.replace(models.PACKABLE, block_count=2, tied=True)
    file = gguf.read(models.path(shape, "Q8_0"))
    arch = configs.find(file.architecture)
    cfg = arch.config(file.metadata)
    prepare, held = gpu.prepare, []

    def bytes_held() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def watched(w):
        done = prepare(w)
        held.append(bytes_held() - before)
        return done

    monkeypatch.setattr(gpu, "prepare", watched)
    before = bytes_held()
    with gpu.mode("interpreted"):
        weights = load_weights(file, arch, cfg, mapped=mapped)
        model = Model(file, cfg, weights, implementation="gpu")
    assert model.weights.output is model.weights.token_embd
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(model.weights)}.values()
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    packed = sum(leaf.nbytes for leaf in leaves)
    largest = max(tensor.data.nbytes for tensor in file.tensors.values())
    assert (max(held) <= packed + largest) == mapped


@pytest.mark.parametrize("layer", [0, 1], ids=["delta net", "attention"])
def test_a_layer_is_five_launches_a_token(layer, on_a_gpu):
    """The mixer's projections, what is between them, the last of them; gate and up; down."""
    model, weights = on_a_gpu
    state = model.init_state()
    x = np.zeros((1, 1, model.config.embedding_length), np.float32)

    def run_layer(w, x, state, length):
        span = Span.text(length, jnp.ones(1, jnp.int32), 1)
        return forward._run_block(w, x, state, span, model.config.blocks[layer], False, "gpu")

    text = lowered(run_layer, "cuda", weights.blocks[layer], x, state.blocks[layer], state.length)
    assert text.count(gpu.CUSTOM_CALL) == 5


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_prefill_of_a_whole_model_lowers(platform, on_a_gpu):
    """Trunk and head."""
    model, weights = on_a_gpu
    cfg = model.config

    def logits(weights, ids, state):
        count = jnp.full(1, ids.shape[1], jnp.int32)
        hidden, state, _ = forward.trunk(weights, ids, count, state, cfg, implementation="gpu")
        eps = cfg.layer_norm_rms_epsilon
        last = hidden[:, -1]
        return forward.head(weights.output_norm, weights.output, last, eps, implementation="gpu")[0], state

    text = lowered(logits, platform, weights, np.zeros((1, 12), np.int32), model.init_state())
    assert (gpu.CUSTOM_CALL in text) == (platform == "cuda")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_decode_block_lowers(platform, on_a_gpu):
    """A static number of tokens in one program: trunk, head and sampling, with no way back to the host."""
    model, weights = on_a_gpu

    def decode(weights, token, state, step, count):
        key, params, stops = jax.random.key(0), Sampling(0.8, 20, 0.9), jnp.array([3, 5])
        arguments = (weights, token, state, key, step, count, params, stops)
        return forward.decode(*arguments, cfg=model.config, block=4, implementation="gpu")

    text = lowered(decode, platform, weights, np.int32(1), model.init_state(), np.int32(0), np.int32(4))
    assert (gpu.CUSTOM_CALL in text) == (platform == "cuda")
    assert "callback" not in text
    assert text.count("stablehlo.while") >= 1
