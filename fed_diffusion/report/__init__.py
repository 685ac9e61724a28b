"""What a person looks at after a run: grids of samples, curves and one self-contained page."""

from __future__ import annotations
