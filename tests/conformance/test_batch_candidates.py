"""Candidates taken from the batch itself, over the service: a row's own label is never its negative."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import shardloss
from shardloss_server.rpc.serve import Server

V, D, N = 41, 5, 7
LABELS = np.array([3, 9, 3, 40, 0, 9, 9])  # some labels are repeated in other rows


@pytest.mark.parametrize("kind", [shardloss.SampledSoftmax, shardloss.SampledLogistic])
def test_hits_that_are_kept_are_other_rows_copies(
    local_server: Server, fresh_name: Callable[[], str], rng: np.random.Generator, kind: type
) -> None:
    """PartialFC lists each class once, so it has no hits to keep; with InBatch, copies in other rows stay negatives."""
    hidden = rng.normal(size=(N, D))
    with shardloss.connect(local_server.address) as client:
        table = client.create_table(
            fresh_name(), num_classes=V, dim=D, dtype="float64", num_shards=3, initializer=shardloss.Normal(1.0)
        )
        rows = table.read_rows(np.arange(V)).rows
        losses = {
            (type(sampler).__name__, remove): table.compute_loss(
                hidden, LABELS, kind(num_sampled=20, sampler=sampler, seed=3, remove_accidental_hits=remove)
            ).loss
            for sampler in (shardloss.InBatch(), shardloss.PartialFc())
            for remove in (False, True)
        }
        client.delete_table(table.name)
    np.testing.assert_array_equal(losses["PartialFc", False], losses["PartialFc", True])
    for remove in (False, True):
        for n in range(N):
            others = np.delete(LABELS, n)
            negatives = others[others != LABELS[n]] if remove else others
            z, z_y = rows[negatives] @ hidden[n], rows[LABELS[n]] @ hidden[n]
            if kind is shardloss.SampledSoftmax:
                expected = np.log(np.exp([z_y, *z]).sum()) - z_y
            else:
                expected = np.log1p(np.exp([-z_y, *z])).sum()
            loss = losses["InBatch", remove]
            assert loss is not None
            np.testing.assert_allclose(loss[n], expected, rtol=1e-12)
