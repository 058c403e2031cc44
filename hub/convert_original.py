# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Converts the adapter files that the paper's authors published to our layout, and ours to theirs. No number changes.

  theirs to ours   python -m hub.convert_original Tvaranka/fineface FOLDER
  ours to theirs   python -m hub.convert_original FOLDER OTHER_FOLDER
  Stable Diffusion 1.5, either way, in files that begin with sd15_: --variant sd15

IN is a folder or a Hub id. Its files show which of the two layouts it holds. If it holds both, ours is taken.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from action_units import AU_NAMES
from au_encoder import (
    ATTN_PROCESSORS_NAME,
    ENCODER_FOLDER,
    LORA_WEIGHTS_NAME,
    ORIGINAL_ATTN_PROCESSORS_NAME,
    ORIGINAL_ENCODER_NAME,
    AdapterFiles,
    AUEncoder,
    _check_finite,
    _original_encoder_config,
    _read_encoder_config,
    _read_lora_metadata,
    check_tensors,
    find_adapter_files,
    read_tensors,
)
from program import Parser, check_new_folder, new_folder, run_program


OUR_KEY = re.compile(r"(.+\.attn2)\.processor\.to_([kv])_au\.weight")
ORIGINAL_KEY = re.compile(r"(.+\.attn2)\.processor\.au_to_([kv])\.weight")


def write_ours(files: AdapterFiles, folder: Path) -> None:
    r"""
    Write an adapter of the original layout into `folder` in ours.

    Raises:
        ValueError: if a file is broken, carries code, or holds other tensors than an adapter's. It names the file.
    """
    attn_processors, cross_attention_dim = _read_attn_processors(files.attn_processors, ORIGINAL_KEY)
    weights = read_tensors(files.encoder)
    config = _original_encoder_config(weights, cross_attention_dim, files.encoder)
    weights = {key.replace("au_encoder.", "intensity_proj."): tensor for key, tensor in weights.items()}
    encoder = _encoder_with(weights, config | {"cross_attention_dim": cross_attention_dim}, files.encoder)
    encoder.save_pretrained(folder / ENCODER_FOLDER)
    tensors = {f"{layer}.processor.to_{kind}_au.weight": t for (layer, kind), t in attn_processors.items()}
    save_file(tensors, folder / ATTN_PROCESSORS_NAME, metadata={"format": "pt"})
    if files.lora is not None:
        shutil.copyfile(files.lora, folder / LORA_WEIGHTS_NAME)


def write_original(files: AdapterFiles, folder: Path, variant: str | None = None) -> None:
    r"""
    Write an adapter of our layout into `folder` in the original one.

    Raises:
        ValueError: if a file is broken, or the original layout has no place for this adapter: other AUs than the
            paper's, other encoders than the published two, several tokens, a LoRA beside a `variant`.
    """
    attn_processors, cross_attention_dim = _read_attn_processors(files.attn_processors, OUR_KEY)
    config = _read_encoder_config(files.encoder_config)
    if config["encoder_type"] not in ("res_mlp64", "res_mlp") or config["num_tokens"] != 1:
        raise ValueError(
            f"{str(files.encoder_config)!r} says {config['num_tokens']} token(s) of the encoder"
            f" {config['encoder_type']!r}. The original layout has one token of 'res_mlp64' or 'res_mlp' only."
        )
    if tuple(config["au_names"] or AU_NAMES) != AU_NAMES:
        raise ValueError(
            f"{str(files.encoder_config)!r} names the AUs {', '.join(config['au_names'])}. The original layout has no"
            f" names and always means {', '.join(AU_NAMES)}."
        )
    if config["cross_attention_dim"] != cross_attention_dim:
        raise ValueError(
            f"{str(files.encoder_config)!r} says a width of {config['cross_attention_dim']}, but"
            f" {str(files.attn_processors)!r} has {cross_attention_dim}."
        )
    if variant and files.lora is not None:
        raise ValueError(
            f"A variant of the original layout has no place for a LoRA, {str(files.lora)!r}. Leave out `--variant`."
        )
    encoder = _encoder_with(read_tensors(files.encoder), config, files.encoder)
    weights = {k.replace("intensity_proj.", "au_encoder."): t.clone() for k, t in encoder.state_dict().items()}
    tensors = {f"{layer}.processor.au_to_{kind}.weight": t for (layer, kind), t in attn_processors.items()}
    prefix = f"{variant}_" if variant else ""
    torch.save(weights, folder / f"{prefix}{ORIGINAL_ENCODER_NAME}")
    torch.save(tensors, folder / f"{prefix}{ORIGINAL_ATTN_PROCESSORS_NAME}")
    if files.lora is not None:
        write_unscaled_lora(files.lora, folder / LORA_WEIGHTS_NAME)


def _read_attn_processors(path: Path, pattern: re.Pattern) -> tuple[dict[tuple[str, str], torch.Tensor], int]:
    """Read the keys and values by layer and kind ("k" or "v"), and the width of the text embedding that they take."""
    tensors = read_tensors(path)
    matches = {key: pattern.fullmatch(key) for key in tensors}
    layers = {match[1] for match in matches.values() if match}
    expected = {(layer, kind) for layer in layers for kind in "kv"}
    by_layer = {match.groups(): tensors[key].clone() for key, match in matches.items() if match}
    widths = {tensor.shape[-1] for tensor in by_layer.values() if tensor.ndim == 2}
    is_whole = tensors and all(matches.values()) and by_layer.keys() == expected
    if not is_whole or len(widths) != 1 or any(tensor.ndim != 2 for tensor in by_layer.values()):
        raise ValueError(
            f"{str(path)!r} does not hold one matrix for keys and one for values of each cross-attention layer, all of"
            " one width. It belongs to something else, or is damaged."
        )
    width = widths.pop()
    for (layer, kind), tensor in by_layer.items():
        name = f"{layer}, {kind}"
        check_tensors({name: tensor}, {name: (by_layer[layer, "k"].shape[0], width)}, path)
        _check_finite(name, tensor, path)
    return by_layer, width


def _encoder_with(weights: dict[str, torch.Tensor], config: dict, source: Path) -> AUEncoder:
    """Make an encoder that holds exactly these tensors, in their own dtype."""
    try:
        with torch.device("meta"):
            encoder = AUEncoder(**config)
    except ValueError as error:
        raise ValueError(f"{str(source)!r}: {error}") from error
    check_tensors(weights, {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}, source)
    for key, tensor in weights.items():
        _check_finite(key, tensor, source)
    encoder.load_state_dict({key: tensor.clone() for key, tensor in weights.items()}, assign=True)
    return encoder


def write_unscaled_lora(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """
    Copy a LoRA for programs that do not read its metadata and assume a scale of 1, such as the original code. If the
    scale is another, it is multiplied into the weights, which then differ, while the model stays the same. With a
    `dtype` of None, the tensors keep theirs.
    """
    tensors = read_tensors(source)
    # From diffusers 0.27 on, LoRAs have the names of PEFT. Older files have no metadata.
    metadata = _read_lora_metadata(source, {key.removeprefix("unet."): tensor for key, tensor in tensors.items()})
    scales = {} if metadata is None else {key: _lora_scale(metadata, key) for key in tensors if ".lora_B." in key}
    for key, tensor in tensors.items():
        _check_finite(key, tensor, source)
    if dtype is None and all(scale == 1 for scale in scales.values()):
        shutil.copyfile(source, target)
    else:
        scaled = {key: (tensor * scales.get(key, 1)).to(dtype or tensor.dtype) for key, tensor in tensors.items()}
        save_file(scaled, target, metadata={"format": "pt"})


def _lora_scale(metadata: dict, key: str) -> float:
    layer = key.removeprefix("unet.").partition(".lora_")[0]
    # A pattern is the end of a layer's name.
    rank, alpha = (
        next((v for pattern, v in metadata[f"{kind}_pattern"].items() if layer.endswith(pattern)), metadata[default])
        for kind, default in (("rank", "r"), ("alpha", "lora_alpha"))
    )
    return alpha / (rank**0.5 if metadata["use_rslora"] else rank)


def run(args: argparse.Namespace) -> str:
    if args.output.resolve() == Path(args.input).resolve():
        raise ValueError("IN and OUT are the same folder. Name another folder as OUT.")
    files = find_adapter_files(args.input, variant=args.variant, optional=True) if args.variant else None
    files = files or find_adapter_files(args.input)
    if files.is_ip_adapter:
        raise ValueError(
            f"{str(files.attn_processors)!r} is an adapter for plain diffusers, which this program does not convert."
            " Take what it was exported from."
        )
    to_ours = files.is_original
    prefix = f"{args.variant}_" if args.variant else ""
    if to_ours and args.variant and not files.encoder.name.startswith(prefix):
        raise OSError(f"{args.input!r} has no files of the variant {args.variant!r}: no {prefix}{files.encoder.name}.")
    marker = ATTN_PROCESSORS_NAME if to_ours else prefix + ORIGINAL_ATTN_PROCESSORS_NAME
    check_new_folder(args.output, args.overwrite, marker)
    with new_folder(args.output) as folder:
        if to_ours:
            write_ours(files, folder)
        else:
            write_original(files, folder, args.variant)
    return f"{args.output}: {'our' if to_ours else 'the original'} layout"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("hub.convert_original", __doc__)
    parser.add_argument("input", metavar="IN", help="folder or Hub id of the adapter")
    parser.add_argument("output", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--variant", help="beginning of the original's file names: sd15")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if this program has written it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
