"""`metrics page`: every metric, as it is documented."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from shardloss_server import metrics

INTRODUCTION = """\
# Metrics

With `metrics_port` set, a server answers Prometheus at `http://metrics_host:metrics_port/metrics`; the port has no
tokens and no TLS, so listen on loopback or a private network. A scrape reads what is known and waits for nobody: the
workers are asked every 5 s beside it, and one that does not answer within 5 s is down until the next time.

`deploy/prometheus/` holds a configuration and alert rules, `deploy/grafana/` a dashboard; docs/operations.md says what
each alert means. `method` is an RPC's name, or "unknown"; `reason` one of docs/errors.md, OK, or CANCELLED where the
caller went away first; `table` a table's name; `worker` an index. Names are bounded: tables by `max_tables`, and the
series of a deleted table end. Histograms of seconds have buckets from 0.5 ms to 10 s. What gRPC itself refuses (above
four times `max_calls_in_flight` calls at once, or a message above `max_message_bytes`) is not seen here.

Operations (flops) are those of the matrix products that were asked for, 2 D for each logit: N V logits of N rows over
all classes (N T more with a margin, N more in Evaluate), N (C + T) with C candidates for the batch, N (S + T) with S
for each row; as many again for the gradient of hidden, for that of the table, for finding hard negatives, and for each
step. What a worker computes twice, or leaves out because it kept it, changes nothing in this count.

This page is made by `make docs`.

| metric | type | unit | labels | meaning |
|---|---|---|---|---|"""
OF_THE_LIBRARY = """\

Of the front end's process there are also `process_*` (CPU seconds, resident and virtual memory, open files, start
time), `python_gc_*` and `python_info`, as prometheus-client exports them."""
app = typer.Typer(no_args_is_help=True, help="The metrics of a server.")


@app.callback()
def commands() -> None:
    """Keep `page` a command of its own."""


@app.command("page")
def print_page() -> None:
    """Print the page that documents every metric (docs/metrics.md)."""
    typer.echo("\n".join(page()))


def page() -> Iterator[str]:
    """The lines of docs/metrics.md."""
    yield from INTRODUCTION.splitlines()
    for each in metrics.ALL:
        labels = ", ".join(each.labels)
        yield f"| `{each.name}` | {each.kind} | {each.unit} | {labels} | {each.meaning} |"
    yield from OF_THE_LIBRARY.splitlines()
