"""The legend: every axis letter of the project, once, and the types that go with them.

    B  sequences in a batch          T  tokens of this call         S  slots of the key-value cache
    D  model width (embedding)       F  feed-forward width          V  vocabulary
    N  query heads                   K  key-value heads             H  attention head dim
    E  experts                       M  rotary pairs (half of the rotary dims)

Delta net: Hk key heads, Hv value heads, Dk key head dim, Dv value head dim, C convolution channels
(2 Hk Dk + Hv Dv), W convolution taps.

Mamba-2, where letters are its papers': H heads of P dims, G groups of R heads, N dims of state a group,
C convolution channels (H P + 2 G N), W convolution taps.

Shapes are written slow to fast, (B, T, D), and a matrix as GGUF stores it, (out, in).
"""

from __future__ import annotations

import jax

from scarlet_jax.ops.qtensor import QTensor

Array = jax.Array
Weight = Array | QTensor
