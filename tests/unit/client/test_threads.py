"""What threads and processes may share: a client, but not a session, a head or an optimizer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from threading import Barrier

import numpy as np
import pytest
import shardloss
import torch
from shardloss.errors import NotSupported
from shardloss_server.rpc.serve import Server

NUM_THREADS, NUM_STEPS, N, D, V = 8, 5, 5, 3, 11
PATIENCE_S = 120.0
AT_ONCE = "use one session of table 'table-[0-9]+' at the same time: give each thread"


@pytest.fixture
def table(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> shardloss.Table:
    return client.create_table(fresh_name(), num_classes=V, dim=D)


@pytest.fixture
def hidden() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


LABELS, LOSS = np.arange(N), shardloss.FullSoftmax()


def in_threads(step: Callable[[], object]) -> list[BaseException | None]:
    """Return the outcome of each of NUM_STEPS steps in NUM_THREADS threads that begin together."""
    start = Barrier(NUM_THREADS)

    def loop() -> list[BaseException | None]:
        start.wait(PATIENCE_S)
        return [outcome(step) for _ in range(NUM_STEPS)]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        loops = [pool.submit(loop) for _ in range(NUM_THREADS)]
        return list(chain.from_iterable(one.result(PATIENCE_S) for one in loops))


def outcome(step: Callable[[], object]) -> BaseException | None:
    try:
        step()
    except Exception as error:
        return error
    return None


def session_steps(table: shardloss.Table, hidden: np.ndarray) -> Callable[[], object]:
    session = table.session()

    def step() -> None:
        loss = session.compute_loss(hidden, LABELS, LOSS)
        session.commit([(loss, None)], learning_rate=0.1)

    return step


def one_call_steps(table: shardloss.Table, hidden: np.ndarray) -> Callable[[], object]:
    session = table.session()
    return lambda: session.train_step(hidden, LABELS, LOSS, learning_rate=0.1)


def head_steps(table: shardloss.Table, hidden: np.ndarray) -> Callable[[], object]:
    head = table.softmax()
    optimizer = head.optimizer(0.1)

    def step() -> None:
        optimizer.zero_grad()
        head(torch.tensor(hidden), torch.tensor(LABELS)).backward()
        optimizer.step()

    return step


def overlapping_steps(table: shardloss.Table, hidden: np.ndarray) -> Callable[[], object]:
    head = table.softmax()
    optimizer = head.optimizer(0.1, overlap=True)

    def step() -> None:
        head(torch.tensor(hidden), torch.tensor(LABELS)).backward()
        optimizer.step()
        optimizer.synchronize()

    return step


def backward_steps(table: shardloss.Table, hidden: np.ndarray) -> Callable[[], object]:
    head = table.softmax(learning_rate=0.1)
    return lambda: head(torch.tensor(hidden), torch.tensor(LABELS)).backward()


STEPS = [session_steps, one_call_steps, head_steps, overlapping_steps, backward_steps]


@pytest.mark.parametrize("steps", STEPS)
def test_each_step_of_a_shared_session_is_applied_or_refused(
    table: shardloss.Table, hidden: np.ndarray, steps: Callable[[shardloss.Table, np.ndarray], Callable[[], object]]
) -> None:
    """Of 8 threads with 5 steps each, as many commits happen as steps end well; the others name both threads."""
    found = in_threads(steps(table, hidden))
    refused = [error for error in found if error is not None]
    assert table.info().num_commits == len(found) - len(refused) > 0
    for error in refused:
        with pytest.raises(NotSupported, match=AT_ONCE):
            raise error
    steps(table, hidden)()  # a session of one thread
    assert table.info().num_open_tickets == 0


def test_another_thread_can_neither_join_nor_drop_a_step(table: shardloss.Table, hidden: np.ndarray) -> None:
    """While a living thread has losses in a step, losses, zero_grad and an empty step() of others are refused."""
    head = table.softmax()
    optimizer = head.optimizer(0.1)
    batch = torch.tensor(hidden), torch.tensor(LABELS)
    with ThreadPoolExecutor(1, "scorer") as pool:
        loss = pool.submit(head, *batch).result(PATIENCE_S)
        for call in (lambda: head(*batch), optimizer.zero_grad, optimizer.step):
            with pytest.raises(NotSupported, match=f"'scorer_0' and 'MainThread' {AT_ONCE}"):
                call()
        pool.submit(loss.backward).result(PATIENCE_S)
        optimizer.step()
    assert (table.info().num_commits, table.info().num_open_tickets) == (1, 0)


@pytest.mark.parametrize("steps", STEPS)
def test_threads_may_take_turns(
    table: shardloss.Table, hidden: np.ndarray, steps: Callable[[shardloss.Table, np.ndarray], Callable[[], object]]
) -> None:
    """Steps that follow each other may run in different threads, alive or ended."""
    step = steps(table, hidden)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for pool in (one, other, one):
            pool.submit(step).result(PATIENCE_S)
    step()
    assert table.info().num_commits == 4


def test_losses_that_do_not_train_may_be_computed_by_any_thread(table: shardloss.Table, hidden: np.ndarray) -> None:
    """A head in eval mode answers eight threads at once."""
    head = table.softmax().eval()
    assert not any(in_threads(lambda: head(torch.tensor(hidden), torch.tensor(LABELS))))


def test_threads_share_a_client(table: shardloss.Table, hidden: np.ndarray) -> None:
    """Eight threads with a session each train through one client, and every step is a commit."""

    def step_of_its_own() -> object:
        return one_call_steps(table, hidden)()

    assert not any(in_threads(step_of_its_own))
    assert table.info().num_commits == NUM_THREADS * NUM_STEPS


FORKED = """
import os, sys, warnings
import shardloss
warnings.simplefilter("ignore", DeprecationWarning)
client = shardloss.connect(sys.argv[1])
if os.fork() == 0:
    try:
        client.list_tables()
    except shardloss.errors.NotSupported as error:
        print(error, flush=True)
    client.close()
    os._exit(0)
os.wait()
client.list_tables()
print("the parent goes on", flush=True)
"""


def test_a_client_of_a_forked_process_is_refused(local_server: Server) -> None:
    """gRPC does not survive a fork: the call is refused at once instead of hanging, and the parent goes on."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED, local_server.address],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env=os.environ | {"GRPC_ENABLE_FORK_SUPPORT": "0"},  # gRPC's own handlers of forks crash some children
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "of which this one is a fork: call shardloss.connect in each process" in first
    assert second == "the parent goes on"
