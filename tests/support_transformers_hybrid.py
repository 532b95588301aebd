"""transformers' own model of a GGUF of delta nets, attention and experts, the converter undone (spec section 3)."""

import math

import numpy as np
import oracle
import pytest

_KINDS = {"qwen35moe": "Qwen3_5Moe", "qwen3next": "Qwen3Next"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_DELTA_NET = {"linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out"}


def hybrid_logits(path, ids):
    """f32 (T, V): Qwen3.5-MoE or Qwen3-Next in float32 with eager attention."""
    torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
    source = oracle.load(path)
    net = _network(source)
    weights = {name: torch.tensor(array, dtype=torch.float32) for name, array in _parameters(source)}
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    with torch.no_grad():
        return net.eval()(torch.tensor(np.array([ids])), use_cache=False).logits[0].numpy()


def _network(source):
    transformers = pytest.importorskip("transformers")
    kind = _KINDS[source.metadata["general.architecture"]]
    layers = range(source.trunk_layers)
    kinds = ["linear_attention" if source.is_recurrent(i) else "full_attention" for i in layers]
    names = {"Qwen3_5Moe": "Qwen3_5MoeTextConfig", "Qwen3Next": "Qwen3NextConfig"}
    config = getattr(transformers, names[kind])(
        vocab_size=len(source.weights["token_embd.weight"]),
        hidden_size=source.key("embedding_length"),
        num_hidden_layers=len(layers),
        layer_types=kinds,
        num_attention_heads=source.key("attention.head_count"),
        num_key_value_heads=source.key("attention.head_count_kv"),
        head_dim=source.key("attention.key_length"),
        linear_conv_kernel_dim=source.key("ssm.conv_kernel"),
        linear_num_key_heads=source.key("ssm.group_count"),
        linear_num_value_heads=source.key("ssm.time_step_rank"),
        linear_key_head_dim=source.key("ssm.state_size"),
        linear_value_head_dim=source.key("ssm.state_size"),
        rms_norm_eps=source.key("attention.layer_norm_rms_epsilon"),
        rope_parameters=_rotation(source),
        num_experts=source.key("expert_count"),
        num_experts_per_tok=source.key("expert_used_count"),
        moe_intermediate_size=source.key("expert_feed_forward_length"),
        shared_expert_intermediate_size=source.key("expert_shared_feed_forward_length"),
        tie_word_embeddings="output.weight" not in source.weights,
        attn_implementation="eager",
        experts_implementation="eager",  # the other wants widths of a multiple of four
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def _rotation(source):
    share = source.key("rope.dimension_count") / source.key("attention.key_length")
    plain = {
        "rope_type": "default",
        "rope_theta": source.key("rope.freq_base"),
        "partial_rotary_factor": math.nextafter(share, 1.0),  # it truncates the product
    }
    sections = source.key("rope.dimension_sections", [])
    return plain | ({"mrope_section": sections[:3], "mrope_interleaved": True} if sections else {})


def _parameters(source):
    """transformers' name and array of every weight; its norms add one, but for the delta net's."""
    yield "model.embed_tokens.weight", source.weights["token_embd.weight"]
    yield "model.norm.weight", source.weights["output_norm.weight"] - 1
    if "output.weight" in source.weights:
        yield "lm_head.weight", source.weights["output.weight"]
    for i in range(source.trunk_layers):
        layer = _layer(source, i)
        recurrent = source.is_recurrent(i)
        for theirs, ours in (_LAYER | (_DELTA_NET if recurrent else _ATTENTION)).items():
            array = layer[f"{ours}.weight"]
            yield f"model.layers.{i}.{theirs}.weight", array - ("norm" in theirs and ours != "ssm_norm")
        for theirs, array in (_experts(layer) | (_delta_net(source, layer) if recurrent else {})).items():
            yield f"model.layers.{i}.{theirs}", array


def _layer(source, i):
    """Tensors of layer i, a joint q, k, v of attention cut apart."""
    prefix = f"blk.{i}."
    layer = {
        name.removeprefix(prefix): source.weights[name] for name in source.weights if name.startswith(prefix)
    }
    if not source.is_recurrent(i) and "attn_qkv.weight" in layer:
        H = source.key("attention.key_length")
        ends = np.cumsum(
            [2 * source.key("attention.head_count") * H, source.key("attention.head_count_kv") * H]
        )
        parts = zip("qkv", np.split(layer.pop("attn_qkv.weight"), ends), strict=True)
        layer |= {f"attn_{part}.weight": rows for part, rows in parts}
    return layer


def _experts(layer):
    halves = [
        layer[f"ffn_{half}_exps.weight"] for half in ("gate", "up") if f"ffn_{half}_exps.weight" in layer
    ]
    return {
        "mlp.experts.gate_up_proj": np.concatenate(halves, axis=1)
        if halves
        else layer["ffn_gate_up_exps.weight"],
        "mlp.experts.down_proj": layer["ffn_down_exps.weight"],
        "mlp.shared_expert_gate.weight": layer["ffn_gate_inp_shexp.weight"][None],
    }


def _delta_net(source, layer):
    """The rest of a delta net; Qwen3.5's value heads from tiled to grouped, Qwen3-Next's joined by key head."""
    Hk, Hv, D = (source.key(f"ssm.{name}") for name in ("group_count", "time_step_rank", "state_size"))
    r, C = Hv // Hk, 2 * Hk * D
    tiled = source.metadata["general.architecture"] == "qwen35moe"
    heads = np.arange(Hv).reshape(r, Hk).T.ravel() if tiled else np.arange(Hv)  # grouped -> the file's

    def by_head(array, of):
        return array.reshape(Hv, of, *array.shape[1:])[heads].reshape(array.shape)

    def by_channel(array):
        return np.concatenate([array[:C], by_head(array[C:], D)])

    theirs = {
        "conv1d.weight": by_channel(layer["ssm_conv1d.weight"])[:, None],
        "dt_bias": by_head(layer["ssm_dt.bias"], 1),
        "A_log": np.log(-by_head(layer["ssm_a"], 1)),
    }
    if tiled:
        theirs |= {
            "in_proj_qkv.weight": by_channel(layer["attn_qkv.weight"]),
            "in_proj_z.weight": by_head(layer["attn_gate.weight"], D),
            "in_proj_a.weight": by_head(layer["ssm_alpha.weight"], 1),
            "in_proj_b.weight": by_head(layer["ssm_beta.weight"], 1),
            "out_proj.weight": by_head(layer["ssm_out.weight"].T, D).T,
        }
    else:
        theirs |= {"in_proj_ba.weight": layer["ssm_ba.weight"], "in_proj_qkvz.weight": _qkvz(layer, Hk, D, r)}
    return {f"linear_attn.{name}": array for name, array in theirs.items()}


def _qkvz(layer, Hk, D, r):
    """q, k, v and z of each key head together: as older files store it, or from the two weights of newer ones."""
    if "ssm_in.weight" in layer:
        return layer["ssm_in.weight"]
    q, k, v = np.split(layer["attn_qkv.weight"], [Hk * D, 2 * Hk * D])
    parts = zip((q, k, v, layer["attn_gate.weight"]), (D, D, r * D, r * D), strict=True)
    width = q.shape[-1]
    return np.concatenate([part.reshape(Hk, rows, width) for part, rows in parts], axis=1).reshape(-1, width)
