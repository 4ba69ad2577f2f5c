"""Images of a dataset row: opened, counted, and put where its messages have room for them.

A row has them in a column `image` (one, or None) or `images` (a list, or None), each a PIL image,
a path, the bytes of a file, or what the Image feature of `datasets` makes of these. Of both
columns a row fills one at most.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.paths import user_path
from ..records import Message
from .row_errors import UnusableRow

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("images", "image")
ROLES = ("system", "user", "assistant", "tool")


def has_image_column(columns: Iterable[str]) -> bool:
    return not set(COLUMNS).isdisjoint(columns)


def row_images(row: Mapping[str, Any]) -> list[Image]:
    """The images of a row, opened; [] without any. Raises UnusableRow with what cannot be read."""
    one, given = row.get("image"), row.get("images")
    if one is not None and given:
        raise UnusableRow(
            "it fills both 'image' and 'images', of which a row uses one: leave one of them None."
        )
    if one is not None:
        given = [one]
    if given is None:
        return []
    if not isinstance(given, list | tuple):
        raise UnusableRow(
            f"column 'images' must hold a list of images, got {type(given).__name__}: name a "
            "column of single images 'image'."
        )
    return [_opened(image, i) for i, image in enumerate(given)]


def _opened(given: Any, number: int) -> Image:
    from PIL import Image, ImageOps

    if isinstance(given, Image.Image):
        image = given
    else:
        image = _open(given, number)
    try:
        image.load()
        if image is not given:
            image = ImageOps.exif_transpose(image)  # turned as the file says, as in datasets
    except Exception as error:  # whatever a decoder runs into
        raise UnusableRow(
            f"its image {number} ({_shown(given)}) cannot be read ({type(error).__name__}: {error})"
            ": the file is damaged or cut."
        ) from error
    if not image.width or not image.height:
        raise UnusableRow(f"its image {number} is empty: {image.width} x {image.height} pixels.")
    return image


def _open(given: Any, number: int) -> Image:
    from PIL import Image

    source: Any = given
    if isinstance(given, Mapping):  # an Image feature with decode=False
        source = given.get("bytes") or given.get("path")
    if isinstance(source, str) and "://" in source:
        raise UnusableRow(
            f"its image {number} is an address ({_shown(source)}), and nothing is downloaded in a "
            "run: download it first, and give the path."
        )
    if isinstance(source, str | Path):
        source = user_path(str(source))
    elif isinstance(source, bytes | bytearray):
        source = io.BytesIO(source)
    else:
        raise UnusableRow(
            f"its image {number} must be a PIL image, a path, or the bytes of a file, got "
            f"{type(given).__name__}."
        )
    try:
        return Image.open(source)
    except Exception as error:
        raise UnusableRow(
            f"its image {number} ({_shown(given)}) cannot be opened ({type(error).__name__}: "
            f"{error})."
        ) from error


def with_images(messages: list[Message], images: list[Image]) -> list[Message]:
    """New messages whose contents are lists of parts, each image in a part of its own.

    The images fill the parts {"type": "image"} in order. Where no message has such a part they come
    ahead of the text of the first message of the user, if that is a string, as in TRL. Raises
    UnusableRow for other numbers of parts than of images.
    """
    made = [{**message, "content": _parts(message)} for message in messages]
    if not any(part["type"] == "image" for m in made for part in m["content"]):
        users = (i for i, message in enumerate(messages) if message.get("role") == "user")
        first = next(users, None)
        if first is not None and isinstance(messages[first].get("content"), str):
            made[first]["content"] = [{"type": "image"} for _ in images] + made[first]["content"]
    rest = iter(images)
    count = 0
    for message in made:
        for part in message["content"]:
            if part["type"] == "image":
                count += 1
                part["image"] = next(rest, None)
    if count != len(images):
        raise UnusableRow(
            f"it has {len(images)} images in its column, but its messages have {count} parts "
            "{'type': 'image'}: give one image for each part."
        )
    return made


def _parts(message: Message) -> list[dict[str, Any]]:
    if message.get("role") not in ROLES:
        raise UnusableRow(
            f"a message has the role {message.get('role')!r}, but {', '.join(ROLES)} are known."
        )
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = [{k: v for k, v in part.items() if v is not None} for part in content]
    for part in parts:
        if part.get("type") not in ("image", "text"):
            raise UnusableRow(
                f"a message has a part of the type {part.get('type')!r}: only 'text' and 'image' "
                "are offered."
            )
        if part["type"] == "image" and len(part) > 1:
            raise UnusableRow(
                f"a message holds an image itself (in {sorted(part.keys() - {'type'})}): give the "
                "images in a column 'images', and {'type': 'image'} in their places."
            )
    return parts


def shown_images(messages: Any, columns: Mapping[str, Any]) -> list[Image]:
    """The images of a prompt: of its messages, or of its row where it is a text."""
    if isinstance(messages, str):
        return row_images(columns)
    return [part["image"] for m in messages for part in m["content"] if part["type"] == "image"]


def without_images(messages: Any) -> Any:
    """Messages without the images themselves, for texts that are shown; others as they are."""
    if not isinstance(messages, list):
        return messages
    return [
        {**m, "content": [{k: v for k, v in part.items() if k != "image"} for part in m["content"]]}
        if isinstance(m, dict) and isinstance(m.get("content"), list) else m
        for m in messages
    ]  # fmt: skip


def _shown(given: Any) -> str:
    if isinstance(given, Mapping):
        given = given.get("path") or given.get("bytes")
    if isinstance(given, bytes | bytearray):
        return f"{len(given)} bytes"
    return repr(str(given)) if isinstance(given, str | Path) else type(given).__name__
