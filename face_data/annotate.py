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

from face_data import store
from face_data.pictures import PICTURE_ERRORS


QUESTIONS = ("Is this a cartoon?", "Is this photo real?")
MAX_CAPTION_TOKENS, MAX_ANSWER_TOKENS = 40, 5


class Blip2:
    """
    A BLIP-2 model that describes pictures and answers questions about them, without sampling. `model` is a folder or a
    Hub id, for instance `Salesforce/blip2-opt-2.7b`; `device` is by default the process's GPU if there is one. A GPU
    computes in float16.
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
    words = [answer.lower().replace(",", " ").replace(".", " ").split()[:1] for answer in (cartoon, real)]
    answers = tuple(word[0] if word in (["yes"], ["no"]) else None for word in words)
    return {("no", "yes"): True, ("yes", "no"): False, ("yes", None): False, (None, "no"): False}.get(answers)


def annotate(folder: Path, kind: str, model: str, batch_size: int, device: str | None = None) -> None:
    """
    Let BLIP-2 look at all pictures of the work folder `folder` that have no caption yet (`kind` is `CAPTIONS`), or of
    which it is not known whether they are photographs (`PHOTOS`), `batch_size` at once. `model` and `device` are as
    `Blip2` takes them; the model is loaded when the first picture needs it.
    """
    store.read_settings(folder, is_finished=True)
    store.claim_folder(folder / kind, {"model": model})
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = {part: folder / kind / f"{part}.jsonl" for part in store.list_parts(folder)[rank::world_size]}
    parts = {part: path for part, path in mine.items() if not path.is_file()}
    num_pictures = sum(1 for _ in store.read_rows(folder, parts))
    blip2, column = None, {store.CAPTIONS: "text", store.PHOTOS: "is_photo"}[kind]
    with ThreadPoolExecutor(4) as readers, tqdm(None, kind, num_pictures, unit="picture") as progress:
        for part, path in parts.items():
            answers = {row["file_name"]: {column: row.get(column)} for row in store.read_rows(folder, [part])}
            # What the table of a picture has answered already stays.
            unknown = [name for name, answer in answers.items() if answer[column] in ("", None)]
            progress.update(len(answers) - len(unknown))
            for start in range(0, len(unknown), batch_size):
                names = unknown[start : start + batch_size]
                blip2 = blip2 or Blip2(model, device)
                pictures = list(readers.map(_open, [folder / name for name in names]))
                answers |= zip(names, _look(blip2, kind, pictures), strict=True)
                progress.update(len(names))
            lines = ({"file_name": name} | answer for name, answer in answers.items())
            store.write_lines(path, lines)


def _look(blip2: Blip2, kind: str, pictures: list[Image.Image]) -> list[dict]:
    if kind == store.CAPTIONS:
        return [{"text": text} for text in blip2.describe(pictures)]
    cartoons, reals = (blip2.ask(pictures, question) for question in QUESTIONS)
    return [
        {"cartoon": cartoon, "real": real, "is_photo": is_photo(cartoon, real)}
        for cartoon, real in zip(cartoons, reals, strict=True)
    ]


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except PICTURE_ERRORS as error:
        raise ValueError(f"{path}: the picture cannot be read any more: {error}") from error
