"""The number of workers that a server starts if none is configured."""

from __future__ import annotations

import pytest
import torch
from shardloss_server.cli.serve import make_group
from shardloss_server.config import Workers


def test_without_a_number_there_is_one_worker_a_core_and_each_tells_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """workers = 0 starts one worker per core that the process may use, and the stats of each worker can be queried."""
    monkeypatch.setattr("shardloss_server.cli.serve.num_cores", lambda: 3)
    num_threads = torch.get_num_threads()
    group = make_group(Workers(workers=0, local=True))
    try:
        assert [seen.index for seen in group.stats(10.0)] == [0, 1, 2]
    finally:
        group.close()
        torch.set_num_threads(num_threads)
