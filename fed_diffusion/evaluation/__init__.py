"""Quality figures of generated images: FID, KID and Inception Score, computed by torch-fidelity.

The module `checks` is cheap to import. The module `quality` imports torch-fidelity, which takes 3
s: import it where figures are needed.
"""

from __future__ import annotations

from fed_diffusion.evaluation.checks import check_evaluation, no_quality

__all__ = ["check_evaluation", "no_quality"]
