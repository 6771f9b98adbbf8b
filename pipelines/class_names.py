"""What people call classes, and the labels that models know them by."""

from __future__ import annotations

from collections.abc import Sequence

from ..modalities.errors import InputError


def imagenet_names() -> list[str]:
    """The 1000 classes of ImageNet in the order of their labels."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def find_class(condition: int | str, num_classes: int, names: Sequence[str]) -> int:
    """See `ClassToImagePipeline.class_label`."""
    text = " ".join(str(condition).lower().split())
    if text.lstrip("-").isdecimal():
        label = int(text)
        if not 0 <= label < num_classes:
            raise InputError(f"Classes are numbered 0 to {num_classes - 1}, got {label}.")
        return label
    lowered = [name.lower() for name in names]
    found = [i for i, name in enumerate(lowered) if name == text]
    found = found or [i for i, name in enumerate(lowered) if text and text in name]
    if len(found) == 1:
        return found[0]
    if not found:
        known = f', for example "{names[0]}"' if names else ""
        raise InputError(
            f'There is no class "{str(condition)[:60]}": give a number of 0 to {num_classes - 1}'
            f"{known and ' or a name'}{known}."
        )
    some = ", ".join(f"{i} {names[i]}" for i in found[:6])
    raise InputError(
        f'"{str(condition)[:60]}" stands for {len(found)} classes ({some}'
        f"{', …' if len(found) > 6 else ''}): give the whole name or the number."
    )
