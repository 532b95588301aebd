"""transformers' own model of a plain decoder's GGUF, its weights put back: a check that shares no code of ours."""

import numpy as np
import oracle
import pytest

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps",
}
_KINDS = {"qwen3": "Qwen3", "qwen3moe": "Qwen3Moe", "qwen2": "Qwen2", "llama": "Llama"}


def decoder_logits(path, ids):
    """f32 (T, V): Qwen3, Qwen3Moe, Qwen2 or Llama in float32 with eager attention."""
    torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
    pytest.importorskip("transformers")
    gguf_model = oracle.load(path)
    net = _network(gguf_model)
    weights = {name: torch.tensor(array, dtype=torch.float32) for name, array in _parameters(gguf_model)}
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("rotary" in name or name == "lm_head.weight" for name in missing), missing
    with torch.no_grad():
        return net.eval()(torch.tensor(np.array([ids]))).logits[0].numpy()


def _network(source):
    """The model of the file's sizes."""
    import transformers

    kind = _KINDS[source.metadata["general.architecture"]]
    tensors = set(source.weights)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=source.key("embedding_length"),
        intermediate_size=source.key("feed_forward_length", 0),
        num_hidden_layers=source.key("block_count"),
        num_attention_heads=source.key("attention.head_count"),
        num_key_value_heads=source.key("attention.head_count_kv"),
        head_dim=source.key("attention.key_length"),
        vocab_size=len(source.weights["token_embd.weight"]),
        rms_norm_eps=source.key("attention.layer_norm_rms_epsilon"),
        rope_theta=source.key("rope.freq_base"),
        rope_parameters={"rope_theta": source.key("rope.freq_base"), **_rope_scaling(source)},
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        tie_word_embeddings="output.weight" not in tensors,
        attn_implementation="eager",
        use_sliding_window=False,
        **_experts(source),
    )
    net = getattr(transformers, f"{kind}ForCausalLM")(config)
    if "rope_freqs.weight" in tensors:  # what Llama 3's scaling comes to
        rotary = net.model.rotary_emb
        rotary.inv_freq /= rotary.inv_freq.new_tensor(source.weights["rope_freqs.weight"])
    return net


def _rope_scaling(source):
    """The kind of rotation, and its settings."""
    factor = source.key("rope.scaling.factor", 1.0)
    if factor == 1:
        return {"rope_type": "default"}
    stretched = {"rope_type": source.key("rope.scaling.type"), "factor": factor}
    context = source.key("rope.scaling.original_context_length", 0)
    return stretched | ({"original_max_position_embeddings": context} if context else {})


def _experts(source):
    """The settings of a mixture of experts, if it is one."""
    if not source.key("expert_count", 0):
        return {}
    return {
        "num_experts": source.key("expert_count"),
        "num_experts_per_tok": source.key("expert_used_count"),
        "moe_intermediate_size": source.key("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "experts_implementation": "eager",
    }


def _parameters(source):
    """transformers' name and array of every weight, rows of queries and keys unpermuted for llama."""
    yield "model.embed_tokens.weight", source.weights["token_embd.weight"]
    yield "model.norm.weight", source.weights["output_norm.weight"]
    if "output.weight" in source.weights:
        yield "lm_head.weight", source.weights["output.weight"]
    heads = {"attn_q": source.key("attention.head_count"), "attn_k": source.key("attention.head_count_kv")}
    permuted = source.metadata["general.architecture"] == "llama"
    for i in range(source.key("block_count")):
        whole = _split(source, i)
        for theirs, ours in _NAMES.items():
            for kind in ("weight", "bias"):
                if (array := whole.get(f"{ours}.{kind}")) is not None:
                    array = _halves(array, heads[ours]) if permuted and ours in heads else array
                    bare = theirs.startswith("mlp.experts.")
                    yield f"model.layers.{i}.{theirs}" + ("" if bare else f".{kind}"), array


def _split(source, i):
    """Tensors of layer i, a joint q, k, v cut apart, experts' gate and up joined."""
    prefix = f"blk.{i}."
    layer = {
        name.removeprefix(prefix): source.weights[name] for name in source.weights if name.startswith(prefix)
    }
    H = source.key("attention.key_length")
    ends = np.cumsum([source.key(f"attention.head_count{kv}") * H for kv in ("", "_kv")])
    for kind in ("weight", "bias"):
        if (joint := layer.pop(f"attn_qkv.{kind}", None)) is not None:
            parts = zip("qkv", np.split(joint, ends), strict=True)
            layer |= {f"attn_{part}.{kind}": rows for part, rows in parts}
    if "ffn_up_exps.weight" in layer:
        halves = [layer.pop(f"ffn_{half}_exps.weight") for half in ("gate", "up")]
        layer["ffn_gate_up_exps.weight"] = np.concatenate(halves, axis=1)
    return layer


def _halves(array, heads):
    """Rows with the two of a rotary pair beside each other -> all firsts, then all seconds, a head at a time."""
    rows = array.reshape(heads, -1, 2, *array.shape[1:])
    return rows.swapaxes(1, 2).reshape(array.shape)
