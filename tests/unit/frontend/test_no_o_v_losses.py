"""Once the class counts are written, the cost of a sampled loss or a draw does not grow with V."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from shardloss_server.frontend.counts import ClassCounts
from shardloss_server.frontend.plan import drawn, mined_part, plan
from shardloss_server.frontend.request import (
    HitIds,
    InBatch,
    LossRequest,
    Mixture,
    PartialFc,
    SampledSoftmax,
    SampledValues,
    SamplerSpec,
)
from shardloss_server.numerics.margin import Margin
from shardloss_server.numerics.objective import Objective
from shardloss_server.numerics.transform import Transform
from shardloss_server.shard.record import Record, StepKey, Upstream

from ..front import request_of
from ..shard.test_no_o_v import LARGE, SMALL, D, N, S, Watch, make_table

LABELS = SMALL - 1 - torch.arange(N)[:, None]  # distinct and rare: no draw below hits them, for any V
ONES = torch.ones(N, 1)


def spec(kind: str, mixture: Mixture | None = None) -> SamplerSpec:
    return SamplerSpec(kind, S, True, 3, mixture=mixture)


def part_of(kind: str, reserved: int) -> SamplerSpec:
    return SamplerSpec(kind, 0, True, 0, 0.75, reserved)


MIXTURES = {
    "mixture": Mixture(part_of("log_uniform", 0), part_of("fixed_unigram", 2), 0.5),
    "mixture of unigrams": Mixture(part_of("fixed_unigram", 1), part_of("fixed_unigram", 2), 0.5),
}
SAMPLERS = {
    **{kind: spec(kind) for kind in ("log_uniform", "uniform", "fixed_unigram", "learned_unigram")},
    **{name: spec("mixture", mixture) for name, mixture in MIXTURES.items()},
    "in_batch": InBatch(True),
    "partial_fc": PartialFc(S, 3),
}


def values(*shape: int) -> SampledValues:
    """Return a draw of ids below 60 with repeats, one per row if the shape is [N, S]."""
    ids = torch.randint(0, 60, shape, generator=torch.Generator().manual_seed(5))
    return SampledValues(ids, ONES, torch.ones(shape))


CAPPED = Objective(transform=Transform(3.0, 2.0, True), z_loss=0.01, learned_scale=True)
STEPS: dict[str, tuple[SampledSoftmax, Objective]] = {
    **{name: (SampledSoftmax(draw, "every"), Objective()) for name, draw in SAMPLERS.items()},
    "a row's own": (SampledSoftmax(values(N, S), "every"), CAPPED),
    "hit ids": (SampledSoftmax(values(S), "last", HitIds(LABELS, values(S).sampled)), CAPPED),
    "hard negatives": (SampledSoftmax(values(S), "every", None, 6), Objective()),
    "nce": (SampledSoftmax(values(S), "every"), Objective("logistic")),
    "nce of a row's own": (SampledSoftmax(values(N, S), "none"), Objective("logistic", Transform(2.0))),
    "margin": (SampledSoftmax(values(S), "every"), Objective("softmax", Transform(8.0, None, True), Margin(1, 0.5, 0))),
}


@pytest.fixture(scope="module")
def counts() -> dict[int, ClassCounts]:
    """Counts of both sizes, written and learned."""
    made = {}
    for num_classes in (SMALL, LARGE):
        one = made[num_classes] = ClassCounts(num_classes, True)
        written = 1.0 / (2.0 + np.arange(num_classes))  # so steep that a draw has the same small ids for any V
        one.write(0, written)
    return made


def request(sampled: SampledSoftmax, objective: Objective) -> LossRequest:
    hidden = torch.randn(N, D, generator=torch.Generator().manual_seed(7))
    return request_of(hidden, LABELS, sampled=sampled, objective=objective, step=1)


def watched(num_classes: int, asked: LossRequest, counts: ClassCounts) -> Iterator[tuple[str, Watch]]:
    """Run each stage of one step under a watch."""
    table = make_table(num_classes, "adagrad", "mod", "float32")
    own = [table.weights, table.biases, *table.weight_state.values(), *table.bias_state.values()]

    def watch() -> Watch:
        return Watch(SMALL, own)

    assert asked.sampled is not None
    with torch.no_grad():
        with watch() as planning:
            part = plan(asked, table.spec, counts)
        yield "plan", planning
        if k := asked.sampled.num_hard_negatives:
            with watch() as mining:
                part = mined_part(part, [table.mine(part, k)], k)
            yield "mine", mining
        with watch() as scoring:
            score = table.score(part, True)
        yield "score", scoring
        upstream = Upstream(score.statistics.lse, torch.ones(N))
        with watch() as grading:
            table.gradient(part, upstream)
        yield "gradient", grading
        record = Record(table.version + 1, StepKey("a", 1, b""), 0.1, 0, (part,), (upstream,))
        with watch() as applying:
            table.apply_(record)
        yield "apply_", applying


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_any_sampled_loss_does_not_know_how_many_classes_there_are(
    counts: dict[int, ClassCounts], name: str
) -> None:
    """With V = 1e5 and a larger V, the same operations of the same sizes run, and only gathers read V elements."""
    asked = request(*STEPS[name])
    small, large = (dict(watched(num_classes, asked, counts[num_classes])) for num_classes in (SMALL, LARGE))
    for stage, watch in small.items():
        assert watch.calls, stage
        assert watch.offences == large[stage].offences == [], stage
        assert watch.calls == large[stage].calls, stage


def seconds(call: Callable[[], object]) -> float:
    """Return the duration of the fastest of 30 calls."""
    times = []
    for _ in range(30):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_draw_does_not_know_how_many_classes_there_are(counts: dict[int, ClassCounts], name: str) -> None:
    """A draw from the larger V takes no memory of that size, and is far from taking longer in proportion."""

    def draw(num_classes: int) -> Callable[[], object]:
        sampled, table_spec = SampledSoftmax(SAMPLERS[name], "every"), SPECS[num_classes]
        return lambda: drawn(sampled, LABELS, table_spec, 1, counts[num_classes])

    draw(LARGE)()  # two unigrams stay prepared; a third is prepared again, once
    tracemalloc.start()
    draw(LARGE)()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < LARGE / 10  # less than one bit per class
    assert seconds(draw(LARGE)) < min(10, LARGE / SMALL / 2) * seconds(draw(SMALL))


SPECS = {num_classes: make_table(num_classes, "sgd", "div", "float32").spec for num_classes in (SMALL, LARGE)}


@pytest.mark.parametrize("num_classes", [SMALL, LARGE])
def test_counting_a_label_does_not_know_how_many_classes_there_are(
    counts: dict[int, ClassCounts], num_classes: int
) -> None:
    """A commit's labels are added to the counts without allocating memory for each class."""
    labels = torch.arange(N)
    tracemalloc.start()
    counts[num_classes].learn(labels.numpy())
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 10_000
