"""Nothing is drawn that nobody uses, and the grid comes first."""

import torch

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.evaluation import generated
from fed_diffusion.generate import Sampler


def sampler(tiny, **settings):
    config = tiny(**{f"evaluation__{key}": value for key, value in settings.items()})
    return Sampler(config, parameters_of(build_network(config)))


def evaluated(sampler, digits):
    """What `evaluate` tells, in order, with the grid among it; and its figures."""
    told = []
    quality = generated.evaluate(
        sampler,
        digits,
        grid=lambda images: told.append(images),
        told=lambda doing, done, of: told.append((doing, done, of)),
    )
    return told, quality


def test_without_a_reference_only_the_grid_is_drawn(tiny, digits):
    told, quality = evaluated(sampler(tiny, samples=500, grid=6, reference="none"), digits)
    (grid,) = (one for one in told if isinstance(one, torch.Tensor))
    assert grid.shape == (6, 1, 8, 8)
    drawn = [one for one in told if not isinstance(one, torch.Tensor)]
    assert {(doing, of) for doing, _, of in drawn} == {("sampling", 6)}
    assert drawn[-1][1] == 6
    assert quality["samples"] == 0
    assert "evaluation.reference is none" in quality["why"]


def test_the_grid_is_the_first_of_the_images_and_drawn_before_the_last(tiny, digits):
    model = sampler(tiny, samples=40, grid=6, batch=8)
    told, quality = evaluated(model, digits)
    at = next(i for i, one in enumerate(told) if isinstance(one, torch.Tensor))
    assert torch.equal(told[at], model.sample(40)[:6])
    assert told[-1][0] == "measuring"
    assert quality["samples"] == 40
    assert quality["fid"] > 0


def test_a_grid_of_more_images_than_the_figures_takes_leaves_them_their_number(tiny, digits):
    told, quality = evaluated(sampler(tiny, samples=20, grid=30, batch=8), digits)
    (grid,) = (one for one in told if isinstance(one, torch.Tensor))
    assert len(grid) == 30
    assert quality["samples"] == 20


def test_progress_rises_to_the_number_of_images_by_every_step(tiny):
    model, done = sampler(tiny, steps=10, batch=4), []
    images = model.sample(6, progress=done.append)
    assert torch.equal(images, model.sample(6))
    assert done == sorted(done)
    assert done[-1] == 6
    assert len(done) >= 2 * 10  # ten steps of two batches


def test_batches_are_the_images_of_sample_in_order(tiny):
    model = sampler(tiny, batch=4)
    parts = list(model.batches(10))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat(parts), model.sample(10))
    assert list(model.batches(0)) == []
