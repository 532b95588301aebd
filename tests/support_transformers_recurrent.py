"""transformers' own LFM2, Mamba-2, Falcon-H1 of a GGUF, its weights put back: a check that shares no code of ours."""

import numpy as np
import oracle
import pytest

_LFM2 = {
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}

_MAMBA2 = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}

_FALCON_H1 = {
    "input_layernorm.weight": "attn_norm.weight",
    "pre_ff_layernorm.weight": "ffn_norm",
    **{f"self_attn.{part}_proj.weight": f"attn_{part}.weight" for part in "qkv"},
    "self_attn.o_proj.weight": "attn_output.weight",
    **{f"feed_forward.{part}_proj.weight": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
    **{theirs.replace("mixer", "mamba"): ours for theirs, ours in _MAMBA2.items() if "mixer" in theirs},
}

# Falcon-H1's scales, none of which is 1: the file's weights are transformers' multiplied by them.
_SCALES = {
    **{"attention_in_multiplier": 1.25, "attention_out_multiplier": 0.75, "key_multiplier": 0.5},
    **{"ssm_in_multiplier": 1.5, "ssm_out_multiplier": 0.8, "mlp_multipliers": [0.6, 1.6]},
    **{"ssm_multipliers": [0.9, 1.1, 0.7, 1.3, 0.4], "embedding_multiplier": 3.0, "lm_head_multiplier": 0.2},
}


def logits(path, ids):
    """f32 (T, V), in float32, with eager attention."""
    torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
    pytest.importorskip("transformers")
    source = oracle.load(path)
    net, parameters = _MAKERS[source.metadata["general.architecture"]](source)
    if "output.weight" in source.weights:
        scale = getattr(net.config, "lm_head_multiplier", 1)
        parameters["lm_head.weight"] = source.weights["output.weight"] / scale
    weights = {name: torch.tensor(array, dtype=torch.float32) for name, array in parameters.items()}
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    with torch.no_grad():
        return net.eval()(torch.tensor(np.array([ids])), use_cache=False).logits[0].numpy()


def _lfm2(source):
    import transformers

    layers = range(source.key("block_count"))
    kinds = ["conv" if source.is_recurrent(i) else "full_attention" for i in layers]
    config = transformers.Lfm2Config(
        vocab_size=len(source.weights["token_embd.weight"]),
        hidden_size=source.key("embedding_length"),
        intermediate_size=source.key("feed_forward_length"),
        num_hidden_layers=len(kinds),
        num_attention_heads=source.key("attention.head_count"),
        num_key_value_heads=max(source.key("attention.head_count_kv")),
        norm_eps=source.key("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": source.key("rope.freq_base")},
        conv_L_cache=source.key("shortconv.l_cache"),
        block_auto_adjust_ff_dim=False,
        layer_types=kinds,
        tie_word_embeddings="output.weight" not in source.weights,
        attn_implementation="eager",
    )
    parameters = {
        "model.embed_tokens.weight": source.weights["token_embd.weight"],
        "model.embedding_norm.weight": source.weights["token_embd_norm.weight"],
    }
    for i in layers:
        for theirs, ours in _LFM2.items():
            if (array := source.weights.get(f"blk.{i}.{ours}.weight")) is not None:
                array = array[:, None] if theirs == "conv.conv" else array
                parameters[f"model.layers.{i}.{theirs}.weight"] = array
    return transformers.Lfm2ForCausalLM(config), parameters


def _mamba2(source):
    import transformers

    heads, inner = source.key("ssm.time_step_rank"), source.key("ssm.inner_size")
    width = source.key("embedding_length")
    config = transformers.Mamba2Config(
        vocab_size=len(source.weights["token_embd.weight"]),
        hidden_size=width,
        expand=inner // width,
        num_heads=heads,
        head_dim=inner // heads,
        state_size=source.key("ssm.state_size"),
        n_groups=source.key("ssm.group_count"),
        conv_kernel=source.key("ssm.conv_kernel"),
        num_hidden_layers=source.key("block_count"),
        layer_norm_epsilon=source.key("attention.layer_norm_rms_epsilon"),
        chunk_size=16,
        tie_word_embeddings="output.weight" not in source.weights,
    )
    parameters = {
        "backbone.embeddings.weight": source.weights["token_embd.weight"],
        "backbone.norm_f.weight": source.weights["output_norm.weight"],
    }
    for i in range(config.num_hidden_layers):
        for theirs, ours in _MAMBA2.items():
            array = _as_mamba2(ours, source.weights[f"blk.{i}.{ours}"])
            parameters[f"backbone.layers.{i}.{theirs}"] = array
    return transformers.Mamba2ForCausalLM(config), parameters


def _falcon_h1(source):
    import transformers

    heads, inner = source.key("ssm.time_step_rank"), source.key("ssm.inner_size")
    groups, state = source.key("ssm.group_count"), source.key("ssm.state_size")
    config = transformers.FalconH1Config(
        vocab_size=len(source.weights["token_embd.weight"]),
        hidden_size=source.key("embedding_length"),
        intermediate_size=source.key("feed_forward_length"),
        num_hidden_layers=source.key("block_count"),
        num_attention_heads=source.key("attention.head_count"),
        num_key_value_heads=source.key("attention.head_count_kv"),
        head_dim=source.key("attention.key_length"),
        rms_norm_eps=source.key("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": source.key("rope.freq_base")},
        mamba_d_ssm=inner,
        mamba_n_heads=heads,
        mamba_d_head=inner // heads,
        mamba_n_groups=groups,
        mamba_d_state=state,
        mamba_d_conv=source.key("ssm.conv_kernel"),
        mamba_chunk_size=16,
        mamba_rms_norm="blk.0.ssm_norm.weight" in source.weights,
        mamba_norm_before_gate=False,
        tie_word_embeddings="output.weight" not in source.weights,
        attn_implementation="eager",
        **_SCALES,
    )
    if config.tie_word_embeddings:  # one weight of two scales: the file's is that of both
        config.lm_head_multiplier = config.embedding_multiplier
    parameters = {
        "model.embed_tokens.weight": source.weights["token_embd.weight"] / config.embedding_multiplier,
        "model.final_layernorm.weight": source.weights["output_norm.weight"],
    }
    parts = np.repeat(config.ssm_multipliers, [inner, inner, groups * state, groups * state, heads])
    divisors = {
        **{f"attn_{part}.weight": config.attention_in_multiplier for part in "qv"},
        "attn_k.weight": config.attention_in_multiplier * config.key_multiplier,
        "attn_output.weight": config.attention_out_multiplier,
        "ssm_in.weight": config.ssm_in_multiplier * parts[:, None],
        "ssm_out.weight": config.ssm_out_multiplier,
        "ffn_gate.weight": config.mlp_multipliers[0],
        "ffn_down.weight": config.mlp_multipliers[1],
    }
    for i in range(config.num_hidden_layers):
        for theirs, ours in _FALCON_H1.items():
            if (array := source.weights.get(f"blk.{i}.{ours}")) is not None:
                name = f"model.layers.{i}.{theirs}"
                parameters[name] = _as_mamba2(ours, array) / divisors.get(ours, 1)
    return transformers.FalconH1ForCausalLM(config), parameters


def _as_mamba2(name, array):
    """A tensor of a state space as transformers holds it."""
    if name == "ssm_a":
        return np.log(-array[:, 0])
    if name == "ssm_conv1d.weight":
        return array[:, None]
    return array.ravel() if name in ("ssm_d", "ssm_norm.weight") else array


_MAKERS = {"lfm2": _lfm2, "mamba2": _mamba2, "falcon-h1": _falcon_h1}
