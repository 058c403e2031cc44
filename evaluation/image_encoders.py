# SPDX-License-Identifier: Apache-2.0
"""Image encoders embed pictures for CLIP-I (Eq. 4), and measure how well a picture shows what its prompt says."""

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from drawing.model import quiet
from evaluation.meters import toy_pixel_values
from program import TOY_MODEL, check_folder_or_hub_id, folder_digest


class ImageEncoder:
    """
    A CLIP model of transformers. If it has its text half, it also measures the agreement with the prompt.

    `settings` are all that its numbers depend on. `agreement_name` describes in the report what `agreement` measures;
    it is "" if this encoder cannot measure it.
    """

    def __init__(self, name: str, device: torch.device):
        with quiet():
            from transformers import CLIPConfig, CLIPImageProcessor

        check_folder_or_hub_id(name, "`--image-encoder`")
        self.name, self.device, path = name, device, Path(name)
        self.settings = {"name": path.name, "files": folder_digest(path)} if path.is_dir() else {"name": name}
        config, _ = CLIPConfig.get_config_dict(name)
        kind = config.get("model_type")
        if kind not in ("clip", "clip_vision_model"):
            raise ValueError(
                f"`--image-encoder` is {name!r}, a model of type {kind!r}. It has to be a CLIP model or the image half"
                " of one."
            )
        self.has_text = kind == "clip"
        self.agreement_name = "CLIP text–image similarity" if self.has_text else ""
        vision = config.get("vision_config", {}) if self.has_text else config
        # The default of transformers' CLIPVisionConfig.
        side = vision.get("image_size", 224)
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        try:
            self.processor = CLIPImageProcessor.from_pretrained(name, **size)
        except OSError:
            # Without a preprocessor_config.json, the normalization is that of OpenAI's CLIP models.
            self.processor = CLIPImageProcessor(**size)

    @functools.cached_property
    def model(self):
        from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

        if self.has_text:
            self.tokenizer = CLIPTokenizer.from_pretrained(self.name)
        model_class = CLIPModel if self.has_text else CLIPVisionModelWithProjection
        return model_class.from_pretrained(self.name, dtype=torch.float32).to(self.device).eval()

    def pixel_values(self, images: list[Image.Image]) -> torch.Tensor:
        """Resize the shorter side, cut out the middle and normalize, as CLIP does: `(images, 3, size, size)`."""
        return self.processor(images, return_tensors="pt").pixel_values.to(self.device)

    @torch.no_grad()
    def embed(self, images: list[Image.Image]) -> np.ndarray:
        """`(images, width)` float32."""
        pixel_values = self.pixel_values(images)
        if self.has_text:
            embeddings = self.model.visual_projection(self.model.vision_model(pixel_values).pooler_output)
        else:
            embeddings = self.model(pixel_values).image_embeds
        return embeddings.float().cpu().numpy()

    @torch.no_grad()
    def agreement(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        """How well each picture agrees with its prompt, `(images,)`; NaN where that cannot be measured."""
        if not self.has_text:
            return np.full(len(images), np.nan)
        embeddings = torch.from_numpy(self.embed(images))
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        text = self.model.text_projection(self.model.text_model(**tokens).pooler_output).float().cpu()
        return F.cosine_similarity(embeddings, text).numpy()


class ToyImageEncoder(ImageEncoder):
    """The toy world's CLIP image encoder. The toy world's attribute reader measures the agreement with the prompt."""

    def __init__(self, model: Path, device: torch.device):
        folders = {name: model / name for name in ("image_encoder", "attribute_reader")}
        for name, folder in folders.items():
            if not (folder / "config.json").is_file():
                raise FileNotFoundError(f"`--image-encoder`: {str(model)!r} holds no {name}/ of the toy world.")
        super().__init__(str(folders["image_encoder"]), device)
        self.settings = {name: folder_digest(folder) for name, folder in folders.items()}
        self.agreement_name, self.reader_folder = "attributes as prompted", folders["attribute_reader"]

    @functools.cached_property
    def reader(self):
        from toy_faces.networks import PictureReader

        return PictureReader.from_pretrained(self.reader_folder, dtype=torch.float32).to(self.device).eval()

    def pixel_values(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.cat([toy_pixel_values(image) for image in images]).to(self.device)

    @torch.no_grad()
    def agreement(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        """The share of the attributes named by the prompt that the picture shows."""
        from toy_faces.networks import attribute_logits
        from toy_faces.renderer import ATTRIBUTES, attributes_in

        all_logits = attribute_logits(self.reader(self.pixel_values(images)))
        seen = {name: logits.argmax(1).tolist() for name, logits in all_logits.items()}
        shares = []
        for row, prompt in enumerate(prompts):
            named = attributes_in(prompt)
            right = [ATTRIBUTES[name][seen[name][row]] == value for name, value in named.items()]
            shares.append(float(np.mean(right)) if right else float("nan"))
        return np.array(shares)


def make_image_encoder(spec: str, device: torch.device) -> ImageEncoder:
    """
    `spec` is `"toy"` for the encoder of the toy model, `"toy:FOLDER"` for the encoder of another model of the toy
    world, or the folder or Hub id of a CLIP model of transformers.
    """
    kind, _, where = spec.partition(":")
    if kind == "toy":
        return ToyImageEncoder(Path(where) if where else TOY_MODEL, device)
    return ImageEncoder(spec, device)
