"""One model of each quant type, packed by llama.cpp's quantiser, against the float64 truth of its weights."""

import numpy as np
import oracle
import pytest
from models import PACKABLE, model, path, tokens
from support import relative_l2

from scarlet_jax.tools.engines import llama_cpp

TOLERANCE = 1e-5  # as for F32: exact mode rounds nothing but f32 arithmetic

# ggml's quantisers for these search large tables: many seconds of set-up each.
SLOW = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"}
TYPES = [
    *("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0", "Q4_K_M", "Q5_K_M"),
    *(pytest.param(qtype, marks=pytest.mark.slow) for qtype in sorted(SLOW)),
]


def llama_cpp_logits(file, ids):
    with llama_cpp.Engine(file, n_ctx=256) as engine:
        return engine.decode(list(ids))


@pytest.mark.parametrize("quant", TYPES)
def test_logits_against_float64(quant, record_property):
    ids = tokens(PACKABLE, 20)
    file = path(PACKABLE, quant)
    truth, _ = oracle.forward(file, ids)
    logits, state = model(PACKABLE, quant).forward(ids[:-1])
    assert relative_l2(logits, truth[:-1]) < TOLERANCE
    last, _ = model(PACKABLE, quant).forward(ids[-1:], state)
    assert relative_l2(last, truth[-1:]) < TOLERANCE

    # llama.cpp rounds activations to 8 or 16 bits, so it is far further off: beside ours, not a bound on it.
    theirs = relative_l2(llama_cpp_logits(file, ids), truth)
    record_property("ours", relative_l2(logits, truth[:-1]))
    record_property("llama.cpp", theirs)
    assert theirs > TOLERANCE


@pytest.mark.parametrize("quant", ["Q5_K", "Q6_K"])
def test_greedy_tokens_where_llama_cpp_is_sure(quant):
    ids = list(tokens(PACKABLE, 12))
    compared = 0
    with llama_cpp.Engine(path(PACKABLE, quant), n_ctx=256) as reference:
        theirs = reference.decode(ids)[-1]
        ours, state = model(PACKABLE, quant).last_logits(ids)
        for _ in range(24):
            truth = oracle.forward(path(PACKABLE, quant), ids)[0][-1]
            second, best = np.sort(theirs)[-2:]
            if best - second > 2 * np.abs(theirs - truth).max():
                compared += 1
                assert int(np.argmax(ours)) == int(np.argmax(theirs))
            ids.append(int(np.argmax(theirs)))
            theirs = reference.decode(ids[-1:])[-1]
            ours, state = model(PACKABLE, quant).last_logits(ids[-1:], state)
    assert compared  # a test that compares nothing cannot fail
