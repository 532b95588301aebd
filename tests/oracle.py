"""The judge: a plain float64 numpy forward of a GGUF, from the spec, sharing no code of ours.

`forward(path, tokens)` gives the logits and every tap of llama.cpp, in the conventions of the dump: token
axis first, then the natural axes slow to fast. Clarity before speed: the delta rule runs token by token,
nothing is cached, and a continuation is computed as the tail of the whole sequence. Sections are the
spec's; (4.1) to (4.8) are the steps of the delta net in its section 4.

Letters: T tokens, S keys (all tokens so far), D model, F ffn, V vocab, N query heads, K kv heads, H head dim;
delta net Hk and Hv heads, Dk and Dv head dims, W conv width, C = 2 Hk Dk + Hv Dv conv channels.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

# ------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------

_LEFT_TO_GGML = {41: "Q1_0", 42: "Q2_0"}  # block formats that gguf-py cannot decode
_BLOCK_SIZES = GGML_QUANT_SIZES | {41: (128, 18), 42: (64, 18)}  # elements and bytes (section 9)


class _Reader(gguf.GGUFReader):
    """gguf-py's reader, stopped before it looks tensor types up: it knows no id 42."""

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        self.infos = {}
        for _, name, _, ne, type_id, offset in (field.parts for field in fields):
            shape = tuple(int(n) for n in reversed(ne))
            self.infos[bytes(name).decode()] = (shape, int(type_id[0]), start_offs + int(offset[0]))


class Weights(Mapping):
    """The tensors of a GGUF by name, dequantised to float64 when asked for; shapes row-major (out, in)."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    def __getitem__(self, name: str) -> np.ndarray:
        shape, type_id, offset = self._reader.infos[name]
        block, block_bytes = _BLOCK_SIZES[type_id]
        rows = (*shape[:-1], shape[-1] // block * block_bytes)
        data = self._reader.data[offset : offset + int(np.prod(rows))].reshape(rows)
        return _dequantize(data, type_id).reshape(shape).astype(np.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.infos)

    def __len__(self) -> int:
        return len(self._reader.infos)


def _dequantize(data: np.ndarray, type_id: int) -> np.ndarray:
    if type_id in _LEFT_TO_GGML:
        from scarlet_jax.tools.engines.llama_cpp import to_float

        return to_float(_LEFT_TO_GGML[type_id], data)
    return gguf.dequantize(data, GGMLQuantizationType(type_id))


@dataclasses.dataclass(frozen=True)
class Family:
    """What the file does not say but its architecture's name (section 1, "Comparison archs")."""

    rope: str  # which dims rotate together, and by which position
    gated: bool = False
    ffn_norm: str = "ffn_norm.weight"
    grouped: bool = False  # delta net: the value heads of a key head follow each other
    taps: Mapping[str, str] = dataclasses.field(default_factory=dict)  # llama.cpp's names, where not qwen35's
    recurrent: str = "delta_net"  # what a layer without attention is
    parallel: bool = False  # attention and the recurrent one in every layer, on the same input
    output_norm: str = "output_norm"


QWEN35 = Family("imrope", gated=True, ffn_norm="post_attention_norm.weight")
_PLAIN_TAPS = {
    "model.input_embed": "embd",
    "attn_pregate": "kqv_out",
    "attn_residual": "ffn_inp",
    "attn_post_norm": "ffn_norm",
}
_GROUPED_TAPS = {
    "model.input_embed": "model.embed_tokens",
    "Qcur_reshaped": "Qcur_view",
    "gate_reshaped": "gate",
    "alpha": "a",
    "beta": "b",
}
FAMILIES = {
    "qwen3next": Family(
        "neox", gated=True, ffn_norm="post_attention_norm.weight", grouped=True, taps=_GROUPED_TAPS
    ),
    "qwen3": Family("neox", taps=_PLAIN_TAPS),
    "qwen3moe": Family("neox", taps=_PLAIN_TAPS),
    "qwen2": Family("neox", taps=_PLAIN_TAPS),
    "lfm2": Family(
        "neox",
        taps={
            "model.input_embed": "model.embed_tokens",
            "attn_norm": "model.layers.{}.operator_norm",
            "attn_post_norm": "model.layers.{}.ffn_out",  # a second name, in the place of the feed-forward's
            "attn_pregate": "kqv_out",
            "attn_output": "model.layers.{}.self_attn.out_proj",
            "Qcur_reshaped": "Qcur",  # before norm and rotation
            "Qcur_normed": "model.layers.{}.self_attn.q_layernorm",
            "Kcur_normed": "model.layers.{}.self_attn.k_layernorm",
            **{name: f"{name}_rope" for name in ("Qcur", "Kcur")},
            **{f"conv_{part}": f"model.layers.{{}}.conv.{part}" for part in ("in_proj", "conv", "out_proj")},
        },
        recurrent="short_conv",
        output_norm="token_embd_norm",
    ),
    "mamba2": Family("none", taps=_PLAIN_TAPS, recurrent="mamba2"),
    "falcon-h1": Family(
        "neox",
        ffn_norm="ffn_norm",
        taps=_PLAIN_TAPS
        | {name: f"{name}-post-rope" for name in ("Qcur", "Kcur", "Vcur")}
        | {
            "Qcur_reshaped": "Qcur",
            "attn_output": "attn_out",
            "ssm_in": "ssm_in_proj",
            "mamba_out": "ssm_out",
        },
        recurrent="mamba2",
        parallel=True,
    ),
    "llama": Family("norm", taps=_PLAIN_TAPS | {"attn_output": "attn_out"}),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """Metadata and weights. Replace either with a dict of your own to ask "what if"."""

    metadata: Mapping[str, Any]
    weights: Mapping[str, np.ndarray]

    def key(self, name: str, default: Any = None, layer: int | None = None) -> Any:
        """`{arch}.{name}`; its `layer`-th entry where the file gives one value a layer."""
        value = self.metadata.get(f"{self.metadata['general.architecture']}.{name}", default)
        if value is None:
            raise KeyError(name)
        return value[layer] if layer is not None and isinstance(value, list) else value

    def scale(self, name: str) -> np.ndarray:
        """What multiplies a product with weight `name`: its separate `.scale`, or 1 (section 2)."""
        return self.weights.get(f"{name}.scale", np.ones(1))

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """W x, scaled, plus its bias if it has one."""
        return x @ self.weights[f"{name}.weight"].T * self.scale(name) + self.bias(name)

    def bias(self, name: str) -> np.ndarray:
        """What is added to a product with weight `name`."""
        return self.weights.get(f"{name}.bias", np.zeros(1))

    @property
    def family(self) -> Family:
        """What the name of the architecture settles."""
        return FAMILIES.get(self.metadata["general.architecture"], QWEN35)

    @property
    def trunk_layers(self) -> int:
        """Blocks that a forward runs: `block_count` includes the MTP blocks."""
        return self.key("block_count") - self.key("nextn_predict_layers", 0)

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer's mixer is the recurrent one: by the list if there is one, else by the interval."""
        if layer >= self.trunk_layers:  # a prediction block
            return False
        heads = self.key("attention.head_count", 0, layer=layer)
        if self.key("attention.head_count_kv", heads, layer=layer) == 0:
            return True
        if self.key("ssm.conv_kernel", 0) == 0:
            return False
        listed = self.key("attention.recurrent_layers", [])
        return bool(listed[layer]) if listed else (layer + 1) % self.key("full_attention_interval", 4) != 0


def load(path: str | os.PathLike[str]) -> Model:
    """Open a GGUF."""
    reader = _Reader(path)
    return Model({name: field.contents() for name, field in reader.fields.items()}, Weights(reader))


# ------------------------------------------------------------------------------
# The formulas, one function each
# ------------------------------------------------------------------------------


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) over the last axis; the weight is applied by the caller."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def l2(x: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(sum(x^2) + eps) over the last axis (4.5)."""
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + eps)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def silu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + e^x), without overflow."""
    return np.logaddexp(0, x)


def rope_component(pair: int, sections: Sequence[int]) -> int:
    """Which of the positions t, h, w, e (0 to 3) turns rotary pair `pair`: the IMROPE rule."""
    t, h, w, _ = sections
    j = pair % sum(sections)
    for component, length in ((0, t), (1, h), (2, w)):
        if j % 3 == component and j < 3 * length:
            return component
    return 3


def rope_angles(
    positions: np.ndarray, rotary: int, sections: Sequence[int], base: float, factors: np.ndarray | float = 1
) -> np.ndarray:
    """What positions (4, T) turn each pair by, (T, rotary/2); without sections, all by the first."""
    half = rotary // 2
    component = [rope_component(i, sections) if len(sections) else 0 for i in range(half)]
    return positions[component].T * base ** (-2 * np.arange(half) / rotary) / factors


def rope_adjacent(
    x: np.ndarray,
    positions: np.ndarray,
    rotary: int,
    sections: Sequence[int],
    base: float,
    factors: np.ndarray | float = 1,
) -> np.ndarray:
    """Turn x (T, heads, H) by positions (4, T): dims 2i and 2i + 1 pair up, those >= rotary pass."""
    angle = rope_angles(positions, rotary, sections, base, factors)
    turned = (x[..., 0:rotary:2] + 1j * x[..., 1:rotary:2]) * np.exp(1j * angle)[:, None]
    pairs = np.stack([turned.real, turned.imag], axis=-1).reshape(*x.shape[:-1], rotary)
    return np.concatenate([pairs, x[..., rotary:]], axis=-1)


def rope(
    x: np.ndarray,
    positions: np.ndarray,
    rotary: int,
    sections: Sequence[int],
    base: float,
    factors: np.ndarray | float = 1,
) -> np.ndarray:
    """Turn x (T, heads, H) by positions (4, T): dims i and i + rotary/2 pair up, those >= rotary pass."""
    half = rotary // 2
    angle = rope_angles(positions, rotary, sections, base, factors)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b, rest = np.split(x, [half, rotary], axis=-1)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)


def kv_head(query_head: np.ndarray, queries: int, kvs: int) -> np.ndarray:
    """The kv head that a query head reads: consecutive query heads share one (section 3)."""
    return query_head // (queries // kvs)


def key_head(value_head: np.ndarray, keys: int, values: int) -> np.ndarray:
    """The key head that a delta-net value head uses: tiled in GGUF order (section 3)."""
    return value_head % keys


def grouped_key_head(value_head: np.ndarray, keys: int, values: int) -> np.ndarray:
    """The same in qwen3next: consecutive value heads share one (section 3)."""
    return value_head // (values // keys)


def query_and_gate(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split u (T, N, 2H): each head has its query rows, then its gate rows."""
    query, gate = np.split(u, 2, axis=-1)
    return query, gate


def causal_softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over keys of scores (T, N, T), token t seeing keys 0 to t."""
    T = len(scores)
    visible = np.arange(T) <= np.arange(T)[:, None, None]
    weights = np.exp(np.where(visible, scores - scores.max(axis=-1, keepdims=True), -np.inf))
    return weights / weights.sum(axis=-1, keepdims=True)


def causal_conv(padded: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """y_t[c] = sum_j kernel[c, j] padded_{t+j}[c], j = W-1 now: (W-1+T, C), (C, W) -> (T, C) (4.3)."""
    W = kernel.shape[1]
    T = len(padded) - (W - 1)
    return np.sum([kernel[:, j] * padded[j : j + T] for j in range(W)], axis=0)


def attention_scale(H: int) -> float:
    """The factor on query times key in full attention."""
    return H**-0.5


def query_scale(Dk: int) -> float:
    """The factor on delta-net queries, after their normalisation (4.6)."""
    return Dk**-0.5


def delta_rule(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, beta: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gated delta rule, one token at a time (4.7).

    q, k (T, Hv, Dk), v (T, Hv, Dv), g, beta (T, Hv) -> outputs (T, Hv, Dv), and the states before each
    token and after the last, (T + 1, Hv, Dv, Dk).
    """
    T, Hv, Dv = v.shape
    states = np.zeros((T + 1, Hv, Dv, k.shape[-1]))
    outputs = np.empty_like(v)
    for t in range(T):
        decayed = states[t] * np.exp(g[t])[:, None, None]
        delta = beta[t][:, None] * (v[t] - np.einsum("hvk,hk->hv", decayed, k[t]))
        states[t + 1] = decayed + delta[:, :, None] * k[t][:, None, :]
        outputs[t] = np.einsum("hvk,hk->hv", states[t + 1], q[t])
    return outputs, states


def gated_norm(o: np.ndarray, weight: np.ndarray, z: np.ndarray, eps: float) -> np.ndarray:
    """The norm first, over each head's Dv, then the gate (4.8)."""
    return rms(o, eps) * weight * silu(z)


# ------------------------------------------------------------------------------
# The forward
# ------------------------------------------------------------------------------


class _Taps(dict):
    """Tap name -> array, for the tokens from `start` on.

    llama.cpp gives some names twice (`norm-N`, `Kcur-N`, `Vcur-N`). A dump keeps the last, so only that is
    recorded here.
    """

    def __init__(self, start: int, names: Mapping[str, str]) -> None:
        self.start = start
        self.names = names

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray:
        """Record an array whose first axis is tokens."""
        self.state(name, x[self.start :])
        return x

    def state(self, name: str, x: np.ndarray) -> None:
        """Record an array that has no token axis."""
        stem, *layer = name.split("-")
        self["-".join([self.names.get(stem, stem), *layer])] = x


def forward(
    model: Model | str | os.PathLike[str],
    tokens: Sequence[int],
    *,
    start: int = 0,
    positions: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits (T, V) and taps, float64.

    With `start`, what a call gives that continues after the first `start` tokens: rows from there on, the
    states that it began with (`state_predelta-N`, `conv_states-N`) and those that it ended with
    (`new_state-N`, `conv_state_last-N`). `positions` (4, T) are t, h, w, e of each token; text by default.
    """
    model = model if isinstance(model, Model) else load(model)
    positions = _text(len(tokens)) if positions is None else positions
    eps, weights, family = model.key("attention.layer_norm_rms_epsilon"), model.weights, model.family
    tap = _Taps(start, family.taps)

    embedding = weights["token_embd.weight"]
    x = tap("model.input_embed", embedding[np.asarray(tokens)])
    for i in range(model.trunk_layers):
        x = layer(model, x, positions, i, tap)
    x = tap("norm", rms(x, eps)) * weights[f"{family.output_norm}.weight"]
    tap("h_nextn", x)
    tap("result_norm", x)
    logits = model.linear("output", x) if "output.weight" in weights else x @ embedding.T
    tap("result_output", logits)
    return logits[start:], dict(tap)


def _text(count: int) -> np.ndarray:
    """Positions (4, T) of plain text."""
    return np.arange(count) * np.array([[1], [1], [1], [0]])


def layer(model: Model, x: np.ndarray, positions: np.ndarray, i: int, tap: _Taps) -> np.ndarray:
    """One layer on the residual stream (T, D)."""
    eps, weights = model.key("attention.layer_norm_rms_epsilon"), model.weights
    h = tap(f"attn_norm-{i}", rms(x, eps) * weights[f"blk.{i}.attn_norm.weight"])
    x = x + mixer(model, h, positions, i, tap)
    if not (model.key("feed_forward_length", 0, layer=i) or model.key("expert_count", 0)):
        return tap(f"l_out-{i}", x)
    x = tap(f"attn_residual-{i}", x)
    normed = tap(f"norm-{i}", rms(x, eps))
    h = tap(f"attn_post_norm-{i}", normed * weights[f"blk.{i}.{model.family.ffn_norm}"])
    return tap(f"l_out-{i}", x + (moe if model.key("expert_count", 0) else ffn)(model, h, i, tap))


def mixer(model: Model, h: np.ndarray, positions: np.ndarray, i: int, tap: _Taps) -> np.ndarray:
    """What a layer has before its network: h (T, D) -> (T, D)."""
    recurrent = RECURRENT[model.family.recurrent]
    if model.family.parallel:
        return tap(f"layer_out-{i}", attention(model, h, positions, i, tap) + recurrent(model, h, i, tap))
    return recurrent(model, h, i, tap) if model.is_recurrent(i) else attention(model, h, positions, i, tap)


def predict(
    model: Model | str | os.PathLike[str],
    tokens: Sequence[int],
    hidden: np.ndarray,
    positions: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The prediction block (section 6): tokens, and the normed state before each (T, D) -> logits, its states.

    `positions` as in `forward`.
    """
    model = model if isinstance(model, Model) else load(model)
    i, eps = model.trunk_layers, model.key("attention.layer_norm_rms_epsilon")
    own = {
        name.removeprefix(f"blk.{i}.nextn.").removesuffix(".weight"): name
        for name in model.weights
        if name.startswith(f"blk.{i}.nextn.")
    }
    embedding = model.weights[own.get("embed_tokens", "token_embd.weight")]
    e = rms(embedding[np.asarray(tokens)], eps) * model.weights[own["enorm"]]
    f = rms(hidden, eps) * model.weights[own["hnorm"]]
    x = np.concatenate([e, f], axis=-1) @ model.weights[own["eh_proj"]].T
    x = layer(model, x, _text(len(tokens)) if positions is None else positions, i, _Taps(0, {}))
    y = rms(x, eps) * model.weights[own.get("shared_head_norm", "output_norm.weight")]
    trunk_head = "output.weight" if "output.weight" in model.weights else "token_embd.weight"
    return y @ model.weights[own.get("shared_head_head", trunk_head)].T, y


def ffn(model: Model, h: np.ndarray, i: int, tap: _Taps) -> np.ndarray:
    """W_down (SiLU(W_gate h) * W_up h)."""
    gate, up = (ffn_half(model, stem, h, i, tap) for stem in ("ffn_gate", "ffn_up"))
    gated = tap(f"ffn_swiglu-{i}", silu(gate) * up)
    return tap(f"ffn_out-{i}", model.linear(f"blk.{i}.ffn_down", gated))


def ffn_half(model: Model, stem: str, h: np.ndarray, i: int, tap: _Taps, of: str = "") -> np.ndarray:
    """Gate or up. llama.cpp taps the bare product, and again with a separate scale or a bias applied."""
    name = f"blk.{i}.{stem}{of}"
    y = tap(f"{stem}-{i}", h @ model.weights[f"{name}.weight"].T)
    if f"{name}.scale" in model.weights:
        y = tap(f"{stem}_s-{i}", y * model.scale(name))
    return tap(f"{stem}_b-{i}", y + model.bias(name)) if f"{name}.bias" in model.weights else y


def moe(model: Model, h: np.ndarray, i: int, tap: _Taps) -> np.ndarray:
    """The k likeliest experts of each token, weighted by their likelihood, and a gated one for all."""
    probabilities = tap(
        f"ffn_moe_probs-{i}", softmax(tap(f"ffn_moe_logits-{i}", model.linear(f"blk.{i}.ffn_gate_inp", h)))
    )
    order = tap(f"ffn_moe_argsort-{i}", np.argsort(-probabilities, axis=-1, kind="stable"))
    chosen = tap(f"ffn_moe_topk-{i}", order[:, : model.key("expert_used_count")])
    weights = np.take_along_axis(probabilities, chosen, axis=-1)
    tap(f"ffn_moe_weights-{i}", weights[..., None])
    total = tap(f"ffn_moe_weights_sum-{i}", weights.sum(axis=-1, keepdims=True))
    total = tap(f"ffn_moe_weights_sum_clamped-{i}", np.maximum(total, 2.0**-14))
    weights = tap(f"ffn_moe_weights_norm-{i}", weights / total)

    gate, up = expert_halves(model, h, chosen, i, tap)
    gated = tap(f"ffn_moe_swiglu-{i}", silu(gate) * up)
    outputs = expert_product(model, "ffn_down_exps", gated, chosen, i, tap)
    routed = tap(f"ffn_moe_weighted-{i}", outputs * weights[..., None]).sum(axis=1)
    tap(f"ffn_moe_out-{i}", routed)
    if f"blk.{i}.ffn_up_shexp.weight" not in model.weights:
        return routed
    return tap(f"ffn_out-{i}", routed + shared_expert(model, h, i, tap))


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def expert_halves(
    model: Model, h: np.ndarray, chosen: np.ndarray, i: int, tap: _Taps
) -> tuple[np.ndarray, np.ndarray]:
    """Gate and up (T, k, F) of each token's experts: two weights, or one with gate's rows before up's."""
    rows = np.repeat(h[:, None], chosen.shape[1], axis=1)
    if f"blk.{i}.ffn_gate_up_exps.weight" not in model.weights:
        up = expert_product(model, "ffn_up_exps", rows, chosen, i, tap)
        return expert_product(model, "ffn_gate_exps", rows, chosen, i, tap), up
    gate, up = np.split(expert_product(model, "ffn_gate_up_exps", rows, chosen, i, tap), 2, axis=-1)
    return tap(f"ffn_moe_gate-{i}", gate), tap(f"ffn_moe_up-{i}", up)


def expert_product(
    model: Model, stem: str, x: np.ndarray, chosen: np.ndarray, i: int, tap: _Taps
) -> np.ndarray:
    """x (T, k, in), each row by its expert's matrix and scale; what has a scale has another name."""
    name, matrices = f"blk.{i}.{stem}", model.weights[f"blk.{i}.{stem}.weight"]
    y = np.stack(
        [[matrices[e] @ row for e, row in zip(*pair, strict=True)] for pair in zip(chosen, x, strict=True)]
    )
    suffix = ""
    if f"{name}.scale" in model.weights:
        y, suffix = y * model.scale(name)[chosen][..., None], "_scaled"
    part = stem.removeprefix("ffn_").removesuffix("_exps")
    return tap(f"ffn_moe_{part}{suffix}-{i}", y)


def shared_expert(model: Model, h: np.ndarray, i: int, tap: _Taps) -> np.ndarray:
    """The network for all tokens, behind a sigmoid of one value a token."""
    gate, up = (ffn_half(model, stem, h, i, tap, "_shexp") for stem in ("ffn_gate", "ffn_up"))
    gated = tap(f"ffn_swiglu-{i}", silu(gate) * up)
    y = tap(f"ffn_shexp-{i}", model.linear(f"blk.{i}.ffn_down_shexp", gated))
    logit = tap(f"shared_expert_gate-{i}", h @ model.weights[f"blk.{i}.ffn_gate_inp_shexp.weight"][:, None])
    return tap(f"ffn_shexp_gated-{i}", y * tap(f"shared_expert_gate_sigmoid-{i}", sigmoid(logit)))


def attention(model: Model, h: np.ndarray, positions: np.ndarray, i: int, tap: _Taps) -> np.ndarray:
    """Full attention, perhaps with a sigmoid gate on each head's output: h (T, D) -> (T, D)."""
    T, N, gated = len(h), model.key("attention.head_count", layer=i), model.family.gated
    H = model.key("attention.key_length", h.shape[1] // N)
    K = model.key("attention.head_count_kv", N, layer=i)
    rotary = model.key("rope.dimension_count", H)
    sections = model.key("rope.dimension_sections") if model.family.rope == "imrope" else []
    rotation = (positions, rotary, sections, model.key("rope.freq_base", 10000.0), *divisors(model, rotary))

    def turn(x: np.ndarray) -> np.ndarray:
        x = (rope_adjacent if model.family.rope == "norm" else rope)(x, *rotation)
        return x * np.where(np.arange(H) < rotary, rope_magnitude(model), 1)

    full, key, value = project_qkv(model, h, i, [(2 if gated else 1) * N * H, K * H, K * H], tap)
    tap(f"Qcur_full-{i}", full)
    query, gate = query_and_gate(full.reshape(T, N, -1)) if gated else (full.reshape(T, N, H), None)
    key, value = key.reshape(T, K, H), tap(f"Vcur-{i}", value.reshape(T, K, H))

    tap(f"Qcur_reshaped-{i}", query)
    query = tap(f"Qcur-{i}", turn(head_norm(model, query, "Q", i, tap)))
    key = tap(f"Kcur-{i}", turn(head_norm(model, key, "K", i, tap)))

    read = kv_head(np.arange(N), N, K)
    scores = tap(f"kq-{i}", np.einsum("tnh,snh->tns", query, key[:, read]))
    probabilities = tap(f"kq_soft_max-{i}", causal_softmax(scores * attention_scale(H)))
    heads = tap(f"kqv-{i}", np.einsum("tns,snh->tnh", probabilities, value[:, read]))
    heads = tap(f"attn_pregate-{i}", heads.reshape(T, N * H))
    if gate is not None:
        gate = tap(f"gate_reshaped-{i}", gate.reshape(T, N * H))
        heads = tap(f"attn_gated-{i}", heads * tap(f"gate_sigmoid-{i}", sigmoid(gate)))
    return tap(f"attn_output-{i}", model.linear(f"blk.{i}.attn_output", heads))


def divisors(model: Model, rotary: int) -> list[np.ndarray]:
    """What the frequency of each rotary pair is divided by, if by anything: the file's table, and the scaling."""
    table = [model.weights["rope_freqs.weight"]] if "rope_freqs.weight" in model.weights else []
    kind, factor = model.key("rope.scaling.type", "linear"), model.key("rope.scaling.factor", 1.0)
    if kind == "none" or factor in (0, 1):
        return table
    kept = yarn_kept(model, rotary) if kind == "yarn" else np.zeros(rotary // 2)
    scaling = 1 / (kept + (1 - kept) / factor)
    return [table[0] * scaling] if table else [scaling]


def yarn_kept(model: Model, rotary: int) -> np.ndarray:
    """How much of its own frequency each pair keeps, 0 to 1 (Peng et al., 2023, section 3.2)."""
    base = model.key("rope.freq_base", 10000.0)
    context = model.key("rope.scaling.original_context_length", model.key("context_length"))
    ends = []
    for turns, whole in (
        (32.0, np.floor),
        (1.0, np.ceil),
    ):  # pair i turns context / (2 pi base^(2i / rotary)) times
        ends.append(whole(rotary / 2 * np.log(context / (2 * np.pi * turns)) / np.log(base)))
    first, last = max(ends[0], 0), min(ends[1], rotary - 1)
    return 1 - np.clip((np.arange(rotary // 2) - first) / max(last - first, 0.001), 0, 1)


def rope_magnitude(model: Model) -> float:
    """What rotated dims are multiplied by: YaRN's "temperature", and the file's own factor."""
    factor = model.key("rope.scaling.factor", 1.0)
    yarn = model.key("rope.scaling.type", "linear") == "yarn" and factor > 1
    return (0.1 * np.log(factor) + 1 if yarn else 1) * model.key("rope.scaling.attn_factor", 1.0)


def head_norm(model: Model, x: np.ndarray, which: str, i: int, tap: _Taps) -> np.ndarray:
    """Heads (T, heads, H) of queries or keys, normed if the file has a norm for them."""
    name = f"blk.{i}.attn_{which.lower()}_norm.weight"
    if name not in model.weights:
        return x
    eps = model.key("attention.layer_norm_rms_epsilon")
    return tap(f"{which}cur_normed-{i}", rms(x, eps) * model.weights[name])


def project_qkv(model: Model, h: np.ndarray, i: int, widths: list[int], tap: _Taps) -> list[np.ndarray]:
    """Query and gate, key, value: three weights, or one with their rows in that order."""
    if f"blk.{i}.attn_qkv.weight" in model.weights:
        fused = tap(f"wqkv-{i}", model.linear(f"blk.{i}.attn_qkv", h))
        return np.split(fused, np.cumsum(widths)[:-1], axis=-1)
    return [model.linear(f"blk.{i}.attn_{part}", h) for part in "qkv"]


def delta_net(model: Model, h: np.ndarray, i: int, tap: _Taps) -> np.ndarray:
    """The gated delta net: h (T, D) -> (T, D)."""
    T, eps, weights = len(h), model.key("attention.layer_norm_rms_epsilon"), model.weights
    Hk, Hv, W = (model.key(f"ssm.{name}") for name in ("group_count", "time_step_rank", "conv_kernel"))
    Dk, Dv = model.key("ssm.state_size"), model.key("ssm.inner_size") // Hv

    mixed, z = project_qkvz(model, h, i)
    mixed = tap(f"linear_attn_qkv_mixed-{i}", mixed)
    tap(f"qkv_mixed_transposed-{i}", mixed)
    before_start = np.zeros((W - 1, mixed.shape[1]))
    padded = tap(f"conv_input-{i}", np.concatenate([before_start, mixed]))
    for name in ("conv_states", "conv_states_reshaped"):
        tap.state(f"{name}-{i}", padded[tap.start : tap.start + W - 1])
    for name in ("conv_state_last", "conv_state_update"):
        tap.state(f"{name}-{i}", padded[T:])
    convolved = tap(f"conv_output_raw-{i}", causal_conv(padded, weights[f"blk.{i}.ssm_conv1d.weight"]))
    activated = tap(f"conv_output_silu-{i}", silu(convolved))

    q, k, v = np.split(activated, [Hk * Dk, 2 * Hk * Dk], axis=-1)
    q = tap(f"q_conv-{i}", q.reshape(T, Hk, Dk))
    k = tap(f"k_conv-{i}", k.reshape(T, Hk, Dk))
    v = tap(f"v_conv_predelta-{i}", v.reshape(T, Hv, Dv))
    q = tap(f"q_conv_predelta-{i}", l2(q, eps))
    k = tap(f"k_conv_predelta-{i}", l2(k, eps))
    use = (grouped_key_head if model.family.grouped else key_head)(np.arange(Hv), Hk, Hv)
    q, k = q[:, use], k[:, use]
    if model.family.grouped:  # here llama.cpp shows them repeated
        tap(f"q_conv_predelta-{i}", q)
        tap(f"k_conv_predelta-{i}", k)
    q = q * query_scale(Dk)

    alpha, beta = project_alpha_beta(model, h, i)
    alpha = tap(f"alpha-{i}", alpha)
    rate = tap(f"a_softplus-{i}", softplus(alpha + weights[f"blk.{i}.ssm_dt.bias"]))
    g = tap(f"gate-{i}", rate * weights[f"blk.{i}.ssm_a"])
    beta = tap(f"beta-{i}", beta[..., None])
    beta = tap(f"beta_sigmoid-{i}", sigmoid(beta))[..., 0]

    o, states = delta_rule(q, k, v, g, beta)
    tap.state(f"state_predelta-{i}", states[tap.start])
    tap.state(f"new_state-{i}", states[T])
    tap(f"attn_output-{i}", o)
    z = tap(f"z-{i}", z)
    gated = gated_norm(o, weights[f"blk.{i}.ssm_norm.weight"], z.reshape(T, Hv, Dv), eps)
    gated = tap(f"final_output-{i}", gated.reshape(T, Hv * Dv))
    return tap(f"linear_attn_out-{i}", model.linear(f"blk.{i}.ssm_out", gated))


def project_qkvz(model: Model, h: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries, keys and values (T, C), and the gate z (T, Hv Dv): two weights, or one by key head (section 3)."""
    if f"blk.{i}.ssm_in.weight" not in model.weights:
        return model.linear(f"blk.{i}.attn_qkv", h), model.linear(f"blk.{i}.attn_gate", h)
    D, values = model.key("ssm.state_size"), model.key("ssm.inner_size") // model.key("ssm.group_count")
    q, k, v, z = by_key_head(model, model.linear(f"blk.{i}.ssm_in", h), [D, D, values, values])
    return np.concatenate([q, k, v], axis=-1), z


def project_alpha_beta(model: Model, h: np.ndarray, i: int) -> list[np.ndarray]:
    """Two numbers a value head, each (T, Hv): two weights, or one by key head, beta before alpha (section 3)."""
    if f"blk.{i}.ssm_ba.weight" not in model.weights:
        return [model.linear(f"blk.{i}.ssm_{part}", h) for part in ("alpha", "beta")]
    heads = model.key("ssm.time_step_rank") // model.key("ssm.group_count")
    return by_key_head(model, model.linear(f"blk.{i}.ssm_ba", h), [heads, heads])[::-1]


def by_key_head(model: Model, x: np.ndarray, widths: list[int]) -> list[np.ndarray]:
    """Parts of those widths, where each key head has its share of every part in x (T, Hk sum(widths))."""
    groups = x.reshape(len(x), model.key("ssm.group_count"), -1)
    return [part.reshape(len(x), -1) for part in np.split(groups, np.cumsum(widths)[:-1], axis=-1)]


def short_conv(model: Model, h: np.ndarray, i: int, tap: _Taps) -> np.ndarray:
    """A causal convolution of every channel between two gates (LFM2): h (T, D) -> (T, D)."""
    b, c, x = np.split(tap(f"conv_in_proj-{i}", model.linear(f"blk.{i}.shortconv.in_proj", h)), 3, axis=-1)
    kernel = model.weights[f"blk.{i}.shortconv.conv.weight"]
    padded = np.concatenate([np.zeros((kernel.shape[1] - 1, h.shape[1])), b * x])
    tap.state(f"history-{i}", padded[len(h) :])
    convolved = tap(f"conv_conv-{i}", causal_conv(padded, kernel))
    return tap(f"conv_out_proj-{i}", model.linear(f"blk.{i}.shortconv.out_proj", c * convolved))


def mamba2(model: Model, h: np.ndarray, i: int, tap: _Taps) -> np.ndarray:
    """A convolution, a state space, a gated norm (Dao and Gu, 2024): h (T, D) -> (T, D)."""
    T, weights, prefix = len(h), model.weights, f"blk.{i}.ssm_"
    W, inner, N, G, H = (
        model.key(f"ssm.{name}")
        for name in ("conv_kernel", "inner_size", "state_size", "group_count", "time_step_rank")
    )
    projected = tap(f"ssm_in-{i}", model.linear(f"{prefix}in", h))
    z, channels, dt = np.split(projected, [inner, 2 * inner + 2 * G * N], axis=-1)
    padded = np.concatenate([np.zeros((W - 1, channels.shape[1])), channels])
    tap.state(f"history-{i}", padded[T:])
    convolved = causal_conv(padded, weights[f"{prefix}conv1d.weight"]) + weights[f"{prefix}conv1d.bias"]
    activated = tap(f"ssm_conv_silu-{i}", silu(tap(f"ssm_conv-{i}", convolved)))
    x, b, c = np.split(activated, [inner, inner + G * N], axis=-1)
    x, b, c = x.reshape(T, H, inner // H), b.reshape(T, G, N), c.reshape(T, G, N)
    dt = tap(f"dt_softplus-{i}", softplus(dt + weights[f"{prefix}dt.bias"]))

    y, memory = state_space(x, dt, weights[f"{prefix}a"][:, 0], b, c)
    tap.state(f"memory-{i}", memory)
    y = tap(f"mamba2_y_add_d-{i}", y + weights[f"{prefix}d"] * x)
    eps = model.key("attention.layer_norm_rms_epsilon")
    out = y.reshape(T, inner) * silu(z)
    if f"{prefix}norm.weight" in weights:
        normed = tap(f"norm-{i}", rms(out.reshape(T, G, inner // G), eps))
        out = (normed * weights[f"{prefix}norm.weight"]).reshape(T, inner)
    return tap(f"mamba_out-{i}", model.linear(f"{prefix}out", out))


def state_space(
    x: np.ndarray, dt: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """x (T, H, P), dt (T, H), a (H,), b and c (T, G, N) -> outputs (T, H, P) and the last state (H, P, N)."""
    T, H, P = x.shape
    group = np.arange(H) // (H // b.shape[1])
    state, outputs = np.zeros((H, P, b.shape[2])), np.empty_like(x)
    for t in range(T):
        written = dt[t][:, None, None] * x[t][:, :, None] * b[t][group][:, None, :]
        state = np.exp(dt[t] * a)[:, None, None] * state + written
        outputs[t] = np.einsum("hpn,hn->hp", state, c[t][group])
    return outputs, state


RECURRENT = {"delta_net": delta_net, "short_conv": short_conv, "mamba2": mamba2}
