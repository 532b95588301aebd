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
    # as many value as key heads, a head rotated whole; one kv head for all; experts
    "d": dict(D=36, F=60, N=3, K=3, H=16, rotary=16, Hk=5, Hv=5, Dk=8, W=4, V=89, layers=6, interval=3),
    "e": dict(D=72, F=44, N=8, K=1, H=24, rotary=8, Hk=1, Hv=4, Dk=20, W=3, V=211, layers=5, interval=4),
    "m": dict(D=44, F=30, N=4, K=2, H=18, rotary=12, Hk=2, Hv=4, Dk=14, W=4, V=97, layers=4, interval=2,
              experts=7, used=3, shared=38),
}  # fmt: skip


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
            **(_experts if "experts" in s else _dense)(s, matrix),
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
    arch = "qwen35moe" if "experts" in s else "qwen35"
    metadata = {
        "general.architecture": arch,
        "general.name": f"tiny-{size}-{seed}",
        f"{arch}.block_count": s["layers"],
        f"{arch}.embedding_length": D,
        f"{arch}.feed_forward_length": 0 if "experts" in s else s["F"],
        f"{arch}.attention.head_count": s["N"],
        f"{arch}.attention.head_count_kv": s["K"],
        f"{arch}.attention.key_length": s["H"],
        f"{arch}.attention.value_length": s["H"],
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.rope.dimension_count": s["rotary"],
        f"{arch}.rope.dimension_sections": [s["rotary"] // 6 + 1, s["rotary"] // 6 + 1, s["rotary"] // 6, 0],
        f"{arch}.rope.freq_base": 1e7,
        f"{arch}.ssm.conv_kernel": s["W"],
        f"{arch}.ssm.state_size": s["Dk"],
        f"{arch}.ssm.group_count": s["Hk"],
        f"{arch}.ssm.time_step_rank": s["Hv"],
        f"{arch}.ssm.inner_size": s["Hv"] * s["Dk"],
        f"{arch}.full_attention_interval": s["interval"],
    }
    if "experts" in s:
        metadata |= {f"{arch}.expert_count": s["experts"], f"{arch}.expert_used_count": s["used"]}
    return Model(metadata, weights)


def _dense(s: dict[str, Any], matrix: Any) -> dict[str, np.ndarray]:
    sizes = {"gate": (s["F"], s["D"]), "up": (s["F"], s["D"]), "down": (s["D"], s["F"])}
    return {f"ffn_{part}.weight": matrix(*size) for part, size in sizes.items()}


def _experts(s: dict[str, Any], matrix: Any) -> dict[str, np.ndarray]:
    """A router, experts of width F and a gated shared one."""
    D, E, shared = s["D"], s["experts"], dict(s, F=s["shared"])
    many = [_dense(s, matrix) for _ in range(E)]
    return {
        "ffn_gate_inp.weight": matrix(E, D) * 2,
        **{name.replace(".", "_exps."): np.stack([one[name] for one in many]) for name in many[0]},
        **{name.replace(".", "_shexp."): value for name, value in _dense(shared, matrix).items()},
        "ffn_gate_inp_shexp.weight": matrix(1, D)[0],
    }
