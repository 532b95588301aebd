"""The training loop: Muon for matrices, AdamW for the rest, a checkpoint to resume from, and a curve.

Step n of a run sees the same text whether or not the run was interrupted before it: the documents of a step
are a function of the seed and the step alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax  # pyright: ignore[reportMissingImports] (the train extra)
from safetensors import safe_open
from safetensors.numpy import save_file

from scarlet_jax.config import Config
from scarlet_jax.errors import BadInput
from scarlet_jax.tools import synth
from scarlet_jax.tools.common import replacing
from scarlet_jax.tools.train import corpus, network, text


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a run depends on: the same recipe gives the same model on the same machine."""

    shape: synth.Shape = network.SHAPE
    seed: int = 0
    steps: int = 1600
    rows: int = 16
    length: int = 128
    learning_rate: float = 0.02  # of Muon, for matrices
    adam_rate: float = 0.003  # of AdamW, for the embedding, norms and other small things
    warmup: int = 50
    decay: float = 0.36  # the last part of the run, over which the rates fall to nothing


@dataclasses.dataclass
class Run:
    """Where a run stands: steps done, parameters, the optimiser's state, and the loss of every step."""

    step: int
    parameters: network.Parameters
    optimiser: Any
    losses: list[float]


def schedule(recipe: Recipe, peak: float) -> optax.Schedule:
    """Up over `warmup` steps, level, and down to nothing at the end."""
    falling = max(1, round(recipe.decay * recipe.steps))
    level = max(recipe.steps - falling, recipe.warmup)
    return optax.join_schedules(
        [
            optax.linear_schedule(0, peak, recipe.warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0, falling),
        ],
        [recipe.warmup, level],
    )


def optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """Jordan et al., 2024 (Muon): steps of orthogonal direction for matrices; AdamW for all else."""
    muon = optax.contrib.muon(
        schedule(recipe, recipe.learning_rate),
        adam_learning_rate=schedule(recipe, recipe.adam_rate),
        adam_b2=0.98,
        muon_weight_dimension_numbers=_matrices,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


# What Muon trains; `attn_q` holds gates too, and `attn_qkv` three projections, but each row is one output.
MATRICES = (
    "attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv", "attn_gate", "ssm_out",
    "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip


def _matrices(parameters: network.Parameters) -> dict[str, Any]:
    """For each parameter its axes (in, out) if it is Muon's, None if it is AdamW's."""
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    endings = tuple(f".{stem}.weight" for stem in MATRICES)
    return {name: dimensions if name.endswith(endings) else None for name in parameters}


def start(recipe: Recipe) -> Run:
    """Before the first step."""
    parameters = network.initial(recipe.shape, recipe.seed)
    return Run(0, parameters, optimiser(recipe).init(parameters), [])


def train(recipe: Recipe, run: Run) -> Iterator[Run]:
    """Steps until the recipe's last; yields after each one."""
    vocabulary = text.vocabulary(recipe.shape.vocab_size, recipe.seed)
    encoder = text.Encoder(text.tokenizer(vocabulary))
    cfg = network.config(recipe.shape, vocabulary)
    update = _updater(cfg, recipe)
    while run.step < recipe.steps:
        documents = corpus.documents(recipe.seed, corpus.TRAINING, 1 + run.step)
        batch = text.batch(encoder, documents, recipe.rows, recipe.length)
        run.parameters, run.optimiser, loss = update(run.parameters, run.optimiser, batch)
        run.losses.append(float(loss))
        run.step += 1
        yield run


def _updater(cfg: Config, recipe: Recipe) -> Callable:
    descend = optimiser(recipe)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(parameters: network.Parameters, state: Any, batch: network.Batch) -> tuple:
        loss, gradient = jax.value_and_grad(network.loss)(parameters, batch, cfg)
        updates, state = descend.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    return update


# --- Checkpoints --------------------------------------------------------------------------------------------


def save(path: Path, recipe: Recipe, run: Run) -> None:
    """Everything that resuming needs, in one safetensors file; whole, or not at all."""
    arrays = {f"parameters/{name}": np.asarray(x) for name, x in run.parameters.items()}
    arrays |= {f"optimiser/{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(run.optimiser))}
    arrays["losses"] = np.array(run.losses, np.float64)
    with replacing(path) as temporary:
        save_file(arrays, temporary, {"step": str(run.step), "recipe": _recipe_text(recipe)})


def restore(path: Path, recipe: Recipe) -> Run:
    """A run saved under the same recipe; BadInput for a file of another recipe, or none of ours."""
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise BadInput(f"{path}: not a checkpoint: {error}") from error
    if metadata.get("recipe") != _recipe_text(recipe):
        raise BadInput(f"{path}: of another recipe; expected {_recipe_text(recipe)}")
    run = start(recipe)
    leaves, tree = jax.tree.flatten(run.optimiser)
    restored = [jax.numpy.asarray(arrays[f"optimiser/{i}"]) for i in range(len(leaves))]
    return Run(
        int(metadata["step"]),
        {name: jax.numpy.asarray(arrays[f"parameters/{name}"]) for name in run.parameters},
        jax.tree.unflatten(tree, restored),
        arrays["losses"].tolist(),
    )


def _recipe_text(recipe: Recipe) -> str:
    return json.dumps(dataclasses.asdict(recipe), sort_keys=True)
