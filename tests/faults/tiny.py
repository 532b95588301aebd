"""Tiny random models for the fault benchmark, every axis of its own length."""

from __future__ import annotations

from typing import Any

import numpy as np
from oracle import Model

SIZES: dict[str, dict[str, Any]] = {
    # D model, F ffn, N/K attention heads of H, rotary, Hk/Hv delta heads of Dk, W conv, V vocab, layers, interval
    "a": dict(D=48, F=80, N=6, K=2, H=20, rotary=12, Hk=2, Hv=6, Dk=16, W=4, V=101, layers=6, interval=3),
    "b": dict(D=64, F=96, N=4, K=2, H=32, rotary=16, Hk=3, Hv=6, Dk=24, W=3, V=67, layers=8, interval=4),
    "c": dict(D=40, F=72, N=8, K=4, H=12, rotary=8, Hk=4, Hv=8, Dk=12, W=5, V=131, layers=4, interval=2),
}


def make(size: str, seed: int = 0) -> Model:
    """A random qwen35 model with activations of ordinary size at every tap."""
    s, rng = SIZES[size], np.random.default_rng(seed)
    D, C = s["D"], 2 * s["Hk"] * s["Dk"] + s["Hv"] * s["Dk"]

    def matrix(out: int, inner: int) -> np.ndarray:
        return (rng.standard_normal((out, inner)) / inner**0.5).astype(np.float32).astype(np.float64)

    def vector(n: int, mean: float, spread: float) -> np.ndarray:
        return (mean + spread * rng.standard_normal(n)).astype(np.float32).astype(np.float64)

    weights = {
        "token_embd.weight": matrix(s["V"], D) * 3,
        "output_norm.weight": vector(D, 1.2, 0.3),
        "output.weight": matrix(s["V"], D),
    }
    for i in range(s["layers"]):
        recurrent = (i + 1) % s["interval"] != 0
        layer: dict[str, np.ndarray] = {
            "attn_norm.weight": vector(D, 1.1, 0.3),
            "post_attention_norm.weight": vector(D, 0.9, 0.3),
            "ffn_gate.weight": matrix(s["F"], D),
            "ffn_up.weight": matrix(s["F"], D),
            "ffn_down.weight": matrix(D, s["F"]),
        }
        if recurrent:
            layer |= {
                "attn_qkv.weight": matrix(C, D),
                "attn_gate.weight": matrix(s["Hv"] * s["Dk"], D),
                "ssm_conv1d.weight": vector(C * s["W"], 0.2, 0.5).reshape(C, s["W"]),
                "ssm_alpha.weight": matrix(s["Hv"], D),
                "ssm_beta.weight": matrix(s["Hv"], D),
                "ssm_dt.bias": vector(s["Hv"], -0.5, 0.7),
                "ssm_a": -np.exp(vector(s["Hv"], -1.0, 0.8)),
                "ssm_norm.weight": vector(s["Dk"], 1.0, 0.3),
                "ssm_out.weight": matrix(D, s["Hv"] * s["Dk"]),
            }
        else:
            layer |= {
                "attn_q.weight": matrix(2 * s["N"] * s["H"], D),
                "attn_k.weight": matrix(s["K"] * s["H"], D),
                "attn_v.weight": matrix(s["K"] * s["H"], D),
                "attn_output.weight": matrix(D, s["N"] * s["H"]),
                "attn_q_norm.weight": vector(s["H"], 1.3, 0.3),
                "attn_k_norm.weight": vector(s["H"], 1.2, 0.3),
            }
        weights |= {f"blk.{i}.{name}": value for name, value in layer.items()}
    metadata = {
        "general.architecture": "qwen35",
        "general.name": f"tiny-{size}-{seed}",
        "qwen35.block_count": s["layers"],
        "qwen35.embedding_length": D,
        "qwen35.attention.head_count": s["N"],
        "qwen35.attention.head_count_kv": s["K"],
        "qwen35.attention.key_length": s["H"],
        "qwen35.attention.value_length": s["H"],
        "qwen35.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen35.rope.dimension_count": s["rotary"],
        "qwen35.rope.dimension_sections": [s["rotary"] // 6 + 1, s["rotary"] // 6 + 1, s["rotary"] // 6, 0],
        "qwen35.rope.freq_base": 1e7,
        "qwen35.ssm.conv_kernel": s["W"],
        "qwen35.ssm.state_size": s["Dk"],
        "qwen35.ssm.group_count": s["Hk"],
        "qwen35.ssm.time_step_rank": s["Hv"],
        "qwen35.ssm.inner_size": s["Hv"] * s["Dk"],
        "qwen35.full_attention_interval": s["interval"],
    }
    return Model(metadata, weights)
