"""The judge judged: against llama.cpp tap by tap, against transformers, and with mistakes made on purpose."""

from __future__ import annotations

import ast
import functools
import inspect

import gguf
import numpy as np
import oracle
import pytest
from support import relative_l2
from support_mutants import functions, mutants
from support_shapes import FOURTH_POSITION, LARGE_EPSILON, REPEATED_SECTIONS, SHAPES

from scarlet_jax.tools import synth
from scarlet_jax.tools.engines import ggml, llama_cpp

# llama.cpp computes in float32: measured over these shapes, at most 5e-6 on any tap.
TOLERANCE = 1e-5

LLAMA_CPP_SHAPES = SHAPES | {
    "fourth position": FOURTH_POSITION,
    "repeated sections": REPEATED_SECTIONS,
    "large epsilon": LARGE_EPSILON,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A function from a shape's name and a quant type to a file, made once."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name: str, quant: str = "F32"):
        return synth.write(folder / f"{name} {quant}.gguf", LLAMA_CPP_SHAPES[name], quant, seed=3)

    return make


@pytest.fixture(scope="module")
def llama_cpp_taps(path):
    """A function from a shape's name, the number of tokens and how many to decode, to llama.cpp's taps."""

    @functools.cache
    def run(name: str, count: int, decode: int = 0):
        return llama_cpp.taps(path(name), tokens(count), decode=decode, threads=1)[0]

    return run


def tokens(count: int) -> list[int]:
    return np.random.default_rng(1).integers(0, SHAPES["conv-4"].vocab_size, count).tolist()


def differences(taps, theirs) -> dict[str, float]:
    """How far every tap that differs is from llama.cpp's, in execution order."""
    errors = {name: relative_l2(theirs[name], tap) for name, tap in taps.items() if name != "h_nextn"}
    return {name: error for name, error in errors.items() if not error <= TOLERANCE}


# ------------------------------------------------------------------------------
# llama.cpp
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 65])
@pytest.mark.parametrize("name", LLAMA_CPP_SHAPES)
def test_every_tap_is_llama_cpps(name, count, path, llama_cpp_taps):
    logits, taps = oracle.forward(path(name), tokens(count))
    theirs = llama_cpp_taps(name, count)
    assert differences(taps, theirs) == {}
    assert relative_l2(theirs["result_output"], logits) <= TOLERANCE
    # Where all tokens have logits, llama.cpp gives the final norm its second name at once.
    assert taps.keys() - {"h_nextn"} == theirs.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_decoding_gives_the_same(name, path, llama_cpp_taps):
    """A cache makes no difference: token by token, llama.cpp arrives where the judge does in one go."""
    _, taps = oracle.forward(path(name), tokens(23))
    theirs = dict(llama_cpp_taps(name, 23, decode=20))
    for kq in (tap for tap in taps if tap.startswith("kq-")):  # in steps, no key is seen before it is there
        taps[kq] = np.tril(taps[kq].swapaxes(0, 1)).swapaxes(0, 1)
        theirs[kq] = np.tril(theirs[kq].swapaxes(0, 1)).swapaxes(0, 1)
    assert differences(taps, theirs) == {}


def test_200_tokens(path, llama_cpp_taps):
    _, taps = oracle.forward(path("conv-4"), tokens(200))
    assert differences(taps, llama_cpp_taps("conv-4", 200)) == {}


@pytest.mark.parametrize("start", [1, 6])
def test_a_continuation_begins_where_the_start_ended(start, path):
    """After fewer tokens than the convolution looks back, and after more."""
    _, whole = oracle.forward(path("conv-5"), tokens(9))
    _, head = oracle.forward(path("conv-5"), tokens(9)[:start])
    logits, tail = oracle.forward(path("conv-5"), tokens(9), start=start)
    for before, after in (("state_predelta", "new_state"), ("conv_states", "conv_state_last")):
        np.testing.assert_allclose(tail[f"{before}-1"], head[f"{after}-1"], atol=1e-12)  # float64
        np.testing.assert_array_equal(tail[f"{after}-1"], whole[f"{after}-1"])
    np.testing.assert_array_equal(tail["conv_input-1"][:4], tail["conv_states-1"])
    np.testing.assert_array_equal(tail["conv_input-1"][4:], whole["linear_attn_qkv_mixed-1"][start:])
    np.testing.assert_array_equal(tail["kq-3"], whole["kq-3"][start:])
    np.testing.assert_array_equal(logits, whole["result_output"][start:])


# ------------------------------------------------------------------------------
# transformers
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_transformers(name, path):
    pytest.importorskip("transformers")
    from scarlet_jax.tools.engines import transformers

    logits, _ = oracle.forward(path(name), tokens(65))
    # float32 of another order of sums: measured, 1e-4 at logits of standard deviation 3.
    np.testing.assert_allclose(transformers.logits(path(name), tokens(65)), logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("rotary", "sections"), [(16, (3, 3, 2, 0)), (26, (5, 4, 4, 0)), (64, (11, 11, 10, 0))]
)
def test_rope_of_image_positions_is_transformers(rotary, sections):
    """Time, height and width each with a position of its own, which text never shows."""
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    config = qwen.Qwen3_5TextConfig(
        head_dim=2 * rotary,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": sections[:3],
        },
    )
    rng = np.random.default_rng(5)
    x = rng.standard_normal((7, 3, 2 * rotary))
    positions = np.concatenate([rng.integers(0, 40, (3, 7)), np.zeros((1, 7), int)])
    cos, sin = qwen.Qwen3_5TextRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions[:3, None]))
    theirs, _ = qwen.apply_rotary_pos_emb(*[torch.tensor(x)[None]] * 2, cos, sin, unsqueeze_dim=2)
    ours = oracle.rope(x, positions, rotary, sections, 1e4)
    assert relative_l2(ours, theirs[0].numpy()) <= 1e-5  # their angles are float32
    assert relative_l2(oracle.rope(x, positions[[0, 2, 1, 3]], rotary, sections, 1e4), ours) > 0.1


# ------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "MXFP4"])
def test_weights_are_what_gguf_py_reads(quant, path):
    weights = oracle.load(path("one-key-head", quant)).weights
    tensors = gguf.GGUFReader(path("one-key-head", quant)).tensors
    assert [tensor.name for tensor in tensors] == list(weights)
    for tensor in tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert weights[tensor.name].dtype == np.float64
        np.testing.assert_array_equal(weights[tensor.name], expected.reshape(tensor.shape[::-1]))


@pytest.mark.parametrize("quant", ["Q1_0", "Q2_0"])
def test_weights_that_gguf_py_cannot_read(quant, tmp_path):
    shape = synth.Shape(block_count=1, embedding_length=128, feed_forward_length=256, vocab_size=300)
    exact = oracle.load(synth.write(tmp_path / "f32.gguf", shape)).weights
    coded = oracle.load(synth.write(tmp_path / "coded.gguf", shape, quant)).weights
    name = "blk.0.ffn_down.weight"
    blocks = ggml.quantize(exact[name].astype(np.float32), quant)
    np.testing.assert_array_equal(coded[name], ggml.to_float(quant, blocks))


# ------------------------------------------------------------------------------
# Mistakes
# ------------------------------------------------------------------------------

REAL = {
    name: getattr(oracle, name) for name in ("rope", "rope_component", "causal_conv", "project_qkv", "rms")
}


def rope_of_neighbours(x, positions, rotary, *rest):
    pairs = np.arange(rotary).reshape(-1, 2).T.ravel()  # dims 0, 2, 4 ..., then 1, 3, 5 ...
    turned = REAL["rope"](np.concatenate([x[..., pairs], x[..., rotary:]], -1), positions, rotary, *rest)
    return np.concatenate([turned[..., np.argsort(pairs)], x[..., rotary:]], -1)


def rope_of_the_whole_head(x, positions, _rotary, *rest):
    return REAL["rope"](x, positions, x.shape[-1], *rest)


def no_mask(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def keys_first(model, h, i, widths, tap):
    return REAL["project_qkv"](model, h, i, widths[::-1], tap)[::-1]


def gates_after_all_queries(u):
    return np.split(u.reshape(len(u), 2 * u.shape[1], -1), 2, axis=1)


def wrong_delta_rule(*, delta_before_decay=False, read_before_write=False, transposed=False):
    def delta_rule(q, k, v, g, beta):
        T, Hv, Dv = v.shape
        states, outputs = np.zeros((T + 1, Hv, Dv, k.shape[-1])), np.empty_like(v)
        for t in range(T):
            decayed = states[t] * np.exp(g[t])[:, None, None]
            recalled = states[t] if delta_before_decay else decayed
            delta = beta[t][:, None] * (v[t] - np.einsum("hvk,hk->hv", recalled, k[t]))
            states[t + 1] = decayed + delta[:, :, None] * k[t][:, None, :]
            read = decayed if read_before_write else states[t + 1]
            outputs[t] = np.einsum("hvk,hk->hv", read.swapaxes(1, 2) if transposed else read, q[t])
        return outputs, states

    return delta_rule


# Shape, function of the judge, what replaces it, and the first operation at which that must show.
MISTAKES = [
    ("conv-4", "key_head", lambda h, k, v: h // (v // k), "new_state"),
    ("conv-4", "kv_head", lambda h, n, k: h % k, "kq"),
    ("conv-4", "query_and_gate", lambda u: np.split(u, 2, -1)[::-1], "Qcur_reshaped"),
    ("conv-4", "query_and_gate", gates_after_all_queries, "Qcur_reshaped"),
    ("conv-3", "project_qkv", keys_first, "Qcur_full"),
    ("conv-4", "rms", lambda x, eps: x / np.std(x, -1, keepdims=True), "attn_norm"),
    ("large epsilon", "rms", lambda x, eps: REAL["rms"](x, 0), "attn_norm"),
    ("large epsilon", "rms", lambda x, eps: REAL["rms"](x, eps**2), "attn_norm"),
    ("large epsilon", "l2", lambda x, eps: x / np.linalg.norm(x, axis=-1, keepdims=True), "q_conv_predelta"),
    ("conv-4", "query_scale", lambda Dk: 1.0, "attn_output"),
    ("conv-4", "attention_scale", lambda H: 1.0, "kq_soft_max"),
    ("conv-4", "causal_conv", lambda x, w: REAL["causal_conv"](x, w[:, ::-1]), "conv_output_raw"),
    ("conv-4", "causal_conv", lambda x, w: REAL["causal_conv"](np.roll(x, 1, 0), w), "conv_output_raw"),
    ("conv-4", "silu", lambda x: x * oracle.sigmoid(1.702 * x), "conv_output_silu"),
    ("conv-4", "silu", lambda x: x, "conv_output_silu"),
    ("conv-4", "softplus", lambda x: np.maximum(x, 0), "a_softplus"),
    ("conv-4", "sigmoid", lambda x: np.clip(0.5 + 0.2 * x, 0, 1), "conv_output_silu"),
    ("conv-4", "gated_norm", lambda o, w, z, e: oracle.rms(o * oracle.silu(z), e) * w, "final_output"),
    ("conv-4", "gated_norm", lambda o, w, z, e: oracle.rms(o, e) * w * oracle.sigmoid(z), "final_output"),
    ("conv-4", "delta_rule", wrong_delta_rule(delta_before_decay=True), "new_state"),
    ("conv-4", "delta_rule", wrong_delta_rule(read_before_write=True), "attn_output"),
    ("conv-4", "delta_rule", wrong_delta_rule(transposed=True), "attn_output"),
    ("conv-4", "rope", rope_of_neighbours, "Qcur"),
    ("conv-4", "rope", rope_of_the_whole_head, "Qcur"),
    ("conv-4", "rope", lambda x, p, r, s, base: REAL["rope"](x, p, r, s, 1e6), "Qcur"),
    ("conv-4", "rope", lambda x, p, *rest: REAL["rope"](x, p + 1, *rest), "Qcur"),
    ("conv-4", "rope", lambda x, p, *rest: REAL["rope"](x, -p, *rest), "Qcur"),
    ("fourth position", "rope_component", lambda pair, sections: 0, "Qcur"),
    ("repeated sections", "rope_component", lambda i, s: REAL["rope_component"](i, (*s[:3], 99)), "Qcur"),
    ("conv-4", "causal_softmax", no_mask, "kq_soft_max"),
]


@pytest.mark.parametrize(("name", "function", "mistake", "first"), MISTAKES)
def test_a_mistake_shows_where_it_is(name, function, mistake, first, path, llama_cpp_taps, monkeypatch):
    monkeypatch.setattr(oracle, function, mistake)
    _, taps = oracle.forward(path(name), tokens(17))
    found = differences(taps, llama_cpp_taps(name, 17))
    tap, error = next(iter(found.items()))
    assert tap.rpartition("-")[0] == first
    assert error > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "first"),
    [("blk.1.ffn_up.scale", "ffn_up_s-1"), ("blk.2.ssm_out.scale", "linear_attn_out-2")],
)
def test_a_forgotten_scale_shows_where_it_is(name, first, path, llama_cpp_taps):
    model = oracle.load(path("conv-5"))
    without = {key: model.weights[key] for key in model.weights if key != name}
    _, taps = oracle.forward(oracle.Model(model.metadata, without), tokens(17))
    theirs = llama_cpp_taps("conv-5", 17)
    errors = {tap: relative_l2(theirs[tap], taps.get(tap, 0)) for tap in theirs}
    assert next(tap for tap, error in errors.items() if error > TOLERANCE) == first


# One-step changes of a formula that change nothing: a sum or a list in another order, what a softmax is
# shifted by, a dimension that files of this family have twice, one state more than is read.
HARMLESS = {
    "return np.logaddexp(x, 0)",
    "for component, length in ((1, h), (0, t), (2, w)):",
    "for component, length in ((0, t), (2, w), (1, h)):",
    "weights = np.exp(np.where(visible, scores + scores.max(axis=-1, keepdims=True), -np.inf))",
    "weights = np.exp(np.where(visible, scores - visible.max(axis=-1, keepdims=True), -np.inf))",
    "T, Hv, Dv = q.shape",
    "T, Hv, Dv = k.shape",
    "outputs = np.empty_like(q)",
    "outputs = np.empty_like(k)",
    "states = np.zeros((T + 1, Hv, k.shape[-1], Dv))",
    "states = np.zeros((T + 1, Hv, Dv, q.shape[-1]))",
    "states = np.zeros((T + 1, Hv, Dv, v.shape[-1]))",
    "states = np.zeros((T + 2, Hv, Dv, k.shape[-1]))",
    "states = np.zeros((Dv + 1, Hv, Dv, k.shape[-1]))",
    # The models here all have sections; those of test_dense.py have none, and text's positions are alike.
    "component = [rope_component(i, sections) if len(sections) else 1 for i in range(half)]",
    "component = [rope_component(i, sections) if len(sections) else -1 for i in range(half)]",
}
FORMULAS = (
    *(
        "rms",
        "l2",
        "sigmoid",
        "silu",
        "softplus",
        "rope_component",
        "rope_angles",
        "rope",
        "kv_head",
        "key_head",
    ),
    *("query_and_gate", "causal_softmax", "causal_conv", "attention_scale", "query_scale", "delta_rule"),
    "gated_norm",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_small_mistake_shows(name, path, llama_cpp_taps, monkeypatch):
    """About a thousand of them; a mistake that ends in an exception has shown."""
    models = {shape: in_memory(path(shape)) for shape in LLAMA_CPP_SHAPES}
    unseen = set()
    for mutant in mutants(functions(inspect.getsource(oracle))[name]):
        changed = dict(vars(oracle))
        exec(compile(ast.Module([mutant.tree], []), name, "exec"), changed)
        monkeypatch.setattr(oracle, name, changed[name])
        if not any(_shows(models[shape], llama_cpp_taps(shape, 17)) for shape in models):
            unseen.add(mutant.change.splitlines()[0])
    assert unseen <= HARMLESS


@functools.cache
def in_memory(path) -> oracle.Model:
    model = oracle.load(path)
    return oracle.Model(model.metadata, dict(model.weights))


def _shows(model: oracle.Model, theirs) -> bool:
    try:
        _, taps = oracle.forward(model, tokens(17))
        return bool(differences(taps, theirs))
    except Exception:
        return True
