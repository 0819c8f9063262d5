"""Draws follow their distributions, and sampled losses estimate the exact one as theory predicts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from shardloss import sampling
from shardloss_server.frontend.counts import ClassCounts
from shardloss_server.frontend.finish import merge
from shardloss_server.frontend.plan import plan
from shardloss_server.frontend.request import LossRequest, SampledSoftmax, SamplerSpec, Want
from shardloss_server.numerics import reference
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.loss import hidden_gradient
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard.record import Part, RowWrite, Score, TableSpec
from shardloss_server.shard.table import ShardTable
from torch import Tensor

from ..extent import EVERYTHING, SEED, sample, scaled
from .frequencies import P_VALUE, assert_same_frequencies, two_sample_z

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
KINDS = ("log_uniform", "uniform")
DRAWS = scaled(1_000, 10_000)  # per step
STEPS = scaled(5_000, 20_000)
BATCHES = scaled(1_500, 5_000)


def probability(kind: str, num_classes: int) -> NDArray[np.float64]:
    """Return the documented probabilities [V]: 1/V (uniform) or log((k + 2) / (k + 1)) / log(V + 1) (log_uniform)."""
    if kind == "uniform":
        return np.full(num_classes, 1 / num_classes)
    return np.array([math.log((k + 2) / (k + 1)) / math.log(num_classes + 1) for k in range(num_classes)])


# Draws


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", sample([2, 1009, 37], 2))  # test_distributions.py covers 211
@pytest.mark.parametrize("seed", sample([2**63 + 1 + SEED, SEED], 1))
def test_draws_with_repeats_fit_their_distribution(kind: str, num_classes: int, seed: int) -> None:
    """The draws of 100 steps pass a chi-square test against their distribution."""
    distribution = sampling.DISTRIBUTIONS[kind](num_classes)
    draws = np.concatenate([sampling.draw(distribution, DRAWS, False, seed, step).sampled for step in range(100)])
    observed = np.bincount(draws, minlength=num_classes)
    expected = probability(kind, num_classes) * len(draws)
    assert expected.min() > 5  # so the chi-square approximation is valid
    assert stats.chisquare(observed, expected).pvalue > P_VALUE


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_one_draw_each_fit_as_well(kind: str) -> None:
    """The first candidates of many steps or seeds fit the distribution: draws of neighbouring keys are independent."""
    distribution, expected = sampling.DISTRIBUTIONS[kind](37), probability(kind, 37) * STEPS
    over_steps = [int(sampling.draw(distribution, 1, False, 3 + SEED, step).sampled[0]) for step in range(STEPS)]
    over_seeds = [int(sampling.draw(distribution, 1, False, SEED + seed, 3).sampled[0]) for seed in range(STEPS)]
    for draws in (over_steps, over_seeds):
        assert stats.chisquare(np.bincount(draws, minlength=37), expected).pvalue > P_VALUE
        pairs = np.array(draws[:-1]) * 37 + np.array(draws[1:])  # independent draws: pair counts are products
        coarse = np.bincount(pairs, minlength=37 * 37).reshape(37, 37)[:6, :6]
        product = np.outer(expected[:6], expected[:6]) / STEPS
        assert (((coarse - product) ** 2) / product).sum() < stats.chi2(36).isf(P_VALUE)


def inclusions(kind: str, num_classes: int, num_sampled: int, num_batches: int) -> NDArray[np.int64]:
    """Return in how many batches of distinct candidates, drawn by our sampler, each class occurs [V]."""
    distribution = sampling.DISTRIBUTIONS[kind](num_classes)
    draws = [sampling.draw(distribution, num_sampled, True, 17 + SEED, step).sampled for step in range(num_batches)]
    return np.bincount(np.concatenate(draws), minlength=num_classes)


def simulated_inclusions(kind: str, num_classes: int, num_sampled: int, num_batches: int) -> NDArray[np.int64]:
    """Return the same counts [V] by definition: draw one class at a time until S are distinct."""
    dice, weights = random.Random(23 + SEED), probability(kind, num_classes).tolist()
    found = np.zeros(num_classes, dtype=np.int64)
    for _ in range(num_batches):
        batch: set[int] = set()
        while len(batch) < num_sampled:
            batch.update(dice.choices(range(num_classes), weights, k=1))
        found[list(batch)] += 1
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes, num_sampled", [(40, 12), (11, 10)])
def test_distinct_draws_hold_each_class_as_often_as_the_definition(
    kind: str, num_classes: int, num_sampled: int
) -> None:
    """Inclusion frequencies over many batches agree with drawing one class at a time until S are distinct."""
    ours = inclusions(kind, num_classes, num_sampled, BATCHES) / BATCHES
    simulated = simulated_inclusions(kind, num_classes, num_sampled, BATCHES) / BATCHES
    assert ours.sum() == pytest.approx(num_sampled)
    assert_same_frequencies(two_sample_z(ours, BATCHES, simulated, BATCHES))


def golden_frequencies(unique: bool) -> Iterator[tuple[str, NDArray[np.float64], int, int]]:
    """Return (kind, frequencies [V], number of draws or batches, S) of TensorFlow's samplers, from the golden index."""
    for case in json.loads((GOLDEN / "index.json").read_text()):
        kind = case.get("op", "").removeprefix("tf.random.").removesuffix("_candidate_sampler")
        if case["family"] == "tf_candidate_sampler" and kind in KINDS and case["unique"] == unique:
            if "empirical_n" not in case:
                continue
            frequency = np.load(GOLDEN / case["file"], allow_pickle=False)["empirical_frequency"]
            yield kind, frequency, case["empirical_n"], case["num_sampled"]


def test_frequencies_are_tensorflows() -> None:
    """Draw frequencies (with repeats) and inclusion frequencies (without) agree with those of TensorFlow's samplers."""
    compared = []
    for kind, frequency, num_batches, num_sampled in golden_frequencies(unique=True):
        ours = inclusions(kind, len(frequency), num_sampled, num_batches) / num_batches
        assert_same_frequencies(two_sample_z(ours, num_batches, frequency, num_batches))
        compared.append((kind, True))
    for kind, frequency, num_draws, _ in golden_frequencies(unique=False):
        draws = sampling.draw(sampling.DISTRIBUTIONS[kind](len(frequency)), num_draws, False, 29 + SEED, 0).sampled
        ours = np.bincount(draws, minlength=len(frequency)) / num_draws
        assert_same_frequencies(two_sample_z(ours, num_draws, frequency, num_draws))
        compared.append((kind, False))
    assert sorted(compared) == [(kind, unique) for kind in KINDS for unique in (False, True)]


# Estimates


V, D, N = 53, 5, 3  # prime V over two shards


class Model:
    """A float64 table over two shards and a batch, scored in the same way as by the server."""

    def __init__(self) -> None:
        placement, initializer = Placement("mod", V, 2), Initializer("zeros", 0.0, 0)
        self.spec = TableSpec("table", V, D, "float64", True, placement, initializer, OptimizerSpec("sgd"))
        self.weights, self.biases = 0.7 * torch.randn(V, D).double(), 0.5 * torch.randn(V).double()
        self.hidden, self.labels = torch.randn(N, D).double(), torch.tensor([[1], [7], [50]])
        self.shards = [ShardTable(self.spec, k, 8) for k in range(2)]
        for shard in self.shards:
            shard.fill_()
            shard.write_(RowWrite(1, torch.arange(V), self.weights, self.biases))

    def part(self, kind: str, num_sampled: int, step: int, labels: Tensor) -> Part:
        """Plan a sampled softmax with repeated candidates and without removing accidental hits."""
        candidates = SamplerSpec(kind, num_sampled, False, 41 + SEED)
        request = LossRequest(
            table="table",
            session="",
            step=step,
            part=0,
            after_step=None,
            hidden=self.hidden,
            labels=labels,
            label_weights=None,
            ignore_index=-1,
            sampled=SampledSoftmax(candidates, "none"),
            upstream=None,
            commit_now=None,
            want=Want(),
            digest=b"",
            max_reply_bytes=1 << 40,
        )
        return plan(request, self.spec, ClassCounts(self.spec.num_classes, False))

    def scores(self, part: Part, with_gradient: bool) -> list[Score]:
        return [shard.score(part, with_gradient) for shard in self.shards]


@pytest.fixture
def model(seed: int) -> Model:
    return Model()


@pytest.mark.parametrize("kind", KINDS)
def test_corrected_candidates_estimate_the_partition_function(model: Model, kind: str) -> None:
    """E[sum over draws of exp(z - log(S p))] = sum over classes of exp(z), over many steps of 19 draws.

    The sum over draws is exp(lse) minus the true column's term, whose logit and -log(S p) are known.
    """
    lse = [
        merge(model.scores(model.part(kind, 19, step, model.labels), False)).statistics.lse
        for step in range(scaled(300, 2000))
    ]
    logits = model.hidden @ model.weights.T + model.biases
    true_count = 19 * torch.from_numpy(probability(kind, V))[model.labels]
    estimates = torch.stack(lse).exp() - (logits.gather(1, model.labels).exp() / true_count)[:, 0]
    exact = logits.exp().sum(1)
    standard_error = estimates.std(0) / math.sqrt(len(estimates))
    assert (
        standard_error / exact < (0.05 if EVERYTHING else 0.1)
    ).all()  # otherwise the bound below would be too loose to fail
    assert ((estimates.mean(0) - exact).abs() < stats.norm.isf(P_VALUE / 12) * standard_error).all()


def mean_gradient(model: Model, kind: str, num_sampled: int, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return the mean [N, D] over steps of the sampled hidden gradient, and its standard error [N, D]."""
    gradients = []
    for step in range(num_steps):
        part = model.part(kind, num_sampled, step, model.labels)
        scores = model.scores(part, True)
        gradients.append(hidden_gradient(merge(scores), part.batch.mass))
    stacked = torch.stack(gradients)
    return stacked.mean(0), stacked.std(0) / math.sqrt(num_steps)


@pytest.mark.parametrize("kind", sample(KINDS, 1))
def test_the_bias_of_the_gradient_falls_like_one_over_s(model: Model, kind: str) -> None:
    """Four times as many candidates reduce the difference between mean and exact gradient to a quarter."""
    hidden = model.hidden.clone().requires_grad_()
    ones = torch.ones(N, 1, dtype=torch.float64)
    reference.full_softmax(model.weights, model.biases, hidden, model.labels, ones).sum().backward()
    assert hidden.grad is not None
    few, _ = mean_gradient(
        model, kind, scaled(6, 12), scaled(600, 2000)
    )  # its bias is four times as large, its noise twice
    many, many_error = mean_gradient(model, kind, scaled(24, 48), scaled(1200, 4000))
    bias_of_few, bias_of_many = few - hidden.grad, many - hidden.grad
    assert (
        many_error.norm() < (0.2 if EVERYTHING else 0.25) * bias_of_many.norm()
    )  # so the comparison is of bias, not of noise
    assert 3 < float(bias_of_few.norm() / bias_of_many.norm()) < 5
