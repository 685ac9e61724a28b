"""Networks of diffusers: read, built, and asked at the time u for an estimate of the noise.

What such a network is stands in a *description*, plain values that JSON takes: `unet` is the
configuration of a UNet2DModel or, where text is the condition, of a UNet2DConditionModel;
`scheduler` is that of the scheduler it was made with, and `pipeline` the name of the pipeline that
holds both. With a description alone any machine can build the network; the weights of a pretrained
one are needed only where a run begins.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fed_diffusion.config.schema import ConfigError, ModelConfig
from fed_diffusion.diffusion.levels import level_of, times_of
from fed_diffusion.models.described import (
    INSTALL,
    first_line,
    found,
    from_json,
    kept,
    refuse_unknown,
    whole,
)
from fed_diffusion.models.text import width_of
from fed_diffusion.models.unet import noise_of

NAME = "diffusers"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""What a scheduler calls what the network's output stands for, and what we call it."""
PIPELINES = ("DDPMPipeline", "DDIMPipeline")
"""Pipelines of one UNet2DModel and one scheduler; the first is what others are exported as."""
KINDS = ("UNet2DModel", "UNet2DConditionModel")
"""The networks that can be used; the second is conditioned on text (model.text)."""
PREFIX = "unet."
"""Before the names of diffusers' own tensors in ours."""

Description = dict[str, Any]


class DiffusersNetwork(nn.Module):
    """A network of diffusers that is asked at real-valued levels j(u); see `diffusion.levels`.

    Parameters
    ----------
    unet
        The network as diffusers builds it.
    levels
        The times u_j of its scheduler's levels.
    prediction
        What its output stands for: eps, v or x0.
    no_label
        The label that stands for a missing one; None for a network that takes no labels.
    text_width
        The width of the embedded texts that stand in the place of labels, float32
        [n, tokens, width]; None for a network that takes none.
    """

    def __init__(
        self,
        unet: Any,
        levels: Tensor,
        prediction: str,
        no_label: int | None,
        text_width: int | None = None,
    ):
        super().__init__()
        self.unet = unet
        self.prediction = prediction
        self.no_label = no_label
        self.text_width = text_width
        self.register_buffer("levels", levels, persistent=False)

    def forward(self, x: Tensor, u: Tensor, labels: Tensor | None = None) -> Tensor:
        """The noise estimate eps_theta(x, u); see `NetworkFactory`."""
        levels = self.levels
        assert isinstance(levels, Tensor)
        given = {}
        if self.no_label is not None:
            missing = torch.full(u.shape, self.no_label, device=u.device)
            given["class_labels"] = missing if labels is None else labels
        if self.text_width is not None:
            if labels is None:  # where only shapes and times are asked for
                labels = x.new_zeros((len(x), 1, self.text_width))
            given["encoder_hidden_states"] = labels
        (out,) = self.unet(x, level_of(u, levels), return_dict=False, **given)
        return noise_of(self.prediction, out, x, u)

    def enable_gradient_checkpointing(self) -> None:
        """Compute blocks again in the backward pass, as far as diffusers does so."""
        self.unet.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keep everything that the backward pass needs."""
        self.unet.disable_gradient_checkpointing()


def describe(model: ModelConfig) -> Description:
    """The description of the network that model.pretrained or model.config names.

    Raises
    ------
    ConfigError
        diffusers is not installed; there is no such network, or no scheduler.
    """
    if model.network is not None:
        return model.network
    _require()
    import diffusers

    pipeline, scheduler = PIPELINES[0], None
    if model.pretrained is not None:
        unet, scheduler, pipeline = _read(model.pretrained)
    else:
        unet = from_json(str(model.config), "model.config")
        refuse_unknown(unet, getattr(diffusers, _kind(unet)), "model.config")
    if model.scheduler is not None:
        scheduler = from_json(model.scheduler, "model.scheduler")
    if scheduler is None and model.pretrained is not None:
        raise ConfigError(
            f"model.pretrained = {model.pretrained!r} is a network without a scheduler, so its "
            "noise levels are not known. Name the scheduler's JSON file in model.scheduler."
        )
    if scheduler is None:
        words = {ours: theirs for theirs, ours in PREDICTIONS.items()}
        scheduler = {"_class_name": "DDPMScheduler", "prediction_type": words[model.prediction]}
    given = {"unet": kept(unet), "scheduler": kept(scheduler)}
    with torch.device("meta"):
        network = unet_of(given)
    return {
        "unet": whole(_kind(unet), network),
        "scheduler": whole(
            given["scheduler"].get("_class_name", "DDPMScheduler"), scheduler_of(given)
        ),
        "pipeline": pipeline,
    }


def network_of(
    description: Mapping[str, Any],
    channels: int,
    classes: int | None,
    model: ModelConfig,
) -> DiffusersNetwork:
    """A network with values that are drawn from torch's global generator.

    Raises
    ------
    ConfigError
        It is not for such images or labels, or cannot be asked at real-valued levels.
    """
    unet = unet_of(description)
    _check_fits(unet.config, channels, classes, model.label_dropout)
    text_width = _text_width(unet, model.text)
    fixed = [name for name, value in unet.named_parameters() if not value.requires_grad]
    fixed += unet.state_dict().keys() - dict(unet.named_parameters()).keys()
    if fixed:
        raise ConfigError(
            f"model.name = 'diffusers': {fixed[0]} is not trained, and only what is trained "
            "travels, so it would not be the same on all machines. Such networks cannot be used."
        )
    scheduler = scheduler_of(description)
    levels, prediction = levels_of(scheduler), PREDICTIONS[scheduler.config["prediction_type"]]
    no_label = None if classes is None else min(classes, unet.config["num_class_embeds"] - 1)
    return DiffusersNetwork(unet, levels, prediction, no_label, text_width)


def unet_of(description: Mapping[str, Any]) -> Any:
    """The UNet2DModel or UNet2DConditionModel of a description."""
    _require()
    import diffusers

    given = dict(description["unet"])
    try:
        return getattr(diffusers, _kind(given)).from_config(given).float()
    except Exception as error:  # what a library says of values that do not go together
        raise ConfigError(
            f"diffusers cannot build the network of model.name = 'diffusers' "
            f"({type(error).__name__}: {error})."
        ) from error


def _kind(config: Mapping[str, Any]) -> str:
    kind = str(config.get("_class_name", KINDS[0]))
    if kind not in KINDS:
        raise ConfigError(
            f"model.name = 'diffusers' takes a {' or a '.join(KINDS)}, and this network is a "
            f"{kind}."
        )
    return kind


def scheduler_of(description: Mapping[str, Any]) -> Any:
    """The scheduler of a description.

    Raises
    ------
    ConfigError
        diffusers has none of this name, or the network's output stands for something else.
    """
    _require()
    import diffusers

    given = dict(description["scheduler"])
    name = str(given.get("_class_name", "DDPMScheduler"))
    kind: Any = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    known = inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)
    if not known:
        raise ConfigError(f"model.scheduler: diffusers has no scheduler {name!r}.")
    try:
        made = kind.from_config(given)
    except Exception as error:
        raise ConfigError(
            f"model.scheduler: diffusers cannot make the {name} ({type(error).__name__}: {error})."
        ) from error
    stands_for = made.config.get("prediction_type", "epsilon")
    if getattr(made, "alphas_cumprod", None) is None or stands_for not in PREDICTIONS:
        raise ConfigError(
            f"model.scheduler: {name} with prediction_type = {stands_for!r} has other noise levels "
            f"than alpha_bar_j, or another output than {', '.join(PREDICTIONS)}; such networks "
            "cannot be used."
        )
    return made


def levels_of(scheduler: Any) -> Tensor:
    """The times u_j of a scheduler's levels."""
    try:
        return times_of(scheduler.alphas_cumprod)
    except ValueError as error:
        raise ConfigError(f"model.scheduler: {type(scheduler).__name__}: {error}.") from error


def check_range(network: DiffusersNetwork, T: float, delta: float) -> None:
    """Refuse times at which the network was never trained."""
    levels = network.levels
    assert isinstance(levels, Tensor)
    first, last = levels[[0, -1]].tolist()
    low, high = first * (1 - 1e-9), last * (1 + 1e-9)
    for key, value in (("T", T), ("delta", delta)):
        if not low <= value <= high:
            raise ConfigError(
                f"diffusion.{key} = {value:g} is beyond the levels of the network's scheduler, "
                f"which are the times from {first:.4g} to {last:.4g}; choose diffusion.delta and "
                "diffusion.T between them."
            )


def weights_of(source: str) -> dict[str, Tensor]:
    """The weights of a pretrained network by our names, float32.

    Raises
    ------
    ConfigError
        They cannot be read, or some are missing.
    """
    _require()
    import diffusers

    config = diffusers.UNet2DModel.load_config(source, subfolder=_subfolder(source))
    try:
        unet, info = getattr(diffusers, _kind(config)).from_pretrained(
            source,
            subfolder=_subfolder(source),
            torch_dtype=torch.float32,
            use_safetensors=True,  # never a pickle
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # no file, no network, a damaged file: diffusers says which
        raise ConfigError(
            f"model.pretrained = {source!r}: its weights cannot be read from a .safetensors file "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    for key in ("missing_keys", "unexpected_keys"):
        if info[key]:
            raise ConfigError(
                f"model.pretrained = {source!r}: its weights are not those of its configuration "
                f"({key.replace('_', ' ')}: {', '.join(sorted(info[key])[:5])})."
            )
    return {PREFIX + name: value.detach() for name, value in unet.named_parameters()}


def _require() -> None:
    if find_spec("diffusers") is None:
        raise ConfigError(f"model.name = 'diffusers' needs the package diffusers: {INSTALL}.")


def _read(source: str) -> tuple[dict[str, Any], dict[str, Any] | None, str]:
    """The configurations of the network and the scheduler, and the name of the pipeline."""
    import diffusers

    is_path = Path(source).is_absolute()
    if is_path and not Path(source).is_dir():
        raise ConfigError(
            f"model.pretrained = {source!r} is no folder. Give the folder of a pipeline or of a "
            "network of diffusers, or a name on the Hub, as in google/ddpm-cifar10-32."
        )
    folder = _subfolder(source)
    try:
        unet = diffusers.UNet2DModel.load_config(source, subfolder=folder)
    except Exception as error:  # diffusers raises OSError for most, and others for odd files
        raise ConfigError(
            f"model.pretrained = {source!r} holds no UNet2DModel: the folder of a pipeline has "
            f"unet/config.json, and that of a network has config.json. A name on the Hub needs a "
            f"network, or a copy in the Hub's cache "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    index = found(diffusers.DiffusionPipeline, source) or {}
    names = ("scheduler", None) if index else (None,)
    schedulers = (found(diffusers.DDPMScheduler, source, name) for name in names)
    scheduler = next((one for one in schedulers if one is not None), None)
    pipeline = index.get("_class_name")
    return dict(unet), scheduler, pipeline if pipeline in PIPELINES else PIPELINES[0]


def _subfolder(source: str) -> str | None:
    """Where the network is: in unet/ of a pipeline, but for old ones, else in the folder itself."""
    import diffusers

    return "unet" if found(diffusers.UNet2DModel, source, "unet") is not None else None


def _check_fits(
    config: Mapping[str, Any], channels: int, classes: int | None, label_dropout: float
) -> None:
    """Refuse a network that is for other images or labels than the run's."""
    for key in ("in_channels", "out_channels"):
        if config[key] != channels:
            raise ConfigError(
                f"model.name = 'diffusers': the network has {key} = {config[key]}, and the images "
                f"have {channels} channels (data.channels)."
            )
    if config["time_embedding_type"] != "positional" or config["class_embed_type"] is not None:
        raise ConfigError(
            "model.name = 'diffusers': the network must have time_embedding_type = 'positional' "
            "and no class_embed_type, so that it can be asked at any time and by the number of a "
            f"class; it has {config['time_embedding_type']!r} and {config['class_embed_type']!r}."
        )
    count = config["num_class_embeds"]
    if (count is None) != (classes is None):
        raise ConfigError(
            f"model.conditional = {classes is not None}, and the network has num_class_embeds = "
            f"{count}; set model.conditional={'false' if count is None else 'true'}."
        )
    needed = 0 if classes is None else classes + bool(label_dropout)
    if count is not None and count < needed:
        raise ConfigError(
            f"model.name = 'diffusers': the network has num_class_embeds = {count}, and "
            f"{classes} classes need {needed}"
            + (' (one more for "no label", model.label_dropout).' if label_dropout else ".")
        )


def _text_width(unet: Any, text: str | None) -> int | None:
    """The width of the texts that the network is conditioned on, which is that of model.text."""
    conditioned = type(unet).__name__ == KINDS[1]
    if conditioned != (text is not None):
        raise ConfigError(
            "model.text: the network is conditioned on text (UNet2DConditionModel); name the "
            "pipeline that has its text encoder in model.text."
            if conditioned
            else f"model.text = {text!r} is for a UNet2DConditionModel, and the network is a "
            f"{type(unet).__name__}; leave model.text out."
        )
    if text is None:
        return None
    config, width = unet.config, width_of(text)
    more = [key for key in ("addition_embed_type", "encoder_hid_dim_type") if config[key]]
    if more:
        raise ConfigError(
            f"model.name = 'diffusers': the network has {more[0]} = {config[more[0]]!r}, so it "
            "needs more than a text. Networks as that of Stable Diffusion 1 and 2 can be used."
        )
    if config["cross_attention_dim"] != width:
        raise ConfigError(
            f"model.text = {text!r} embeds texts in {width} values, and the network has "
            f"cross_attention_dim = {config['cross_attention_dim']}; name its own pipeline."
        )
    return width
