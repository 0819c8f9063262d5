"""The number of workers that a server starts if none is configured."""

from __future__ import annotations

import os

import torch
from shardloss_server.cli.serve import make_group
from shardloss_server.config import Workers


def test_without_a_number_there_is_one_worker_a_core_and_each_tells_of_itself() -> None:
    """workers = 0 starts one worker per core, and the stats of each worker can be queried."""
    num_threads = torch.get_num_threads()
    group = make_group(Workers(workers=0, local=True))
    try:
        assert [seen.index for seen in group.stats(10.0)] == list(range(os.cpu_count() or 1))
    finally:
        group.close()
        torch.set_num_threads(num_threads)
