"""Partials of disjoint candidate sets form a commutative monoid under `merge`; targets add up."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from shardloss_server.numerics.partial import Partial, Target, add_all, merge, share
from torch import Tensor

N, D = 7, 5  # N is no multiple of a vector width; D is odd
TOLERANCE = 1e-12
num_candidates = st.integers(0, 13)  # 0: a shard that owns no candidate
seeds = st.integers(0, 2**32)
scales = st.sampled_from([0.1, 3.0, 300.0, 1e4])  # of logits: from flat to saturated, far outside exp's range


def scored(logits: Tensor, rows: Tensor) -> Partial:
    """Return the partial of logits [N, C] over rows [C, D], computed with torch's own softmax."""
    if logits.shape[1] == 0:
        return Partial.empty(len(logits), rows.shape[1], logits.dtype)
    weights = torch.nan_to_num(torch.softmax(logits, 1))  # a row without a finite logit has no weights
    return Partial(torch.logsumexp(logits, 1), weights @ rows)


def random_set(generator: torch.Generator, num: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return logits [N, num] and rows [num, D]; about one candidate in five is masked, as accidental hits are."""
    logits = torch.randn(N, num, dtype=torch.float64, generator=generator) * scale
    masked = torch.rand(N, num, generator=generator) < 0.2
    return logits.masked_fill(masked, -torch.inf), torch.randn(num, D, dtype=torch.float64, generator=generator)


def random_partials(seed: int, nums: tuple[int, ...], scale: float) -> list[Partial]:
    generator = torch.Generator().manual_seed(seed)
    return [scored(*random_set(generator, num, scale)) for num in nums]


def assert_same(a: Partial, b: Partial) -> None:
    torch.testing.assert_close(a.lse, b.lse, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(a.mean_row, b.mean_row, rtol=TOLERANCE, atol=TOLERANCE * 10)


@given(seeds, num_candidates, num_candidates, scales)
def test_merging_equals_scoring_the_union(seed: int, num_a: int, num_b: int, scale: float) -> None:
    """merge(score(A), score(B)) equals score(A and B), including masked candidates and empty sets."""
    generator = torch.Generator().manual_seed(seed)
    logits_a, rows_a = random_set(generator, num_a, scale)
    logits_b, rows_b = random_set(generator, num_b, scale)
    union = scored(torch.cat([logits_a, logits_b], 1), torch.cat([rows_a, rows_b]))
    merged = merge(scored(logits_a, rows_a), scored(logits_b, rows_b))
    torch.testing.assert_close(merged.lse, union.lse, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(merged.mean_row, union.mean_row, rtol=0, atol=1e-11 * max(1.0, scale / 100))


@given(seeds, num_candidates, num_candidates, scales)
def test_merge_is_commutative(seed: int, num_a: int, num_b: int, scale: float) -> None:
    """merge(a, b) equals merge(b, a) bit for bit."""
    a, b = random_partials(seed, (num_a, num_b), scale)
    one, other = merge(a, b), merge(b, a)
    assert torch.equal(one.lse, other.lse)
    assert torch.equal(one.mean_row, other.mean_row)


@given(seeds, num_candidates, num_candidates, num_candidates)
def test_merge_is_associative_to_rounding(seed: int, num_a: int, num_b: int, num_c: int) -> None:
    """merge(merge(a, b), c) equals merge(a, merge(b, c)) up to rounding."""
    a, b, c = random_partials(seed, (num_a, num_b, num_c), 3.0)
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))


@given(seeds, num_candidates, scales)
def test_the_empty_partial_is_the_identity(seed: int, num: int, scale: float) -> None:
    """Merging with a shard that owns no candidate changes no bit."""
    (partial,) = random_partials(seed, (num,), scale)
    empty = Partial.empty(N, D, torch.float64)
    for merged in (merge(partial, empty), merge(empty, partial)):
        assert torch.equal(merged.lse, partial.lse)
        assert torch.equal(merged.mean_row, partial.mean_row)


def test_nothing_merged_with_nothing_is_nothing() -> None:
    """Merging -inf with -inf gives -inf with mean row 0, never nan."""
    empty = Partial.empty(N, D, torch.float64)
    merged = merge(empty, empty)
    assert torch.equal(merged.lse, torch.full((N,), -torch.inf, dtype=torch.float64))
    assert torch.equal(merged.mean_row, torch.zeros(N, D, dtype=torch.float64))


def test_a_set_that_holds_nothing_has_no_share() -> None:
    """share = exp(lse - total) is 0 for an lse of -inf, even if the total is -inf, and 1 for a finite lse = total."""
    none, some = torch.tensor([-torch.inf]), torch.tensor([-1e4])
    assert share(none, none).tolist() == [0.0]
    assert share(none, some).tolist() == [0.0]
    assert share(some, some).tolist() == [1.0]


def test_a_partial_without_mean_rows_merges_without() -> None:
    """If one side was scored for its lse alone, the merged partial has no mean rows either; its lse is the same."""
    a, b = random_partials(3, (4, 2), 3.0)
    merged = merge(a, Partial(b.lse, None))
    assert merged.mean_row is None
    assert torch.equal(merged.lse, merge(a, b).lse)


@given(seeds, st.integers(1, 7))
def test_targets_add_up(seed: int, num_shards: int) -> None:
    """The target of the whole is the sum of the shards' targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = [
        Target(torch.randn(N, generator=generator).double(), torch.randn(N, D, generator=generator).double())
        for _ in range(num_shards)
    ]
    total = add_all(targets)
    torch.testing.assert_close(total.target_logit, torch.stack([t.target_logit for t in targets]).sum(0))
    torch.testing.assert_close(total.target_row, torch.stack([t.target_row for t in targets]).sum(0))
    assert add_all([*targets, Target(targets[0].target_logit, None)]).target_row is None


@given(seeds, st.integers(1, 7))
def test_targets_of_some_rows_add_up(seed: int, num_shards: int) -> None:
    """Targets given for some rows only are added at those rows, as if each shard had returned 0 for all others."""
    generator = torch.Generator().manual_seed(seed)
    zeros, sparse, dense = torch.zeros(N, dtype=torch.float64), [], torch.zeros(N, D, dtype=torch.float64)
    for _ in range(num_shards):
        at = torch.nonzero(torch.rand(N, generator=generator) < 0.5)[:, 0]
        rows = torch.randn(len(at), D, generator=generator).double()
        sparse.append(Target(zeros, rows, None, at))
        dense[at] += rows
    gradient = torch.randn(N, D, generator=generator).double()
    expected = Target(zeros, dense).subtracted_from_(gradient.clone())
    torch.testing.assert_close(add_all(sparse).subtracted_from_(gradient), expected)
