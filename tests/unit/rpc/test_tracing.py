"""The trace of a call, from the client through the front end to the workers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest
import shardloss
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collected
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collecting
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, StatusCode
from shardloss.errors import Overloaded, TableNotFound
from shardloss.session import log_name
from shardloss.tracing import Tracing as OfClient
from shardloss.v1 import server_pb2, server_pb2_grpc
from shardloss_server import tracing
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import CannotServe, ServerConfig, Watching
from shardloss_server.frontend.meter import MAX_PHASES, Phases
from shardloss_server.rpc.serve import Server
from shardloss_server.tracing import Tracing

N, D, V = 7, 5, 11
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{}"


class Traced:
    """A server and a client whose spans the test reads."""

    def __init__(self) -> None:
        self.memory = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.memory))
        self.group = LocalGroup(2)
        self.server = Server(self.group, ServerConfig())
        self.server.handlers.call_log.tracing = Tracing(self.provider)
        self.server.start()

    def connect(self, provider: TracerProvider, patch: pytest.MonkeyPatch) -> shardloss.LossClient:
        """Return a client of an application with this provider, which otherwise can be set only once per process."""
        with patch.context() as patched:
            patched.setattr(trace, "get_tracer_provider", lambda: provider)
            return shardloss.connect(self.server.address, timeout_s=20.0)

    def spans(self, name: str = "", kind: SpanKind | None = None) -> list[ReadableSpan]:
        """Return the finished spans, optionally of one name and kind."""
        every = self.memory.get_finished_spans()
        return [span for span in every if (not name or span.name == name) and kind in (None, span.kind)]

    def call(self, method: str) -> tuple[ReadableSpan, ReadableSpan]:
        """Return the only client span and the only server span of a method."""
        (client,), (server,) = self.spans(method, SpanKind.CLIENT), self.spans(method, SpanKind.SERVER)
        return client, server

    def inside(self, span: ReadableSpan) -> list[ReadableSpan]:
        """Return the direct children of a span."""
        return [each for each in self.spans() if each.parent and each.parent.span_id == id_of(span)]


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def said(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.fixture(scope="module")
def server() -> Iterator[Traced]:
    traced = Traced()
    yield traced
    traced.server.stop(grace_s=1.0)
    traced.group.close()


@pytest.fixture
def traced(server: Traced) -> Traced:
    server.memory.clear()
    return server


@pytest.fixture
def client(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> Iterator[shardloss.LossClient]:
    with traced.connect(traced.provider, monkeypatch) as client:
        yield client


@pytest.fixture
def table(client: shardloss.LossClient, fresh_name: Any, traced: Traced) -> shardloss.Table:
    made = client.create_table(fresh_name(), num_classes=V, dim=D, num_shards=2)
    traced.memory.clear()
    return made


def batch() -> tuple[np.ndarray, np.ndarray]:
    return np.ones((N, D), np.float32), np.arange(N)


def test_a_loss_is_one_trace_from_the_client_to_the_workers(traced: Traced, table: shardloss.Table) -> None:
    """Each internal span lies within the time of its parent."""
    table.compute_loss(*batch(), shardloss.FullSoftmax())
    client, server = traced.call("ComputeLoss")
    assert server.parent is not None
    assert server.parent.span_id == id_of(client)
    assert {span.context.trace_id for span in traced.spans() if span.context} == {server.parent.trace_id}
    names = [span.name for span in sorted(traced.inside(server), key=lambda span: span.start_time or 0)]
    assert [name for name in names if name != "wait"] == ["plan", "fanout", "finish"]
    (fanout,) = traced.spans("fanout")
    kernels = traced.inside(fanout)
    assert sorted(said(kernel)["shardloss.worker"] for kernel in kernels) == [0, 1]
    assert {kernel.name for kernel in kernels} == {"kernel"}
    by_id = {id_of(span): span for span in traced.spans()}
    for span in traced.spans():
        if span.parent and span.kind == SpanKind.INTERNAL:
            above = by_id[span.parent.span_id]
            assert (above.start_time or 0) <= (span.start_time or 0) < (span.end_time or 0) <= (above.end_time or 0)


def test_a_call_says_what_it_was_about(traced: Traced, table: shardloss.Table) -> None:
    """Spans have no rows and no session name, which others could use to commit."""
    session = table.session()
    found = session.compute_loss(*batch(), shardloss.FullSoftmax(), want_cost=True)
    session.commit([(found, None)], learning_rate=0.1)
    client, server = traced.call("ComputeLoss")
    told = said(server)
    assert found.cost is not None
    assert told["shardloss.received_bytes"] == found.cost.received_bytes > N * D * 4
    assert told["shardloss.sent_bytes"] > N * D * 4
    assert told["shardloss.flops"] == found.cost.flops
    assert told["shardloss.table"] == table.name
    assert told["shardloss.session"] == log_name(session.name)
    assert told["shardloss.reason"] == said(client)["shardloss.reason"] == "OK"
    assert told["shardloss.request_id"] == said(client)["shardloss.request_id"]
    assert said(client)["shardloss.tries"] == 1
    assert said(client)["rpc.service"] == "shardloss.v1.LossService"
    _, commit = traced.call("Commit")
    assert [span.name for span in traced.inside(commit) if span.name != "wait"] == ["fanout"]
    for span in traced.spans():
        assert session.name not in str(said(span))


def test_a_stream_is_traced(traced: Traced, table: shardloss.Table) -> None:
    """A label distribution is sent in columns, and its fan-outs are children of its plan."""
    labels = np.full((N, V), 1 / V, np.float32)
    table.compute_loss(batch()[0], None, shardloss.FullSoftmax(), label_distribution=labels)
    client, server = traced.call("StreamLoss")
    assert server.parent is not None
    assert server.parent.span_id == id_of(client)
    (plan,) = traced.spans("plan")
    assert "fanout" in {span.name for span in traced.inside(plan)}


def test_a_trainer_s_span_holds_its_calls(traced: Traced, table: shardloss.Table) -> None:
    with traced.provider.get_tracer("trainer").start_as_current_span("step"):
        table.top_k(batch()[0], 2)
    client, _ = traced.call("TopK")
    (step,) = traced.spans("step")
    assert client in traced.inside(step)


def test_all_tries_of_a_call_are_one_span(
    traced: Traced, table: shardloss.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try has a server span below the client's span."""
    real, refused = traced.server.handlers.pipeline.loss, []

    def loss(*arguments: Any) -> Any:
        if len(refused) < 2:
            refused.append(arguments)
            raise Overloaded("no place", retry_after_s=0.01)
        return real(*arguments)

    monkeypatch.setattr(traced.server.handlers.pipeline, "loss", loss)
    table.compute_loss(*batch(), shardloss.FullSoftmax())
    (client,) = traced.spans("ComputeLoss", SpanKind.CLIENT)
    assert said(client)["shardloss.tries"] == 3
    tries = traced.spans("ComputeLoss", SpanKind.SERVER)
    assert [said(span)["shardloss.reason"] for span in tries] == ["OVERLOADED", "OVERLOADED", "OK"]
    assert {span.parent.span_id for span in tries if span.parent} == {id_of(client)}


def test_a_failed_call_has_its_reason(traced: Traced, client: shardloss.LossClient) -> None:
    """The span is an error in the client only, because the server did its work."""
    with pytest.raises(TableNotFound):
        client.table("nowhere")
    of_client, server = traced.call("GetTable")
    assert said(of_client)["shardloss.reason"] == said(server)["shardloss.reason"] == "TABLE_NOT_FOUND"
    assert (of_client.status.status_code, server.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)
    assert not of_client.events
    assert not server.events


def test_a_fault_of_the_server_is_an_error(
    traced: Traced, table: shardloss.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traced.server.handlers.pipeline, "loss", lambda *_: 1 / 0)
    with pytest.raises(shardloss.errors.Internal):
        table.compute_loss(*batch(), shardloss.FullSoftmax())
    _, server = traced.call("ComputeLoss")
    assert (server.status.status_code, server.status.description) == (StatusCode.ERROR, None)
    assert not server.events


def test_a_call_that_its_client_does_not_sample_has_no_span(
    traced: Traced, fresh_name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server follows the parent's sampling decision."""
    with traced.connect(TracerProvider(sampler=ParentBased(ALWAYS_OFF), shutdown_on_exit=False), monkeypatch) as client:
        client.create_table(fresh_name(), num_classes=V, dim=D)
    assert traced.spans() == []


def test_a_client_without_tracing_sends_no_trace(traced: Traced) -> None:
    """The server's span is then the root of the trace."""
    with shardloss.connect(traced.server.address) as client:
        client.list_tables()
    assert traced.spans(kind=SpanKind.CLIENT) == []
    (server,) = traced.spans("ListTables")
    assert server.parent is None


def ask(server: Server, **metadata: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = server_pb2_grpc.ServerServiceStub(channel)
        stub.GetServerInfo(server_pb2.GetServerInfoRequest(), metadata=tuple(metadata.items()), timeout=60)


@pytest.mark.parametrize("flags, num_spans", [("01", 1), ("00", 0)])
def test_a_traceparent_of_anybody_is_continued(traced: Traced, flags: str, num_spans: int) -> None:
    ask(traced.server, traceparent=PARENT.format(flags), tracestate="them=1")
    found = traced.spans("GetServerInfo")
    assert len(found) == num_spans
    for span in found:
        assert span.parent is not None
        assert f"{span.parent.trace_id:032x}" in PARENT


@pytest.mark.parametrize("bad", ["", "x", PARENT.format("zz"), f"00-{0:032}-{0:016}-01", 999 * "0"])
def test_a_bad_traceparent_is_ignored(traced: Traced, bad: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is logged; otherwise any caller could write to the log."""
    for state in ("", "=,=", "a=1," * 99):
        ask(traced.server, traceparent=bad, tracestate=state)
    ask(traced.server, traceparent=PARENT.format("01"), tracestate="=,=")
    assert not [record for record in caplog.records if "opentelemetry" in record.name]
    found = traced.spans("GetServerInfo")
    assert [span.parent is None for span in found] == [True, True, True, False]


@given(st.text(max_size=70), st.text(max_size=70))
def test_no_traceparent_breaks_a_call(server: Traced, parent: str, state: str) -> None:
    metadata = (("traceparent", parent), ("tracestate", state), ("traceparent", parent[::-1]), ("a-bin", b"1"))
    span = Tracing(server.provider).begin("Anything", metadata, 0.0)
    assert span is None or len(span.trace_id) == 32


def test_a_long_call_shows_its_first_phases_and_counts_the_others() -> None:
    """A plan with many fan-outs also shows only the first MAX_PHASES of them."""
    phases = Phases()
    meter = tracing_meter(phases)
    with meter.planning():
        for moment in range(2 * MAX_PHASES):
            meter.note("fanout", moment, moment + 1, {0: 0.5})
    assert [(phase.name, len(phase.inner)) for phase in phases.seen] == [("plan", MAX_PHASES)]
    assert phases.num_left_out == MAX_PHASES
    assert phases.seen[0].inner[0].computed_s == {0: 0.5}


def test_a_wait_that_is_none_is_not_shown() -> None:
    phases = Phases()
    meter = tracing_meter(phases)
    meter.note("wait", 1.0, 1.00001)
    meter.note("wait", 1.0, 1.5)
    assert [(phase.name, phase.ended) for phase in phases.seen] == [("wait", 1.5)]


def tracing_meter(phases: Phases) -> Any:
    from shardloss_server.frontend.meter import Meter

    return Meter(phases=phases)


class Collector(collecting.TraceServiceServicer):
    """A collector that keeps the spans exported to it."""

    def __init__(self) -> None:
        self.spans: dict[str, list[str]] = {}

    def Export(self, request: Any, context: Any) -> Any:
        for each in request.resource_spans:
            (name,) = (said.value.string_value for said in each.resource.attributes if said.key == "service.name")
            self.spans.setdefault(name, []).extend(span.name for scope in each.scope_spans for span in scope.spans)
        return collected.ExportTraceServiceResponse()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    found = Collector()
    listening = grpc.server(futures.ThreadPoolExecutor(2))
    collecting.add_TraceServiceServicer_to_server(found, listening)
    port = listening.add_insecure_port("127.0.0.1:0")
    listening.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    yield found
    listening.stop(0).wait(5)


@pytest.mark.parametrize("named", ["", "losses-of-tests"])
def test_a_collector_gets_the_spans_at_the_latest_when_the_server_stops(
    collector: Collector, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The standard variables configure the export; the service name is shardloss-server if they give none."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", named)
    group = LocalGroup(1)
    server = Server(group, ServerConfig(watching=Watching(tracing=True)))
    server.start()
    ask(server)
    server.stop(grace_s=1.0)
    group.close()
    assert collector.spans == {named or "shardloss-server": ["GetServerInfo"]}


def test_tracing_without_its_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "NEEDED", ("opentelemetry.exporter.of_no_kind.at_all",))
    with pytest.raises(CannotServe, match=r"pip install shardloss-server\[tracing\]"):
        Server(LocalGroup(1), ServerConfig(watching=Watching(tracing=True)))
    tracing.refuse_missing(Watching())  # tracing is off, so its packages are not needed


def test_a_client_of_an_application_that_has_set_nothing_up_is_not_traced(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client does not import opentelemetry.trace either, because that takes time."""
    with shardloss.connect(traced.server.address) as client:
        assert client.channel._tracing is None
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    assert OfClient.found() is None
    assert "opentelemetry.trace" not in sys.modules
