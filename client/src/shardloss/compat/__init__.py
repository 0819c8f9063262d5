"""Losses and samplers over remote tables, with the signatures of other frameworks."""

from shardloss.trainable import require_torch

require_torch()
