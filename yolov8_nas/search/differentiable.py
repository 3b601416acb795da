"""What each option of a space is worth, learned by gradient: one architecture parameter per option.

The parameters are the logits of independent categorical distributions, one per dimension. A step draws a network from
them, computes it as it is (`supernet.relaxed`: one-hot choices, no blend of options, so that batch statistics are those
of a network that exists), and takes the derivative of the logarithm of its loss by all choices at once: the
straight-through estimate (Bengio et al., arXiv:1308.3432) of what each option would change, from one backward pass.

The expected loss is linear in the probabilities of a dimension, with the expectation of this derivative as slope. So
the step is one of mirror descent with the entropy as mirror map (Beck and Teboulle, Mirror descent and nonlinear
projected subgradient methods for convex optimization, 2003): the slope is subtracted from the logits. Straight-through
Gumbel-softmax (Jang et al., arXiv:1611.01144; Maddison et al., arXiv:1611.00712) multiplies it with the Jacobian of a
noisy softmax on the way. What that costs is known beforehand: an option that has become unlikely hardly learns any
more, the variance grows as the temperature falls, and with Adam all dimensions move alike, those that matter and those
that do not. Here a logit is a mean of derivatives over the temperature, minus what latency takes, so it has a unit:
an option that lowers the loss by `temperature`, as a share, more than another is e times as likely in the end.

Latency is a constraint (as in HardCoRe-NAS, arXiv:2102.11646) and no term of the loss with a weight to tune. Expected
latency is exact and has a gradient (`search.linear_cost`), and after each step the logits move along it until it keeps
the limit: the multiplier follows, and the limit holds from the first step to the last.

The supernet's weights stay frozen, where DARTS (arXiv:1806.09055) alternates. They were trained so that every network
of the space works as it is; trained on along the way they would come to suit the networks that are likely so far, which
makes those likelier still, and the evolution that follows needs weights that are fair to all. The images are those of
the search split: on the train split, whose images the weights have learned, more capacity always looks better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import read_json, read_kept, write_json
from yolov8_nas.runner.results import PriorStep
from yolov8_nas.search.linear_cost import LinearCost
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.supernet.images import read_split
from yolov8_nas.supernet.learner import DetectionLoss
from yolov8_nas.supernet.relaxed import RelaxedSupernet
from yolov8_nas.supernet.supernet import Supernet

CHECKPOINT: Final = "prior.json"

CHECKPOINT_EVERY: Final = 8
"""Steps between two checkpoints."""

_HALVINGS: Final = 20
"""Steps of the bisection that finds the multiplier of the limit."""

Parameters = list[Tensor]
"""For each dimension of the space one number per option, in float64 on the CPU."""


@dataclass(frozen=True)
class PriorRecipe:
    """How architecture parameters are learned.

    Attributes:
        steps: Networks drawn, each on images of its own.
        imgsz: Side of the square input in pixels.
        seed: Seed of networks and images.
        batch: Images per step.
        temperature: Share of the loss that makes an option e times as likely as another.
    """

    steps: int
    imgsz: int
    seed: int
    batch: int = 16
    temperature: float = 3e-4


@dataclass(frozen=True)
class Prior:
    """Where to look in a space.

    Attributes:
        logits: For each dimension those of its options' probabilities, within the limit in expectation. An exact solver
            that maximises their sum finds the likeliest network within all limits.
        worth: For each dimension by which share each option lowers the loss more than the mean of the options does,
            whatever its latency; the mean over all steps.
        trajectory: Every step.
    """

    logits: tuple[tuple[float, ...], ...]
    worth: tuple[tuple[float, ...], ...]
    trajectory: tuple[PriorStep, ...]

    def most_likely(self, space: SearchSpace) -> Architecture:
        """The architecture of the likeliest options."""
        return space.decode([int(np.argmax(values)) for values in self.logits])

    def sample(self, space: SearchSpace, rng: np.random.Generator) -> Architecture:
        """An architecture with every option drawn independently."""
        return space.decode(_draw(self.logits, rng))


def learn_prior(
    supernet: Supernet,
    data_yaml: Path,
    linear: LinearCost,
    limit_ms: float | None,
    *,
    recipe: PriorRecipe,
    partial: Path,
    progress: Callable[[PriorStep], None],
) -> Prior:
    """Learn which options of a space lower a supernet's loss, within a limit on expected latency.

    Args:
        supernet: The trained supernet, on the device to compute on; it stays as it is.
        data_yaml: Ultralytics data yaml with absolute paths, in a writable folder, with the search split as `val`.
        linear: The linear part of the latency model. Its space is learned: the supernet's, or one with fewer options.
        limit_ms: What it may come to in expectation, in ms; nothing for no limit.
        recipe: How to learn.
        partial: Folder for the checkpoint, from which an interrupted learning goes on; it is made where it is missing.
        progress: Told after every step.

    Raises:
        InputError: The search split is empty.
        StageError: The loss is not finite.
    """
    space, drawn = linear.space, _Drawn(supernet, data_yaml, linear.space, recipe)
    partial.mkdir(parents=True, exist_ok=True)
    worth, logits = ([torch.zeros(len(d.options), dtype=torch.float64) for d in space.dimensions] for _ in range(2))
    trajectory: list[PriorStep] = []
    checkpoint = partial / CHECKPOINT
    if saved := read_kept(checkpoint, read_json):
        worth, logits = ([torch.tensor(x, dtype=torch.float64) for x in saved[name]] for name in ("worth", "logits"))
        trajectory = [PriorStep.model_validate(row) for row in saved["trajectory"]]

    for step in range(len(trajectory), recipe.steps):
        loss, saved_share = drawn.step(step, logits)
        worth = [w + (s - w) / (step + 1) for w, s in zip(worth, saved_share, strict=True)]
        rate = 1 / (recipe.temperature * recipe.steps)
        logits = [x + rate * s for x, s in zip(logits, saved_share, strict=True)]
        multiplier = 0.0
        if limit_ms is not None:
            logits, multiplier = within(logits, linear, limit_ms)
        probabilities = [x.softmax(0) for x in logits]
        expected_ms = linear.expected(probabilities).item()
        trajectory.append(
            PriorStep(
                step=step + 1,
                loss=loss,
                expected_ms=expected_ms,
                penalty=multiplier / rate,
                probabilities=_tuples(probabilities),
            )
        )
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state = {"worth": _tuples(worth), "logits": _tuples(logits)}
            write_json(checkpoint, {**state, "trajectory": [point.plain() for point in trajectory]})
        progress(trajectory[-1])
    return Prior(_tuples(logits), _tuples(worth), tuple(trajectory))


class _Drawn:
    """Networks drawn by architecture parameters, and how the loss depends on their options.

    Args:
        supernet: The trained supernet.
        data_yaml: Ultralytics data yaml with the search split as `val`.
        space: The supernet's space, or one with fewer options.
        recipe: How to learn.

    Raises:
        InputError: The search split is empty.
    """

    def __init__(self, supernet: Supernet, data_yaml: Path, space: SearchSpace, recipe: PriorRecipe) -> None:
        try:
            self.images = read_split(data_yaml, "val", recipe.imgsz, augment=False)
        except FileNotFoundError:
            raise InputError(
                f"{data_yaml}: no images in `val`, the search split; cut a larger one from train"
            ) from None
        self.recipe = recipe
        self.relaxed, self.criterion = RelaxedSupernet(supernet), DetectionLoss(supernet, recipe.imgsz)
        self.whole = supernet.space.dimensions
        kept = zip(self.whole, space.dimensions, strict=True)
        self.places = [[d.options.index(option) for option in narrow.options] for d, narrow in kept]
        self.device = next(supernet.parameters()).device

    def step(self, step: int, logits: Parameters) -> tuple[float, Parameters]:
        """Draw a network and images, which depend on nothing but the number of the step and the parameters.

        Returns:
            The loss per image; and for each dimension the share of it that each option saves against their mean.

        Raises:
            StageError: The loss is not finite.
        """
        rng = np.random.default_rng([self.recipe.seed, step])
        drawn = rng.permutation(len(self.images))[: self.recipe.batch]
        batch = self.images.collate_fn([self.images[int(i)] for i in drawn])
        x_BCHW = (batch["img"].to(self.device).float() / 255).contiguous(memory_format=torch.channels_last)
        choices = {
            dimension.name: F.one_hot(torch.tensor(place[gene]), len(dimension.options)).to(x_BCHW).requires_grad_()
            for dimension, place, gene in zip(self.whole, self.places, _draw(logits, rng), strict=True)
        }
        loss = self.criterion(self.relaxed(x_BCHW, choices), batch)[0].sum() / len(drawn)
        if not torch.isfinite(loss):
            raise StageError(f"step {step + 1} of the prior: the loss is {loss.item()}; train the supernet again")
        slopes = torch.autograd.grad(loss.log(), list(choices.values()), allow_unused=True, materialize_grads=True)
        of_kept = [slope[place] for slope, place in zip(slopes, self.places, strict=True)]
        return loss.item(), [-(slope - slope.mean()).double().cpu() for slope in of_kept]


def within(logits: Parameters, linear: LinearCost, limit_ms: float) -> tuple[Parameters, float]:
    """The logits moved against the gradient of expected latency, just far enough to keep a limit.

    Args:
        logits: Architecture parameters.
        linear: The linear part of the latency model.
        limit_ms: The limit in ms.

    Returns:
        The new logits, and the multiplier of the gradient of latency as a share of the limit; a limit below all that
        can be reached gives the logits of the fastest network that the gradient points to.
    """
    probabilities = [x.softmax(0).requires_grad_() for x in logits]
    expected = linear.expected(probabilities) / limit_ms
    if expected <= 1:
        return logits, 0.0
    slopes = torch.autograd.grad(expected, probabilities, allow_unused=True, materialize_grads=True)

    def moved(multiplier: float) -> Parameters:
        return [x - multiplier * slope for x, slope in zip(logits, slopes, strict=True)]

    def kept(multiplier: float) -> bool:
        return bool(linear.expected([x.softmax(0) for x in moved(multiplier)]) <= limit_ms)

    low, high = 0.0, 1.0
    while not kept(high) and high < 1e6:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    return moved(high), high


def _draw(logits: Sequence[Sequence[float] | Tensor], rng: np.random.Generator) -> list[int]:
    """An option of each dimension, by the maximum of logits and Gumbel noise."""
    return [int((np.asarray(values) + rng.gumbel(size=len(values))).argmax()) for values in logits]


def _tuples(parameters: Sequence[Tensor]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(values.tolist()) for values in parameters)
