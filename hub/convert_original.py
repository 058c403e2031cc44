# SPDX-License-Identifier: Apache-2.0
"""
Converts the adapter files that the paper's authors published to our layout, and ours to theirs. No number changes.

  theirs to ours   python -m hub.convert_original Tvaranka/fineface FOLDER
  ours to theirs   python -m hub.convert_original FOLDER OTHER_FOLDER
  Stable Diffusion 1.5, either way, in files that begin with sd15_: --variant sd15

IN is a folder or a Hub id. Its files show which of the two layouts it holds. If it holds both, ours is taken.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import au_encoder
from action_units import AU_NAMES
from program import Parser, check_new_folder, new_folder, run_program


def write_original(folder: Path, adapter: au_encoder.AUAdapter, prefix: str = "") -> None:
    """Write `adapter` into `folder` in the layout of the paper's authors, in files that begin with `prefix`."""
    encoder = {k.replace("intensity_proj.", "au_encoder."): t for k, t in adapter.encoder.state_dict().items()}
    values = {
        key.replace("to_k_au", "au_to_k").replace("to_v_au", "au_to_v"): tensor.clone()
        for key, tensor in adapter.attn_processors_state_dict().items()
    }
    torch.save(encoder, folder / f"{prefix}{au_encoder.ORIGINAL_ENCODER_NAME}")
    torch.save(values, folder / f"{prefix}{au_encoder.ORIGINAL_ATTN_PROCESSORS_NAME}")


def check_fits_original(adapter: au_encoder.AUAdapter, source: Path) -> None:
    """Raise a ValueError if the original layout has no place for `adapter`, whose config is the file `source`."""
    config = adapter.config
    if config.encoder_type not in ("res_mlp64", "res_mlp") or adapter.num_tokens != 1:
        raise ValueError(
            f"{str(source)!r} says {adapter.num_tokens} token(s) of the encoder {config.encoder_type!r}. The original"
            " layout has one token of 'res_mlp64' or 'res_mlp' only."
        )
    if tuple(config.au_names or AU_NAMES) != AU_NAMES:
        raise ValueError(
            f"{str(source)!r} names the AUs {', '.join(config.au_names)}. The original layout has no names and always"
            f" means {', '.join(AU_NAMES)}."
        )


def write_unscaled_lora(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """
    Copy a LoRA for programs that do not read its metadata and assume a scale of 1, such as the original code. If the
    scale is another, it is multiplied into the weights, which then differ, while the model stays the same. With a
    `dtype` of None, the tensors keep theirs.
    """
    tensors = au_encoder.read_tensors(source)
    # From diffusers 0.27 on, LoRAs have the names of PEFT. Older files have no metadata.
    metadata = au_encoder.read_lora_metadata(
        source, {key.removeprefix("unet."): tensor for key, tensor in tensors.items()}
    )
    scales = {} if metadata is None else {key: _lora_scale(metadata, key) for key in tensors if ".lora_B." in key}
    for key, tensor in tensors.items():
        au_encoder.check_finite(key, tensor, source)
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
    files = au_encoder.find_adapter_files(args.input, variant=args.variant, optional=True) if args.variant else None
    files = files or au_encoder.find_adapter_files(args.input)
    if files.is_ip_adapter:
        raise ValueError(
            f"{str(files.attn_processors)!r} is an adapter for plain diffusers, which this program does not convert."
            " Take what it was exported from."
        )
    to_ours, prefix = files.is_original, f"{args.variant}_" if args.variant else ""
    if to_ours and not files.encoder.name.startswith(prefix):
        raise OSError(f"{args.input!r} has no files of the variant {args.variant!r}: no {prefix}{files.encoder.name}.")
    if not to_ours and args.variant and files.lora is not None:
        raise ValueError(
            f"A variant of the original layout has no place for a LoRA, {str(files.lora)!r}. Leave out `--variant`."
        )
    marker = au_encoder.ATTN_PROCESSORS_NAME if to_ours else prefix + au_encoder.ORIGINAL_ATTN_PROCESSORS_NAME
    check_new_folder(args.output, args.overwrite, marker)
    adapter = au_encoder.read_au_adapter(files)
    with new_folder(args.output) as folder:
        if to_ours:
            au_encoder.write_adapter_weights(folder, adapter)
        else:
            check_fits_original(adapter, files.encoder_config)
            write_original(folder, adapter, prefix)
        if files.lora is not None:
            copy_lora = shutil.copyfile if to_ours else write_unscaled_lora
            copy_lora(files.lora, folder / au_encoder.LORA_WEIGHTS_NAME)
    return f"{args.output}: {'our' if to_ours else 'the original'} layout"


def main(argv: list[str] | None = None) -> int:
    parser = Parser("hub.convert_original", __doc__)
    parser.add_argument("input", metavar="IN", help="folder or Hub id of the adapter")
    parser.add_argument("output", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--variant", help="beginning of the original's file names: sd15")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if this program has written it")
    return run_program(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
