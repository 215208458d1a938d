"""Models that see images: each rank computes the features of all of a pack's images, and takes its rows' own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flashcp.sharding.documents import document_offsets
from flashcp.sharding.mask import Mask


def block_masks(marks: np.ndarray, document_lengths: np.ndarray) -> list[Mask]:
    """Each document's mask: causal, and tokens that follow each other with a mark of 1 see each other (Gemma 3).

    marks: [tokens] of the pack.
    """
    masks = []
    for start, stop in pairwise(document_offsets(document_lengths).tolist()):
        edges = np.flatnonzero(np.diff(marks[start:stop] == 1, prepend=False, append=False))
        masks.append(Mask("causal", blocks=edges.reshape(-1, 2).tolist()))
    return masks


def own_images(tokens: Tensor, rows: Tensor, pixel_values: Tensor, image: int | None) -> dict[str, Any]:
    """What a model with `take_own_features` is given. tokens: of the pack; rows: of it that are this rank's;
    image: the token that stands for a feature."""
    if image is None:
        raise ValueError("pixel_values without an image_token_id: expected config=model.config of a model with one")
    is_image = tokens == image
    own = (is_image.cumsum(0) - 1)[rows][is_image[rows]]
    return {"pixel_values": pixel_values, "image_rows": own, "image_tokens": int(is_image.sum())}


def take_own_features(model: nn.Module) -> None:
    """Let a model that is called with `image_rows` (`Collator` puts them into batches) compute the features of all
    images in pixel_values, and put those of these rows where its input_ids have image tokens.

    For models whose images are placed through `mm_encoder_outputs`, each of as many tokens. Their gradients add up
    over ranks as any parameter's. Raises ValueError, when called, for other features and counts.
    """

    def hook(module: Any, given: tuple[Any, ...], said: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "image_rows" not in said:
            return given, said
        said = dict(said)
        rows, tokens = said.pop("image_rows"), said.pop("image_tokens")
        encoded = module.get_image_features(said.pop("pixel_values"), return_dict=True)
        features = encoded.pooler_output
        if isinstance(features, list | tuple):
            features = torch.cat([one.flatten(0, -2) for one in features])
        features = features.flatten(0, -2)
        if len(features) != tokens:
            raise ValueError(f"{len(features)} image features, {tokens} image tokens in the pack: expected as many")
        encoded.pooler_output = features.index_select(0, rows)[None]
        return given, {**said, "mm_encoder_outputs": {"image": encoded}}

    model.register_forward_pre_hook(hook, with_kwargs=True)
