"""Secure aggregation under unequal masks: the server learns the sums of equation (8) alone.

The protocol is SecAgg+ (Bell et al. 2020, after Bonawitz et al. 2017) in Z_2^64, with masks that
pairs of clients share on the coordinates that both keep. `member` is a client's half, `gathering`
the server's; `plan` is what all of them agree on, `masking` the arithmetic, and `keys`, `shamir`
and `graph` the cryptography below. docs/security.md says what is proved and what is not.
"""
