# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
The handler that a Hugging Face Inference Endpoint runs: `handler.py` at the root of an exported repository.

    {"inputs": "a boy in a park", "parameters": {"aus": "6C+12D", "seed": 3}}

is answered by a picture, and a wrong request by {"error": message, "error_type": ...}. Callers that can send only text
write AUs into the prompt: "a boy <AU6=3 AU12=5> in a park".
"""

import json
import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image


MODEL_DEFAULTS_NAME = "fineface.json"
MAX_TEXT_LENGTH = 2000
MAX_SEED = 2**63 - 1
PARAMETERS = ("aus", "negative_aus", "au_scale", "au_guidance_scale", "guidance_scale", "negative_prompt")
PARAMETERS += ("seed", "num_inference_steps", "width", "height")


class EndpointHandler:
    r"""
    Args:
        path (`str`):
            Folder of an exported repository.
        max_steps (`int`, defaults to 100):
            The most denoising steps that a request may ask for.
        max_pixels (`int`, defaults to 1024 · 1024):
            The most pixels that a picture may have.
    """

    def __init__(self, path: str = "", max_steps: int = 100, max_pixels: int = 1024 * 1024):
        # The lowest value, the highest one, and what it has to be a multiple of.
        self.limits = {"seed": (0, MAX_SEED, 1), "num_inference_steps": (1, max_steps, 1)}
        self.limits |= dict.fromkeys(("width", "height"), (8, max_pixels // 8, 8))
        self.max_pixels = max_pixels
        has_accelerator = torch.accelerator.is_available()
        device = torch.accelerator.current_accelerator() if has_accelerator else torch.device("cpu")
        self.pipeline = DiffusionPipeline.from_pretrained(
            path, dtype=torch.float16 if has_accelerator else torch.float32, trust_remote_code=True
        ).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        # The settings that suit the model best, if its repository names them.
        defaults = Path(path) / MODEL_DEFAULTS_NAME
        self.defaults = json.loads(defaults.read_text(encoding="utf-8")) if defaults.is_file() else {}
        if "size" in self.defaults:
            self.defaults["width"] = self.defaults["height"] = self.defaults.pop("size")

    def __call__(self, data: dict) -> Image.Image | dict[str, str]:
        r"""
        Args:
            data (`dict`):
                `{"inputs": prompt, "parameters": {…}}`. All parameters may be left out or None: `aus` and
                `negative_aus` in any form that fits into JSON, `au_scale`, `au_guidance_scale`, `guidance_scale`,
                `num_inference_steps`, `width`, `height`, `negative_prompt`, as in the pipeline's `__call__`; and
                `seed`, a whole number from 0 on. Without a seed, every call draws another picture.

        Returns:
            A picture, or `{"error": message, "error_type": "invalid_request" or "out_of_memory"}`.
        """
        try:
            arguments = self.check(data)
            seed = arguments.pop("seed", None)
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            return self.pipeline(**arguments, generator=generator).images[0]
        except ValueError as error:
            return {"error": str(error)[:1000], "error_type": "invalid_request"}
        except torch.OutOfMemoryError:
            message = "There is not enough memory for this picture. Ask for fewer pixels."
            return {"error": message, "error_type": "out_of_memory"}

    def check(self, data: dict) -> dict:
        """
        Check names, and the limits of numbers and texts. Returns the arguments of the pipeline's call, and the seed.
        The pipeline checks the rest before it runs a model.

        Raises:
            ValueError: if the request has another form, or asks for too much.
        """
        if not isinstance(data, dict):
            raise ValueError('The request has to be an object: {"inputs": prompt, "parameters": {…}}.')
        _check_names(data, ("inputs", "parameters"), "the request")
        prompt = _check_text("inputs", data.get("inputs"))
        # A tag of AUs alone says nothing of the picture either.
        if not self.pipeline.take_au_tags(prompt, None)[0].strip():
            raise ValueError("`inputs` is an empty prompt. Say what to draw, such as 'a girl in a park'.")
        parameters = {} if data.get("parameters") is None else data["parameters"]
        if not isinstance(parameters, dict):
            raise ValueError("`parameters` has to be an object.")
        _check_names(parameters, PARAMETERS, "`parameters`")
        given = {name: value for name, value in parameters.items() if value is not None}
        for name, value in given.items():
            if name in self.limits:
                _check_number(name, value, *self.limits[name])
            elif name == "negative_prompt" or isinstance(value, str):
                _check_text(name, value)
        arguments = {**self.defaults, **given, "prompt": prompt}
        height, width = self.pipeline._image_size(arguments.get("height"), arguments.get("width"))
        if ("width" in given or "height" in given) and width * height > self.max_pixels:
            raise ValueError(f"{width} x {height} pixels are more than the {self.max_pixels} that are allowed.")
        return arguments


def _check_number(name: str, value, lowest: int, highest: int, step: int) -> None:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest or value % step:
        what = "a whole number" if step == 1 else f"a multiple of {step}"
        raise ValueError(f"`{name}` has to be {what} from {lowest} to {highest}, but is {_show(value)}.")


def _check_names(values: dict, known: tuple[str, ...], where: str) -> None:
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{_show(unknown[0])} is unknown in {where}. Known are {', '.join(known)}.")


def _check_text(name: str, value) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` has to be one text, but is {_show(value)}.")
    if len(value) > MAX_TEXT_LENGTH:
        raise ValueError(f"`{name}` has {len(value)} characters, and may have {MAX_TEXT_LENGTH}.")
    # JSON can contain lone surrogates (halves of characters), which tokenizers cannot read.
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"`{name}` has to be Unicode text, but has a half of a character in it.")
    return value


def _show(value) -> str:
    """Write any value in short. Error messages go back to the caller, who may have sent a very long value."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    # Python refuses to print whole numbers of more than some thousand digits.
    is_huge = isinstance(value, int) and abs(value) > 2**64
    text = "a very large number" if is_huge else repr(value)
    return text if len(text) <= 60 else f"{text[:56]}…{text[-1]}"
