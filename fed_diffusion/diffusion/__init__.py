"""The OU process, partitions of time, the denoising loss and the samplers."""
