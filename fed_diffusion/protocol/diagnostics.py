"""The names under which the numbers of a diagnostic round travel."""

from __future__ import annotations

ASKED, CURVED = "diagnostic.minibatches", "diagnostic.products"
TOGETHER = "diagnostic.workers"
GRADIENTS, FAILED = "diagnostic.gradients", "diagnostic.failed"
LOSS, LOSS_ERROR, M2 = "diagnostic.loss", "diagnostic.loss_error", "diagnostic.M2"
L, L_ERROR = "diagnostic.L", "diagnostic.L_error"
