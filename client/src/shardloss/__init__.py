"""shardloss: softmax losses over class tables that a remote service stores.

    client = shardloss.connect("localhost:7070")
    head = client.table("words").sampled_softmax(num_sampled=4096)
    optimizer = head.optimizer(lr=0.1)

Importing this package imports neither torch nor ray; torch is imported when a head is created.
"""

from shardloss import errors
from shardloss.client import LossClient, connect
from shardloss.errors import ShardlossError
from shardloss.lazy_rows import LazyRows
from shardloss.session import Session
from shardloss.table import Table
from shardloss.types import (
    Adagrad,
    Adam,
    AdamW,
    CallCost,
    Candidates,
    ClassSamples,
    CommitResult,
    Evaluation,
    EvaluationSummary,
    FixedUnigram,
    FullSigmoid,
    FullSoftmax,
    HitIds,
    InBatch,
    LogitTransform,
    LossResult,
    Margin,
    Mixture,
    Normal,
    PartialFc,
    RowAdagrad,
    Rows,
    SampledLogistic,
    SampledSoftmax,
    SampledValues,
    SamplingGap,
    Scores,
    ServerInfo,
    Sgd,
    SparseAdam,
    TableGradient,
    TableInfo,
    TopK,
    Uniform,
    Zeros,
)

__version__ = "0.1.0"

__all__ = [
    "Adagrad",
    "Adam",
    "AdamW",
    "CallCost",
    "Candidates",
    "ClassSamples",
    "CommitResult",
    "Evaluation",
    "EvaluationSummary",
    "FixedUnigram",
    "FullSigmoid",
    "FullSoftmax",
    "HitIds",
    "InBatch",
    "LazyRows",
    "LogitTransform",
    "LossClient",
    "LossResult",
    "Margin",
    "Mixture",
    "Normal",
    "PartialFc",
    "RowAdagrad",
    "Rows",
    "SampledLogistic",
    "SampledSoftmax",
    "SampledValues",
    "SamplingGap",
    "Scores",
    "ServerInfo",
    "Session",
    "Sgd",
    "ShardlossError",
    "SparseAdam",
    "Table",
    "TableGradient",
    "TableInfo",
    "TopK",
    "Uniform",
    "Zeros",
    "connect",
    "errors",
]
