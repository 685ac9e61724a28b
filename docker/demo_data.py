"""The embedded digits as image files: a folder for each node, every image in one of them only.

python demo_data.py FOLDER NODES
"""

import sys
from pathlib import Path

from PIL import Image

from fed_diffusion.config import load_config
from fed_diffusion.data import load_dataset

folder, nodes = Path(sys.argv[1]), int(sys.argv[2])
digits = load_dataset(load_config("digits").data)
for i, image in enumerate(digits.images):
    target = folder / f"node-{i % nodes + 1}" / str(int(digits.labels[i])) / f"{i:04d}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[0].numpy()).save(target)
