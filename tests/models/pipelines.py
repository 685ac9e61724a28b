"""Small random networks of diffusers, made with its own classes."""

import torch

SHAPE = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
"""45,000 parameters."""


def save_pipeline(folder, *, scheduler=None, kind="DDPMPipeline", seed=0, **changes):
    """Write a pipeline with drawn weights into a folder; returns it."""
    import diffusers

    torch.manual_seed(seed)
    unet = diffusers.UNet2DModel(**SHAPE | changes)
    scheduler = scheduler or diffusers.DDPMScheduler()
    getattr(diffusers, kind)(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder
