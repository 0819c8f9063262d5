"""The retrieval task of tensorflow_recommenders v0.7.7."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardloss import types
from shardloss.autograd import to_numpy
from shardloss.compat.arguments import real, refuse_where, tensor_of, truth, whole
from shardloss.compat.head import losses_of
from shardloss.errors import InvalidArgument, NotSupported
from shardloss.lazy_rows import LazyRows
from shardloss.wire import Array

LEAST_PROBABILITY = 1e-6  # as in tensorflow_recommenders v0.7.7, layers/loss.py
MOST_TEMPERATURE = 1e37  # it and its inverse are float32 numbers
NAMES = {  # fields of the contract -> the arguments of tensorflow_recommenders
    "hidden": "query_embeddings",
    "labels": "candidate_embeddings",
    "sampled_values.sampled": "candidate_embeddings",
    "sampled_softmax.num_hard_negatives": "num_hard_negatives",
}
Ids = NDArray[np.int64]
Values: TypeAlias = Tensor | Array | Sequence[Any]


class Retrieval:
    """The two-tower retrieval loss with tensorflow_recommenders' arguments; call it like a Keras layer.

    scores = queries @ candidates.T / temperature - log(candidate_sampling_probability) [Q, C], the positive of row i in
    column i; loss = sum_i sample_weight[i] * (logsumexp(scores[i]) - scores[i, i]). remove_accidental_hits removes from
    row i every other candidate that has the id of candidate i. num_hard_negatives k keeps the k best negatives of each
    row; None, k <= 0 or k >= C - 1 keeps all of them. loss, metrics, batch_metrics and loss_metrics must be None; name
    has no effect. For metrics over all classes, call `Table.evaluate` and `Table.top_k`.

    Raises:
        NotSupported: a loss or metrics are given.
        InvalidArgument: temperature is not in [1e-37, 1e37], or another option has a wrong type.
    """

    def __init__(
        self,
        loss: None = None,
        metrics: None = None,
        batch_metrics: None = None,
        loss_metrics: None = None,
        temperature: float | None = None,
        num_hard_negatives: int | None = None,
        remove_accidental_hits: bool = False,
        name: str | None = None,
    ) -> None:
        for field, given in (
            ("loss", loss),
            ("metrics", metrics),
            ("batch_metrics", batch_metrics),
            ("loss_metrics", loss_metrics),
        ):
            if given is not None:
                raise NotSupported(f"{field} must be None: {INSTEAD[field]}", field=field)
        self.name = name
        self.temperature = 1.0 if temperature is None else real(temperature, "temperature")
        if not 1 / MOST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE:
            raise InvalidArgument(
                f"temperature = {self.temperature} is outside [{1 / MOST_TEMPERATURE}, {MOST_TEMPERATURE}]",
                field="temperature",
            )
        self.num_hard_negatives = (
            0 if num_hard_negatives is None else max(0, whole(num_hard_negatives, "num_hard_negatives"))
        )
        self.remove_accidental_hits = truth(remove_accidental_hits, "remove_accidental_hits")

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """Return the loss, as `call` does."""
        return self.call(*args, **options)

    def call(
        self,
        query_embeddings: Values,
        candidate_embeddings: LazyRows,
        sample_weight: Values | float | None = None,
        candidate_sampling_probability: Values | float | None = None,
        candidate_ids: Values | None = None,
        compute_metrics: bool = True,  # noqa: ARG002  (accepted, without effect)
        compute_batch_metrics: bool = True,  # noqa: ARG002  (accepted, without effect)
        score_mask: None = None,
    ) -> Tensor:
        """Return the loss [], differentiable in query_embeddings [Q, D] and sample_weight, and trained by `optimizer`.

        candidate_embeddings is `table.embeddings(class_ids [C])`, C >= Q, of a table without biases: row i is the
        positive of query i, and the rows from Q on are additional negatives. sample_weight is [Q], [Q, 1] or a scalar.
        candidate_sampling_probability [C] is clipped to [1e-6, 1], as in tfrs. candidate_ids [C] may have any dtype
        that NumPy can sort, including text. compute_metrics and compute_batch_metrics have no effect. Under
        torch.no_grad the table is not trained.

        Raises:
            NotSupported: score_mask is given, or the queries have several heads [Q, H, D].
            InvalidArgument: the tensors do not fit each other or the table, or remove_accidental_hits is set without
                candidate_ids.
        """
        if score_mask is not None:
            raise NotSupported("score_mask must be None: all queries share the candidates", field="score_mask")
        queries = tensor_of(query_embeddings, "query_embeddings", lists=True)
        check_candidates(queries, candidate_embeddings)
        num_queries, class_ids = len(queries), candidate_embeddings.class_ids
        keeps_all = self.num_hard_negatives >= len(class_ids) - 1
        count = probabilities_of(candidate_sampling_probability, len(class_ids))
        loss = types.SampledSoftmax(
            sampled_values=types.SampledValues(class_ids, count[:num_queries, None], count),
            hit_ids=self._hit_ids(candidate_ids, num_queries, len(class_ids)),
            num_hard_negatives=0 if keeps_all else self.num_hard_negatives,
            logits=types.LogitTransform(scale=1.0 / self.temperature),
        )
        weights = None if sample_weight is None else weights_of(sample_weight, num_queries)
        labels = torch.tensor(class_ids[:num_queries, None])
        losses = losses_of(candidate_embeddings.table, queries, labels, loss, NAMES)
        return (losses if weights is None else losses * weights.to(losses)).sum()

    def _hit_ids(self, candidate_ids: Values | None, num_queries: int, num_candidates: int) -> types.HitIds:
        """Return the ids by which hits are found: column numbers, which match the positive alone, or candidate_ids."""
        places = np.arange(num_candidates)
        if self.remove_accidental_hits:
            places = numbered(candidate_ids, num_candidates)
        return types.HitIds(places[:num_queries, None], places)


INSTEAD = {
    "loss": "the loss is the sum of the categorical cross-entropies",
    "metrics": "call Table.evaluate and Table.top_k for exact metrics over all classes",
    "batch_metrics": "the scores stay on the server",
    "loss_metrics": "use the loss that the call returns",
}


def check_candidates(queries: Tensor, candidates: LazyRows) -> None:
    """Refuse arguments that are not a batch of queries [Q, D] with at least one candidate each."""
    if not isinstance(candidates, LazyRows):
        raise InvalidArgument(
            f"candidate_embeddings is a {type(candidates).__name__}; pass table.embeddings(class_ids)",
            field="candidate_embeddings",
        )
    if candidates.table.spec.bias:
        raise InvalidArgument(
            f"table {candidates.table.name!r} has biases, but two-tower scores have none: create it with bias=False",
            field="candidate_embeddings",
        )
    if queries.dim() == 3:
        raise NotSupported("query_embeddings has several heads per query; [Q, D] is needed", field="query_embeddings")
    if queries.dim() != 2 or queries.shape[1] != candidates.shape[1]:
        raise InvalidArgument(
            f"query_embeddings has shape {list(queries.shape)}; [Q, {candidates.shape[1]}] is needed",
            field="query_embeddings",
        )
    if len(candidates) < len(queries):
        raise InvalidArgument(
            f"{len(candidates)} candidates for {len(queries)} queries: candidate i is the positive of query i",
            field="candidate_embeddings",
        )


def probabilities_of(given: Values | float | None, num_candidates: int) -> NDArray[np.float64]:
    """Return candidate_sampling_probability [C], broadcast from [1, C], [1] or a number; ones for None."""
    field = "candidate_sampling_probability"
    if given is None:
        return np.ones(num_candidates)
    p = tensor_of(given, field, lists=True).double()
    refuse_where(~((p >= 0) & (p < torch.inf)), p, field, "must be finite and >= 0")
    try:
        p = (p[0] if p.dim() == 2 and len(p) == 1 else p).expand(num_candidates)
    except RuntimeError:
        raise InvalidArgument(
            f"{field} has shape {list(p.shape)}; [C = {num_candidates}] is needed", field=field
        ) from None
    return np.asarray(to_numpy(p), np.float64).clip(LEAST_PROBABILITY, 1.0)


def numbered(candidate_ids: Values | None, num_candidates: int) -> Ids:
    """Number candidate_ids [C] from 0; equal ids get equal numbers, and nan is equal to nothing."""
    if candidate_ids is None:
        raise InvalidArgument("remove_accidental_hits needs candidate_ids", field="candidate_ids")
    try:
        ids = to_numpy(candidate_ids) if isinstance(candidate_ids, Tensor) else np.asarray(candidate_ids)
    except ValueError as error:
        raise InvalidArgument(f"candidate_ids is not an array: {error}", field="candidate_ids") from None
    if ids.shape != (num_candidates,):
        raise InvalidArgument(
            f"candidate_ids has shape {list(ids.shape)}; [C = {num_candidates}] is needed", field="candidate_ids"
        )
    try:
        numbers: Ids = np.unique(ids, return_inverse=True, equal_nan=False)[1].astype(np.int64)
    except TypeError as error:
        raise InvalidArgument(f"candidate_ids cannot be compared: {error}", field="candidate_ids") from None
    return numbers


def weights_of(sample_weight: Values | float, num_queries: int) -> Tensor:
    """Return sample_weight in the shape [Q] or []; as in Keras, it is [Q], [Q, 1], [1] or a number."""
    weights = tensor_of(sample_weight, "sample_weight", lists=True)
    if weights.shape not in ((num_queries,), (num_queries, 1), (1,), ()):
        raise InvalidArgument(
            f"sample_weight has shape {list(weights.shape)}; [Q = {num_queries}] is needed", field="sample_weight"
        )
    return weights.reshape(num_queries if weights.numel() == num_queries else ())
