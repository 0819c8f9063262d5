"""Checks that reject a request before any work is done for it."""

from shardloss_server.frontend.validate.candidates import candidates, filled_in, num_drawn, sampler
from shardloss_server.frontend.validate.changes import (
    class_counts,
    class_range,
    commit_request,
    learned_counts,
    num_commits,
    row_state,
    row_write,
)
from shardloss_server.frontend.validate.loss import label_columns, label_list, labels, loss_request, reply_bytes
from shardloss_server.frontend.validate.objective import objective, transform
from shardloss_server.frontend.validate.tensors import (
    all_finite,
    answered_bytes,
    at_least,
    class_ids,
    finite,
    finite_logits,
    hidden,
    id_list,
    refuse_where,
    session,
)

__all__ = [
    "all_finite",
    "answered_bytes",
    "at_least",
    "candidates",
    "class_counts",
    "class_ids",
    "class_range",
    "commit_request",
    "filled_in",
    "finite",
    "finite_logits",
    "hidden",
    "id_list",
    "label_columns",
    "label_list",
    "labels",
    "loss_request",
    "learned_counts",
    "num_commits",
    "num_drawn",
    "objective",
    "refuse_where",
    "reply_bytes",
    "row_state",
    "row_write",
    "sampler",
    "session",
    "transform",
]
