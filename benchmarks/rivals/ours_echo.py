"""Hidden sent and its gradient returned: ComputeLoss of a table of 2 rows, so that almost nothing is computed.

The shape: N and D; and address, or local for a front end of its own whose only shard is a thread, so that there is no
worker process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import grpc
import numpy as np
import shardloss

from benchmarks.rivals.child import Child, main

MODULE = "benchmarks.rivals.ours_echo"


class Echo:
    """The caller of ComputeLoss with hidden [N, D]."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        self.server = Child(MODULE, shape) if shape.get("local") else None
        self.client = shardloss.connect(self.server.ready["address"] if self.server else shape["address"])
        self.name = f"bench-{uuid4().hex[:12]}"
        self.table = self.client.create_table(self.name, num_classes=2, dim=shape["D"], bias=False, num_shards=1)
        self.hidden = np.random.default_rng(0).standard_normal((shape["N"], shape["D"]), dtype=np.float32)
        self.labels = np.zeros(shape["N"], np.int64)

    def versions(self) -> Mapping[str, str]:
        return {"shardloss": shardloss.__version__, "grpcio": grpc.__version__}

    def step(self) -> None:
        result = self.table.compute_loss(self.hidden, self.labels, shardloss.FullSoftmax(), want_hidden_grad=True)
        assert result.hidden_grad is not None
        assert result.hidden_grad.shape == self.hidden.shape

    def close(self) -> None:
        """Delete the table, and end the server if this process started it."""
        self.client.delete_table(self.name)
        self.client.close()
        if self.server is not None:
            self.server.stop()


def run_server(_shape: Mapping[str, Any]) -> None:
    """Run a front end whose only shard is a thread, until stdin closes."""
    from shardloss_server.cluster.local import LocalGroup

    from benchmarks.rivals.front_end import serve_front_end

    serve_front_end(LocalGroup(1))


if __name__ == "__main__":
    main(Echo, run_server)
