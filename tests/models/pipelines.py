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


def autoencoder(**changes):
    """An autoencoder of grey images with drawn weights, whose latents have half the side."""
    import diffusers

    return diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **changes,
    )


def save_text_pipeline(folder, *, seed=0, width=16):
    """Write a text-to-image pipeline for grey images of 8 x 8, with drawn weights; returns it.

    Its tokenizer knows letters and digits, and its latents have 4 channels and half the side.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in (*range(97, 123), *range(48, 58))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    first, last = len(words) - 2, len(words) - 1
    ends = {"bos_token_id": first, "eos_token_id": last, "pad_token_id": last}
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        **ends,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=width,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder
