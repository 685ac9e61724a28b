"""Arguments of the theorem, drawn over many orders of magnitude."""

from hypothesis import strategies as st

from fed_diffusion.theory.bound import Training


def positive(low=1e-3, high=1e3):
    return st.floats(low, high, allow_nan=False)


@st.composite
def trainings(draw):
    """Any run that the theorem speaks about: Gamma* >= 1, everybody takes part."""
    N = draw(st.integers(1, 50))
    return Training(
        N=N,
        S=draw(st.integers(1, 20)),
        R=draw(st.integers(1, 500)),
        eta=draw(positive(1e-8, 1.0)),
        L=draw(positive(1e-2, 1e4)),
        sigma1=draw(positive()),
        sigma2=draw(positive()),
        w2=draw(positive(1e-6, 10)),
        gamma_star=draw(st.integers(1, N)),
        F0=draw(positive(1e-2, 1e5)),
        Fn0=draw(positive(1e-2, 1e5)),
        drift=draw(positive()),
    )
