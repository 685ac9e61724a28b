"""The score networks: the U-Net that is built in, those of diffusers, and the user's own."""
