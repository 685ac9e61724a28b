"""Quality figures of generated images: Inception Score, FID and KID, through torch-fidelity.

`checks` is cheap to import, `quality` imports torch-fidelity (3 s): import it where it is needed.
"""

from __future__ import annotations

from fed_diffusion.evaluation.checks import check_evaluation, no_quality

__all__ = ["check_evaluation", "no_quality"]
