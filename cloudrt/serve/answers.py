"""The answers of the API: their JSON schemas, and how results become JSON and PNG."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from fastapi import Response
from pydantic import BaseModel, Field

from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.labels import Labels, class_colours
from cloudrt.masks.rle import rle_area, rle_decode
from cloudrt.serve.batcher import Outputs


@dataclass(frozen=True)
class Segmented:
    """The result for an image that was decoded.

    Parameters
    ----------
    texts
        RLE text of each class.
    outputs
        The network's outputs.
    place
        Grid and position of the masks, for GeoJSON; else None.
    """

    texts: list[str]
    outputs: Outputs
    place: MaskGrid | None = None


class ClassAnswer(BaseModel):
    """The mask of one class."""

    rle: str = Field(description="Run-length text on the grid, as in a submission; empty if the class is absent.")
    area: int = Field(description="Number of pixels of the mask.")
    share: float = Field(description="Fraction of the grid that the mask covers, 0 to 1.")
    presence: int | None = Field(description="Level 0..255 of the presence output; null if the model has none.")


class ImageAnswer(BaseModel):
    """The result for one image."""

    image: str = Field(description="Name of the file; without one, image-0, image-1 and so on.")
    error: str | None = Field(description="Why the image failed; null if it did not.")
    classes: dict[str, ClassAnswer] = Field(description="Class name to mask; empty if the image failed.")
    levels: str | None = Field(
        default=None,
        description="With levels=true: the probability as uint8 (classes, width, height), in base64.",
    )


class SegmentAnswer(BaseModel):
    """The results for the images of a request, in order."""

    model: str = Field(description="Name of the model.")
    grid: tuple[int, int] = Field(description="Height and width of the masks.")
    images: list[ImageAnswer] = Field(description="A result for each image.")


class Problem(BaseModel):
    """Why a request failed."""

    detail: str = Field(description="The reason.")


class ModelAnswer(BaseModel):
    """The model that is served."""

    name: str = Field(description="Name of the model in URLs.")
    classes: list[str] = Field(description="Names of the classes.")
    grid: tuple[int, int] = Field(description="Height and width of the masks.")
    input_size: tuple[int, int] = Field(description="Height and width of the network's input.")
    rules: dict[str, dict[str, int]] = Field(description="Class name to the parameters of its post-processing.")
    precision: str = Field(description="Precision of the model: fp32, fp16 or int8.")
    provider: str = Field(description="Provider that runs the network.")
    batch_size: int = Field(description="Maximum number of images per batch.")
    has_presence: bool = Field(description="Whether the network has a presence output.")
    validation_dice: float = Field(description="Dice on images that the network was not trained on.")
    max_upload_bytes: int = Field(description="Larger requests are refused with status 413.")
    max_pixels: int = Field(description="Images with more pixels fail.")


class ModelsAnswer(BaseModel):
    """The models that are served."""

    models: list[ModelAnswer] = Field(description="The only element is the model.")


class StatusAnswer(BaseModel):
    """The state of the server."""

    status: str = Field(description="ok or ready.")


def json_answer(
    model: str, labels: Labels, names: Sequence[str], results: Sequence[Segmented | str], levels: bool
) -> Response:
    """Return the results of images, or why they failed, as JSON."""
    answers = [
        ImageAnswer(image=name, error=result, classes={})
        if isinstance(result, str)
        else image_answer(name, labels, result, levels=levels)
        for name, result in zip(names, results, strict=True)
    ]
    answer = SegmentAnswer(model=model, grid=labels.submit_grid, images=answers)
    return Response(answer.model_dump_json(), media_type="application/json")


def png_answer(texts: Sequence[str], labels: Labels, label: str | None) -> Response:
    """Return the masks of an image as a PNG: of one class, or of all if `label` is None."""
    content = masks_png(texts, labels) if label is None else mask_png(texts[labels.classes.index(label)], labels)
    return Response(content, media_type="image/png")


def image_answer(name: str, labels: Labels, result: Segmented, *, levels: bool) -> ImageAnswer:
    """Return the answer for an image that was decoded; `levels` includes the network's output."""
    height, width = labels.submit_grid
    classes, outputs = {}, result.outputs
    for index, (label, text) in enumerate(zip(labels.classes, result.texts, strict=True)):
        area = rle_area(text)
        presence = None if outputs.presence is None else int(outputs.presence[index])
        classes[label] = ClassAnswer(rle=text, area=area, share=area / (height * width), presence=presence)
    encoded = b64encode(outputs.levels.tobytes()).decode("ascii") if levels else None
    return ImageAnswer(image=name, error=None, classes=classes, levels=encoded)


def mask_png(text: str, labels: Labels) -> bytes:
    """Return one mask as a black-and-white PNG, as `cloudrt-infer --masks` writes it."""
    return _png(rle_decode(text, labels.submit_grid) * 255, [cv2.IMWRITE_PNG_BILEVEL, 1])


def masks_png(texts: Sequence[str], labels: Labels) -> bytes:
    """Return all masks of an image as a transparent PNG, each in the colour of its class; later classes are on top."""
    picture = np.zeros((*labels.submit_grid, 4), np.uint8)
    for text, colour in zip(texts, class_colours(len(texts)), strict=True):
        if text:
            picture[rle_decode(text, labels.submit_grid) != 0] = [*(int(colour[i : i + 2], 16) for i in (5, 3, 1)), 160]
    return _png(picture)


def picture_jpeg(image: np.ndarray) -> bytes:
    """Return an (H, W, 3) uint8 RGB image as a JPEG."""
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return data.tobytes()


def _png(picture: np.ndarray, options: list[int] | None = None) -> bytes:
    _, data = cv2.imencode(".png", picture, options or [])
    return data.tobytes()
