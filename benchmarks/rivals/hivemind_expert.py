"""Hivemind: cross entropy over its own weight as a remote expert. Runs in .venv-hivemind.

One step is the trainer's forward and backward; in backward the expert runs its forward again, as hivemind does, and
then SGD. An expert accepts one float tensor, so labels are a column of it, which is exact up to 2^24 classes.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import signal
from collections.abc import Mapping
from typing import Any

import torch
from hivemind.dht import DHT
from hivemind.moe.client.expert import create_remote_experts
from hivemind.moe.expert_uid import ExpertInfo
from hivemind.moe.server.module_backend import ModuleBackend
from hivemind.moe.server.server import Server
from hivemind.p2p import PeerID
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rivals.child import Child, main, serve_child
from benchmarks.rivals.torch_batches import tensors

MODULE = "benchmarks.rivals.hivemind_expert"
NAME = "loss.0"
LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
LEARNING_RATE = 0.1
PR_SET_PDEATHSIG = 1  # prctl.h
THREADS = 2


class Peer(DHT):  # type: ignore[misc]  # hivemind has no types
    """A peer whose process, a fork of this one, ends with this one; hivemind's own would outlive it if it is killed."""

    def run(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        super().run()


class Loss(torch.nn.Module):
    """Cross entropy [N] of x [N, D + 1], whose last column is the label."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(num_classes, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(x[:, :-1] @ self.weight.T, x[:, -1].long(), reduction="none")


class RemoteLoss:
    """The trainer: a DHT peer, with the server in a child process."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        torch.set_num_threads(1)
        # Started before the child, as the processes that a DHT forks would otherwise keep the child's stdin open.
        self.dht = Peer(start=True, host_maddrs=LOOPBACK)
        peers = [str(address) for address in self.dht.get_visible_maddrs()]
        self.server = Child(MODULE, {**shape, "peers": peers})
        peer = PeerID.from_base58(self.server.ready["peer"])
        (self.expert,) = create_remote_experts([ExpertInfo(NAME, peer)], self.dht)
        self.batches = tensors(dict(shape))

    def versions(self) -> Mapping[str, str]:
        return {"hivemind": importlib.metadata.version("hivemind"), "torch": torch.__version__}

    def step(self) -> None:
        hidden, labels = next(self.batches)
        hidden.grad = None
        self.expert(torch.cat([hidden, labels[:, None].float()], 1)).mean().backward()

    def close(self) -> None:
        """End the server, then this peer."""
        self.server.stop()
        self.dht.shutdown()


def run_server(shape: Mapping[str, Any]) -> None:
    """Serve the expert until stdin closes."""
    torch.set_num_threads(THREADS)
    dht = Peer(initial_peers=shape["peers"], start=True, host_maddrs=LOOPBACK)
    loss = Loss(shape["V"], shape["D"])
    backend = ModuleBackend(
        NAME,
        loss,
        optimizer=torch.optim.SGD(loss.parameters(), lr=LEARNING_RATE),
        args_schema=(BatchTensorDescriptor(shape["D"] + 1),),
        outputs_schema=BatchTensorDescriptor(()),
        max_batch_size=shape["N"],
    )
    server = Server(dht, {NAME: backend}, device="cpu", start=True)
    serve_child({"peer": dht.peer_id.to_base58()})
    server.shutdown()


if __name__ == "__main__":
    main(RemoteLoss, run_server)
