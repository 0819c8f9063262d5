"""Links: calls keep their order, parts are kept while needed, strangers are refused, and a lost worker is noticed."""

from __future__ import annotations

import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shardloss_server.cluster import frames, handshake, linked_worker, listener
from shardloss_server.cluster.frames import LinkClosed
from shardloss_server.cluster.group import ShardMissing, WorkerLost
from shardloss_server.cluster.link import KeptPart, Links, WorkerFailed
from shardloss_server.cluster.listener import shut
from shardloss_server.shard.record import Batch, Candidates, OutOfMemory, Part
from torch import Tensor

from ...patience import PATIENCE_S, eventually

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool]


def part_of(num_rows: int = 3, dim: int = 5) -> Part:
    """Return an arbitrary part; a hidden of 40 kB or more is sent outside the pickle."""
    hidden, labels = torch.randn(num_rows, dim), torch.arange(num_rows)[:, None]
    batch = Batch(hidden, labels, torch.ones(num_rows, 1), torch.ones(num_rows))
    none = torch.zeros(0, dtype=torch.int64)
    return Part(batch, Candidates(none, torch.zeros(0), None, torch.zeros(num_rows, 1)))


class Worker:
    """A linked worker of a test that answers by the name of the method and records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.gate = threading.Event()
        self.entered = threading.Event()

    def call(self, method: str, *args: Any) -> Any:
        self.calls.append((method, args))
        if method == "wait":
            self.entered.set()
            assert self.gate.wait(PATIENCE_S)
        if method == "missing":
            raise ShardMissing("no such shard")
        if method == "memory":
            raise OutOfMemory("none left")
        if method == "strange":
            raise Unsendable(threading.Lock())
        return {0: args}


class Unsendable(Exception):
    """An error that cannot be pickled."""


@pytest.fixture
def links() -> Iterator[Links]:
    found = Links(1)
    yield found
    found.close()


@pytest.fixture
def worker(links: Links) -> Worker:
    made = Worker()
    linked_worker.start(made.call, [links.invitation], 0, 1)
    assert links.wait(PATIENCE_S)
    return made


def ask(links: Links, method: str, *args: Any) -> Any:
    """Return the answer of worker 0."""
    return links.call([0], method, *args)[0].result(PATIENCE_S)[0]


# Frames


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (33, 65)])
def test_a_tensor_comes_as_it_went(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Bits, dtype and shape are preserved, also in another memory order, in a view, and in an empty tensor."""
    tensor = (torch.randn(shape) * 9).to(dtype)
    for sent in (tensor, tensor.T if tensor.dim() == 2 else tensor, tensor[1:] if tensor.dim() else tensor):
        came = round_trip(sent)
        assert came.dtype == sent.dtype
        assert came.shape == sent.shape
        assert torch.equal(came, sent)


@given(st.lists(st.integers(0, 5000), max_size=9))
def test_values_of_any_size_come_whole(sizes: list[int]) -> None:
    """One value may have tensors below and above the size that is sent outside the pickle."""
    sent = {n: torch.arange(size) for n, size in enumerate(sizes)}
    came = round_trip(sent)
    assert sorted(came) == sorted(sent)
    assert all(torch.equal(came[n], sent[n]) for n in sent)


def round_trip(value: Any) -> Any:
    """Encode a value and decode it from its joined pieces, as a socket would deliver them."""
    return frames.decode(memoryview(bytearray(b"".join(bytes(piece) for piece in frames.encode(value)))))


def test_what_came_can_be_written_to() -> None:
    """Tensors of a frame own their memory, whether they are large or small."""
    for size in (3, 9000):
        round_trip(torch.zeros(size)).add_(1)


# Calls


def test_calls_are_answered_in_order(links: Links, worker: Worker) -> None:
    """A hundred calls started at once, large and small, each get their own answer."""
    pending = [links.call([0], "echo", n, torch.full((n * 50,), n))[0] for n in range(100)]
    for n, answer in enumerate(pending):
        number, tensor = answer.result(PATIENCE_S)[0]
        assert number == n
        assert torch.equal(tensor, torch.full((n * 50,), n))
    assert [args[0] for _, args in worker.calls] == list(range(100))


@pytest.mark.parametrize(("method", "error"), [("missing", ShardMissing), ("memory", OutOfMemory)])
def test_errors_of_a_worker_keep_their_kind(links: Links, worker: Worker, method: str, error: type[Exception]) -> None:
    """The error has the worker's traceback as a note, and the link stays usable."""
    with pytest.raises(error) as raised:
        ask(links, method)
    assert "Traceback" in "".join(raised.value.__notes__)
    assert ask(links, "echo", 1) == (1,)


def test_an_error_that_cannot_be_sent_is_told_by_its_trace(links: Links, worker: Worker) -> None:
    """The caller gets WorkerFailed with the traceback, even if the error cannot be pickled."""
    with pytest.raises(WorkerFailed, match="Unsendable"):
        ask(links, "strange")


def test_an_abandoned_call_that_has_not_begun_is_passed_over(links: Links) -> None:
    """A running call continues; a call that is abandoned while it waits behind it never runs."""
    worker = Worker()
    linked = linked_worker.LinkedWorker(worker.call, linked_worker.connect(links.invitation, 0))
    threading.Thread(target=linked.run, daemon=True).start()
    assert links.wait(PATIENCE_S)
    running = links.call([0], "wait")[0]
    assert worker.entered.wait(PATIENCE_S)
    given_up, wanted = links.call([0], "given up")[0], links.call([0], "wanted")[0]
    with pytest.raises(TimeoutError):
        given_up.result(0.01)
    given_up.abandon()
    links.call([0], "behind")
    eventually(lambda: bool(linked._cancelled), "the worker hears of it")
    worker.gate.set()
    running.result(PATIENCE_S)
    wanted.result(PATIENCE_S)
    ask(links, "last")
    assert [method for method, _ in worker.calls] == ["wait", "wanted", "behind", "last"]


# Parts


def test_a_part_is_sent_once_and_stays_the_same_object(links: Links, worker: Worker) -> None:
    """Both calls get the same object, so a step finds what a score kept for the part."""
    kept = links.keep(part_of(100, 101))
    ask(links, "score", kept)
    ask(links, "apply", kept)
    first, second = (args[0] for _, args in worker.calls)
    assert first is second
    assert torch.equal(first.batch.hidden, kept.part.batch.hidden)


def test_a_part_goes_when_nobody_needs_it(links: Links, worker: Worker) -> None:
    """The link frees an unused part by itself, without another call."""
    kept: KeptPart | None = links.keep(part_of())
    ask(links, "score", kept)
    theirs = weakref.ref(worker.calls.pop()[1][0])
    assert theirs() is not None
    kept = None
    eventually(lambda: theirs() is None, "the worker's part goes")


# Workers that come and go


def test_a_lost_worker_fails_what_is_under_way_and_the_next_one_is_asked(links: Links) -> None:
    """Calls to an absent worker wait for it, and a part that it lacks is sent again."""
    gone, kept = Worker(), links.keep(part_of())
    sock = linked_worker.connect(links.invitation, 0)
    threading.Thread(target=linked_worker.LinkedWorker(gone.call, sock).run, daemon=True).start()
    assert links.wait(PATIENCE_S)
    ask(links, "score", kept)
    running = links.call([0], "wait")[0]
    assert gone.entered.wait(PATIENCE_S)
    sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(WorkerLost):
        running.result(PATIENCE_S)
    early = links.call([0], "score", kept)[0]
    with pytest.raises(TimeoutError):
        early.result(0.05)
    back = Worker()
    linked_worker.start(back.call, [links.invitation], 0, 1)
    early.result(PATIENCE_S)
    assert torch.equal(back.calls[0][1][0].batch.hidden, kept.part.batch.hidden)
    gone.gate.set()


def test_calls_that_need_rows_miss_them_at_once_where_the_worker_is_known_to_have_died(links: Links) -> None:
    """Waiting and new calls fail alike, also those that create a table; a drop waits until the worker is back."""
    sock = linked_worker.connect(links.invitation, 0)
    threading.Thread(target=linked_worker.LinkedWorker(Worker().call, sock).run, daemon=True).start()
    assert links.wait(PATIENCE_S)
    assert not links.away()
    shut(sock)
    eventually(lambda: bool(links.away()), "the link is broken")
    waiting, freed = links.call([0], "score")[0], links.call([0], "drop")[0]
    link = links.away()[0]
    link.bury(link.lives)
    for pending in (waiting, *(links.call([0], method)[0] for method in ("apply", "memory", "create", "fill"))):
        with pytest.raises(ShardMissing, match="worker 0 has died"):
            pending.result(PATIENCE_S)
    back = Worker()
    linked_worker.start(back.call, [links.invitation], 0, 1)
    freed.result(PATIENCE_S)
    ask(links, "score")
    assert [method for method, _ in back.calls] == ["drop", "score"]


def test_a_death_that_is_heard_of_late_is_none_of_the_next_life(links: Links, worker: Worker) -> None:
    """A late report of a death fails no call if the worker has reconnected since, even after another broken link."""
    link = links.links[0]
    heard, sock = link.lives, link._sock
    assert sock is not None
    link.bury(heard)
    assert ask(links, "score") == ()
    shut(sock)
    eventually(lambda: link.lives > heard and link.linked.is_set(), "a new link")
    link.bury(heard)
    assert ask(links, "score") == ()


def test_a_link_that_breaks_is_made_anew_by_its_worker(links: Links, worker: Worker) -> None:
    """The worker keeps its rows, and only calls in progress are lost."""
    assert ask(links, "echo", 1) == (1,)
    sock = links.links[0]._sock
    assert sock is not None
    shut(sock)
    eventually(lambda: links.links[0]._sock is not sock and links.links[0].linked.is_set(), "a new link")
    assert ask(links, "echo", 2) == (2,)


def test_a_closed_group_answers_at_once(links: Links) -> None:
    """Calls that wait for a worker which never came, and calls after close, raise WorkerLost."""
    early = links.call([0], "echo")[0]
    links.close()
    for pending in (early, links.call([0], "echo")[0]):
        with pytest.raises(WorkerLost):
            pending.result(PATIENCE_S)


def test_a_stranger_is_not_admitted(links: Links, worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    """No frame is read from a peer without the key, and the connected worker stays."""
    address = links.invitation.address
    assert isinstance(address, str)
    for answer in (b"", b"x", bytes(8) + bytes(handshake.CHALLENGE_BYTES) * 2):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address)
            sock.sendall(answer)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(PATIENCE_S)
            with suppress(ConnectionResetError):
                while sock.recv(4096):
                    pass
    eventually(lambda: "refused" in caplog.text, "a refusal is logged")
    assert ask(links, "echo", 1) == (1,)


def test_silent_strangers_keep_no_worker_out(links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many peers connect and send nothing, few of them hold a thread, and a worker is admitted at once."""
    monkeypatch.setattr(handshake, "TIMEOUT_S", 10 * PATIENCE_S)
    places, before = len(links.links) + listener.MOST_STRANGERS, threading.active_count()
    address = links.invitation.address
    with ExitStack() as stack:
        for _ in range(3 * places):
            stranger = stack.enter_context(socket.socket(socket.AF_UNIX))
            stranger.settimeout(PATIENCE_S)
            stranger.connect(address)
        late = stack.enter_context(linked_worker.connect(links.invitation, 0))
        eventually(links.links[0].linked.is_set, "the worker's link")
        assert threading.active_count() <= before + 2 * places  # a thread and a timer for each
        assert late.fileno() >= 0


def test_a_worker_does_not_serve_a_listener_without_the_key(links: Links) -> None:
    """Both sides must prove that they know the key."""
    forged = linked_worker.Invitation(links.invitation.address, b"another key".ljust(32))
    with pytest.raises((handshake.NotOurs, LinkClosed, OSError)):
        linked_worker.connect(forged, 0)


def test_a_frame_cut_short_is_a_closed_link() -> None:
    """LinkClosed is raised if only half of a header or of a body arrives."""
    for content in (b"\x01" * 5, frames.HEADER.pack(1, 1, 100) + b"only so much"):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(content)
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(LinkClosed):
                frames.receive(ours)


def test_large_values_are_sent_whole_over_a_slow_socket() -> None:
    """A value may have more pieces and bytes than one sendmsg accepts."""
    ours, theirs = socket.socketpair()
    value: list[Tensor] = [torch.full((3000,), n) for n in range(200)]
    with ours, theirs:
        sender = threading.Thread(target=frames.send, args=(ours, 1, 7, frames.encode(value)))
        sender.start()
        frame = frames.receive(theirs)
        sender.join(PATIENCE_S)
    assert (frame.kind, frame.number) == (1, 7)
    assert all(torch.equal(a, b) for a, b in zip(frames.decode(frame.body), value, strict=True))
