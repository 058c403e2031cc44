# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Captions, and the answer to whether a picture is a photograph, by BLIP-2 (paper, supplement "Dataset Construction").

The answers for a part of a work folder make one file, with a line for each picture. Under `accelerate launch` or
`torchrun`, each of n processes takes every n-th part.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from face_data.pictures import PICTURE_ERRORS
from face_data.store import CAPTIONS, claim_folder, list_parts, part_path, read_rows, read_settings, write_lines


QUESTIONS = {"cartoon": "Is this a cartoon?", "real": "Is this photo real?"}
MAX_CAPTION_TOKENS, MAX_ANSWER_TOKENS = 40, 5


class Blip2:
    """
    A BLIP-2 model that describes pictures and answers questions about them, without sampling.

    Args:
        model (`str`):
            Folder or Hub id, for instance `Salesforce/blip2-opt-2.7b`.
        device (`str`, *optional*):
            By default the process's GPU if there is one. A GPU computes in float16.
    """

    def __init__(self, model: str, device: str | None = None):
        if device is None:
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.float16
        self.processor = Blip2Processor.from_pretrained(model)
        # An answer is what follows the prompt, so all prompts of a batch have to end in the same column.
        self.processor.tokenizer.padding_side = "left"
        self.model = Blip2ForConditionalGeneration.from_pretrained(model, dtype=self.dtype).to(self.device).eval()

    def describe(self, pictures: list[Image.Image]) -> list[str]:
        return self._generate(MAX_CAPTION_TOKENS, images=pictures)

    def ask(self, pictures: list[Image.Image], question: str) -> list[str]:
        prompts = [f"Question: {question} Answer:"] * len(pictures)
        return self._generate(MAX_ANSWER_TOKENS, images=pictures, text=prompts, padding=True)

    @torch.inference_mode()
    def _generate(self, max_new_tokens: int, **inputs) -> list[str]:
        inputs = self.processor(**inputs, return_tensors="pt").to(self.device, self.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        if "input_ids" in inputs and self.model.config.use_decoder_only_language_model:
            # A language model without an encoder repeats the question.
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def is_photo(cartoon: str, real: str) -> bool | None:
    """Combine the two answers. None means that they are unclear or contradict each other."""
    answers = tuple(_yes_or_no(answer) for answer in (cartoon, real))
    return {("no", "yes"): True, ("yes", "no"): False, ("yes", None): False, (None, "no"): False}.get(answers)


def _yes_or_no(answer: str) -> str | None:
    word = answer.lower().replace(",", " ").replace(".", " ").split()[:1]
    return word[0] if word in (["yes"], ["no"]) else None


def annotate(folder: Path, kind: str, model: str, batch_size: int, device: str | None = None) -> None:
    """
    Let BLIP-2 look at all pictures of the work folder `folder` that have no caption yet, or of which it is not known
    whether they are photographs.

    Args:
        kind (`str`):
            `CAPTIONS` or `PHOTOS`.
        model (`str`), device (`str`, *optional*):
            As `Blip2` takes them. The model is loaded when the first picture needs it.
        batch_size (`int`):
            Pictures that the model sees together.
    """
    if batch_size < 1:
        raise ValueError(f"`--batch_size` has to be at least 1, but is {batch_size}.")
    read_settings(folder, is_finished=True)
    claim_folder(folder / kind, {"model": model})
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    parts = [part for part in list_parts(folder)[rank::world_size] if not (folder / kind / f"{part}.jsonl").is_file()]
    num_pictures = sum(1 for part in parts for _ in read_rows(part_path(folder, part)))
    blip2 = None
    with ThreadPoolExecutor(4) as readers, tqdm(None, kind, num_pictures, unit="picture") as progress:
        for part in parts:
            rows = list(read_rows(part_path(folder, part)))
            lines = [_known(row, kind) for row in rows]
            unknown = [index for index, line in enumerate(lines) if line is None]
            if unknown and blip2 is None:
                blip2 = Blip2(model, device)
            progress.update(len(rows) - len(unknown))
            for start in range(0, len(unknown), batch_size):
                batch = unknown[start : start + batch_size]
                names = [rows[index]["file_name"] for index in batch]
                pictures = list(readers.map(_open, [folder / name for name in names]))
                for index, line in zip(batch, _look(blip2, kind, pictures), strict=True):
                    lines[index] = {"file_name": rows[index]["file_name"]} | line
                progress.update(len(batch))
            write_lines(folder / kind / f"{part}.jsonl", lines)


def _known(row: dict, kind: str) -> dict | None:
    """The line of a picture that its table has answered already, or None."""
    name, known = ("text", row["text"]) if kind == CAPTIONS else ("is_photo", row.get("is_photo"))
    return None if known in ("", None) else {"file_name": row["file_name"], name: known}


def _look(blip2: Blip2, kind: str, pictures: list[Image.Image]) -> list[dict]:
    if kind == CAPTIONS:
        return [{"text": text} for text in blip2.describe(pictures)]
    answers = {name: blip2.ask(pictures, question) for name, question in QUESTIONS.items()}
    return [
        {"cartoon": cartoon, "real": real, "is_photo": is_photo(cartoon, real)}
        for cartoon, real in zip(answers["cartoon"], answers["real"], strict=True)
    ]


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except PICTURE_ERRORS as error:
        raise ValueError(f"{path}: the picture cannot be read any more: {error}") from error
