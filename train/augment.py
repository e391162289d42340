"""Augmentation presets: transforms applied to an image together with its masks."""

from __future__ import annotations

from typing import Any

import cv2


def build_augmentation(preset: str) -> Any:
    """Return an albumentations pipeline, or None for "none".

    ==========  ==========================================================================================
    flips       horizontal and vertical flips
    notebook    flips, shift and scale with a zero border, grid distortion, at the notebook's probabilities
    blur        the notebook's, and Blur or MedianBlur
    elastic     the notebook's, with ElasticTransform among the distortions
    strong      all of these, and brightness and contrast
    ==========  ==========================================================================================
    """
    import albumentations

    if preset == "none":
        return None
    flips = [albumentations.HorizontalFlip(p=0.5), albumentations.VerticalFlip(p=0.5)]
    if preset == "flips":
        return albumentations.Compose(flips)
    # albumentations 2's equivalent of ShiftScaleRotate(scale 0.5, rotate 0, shift 0.1).
    affine = albumentations.Affine(
        scale=(0.5, 1.5),
        translate_percent=(-0.1, 0.1),
        rotate=0,
        keep_ratio=True,
        border_mode=cv2.BORDER_CONSTANT,
        fill=0,
        fill_mask=0,
        p=0.5,
    )
    quarter = [albumentations.HorizontalFlip(p=0.25), albumentations.VerticalFlip(p=0.25)]
    grid = albumentations.GridDistortion(p=0.25)
    bend = albumentations.OneOf(
        [albumentations.GridDistortion(p=1), albumentations.ElasticTransform(alpha=40, sigma=8, p=1)], p=0.3
    )
    blur = albumentations.OneOf(
        [albumentations.Blur(blur_limit=5, p=1), albumentations.MedianBlur(blur_limit=5, p=1)], p=0.25
    )
    light = albumentations.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.15, p=0.3)
    steps = {
        "notebook": [*quarter, affine, grid],
        "blur": [*quarter, affine, grid, blur],
        "elastic": [*quarter, affine, bend],
        "strong": [*flips, affine, bend, blur, light],
    }
    return albumentations.Compose(steps[preset])
