"""The settings of the images: which ones, how they are read, and how the clients share them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fed_diffusion.config.names import is_own, part
from fed_diffusion.config.section import Section, as_values

Background = Literal["white", "black"]


def _named_options(value: Any) -> Any:
    """Read a transform: a name alone means no options; numbers and truth values are read."""
    given = {value: None} if isinstance(value, str) else value
    if not isinstance(given, dict) or len(given) != 1:
        raise PydanticCustomError(
            "transform", "give each transform as Name, or as {Name: {option: value}}"
        )
    ((name, options),) = given.items()
    if not (options is None or isinstance(options, dict)):
        raise PydanticCustomError(
            "transform", "give the options of {name} as {option: value}", {"name": name}
        )
    return {name: as_values(options or {})}


Augmentation = Annotated[dict[str, dict[str, Any]], BeforeValidator(_named_options)]
"""One entry of data.augment: the transform's name with its options."""


class DataConfig(Section):
    """Which images, how they are split over the clients, and what is held out."""

    name: str = "digits"
    """The data set: digits (embedded), cifar10, svhn, fashion_mnist or mnist (read from `dir`, or
    downloaded on first use), image_folder (a folder of yours, `dir`), hf:NAME-OR-PATH (a data set
    of the package datasets, on the Hub or in local files), or your_module:function, see
    `data.Loader`."""
    dir: str | None = None
    """Where the files are. A named set other than digits may lie there as it is published or as
    class folders of images (cifar10/<class>/*.png, also below train/ and test/); what is not there
    is downloaded to it. Where it is not set, Debian's package dataset-fashion-mnist is found."""
    size: int | None = Field(None, ge=1)
    """The side of an image in pixels. It is known for the named sets. image_folder and a data set
    of yours need it, where none of `pad`, `resize` and `crop` says it."""
    crop: Literal["square"] | Annotated[int, Field(ge=1)] | None = None
    """First, the middle of each image is cut out: its largest square, or so many pixels each way.
    """
    resize: int | None = Field(None, ge=1)
    """Then each image is scaled until its longer side has so many pixels (bicubic, antialiased)."""
    pad: int | None = Field(None, ge=1)
    """Then each image gets a border, up to so many pixels each way, in the colour of `background`;
    without one in black. U-Nets want sides that halve often: 32 for images of 28."""
    channels: Literal[1, 3] | None = None
    """1 for grey images, 3 for colour. It is known for the named sets, and has to be given for
    image_folder and for a data set of yours."""
    background: Background | None = None
    """The colour that transparent pixels of image files are laid over, and that of the border which
    `pad` adds. Without it, an image with any pixel that is not opaque is refused."""
    classes: int | None = Field(None, ge=1)
    """The number of classes. By default the data set says it; a data set of yours needs it where
    the network is conditional."""
    class_names: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(None, min_length=1)
    """The names of the classes, in the order of their labels. For image_folder they are the names
    of the class folders, on every node that has images of its own; a node need not have all of
    them. By default they are the folders' names in plain string order, and are written to the
    run's config.yaml."""
    caption: str | None = Field(None, min_length=1)
    """For model.text: the caption of each image, in which {} stands for the name of its class, as
    in "a photo of a {}". Without it captions are those of an image folder's metadata.jsonl, lines
    with file_name and text, or of the column text or caption of a set of the package datasets."""
    partition: Annotated[str, part("iid", "dirichlet", "shards", "folders")] = "iid"
    """How the images are split over the clients. iid: at random; dirichlet: each class in unequal
    parts (`alpha`); shards: few classes for each client (`classes_per_client`); folders: each
    first-level folder is a client; your_module:function: see `data.partition.Split`;
    flwr_datasets.partitioner:DirichletPartitioner or another of Flower's partitioners, with
    `partition_options`."""
    partition_options: dict[str, Any] = Field({}, validate_default=False)
    """The options of one of Flower's partitioners, as in {alpha: 0.5, min_partition_size: 10}."""
    alpha: float = Field(0.5, gt=0)
    """For the dirichlet split: its concentration. The smaller it is, the more unequal the parts."""
    classes_per_client: int = Field(2, ge=1)
    """For the shards split: how many pieces of classes each client gets."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """The part of each client's images that is not trained on, and that its held-out loss is
    measured on."""
    flip: bool = False
    """Whether training mirrors images left to right at random."""
    augment: tuple[Augmentation, ...] = ()
    """The transforms of torchvision.transforms.v2 that training applies to each image of a batch,
    in this order, as in [{RandomCrop: {size: 32, padding: 4}}, ColorJitter]. They see uint8 images
    [C, H, W] and keep the shape. Held-out and reference images are not changed."""

    @field_validator("partition_options", mode="before")
    @classmethod
    def _read_options(cls, value: Any) -> Any:
        return as_values(value)

    @model_validator(mode="after")
    def _options_of_a_part_of_yours(self) -> DataConfig:
        if self.partition_options and not is_own(self.partition):
            raise ValueError(
                f"partition_options: they are for one of Flower's partitioners, not for "
                f"{self.partition}"
            )
        return self

    @field_validator("augment", mode="before")
    @classmethod
    def _one_transform_alone(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | dict) else value

    @property
    def side(self) -> int | None:
        """The side that pad, resize or crop gives every image; None where none of them says it."""
        return self.pad or self.resize or (self.crop if isinstance(self.crop, int) else None)

    @model_validator(mode="after")
    def _sides_agree(self) -> DataConfig:
        key = next((k for k in ("pad", "resize", "crop") if getattr(self, k) == self.side), "")
        if self.side is not None and self.size not in (None, self.side):
            raise ValueError(
                f"size: {self.size} contradicts data.{key} = {self.side}, which makes images of "
                f"that side; leave data.size unset, or set it to {self.side}"
            )
        inner = self.resize or (self.crop if isinstance(self.crop, int) else None)
        if self.pad is not None and inner is not None and self.pad < inner:
            raise ValueError(
                f"pad: {self.pad} is less than the {inner} pixels that the images have before a "
                "border is added (data.resize, data.crop); set data.pad to the same or more"
            )
        return self

    @model_validator(mode="after")
    def _classes_have_names_of_their_own(self) -> DataConfig:
        names = self.class_names
        if names is None:
            return self
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"class_names: {twice[0]!r} is given twice; give each class once")
        if self.classes not in (None, len(names)):
            raise ValueError(
                f"class_names: {len(names)} names for data.classes = {self.classes}; leave "
                "data.classes unset, or name as many"
            )
        return self
