"""transformers' own LFM2 and Mamba-2 of a GGUF, its weights put back: a check that shares no code of ours."""

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


def logits(path, ids):
    """f32 (T, V), in float32, with eager attention."""
    torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
    pytest.importorskip("transformers")
    source = oracle.load(path)
    net, parameters = _MAKERS[source.metadata["general.architecture"]](source)
    if "output.weight" in source.weights:
        parameters["lm_head.weight"] = source.weights["output.weight"]
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
        here = {name: source.weights[f"blk.{i}.{name}"] for name in _MAMBA2.values()}
        here["ssm_conv1d.weight"] = here["ssm_conv1d.weight"][:, None]
        here["ssm_a"] = np.log(-here["ssm_a"][:, 0])
        here["ssm_d"] = here["ssm_d"][:, 0]
        here["ssm_norm.weight"] = here["ssm_norm.weight"].ravel()
        parameters |= {f"backbone.layers.{i}.{theirs}": here[ours] for theirs, ours in _MAMBA2.items()}
    return transformers.Mamba2ForCausalLM(config), parameters


_MAKERS = {"lfm2": _lfm2, "mamba2": _mamba2}
