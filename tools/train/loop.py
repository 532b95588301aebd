"""The training loop: Muon for matrices, AdamW for the rest, a checkpoint to resume from, and a curve.

Step n of a run sees the same text whether or not the run was interrupted before it: the documents of a step
are a function of the seed and the step alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # pyright: ignore[reportMissingImports] (the train extra)
from safetensors import safe_open
from safetensors.numpy import save_file

from scarlet_jax.config import Config
from scarlet_jax.errors import BadInput
from scarlet_jax.tools import synth
from scarlet_jax.tools.common import replacing
from scarlet_jax.tools.train import corpus, network, text
from scarlet_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a run depends on: the same recipe gives the same model on the same machine."""

    shape: synth.Shape = network.SHAPE
    seed: int = 0
    steps: int = 2400
    turn: int = 1842  # the step from which the text is of the later mix
    init: str = ""  # SHA-256 of the file whose parameters it starts from, if any
    rows: int = 16
    length: int = 128
    learning_rate: float = 0.02  # of Muon, for matrices
    adam_rate: float = 0.003  # of AdamW, for the embedding, norms and other small things
    warmup: int = 50
    decay: float = 0.1  # the last part of the run, over which the rates fall to nothing


Loss = Callable[[network.Parameters, network.Batch, Config], Array]  # mean, in nats


@dataclasses.dataclass
class Run:
    """Where a run stands: steps done, trained parameters, the optimiser's state, and the loss of every step."""

    step: int
    parameters: network.Parameters
    optimiser: Any
    losses: list[float]


def level_until(recipe: Recipe) -> int:
    """The step at which the rates begin to fall: until then a run does not depend on how many there will be."""
    return max(recipe.steps - max(1, round(recipe.decay * recipe.steps)), recipe.warmup)


def schedule(recipe: Recipe, peak: float) -> optax.Schedule:
    """Up over `warmup` steps, level, and down to nothing at the end."""
    level = level_until(recipe)
    return optax.join_schedules(
        [
            optax.linear_schedule(0, peak, recipe.warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0, recipe.steps - level),
        ],
        [recipe.warmup, level],
    )


def optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for matrices, AdamW for all else."""
    rules: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(
            optax.trace(0.95, nesterov=True),
            optax.stateless(lambda updates, _: jax.tree.map(orthogonal, updates)),
            optax.scale_by_learning_rate(schedule(recipe, recipe.learning_rate)),
        ),
        "adam": optax.adam(schedule(recipe, recipe.adam_rate), b2=0.98),
    }
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(rules, _rules))


def orthogonal(step: jax.Array) -> jax.Array:
    """A matrix (out, in) with its singular values brought near one: Jordan et al., 2024 (Muon).

    Five rounds of their polynomial, which leaves them between 0.7 and 1.2; optax's own does the same in
    batches of one, which XLA:CPU multiplies ten times as slowly. Scaled, as theirs, for matrices that widen.
    """
    out, into = step.shape
    x = step if out <= into else step.T
    x = x / (jnp.linalg.norm(x) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return (x if out <= into else x.T) * math.sqrt(max(1, out / into))


# What Muon trains; `attn_q` holds gates too, and `attn_qkv` three projections, but each row is one output.
MATRICES = (
    "attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv", "attn_gate", "ssm_out",
    "ffn_gate", "ffn_up", "ffn_down", "eh_proj",
)  # fmt: skip


def _rules(parameters: network.Parameters) -> dict[str, str]:
    endings = tuple(f".{stem}.weight" for stem in MATRICES)
    return {name: "muon" if name.endswith(endings) else "adam" for name in parameters}


NONE: network.Parameters = {}


def start(recipe: Recipe, frozen: network.Parameters = NONE, init: network.Parameters = NONE) -> Run:
    """Before the first step; trained are the parameters that are not frozen, from `init` where it has them."""
    every = network.initial(recipe.shape, recipe.seed)
    parameters = {name: init.get(name, x) for name, x in every.items() if name not in frozen}
    return Run(0, parameters, optimiser(recipe).init(parameters), [])


def train(
    recipe: Recipe, run: Run, loss: Loss = network.loss, frozen: network.Parameters = NONE
) -> Iterator[Run]:
    """Steps until the recipe's last; yields after each one."""
    vocabulary = text.vocabulary(recipe.shape.vocab_size, recipe.seed)
    encoder = text.Encoder(text.tokenizer(vocabulary))
    cfg = network.config(recipe.shape, vocabulary)
    update = _updater(cfg, recipe, loss)
    while run.step < recipe.steps:
        mix = corpus.FIRST if run.step < recipe.turn else corpus.LATER
        documents = corpus.documents(recipe.seed, corpus.TRAINING, 1 + run.step, mix=mix)
        batch = text.batch(encoder, documents, recipe.rows, recipe.length, mix.told)
        run.parameters, run.optimiser, nats = update(run.parameters, run.optimiser, frozen, batch)
        run.losses.append(float(nats))
        run.step += 1
        yield run


def _updater(cfg: Config, recipe: Recipe, loss: Loss) -> Callable:
    descend = optimiser(recipe)

    def of_trained(trained: network.Parameters, frozen: network.Parameters, batch: network.Batch) -> Array:
        return loss(trained | frozen, batch, cfg)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(
        trained: network.Parameters, state: Any, frozen: network.Parameters, batch: network.Batch
    ) -> tuple:
        nats, gradient = jax.value_and_grad(of_trained)(trained, frozen, batch)
        updates, state = descend.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, nats

    return update


# --- Checkpoints --------------------------------------------------------------------------------------------


def save(path: Path, recipe: Recipe, run: Run) -> None:
    """Everything that resuming needs, in one safetensors file; whole, or not at all."""
    arrays = {f"parameters/{name}": np.asarray(x) for name, x in run.parameters.items()}
    arrays |= {f"optimiser/{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(run.optimiser))}
    arrays["losses"] = np.array(run.losses, np.float64)
    with replacing(path) as temporary:
        save_file(arrays, temporary, {"step": str(run.step), "recipe": _recipe_text(recipe)})


def restore(path: Path, recipe: Recipe, frozen: network.Parameters = NONE) -> Run:
    """A run saved under the same recipe, or one of other `steps` that was the same so far.

    Raises BadInput for a file of another recipe, or none of ours.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise BadInput(f"{path}: not a checkpoint: {error}") from error
    step = int(metadata.get("step", 0))
    if not _continues(json.loads(metadata.get("recipe", "{}")), step, recipe):
        raise BadInput(f"{path}: of another recipe; expected {_recipe_text(recipe)}")
    run = start(recipe, frozen)
    leaves, tree = jax.tree.flatten(run.optimiser)
    restored = [jax.numpy.asarray(arrays[f"optimiser/{i}"]) for i in range(len(leaves))]
    return Run(
        step,
        {name: jax.numpy.asarray(arrays[f"parameters/{name}"]) for name in run.parameters},
        jax.tree.unflatten(tree, restored),
        arrays["losses"].tolist(),
    )


def _continues(saved: dict[str, Any], step: int, recipe: Recipe) -> bool:
    """Whether a run of the saved recipe is at `step` what one of this recipe would be.

    More or fewer steps in all make no difference as long as neither has begun to lower its rates.
    """
    wanted = json.loads(_recipe_text(recipe))
    if saved | {"steps": recipe.steps} != wanted:
        return False
    before = dataclasses.replace(recipe, steps=saved["steps"])
    return saved == wanted or step <= min(level_until(before), level_until(recipe))


def _recipe_text(recipe: Recipe) -> str:
    return json.dumps(dataclasses.asdict(recipe), sort_keys=True)
