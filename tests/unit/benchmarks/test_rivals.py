"""The parameter-server rival draws and steps as documented, so that the comparison is fair."""

import numpy as np
import torch

from benchmarks.rivals.parameter_server import LEARNING_RATE, Table, distinct_log_uniform, log_expected

V, D, S = 23, 5, 11  # small enough that nearly every draw repeats an id


class Recorded:
    """A generator that records the numbers it returned."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.given = rng, np.empty(0)

    def random(self, count: int) -> np.ndarray:
        self.given = self.rng.random(count)
        return self.given


def test_draws_go_on_until_enough_ids_are_distinct_and_not_longer(rng):
    recorded = Recorded(rng)
    ids, num_tries = distinct_log_uniform(recorded, S, V)
    drawn = np.minimum(np.exp(recorded.given * np.log(V + 1.0)).astype(np.int64) - 1, V - 1)
    assert sorted(ids.tolist()) == sorted(set(drawn[:num_tries].tolist()))
    assert len(set(drawn[:num_tries].tolist())) == S
    assert len(set(drawn[: num_tries - 1].tolist())) == S - 1


def test_expected_counts_are_the_chance_to_be_drawn_at_all():
    p = np.log((np.arange(V) + 2.0) / (np.arange(V) + 1.0)) / np.log(V + 1.0)
    expected = np.log(1.0 - (1.0 - p) ** 17)
    np.testing.assert_allclose(log_expected(torch.arange(V), 17, V).numpy(), expected, rtol=1e-5)


def test_a_step_is_torch_adagrad_with_repeated_rows_summed():
    table, ids = Table(V, D), torch.tensor([3, 7, 3, 0])
    reference = torch.nn.Parameter(table.rows.clone())
    optimizer = torch.optim.Adagrad([reference], lr=LEARNING_RATE)
    for _ in range(2):  # the second step starts from an accumulator that is not 0
        rows = torch.randn(len(ids), D)
        reference.grad = torch.zeros(V, D).index_add(0, ids, rows)
        optimizer.step()
        table.step_(ids, rows, torch.zeros(len(ids)))
    torch.testing.assert_close(table.rows, reference.detach())
