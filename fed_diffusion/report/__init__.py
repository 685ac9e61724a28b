"""What a person looks at after a run: sample grids, curves and one self-contained page."""

from __future__ import annotations
