"""Whole models drawn at random, for hypothesis: every size that a file may choose, within what llama.cpp takes."""

from __future__ import annotations

from hypothesis import strategies as st

from scarlet_jax.tools.synth import Shape

HYBRID = ("qwen35", "qwen35moe", "qwen3next")
ARCHITECTURES = (*HYBRID, "qwen3", "qwen3moe", "qwen2", "llama", "lfm2", "mamba2", "falcon-h1")
_WITH_MEMORY = ("lfm2", "mamba2", "falcon-h1")
_ATTENTION_ROLES = ("attn_q", "attn_k", "attn_v", "attn_output")
_BIASES = {
    "qwen2": _ATTENTION_ROLES[:3],
    "qwen3": _ATTENTION_ROLES[:3],
    "llama": (*_ATTENTION_ROLES, "ffn_gate", "ffn_up", "ffn_down"),
}


@st.composite
def shapes(draw: st.DrawFn, archs: tuple[str, ...] = ARCHITECTURES) -> Shape:
    """A model of one of these architectures; no two of its sizes need be alike.

    The first of each list is what hypothesis tries first: several of everything, so that a swap shows.
    """
    arch = draw(st.sampled_from(archs))
    layers = draw(st.sampled_from([3, 2, 1]))
    sizes = {
        "arch": arch,
        "block_count": layers,
        "context_length": 512,
        "embedding_length": draw(st.integers(8, 96)),
        "vocab_size": draw(st.integers(290, 340)),
        "layer_norm_rms_epsilon": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "tied": draw(st.booleans()),
    }
    sizes |= {} if arch == "mamba2" else draw(_attention(arch))
    sizes |= draw(_recurrent(arch, layers)) if arch in (*HYBRID, *_WITH_MEMORY) else {}
    if arch in ("qwen2", "lfm2"):  # llama.cpp has no other width for their heads together
        sizes["embedding_length"] = sizes["head_count"] * sizes["key_length"]
    return Shape(**(sizes | draw(_network(arch))))


def llama_cpp_takes(shape: Shape) -> bool:
    """Where it has layers of two kinds, it ends the process over a model with layers of one."""
    return shape.arch not in (*HYBRID, "lfm2") or len(set(shape.recurrent_layers or ())) == 2


def transformers_takes(shape: Shape) -> bool:
    """Whether it computes the same.

    It knows no fourth position: all pairs must be one of the first three's. Its delta net's keys are divided by
    their length with an epsilon of their own, 1e-6. What loads qwen35 runs with a cache, which without attention
    it does not make; what loads experts knows no separate scales.
    """
    in_sections = shape.arch in ("qwen35", "qwen35moe")
    theirs = not in_sections or shape.dimension_sections == in_turn(shape.dimension_count // 2)
    small = shape.arch not in HYBRID or shape.layer_norm_rms_epsilon == 1e-6
    cached = shape.arch != "qwen35" or not all(shape.recurrent_layers or ())
    return theirs and small and cached and not (shape.scales and shape.expert_count)


@st.composite
def _attention(draw: st.DrawFn, arch: str) -> dict:
    kv_heads = draw(st.sampled_from([2, 3, 1, 4]))
    pairs = draw(st.integers(5, 24))
    # llama.cpp rotates whole heads where the file has no word of another size for this architecture.
    rotary = draw(st.integers(3, pairs)) if arch in HYBRID else pairs
    fused = draw(st.booleans())
    sizes = {
        "head_count": kv_heads * draw(st.sampled_from([3, 2, 1, 4])),
        "head_count_kv": kv_heads,
        "key_length": 2 * pairs,
        "dimension_count": 2 * rotary,
        "freq_base": draw(st.sampled_from([1e4, 5e5, 1e7])),
        "fused_qkv": fused,
    }
    if arch in ("qwen35", "qwen35moe"):
        sizes["dimension_sections"] = draw(_sections(rotary))
    if arch in _BIASES and not fused:
        sizes["biases"] = tuple(draw(st.lists(st.sampled_from(_BIASES[arch]), unique=True)))
    if arch == "llama":
        sizes["freq_factors"] = draw(st.booleans())
    return sizes


@st.composite
def _sections(draw: st.DrawFn, pairs: int) -> tuple[int, ...]:
    """Pairs for time, height, width and the fourth position: where they are fewer than there are, they repeat.

    Not more: llama.cpp ends the process over sections longer than a head, and where only the fourth has any.
    """
    if draw(st.booleans()):
        return in_turn(pairs)
    ends = sorted(draw(st.lists(st.integers(0, pairs), min_size=3, max_size=3)))
    ends[-1] = max(ends[-1], 1)
    total = draw(st.integers(ends[-1], pairs))
    return (ends[0], ends[1] - ends[0], ends[2] - ends[1], total - ends[2])


def in_turn(pairs: int) -> tuple[int, ...]:
    """Every pair to time, height or width, as in all published models."""
    return ((pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0)


@st.composite
def _recurrent(draw: st.DrawFn, arch: str, layers: int) -> dict:
    groups = draw(st.sampled_from([2, 3, 1, 4]))
    attentive = [i % 2 == 1 for i in range(layers)]  # by default: layers of both kinds
    return {
        "recurrent_layers": tuple(draw(st.booleans()) == flag for flag in attentive),
        "conv_kernel": draw(st.integers(2, 6)),
        "state_size": draw(st.integers(3, 48)),
        "group_count": groups,
        "time_step_rank": groups * draw(st.sampled_from([3, 2, 1, 4])),
        "ssm_head_length": draw(st.integers(2, 24)) if arch in ("mamba2", "falcon-h1") else 0,
        "ssm_norm": arch != "falcon-h1" or draw(st.booleans()),
        "legacy_ssm_in": arch == "qwen3next" and draw(st.booleans()),
    }


@st.composite
def _network(draw: st.DrawFn, arch: str) -> dict:
    width = st.integers(4, 96)
    if arch == "mamba2":
        return {"feed_forward_length": 0}
    scales = arch in ("qwen35", "qwen35moe") and draw(st.booleans())
    if arch not in ("qwen35moe", "qwen3next", "qwen3moe"):
        return {"feed_forward_length": draw(width), "scales": scales}
    experts = draw(st.sampled_from([5, *range(1, 10)]))
    return {
        "feed_forward_length": 0,
        "scales": scales,
        "expert_count": experts,
        "expert_used_count": draw(st.sampled_from([(experts + 1) // 2, *range(1, experts + 1)])),
        "expert_feed_forward_length": draw(width),
        "expert_shared_feed_forward_length": draw(width) if arch in HYBRID else 0,
        "fused_gate_up": arch in HYBRID and draw(st.booleans()),
    }
