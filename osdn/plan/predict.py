"""A recipe on a number of GPUs: what it takes, whether it fits, and what to change where not."""

from dataclasses import dataclass
from itertools import product

from osdn.data import load_tokenizer, vocabulary_size
from osdn.errors import UserError
from osdn.model.configuration import OSDNConfig
from osdn.model.flops import flops_per_token
from osdn.plan.hardware import Gpu
from osdn.plan.memory import Memory, Model, count_model, memory
from osdn.plan.speed import Step, step_seconds
from osdn.train.recipe import Recipe
from osdn.train.setup import passes


@dataclass(frozen=True)
class Plan:
    """A recipe's prediction for `gpus` GPUs that divide the weights by `shard`."""

    recipe: Recipe
    gpu: Gpu
    gpus: int
    shard: int
    passes: int
    model: Model
    flops: int
    memory: Memory
    step: Step

    @property
    def fits(self) -> bool:
        """Whether one GPU holds its part."""
        return self.memory.total <= self.gpu.memory

    @property
    def tokens_per_s(self) -> float:
        """Of all GPUs together."""
        return self.recipe.train.batch_rows * self.recipe.train.seq_len / self.step.total

    @property
    def utilisation(self) -> float:
        """Model FLOPs over the vendor's bfloat16 peak."""
        return self.flops * self.tokens_per_s / (self.gpu.peak() * self.gpus)

    @property
    def seconds(self) -> float:
        """Of the whole run, without validations and checkpoints."""
        return self.recipe.train.steps * self.step.total

    @property
    def gpu_hours(self) -> float:
        """What is paid for."""
        return self.seconds * self.gpus / 3600


def model_config(recipe: Recipe) -> OSDNConfig:
    """The recipe's configuration; only if it names no vocab_size is its tokenizer loaded."""
    fields = dict(recipe.model)
    if "vocab_size" not in fields:
        fields["vocab_size"] = vocabulary_size(load_tokenizer(recipe.data.tokenizer))
    return OSDNConfig(**fields)


def predict(
    recipe: Recipe, gpu: Gpu, gpus: int, *, config: OSDNConfig, model: Model | None = None
) -> Plan:
    """The plan for `gpus` GPUs; `model` saves counting the parameters again.

    Raises:
        UserError: the GPUs do not divide the rows of a step, or parallel.shard not the GPUs.
    """
    # As in osdn.train.distributed.parallel: the same words, the same errors.
    shard = gpus if recipe.parallel.shard == "all" else recipe.parallel.shard
    if gpus % shard:
        raise UserError(
            f"parallel.shard: {shard} does not divide {gpus} GPUs; set it to a divisor, or to all"
        )
    model = count_model(config) if model is None else model
    count = passes(recipe, gpus)
    train = recipe.train
    return Plan(
        recipe,
        gpu,
        gpus,
        shard,
        count,
        model,
        flops_per_token(config, train.seq_len),
        memory(config, model, train, shard=shard, passes=count),
        step_seconds(config, model, train, gpu, gpus=gpus, shard=shard, passes=count),
    )


def smaller(plan: Plan, config: OSDNConfig) -> tuple[list[str], Plan] | None:
    """The fastest plan that fits, as overrides of this one that does not; None if none does.

    The result of training does not depend on any of what it changes.
    """
    train = plan.recipe.train
    modes = ["none", "selective", "full"]
    # Only what saves more than the recipe does already.
    modes = modes[modes.index(train.activation_checkpointing) :]
    # divisors: the passes stay whole
    rows = [n for n in range(train.rows, 0, -1) if train.rows % n == 0]
    # As it is, one machine, all GPUs.
    shards = list(dict.fromkeys((plan.shard, min(plan.gpus, plan.gpu.machine), plan.gpus)))
    best: tuple[list[str], Plan] | None = None
    for mode, n, shard in product(modes, rows, shards):
        if plan.gpus % shard or shard < plan.shard:
            continue
        changed = plan.recipe.model_copy(
            update={
                "train": train.model_copy(update={"activation_checkpointing": mode, "rows": n}),
                "parallel": plan.recipe.parallel.model_copy(update={"shard": shard}),
            }
        )
        other = predict(changed, plan.gpu, plan.gpus, config=config, model=plan.model)
        # The fastest, not the first: less recomputation may allow a smaller shard.
        if other.fits and (best is None or other.step.total < best[1].step.total):
            given = [f"train.activation_checkpointing={mode}", f"train.rows={n}"]
            given.append(f"parallel.shard={'all' if shard == plan.gpus else shard}")
            now = (mode == train.activation_checkpointing, n == train.rows, shard == plan.shard)
            best = [text for text, same in zip(given, now) if not same], other
    return best
