"""The torch interface of a table: its heads, and its rows and logits as lazy values. torch is imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from shardloss import messages, types
from shardloss.lazy_rows import LazyRows, lazy_rows
from shardloss.wire import Array

if TYPE_CHECKING:
    from torch import Tensor

    from shardloss.heads import MarginSoftmaxHead, SampledLogisticHead, SampledSoftmaxHead, SigmoidHead, SoftmaxHead
    from shardloss.lazy import LazyLogits
    from shardloss.table import Table


def require_torch() -> None:
    """Check that torch can be imported.

    Raises:
        ModuleNotFoundError: torch is not installed; the message names the extra that installs it.
    """
    try:
        import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        message = "heads, lazy logits and shardloss.compat need torch: pip install 'shardloss[torch]'"
        raise ModuleNotFoundError(message, name="torch") from None


class Trainable:
    """The torch interface of a `Table`: each loss is a head, a module called like a local loss."""

    def _self(self) -> Table:
        return cast("Table", self)

    def softmax(
        self,
        *,
        label_smoothing: float = 0.0,
        class_weights: Array | None = None,
        z_loss: float = 0.0,
        logits: types.LogitTransform | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        learning_rate: float | None = None,
    ) -> SoftmaxHead:
        """Return a torch.nn.Module of the exact softmax loss over all classes; see `shardloss.heads.Head`.

        label_smoothing and class_weights [V] are as in torch.nn.functional.cross_entropy. z_loss adds z_loss * lse ** 2
        per row. logits is the transform of logits (temperature, soft cap, cosines). reduction is "mean", "sum" or
        "none". Rows whose labels are all ignore_index do not count; with None all rows count. With a learning_rate the
        head commits in backward; without one, `head.optimizer(lr)` commits.

        Raises:
            InvalidArgument: reduction is unknown, or class_weights are not V finite floats >= 0.
        """
        require_torch()
        from shardloss.heads import SoftmaxHead

        loss = types.FullSoftmax(label_smoothing, class_weights, None, z_loss, logits or types.LogitTransform())
        return SoftmaxHead(
            self._self(), loss, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate
        )

    def sampled_softmax(
        self,
        num_sampled: int = 0,
        *,
        sampler: types.Sampler = "log_uniform",
        unique: bool = True,
        seed: int | None = None,
        remove_accidental_hits: bool = True,
        hit_removal: str = "every",
        num_hard_negatives: int = 0,
        z_loss: float = 0.0,
        logits: types.LogitTransform | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        learning_rate: float | None = None,
    ) -> SampledSoftmaxHead:
        """Return a torch.nn.Module of the sampled softmax loss; see `shardloss.heads.Head`.

        Each step draws num_sampled candidates from sampler (see `shardloss.SampledSoftmax`; "log_uniform" is for ids
        sorted by descending frequency), without repeats if unique, keyed by (seed, step). With seed None, torch's
        generator draws the seed. remove_accidental_hits removes from a row the candidates that are its labels:
        hit_removal "every" removes each copy, "last" only the last as TensorFlow does. num_hard_negatives > 0 keeps
        only that many of the best candidates of each row. num_sampled 0 is for a head that is always given
        sampled_values, and for samplers that need no number. Other arguments are as in `softmax`.

        Raises:
            InvalidArgument: sampler, hit_removal or reduction is unknown.
        """
        require_torch()
        from shardloss.autograd import fresh_seed
        from shardloss.heads import SampledSoftmaxHead

        loss = types.SampledSoftmax(
            num_sampled=num_sampled,
            sampler=sampler,
            unique=unique,
            seed=fresh_seed() if seed is None else seed,
            remove_accidental_hits=remove_accidental_hits,
            hit_removal=hit_removal,
            num_hard_negatives=num_hard_negatives,
            z_loss=z_loss,
            logits=logits or types.LogitTransform(),
        )
        messages.check_loss(loss)
        return SampledSoftmaxHead(
            self._self(), loss, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate
        )

    def nce(
        self,
        num_sampled: int = 0,
        *,
        sampler: types.Sampler = "log_uniform",
        unique: bool = True,
        seed: int | None = None,
        remove_accidental_hits: bool = False,
        hit_removal: str = "every",
        subtract_log_q: bool = True,
        logits: types.LogitTransform | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        learning_rate: float | None = None,
    ) -> SampledLogisticHead:
        """Return a torch.nn.Module of noise-contrastive estimation, TensorFlow's nce_loss; see `shardloss.heads.Head`.

        With remove_accidental_hits=True it is the sampled logistic loss; with subtract_log_q=False it is negative
        sampling. Other arguments are as in `sampled_softmax`.

        Raises:
            InvalidArgument: sampler, hit_removal or reduction is unknown.
        """
        require_torch()
        from shardloss.autograd import fresh_seed
        from shardloss.heads import SampledLogisticHead

        loss = types.SampledLogistic(
            num_sampled=num_sampled,
            sampler=sampler,
            unique=unique,
            seed=fresh_seed() if seed is None else seed,
            remove_accidental_hits=remove_accidental_hits,
            hit_removal=hit_removal,
            subtract_log_q=subtract_log_q,
            logits=logits or types.LogitTransform(),
        )
        messages.check_loss(loss)
        return SampledLogisticHead(
            self._self(), loss, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate
        )

    def sigmoid(
        self,
        *,
        logits: types.LogitTransform | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        learning_rate: float | None = None,
    ) -> SigmoidHead:
        """Return a torch.nn.Module of the logistic loss over all classes, summed per row; see `shardloss.heads.Head`.

        It equals torch.nn.functional.binary_cross_entropy_with_logits(h @ W.T + b, multi-hot labels, "none").sum(-1),
        whose labels are 1 for each class that a row lists, once or more often. Arguments are as in `softmax`.

        Raises:
            InvalidArgument: reduction is unknown.
        """
        require_torch()
        from shardloss.heads import SigmoidHead

        loss = types.FullSigmoid(logits or types.LogitTransform())
        return SigmoidHead(
            self._self(), loss, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate
        )

    def margin_softmax(
        self,
        *,
        m1: float = 1.0,
        m2: float = 0.5,
        m3: float = 0.0,
        scale: float = 64.0,
        normalize: bool = True,
        num_sampled: int = 0,
        seed: int | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        learning_rate: float | None = None,
    ) -> MarginSoftmaxHead:
        """Return a torch.nn.Module of the combined margin softmax: ArcFace (m2), CosFace (m3), SphereFace (m1).

        Hidden and rows are divided by their norms; with normalize=False, hidden . row itself is used as the cosine.
        num_sampled > 0 trains as PartialFC does, on the batch's classes and uniform negatives, num_sampled in total,
        keyed by (seed, step). The table must have no biases. Other arguments are as in `softmax`.

        Raises:
            InvalidArgument: reduction is unknown.
        """
        require_torch()
        from shardloss.autograd import fresh_seed
        from shardloss.heads import MarginSoftmaxHead

        margin, logits = types.Margin(m1, m2, m3), types.LogitTransform(scale, None, normalize)
        loss: types.FullSoftmax | types.SampledSoftmax = types.FullSoftmax(margin=margin, logits=logits)
        if num_sampled:
            seed = fresh_seed() if seed is None else seed
            loss = types.SampledSoftmax(
                num_sampled=num_sampled, sampler=types.PartialFc(), seed=seed, margin=margin, logits=logits
            )
        return MarginSoftmaxHead(
            self._self(), loss, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate
        )

    def logits(self, hidden: Tensor, transform: types.LogitTransform | None = None) -> LazyLogits:
        """Return the lazy logits [..., V] of hidden [..., D] for the losses of `shardloss.compat.paddle`.

        The logits are never materialised. transform is applied to them (scale, soft cap, cosines).

        Raises:
            InvalidArgument: hidden is not a float tensor [..., D].
        """
        require_torch()
        from shardloss.lazy import LazyLogits

        return LazyLogits(self._self(), hidden, transform)

    def embeddings(self, class_ids: Array | Tensor) -> LazyRows:
        """Return the rows of class_ids [C] as a lookup that is never fetched, for `shardloss.compat.tfrs.Retrieval`.

        Raises:
            InvalidArgument: class_ids is not a one-dimensional array of class ids of the table.
        """
        return lazy_rows(self._self(), class_ids)
